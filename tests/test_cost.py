"""The cost model by hand."""

from dataclasses import replace

import pytest

from comoe.plan.cost import Costs
from comoe.plan.ladder import Band


def test_reading_takes_its_bytes_and_a_latency_for_every_read() -> None:
    costs = Costs(read_bps=2e9, read_latency_s=1e-4, memory_bps=10e9, framework_ms=Band(1.0, 2.0))
    assert costs.read_ms(4e6, 3) == pytest.approx(2.0 + 0.3)
    assert costs.read_ms(0, 0) == 0


def test_computing_takes_the_time_of_reading_the_weights_from_memory() -> None:
    costs = Costs(read_bps=1.0, read_latency_s=0.0, memory_bps=10e9, framework_ms=Band(1.0, 2.0))
    assert costs.expert_ms(30e6, "q4") == pytest.approx(3.0)
    assert replace(costs, compute_bps={"q4": 5e9}).expert_ms(30e6, "q4") == pytest.approx(6.0)


def test_unknown_costs_still_compare_plans_by_bytes() -> None:
    costs = Costs.unknown()
    assert costs.read_ms(2, 1) == 2 * costs.read_ms(1, 1) > 0
