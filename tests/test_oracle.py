"""The optimum of a pinned plan against trying everything, and plans that are found expert by expert against it."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ladders import costs, ladder

from comoe.plan.cost import Costs
from comoe.plan.ladder import Array, Band, Rung
from comoe.plan.oracle import optimum
from comoe.plan.pinned import Options, options, pinned

COSTS = Costs(read_bps=1e8, read_latency_s=1e-4, memory_bps=1e10, framework_ms=Band(0.0, 0.0))


def forms(use: list[float], clusters: int, seed: int) -> list[tuple[Rung, Array]]:
    """Shared averages, two nested forms and exact, with losses that fall."""
    rng = np.random.default_rng(seed)
    blobs = {"merged": 8192, "high": 12288, "low": 12288, "exact": 49152}
    found = ladder(blobs, {}, [use], clusters=clusters)
    return [
        (found.rung(name), scale * rng.uniform(0.5, 1.5, len(use)))
        for name, scale in (("merged", 0.1), ("q4", 0.02), ("q8", 0.002), ("exact", 0.0))
    ]


def least(ways: Options, budget: float, bound: float) -> float | None:
    """Milliseconds of the best of all choices; None where none fits."""
    totals = [ways.total(np.array(chosen)) for chosen in product(range(ways.cost.shape[1]), repeat=len(ways.cost))]
    fitting = [ms for ms, nbytes, loss in totals if nbytes <= budget and loss <= bound]
    return min(fitting) if fitting else None


def problem(seed: int, experts: int, clusters: int) -> tuple[Options, float, float]:
    rng = np.random.default_rng(seed)
    use = rng.dirichlet(np.ones(experts))
    ways = options(forms(use.tolist(), clusters, seed), use, COSTS)
    return ways, rng.uniform(0.05, 0.8) * 49152 * experts, rng.uniform(0.001, 0.1) * experts


@pytest.mark.parametrize("seed", range(12))
def test_highs_finds_what_trying_everything_finds(seed: int) -> None:
    ways, budget, bound = problem(seed, 3, 1 + seed % 3)
    expected, found = least(ways, budget, bound), optimum(ways, budget, bound)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found.ms == pytest.approx(expected, rel=1e-3)
        assert found.bound <= expected * (1 + 1e-6)
        _, nbytes, loss = ways.total(found.chosen)
        assert nbytes <= budget and loss <= bound * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_a_plan_found_expert_by_expert_keeps_its_limits_and_is_near_the_optimum(seed: int) -> None:
    ways, budget, bound = problem(seed, 24, 6)
    found, best = pinned(ways, budget, bound), optimum(ways, budget, bound)
    assert found is not None and best is not None
    ms, nbytes, loss = ways.total(found)
    assert nbytes <= budget and loss <= bound
    assert best.bound * (1 - 1e-9) <= ms <= 1.05 * best.ms


def test_nothing_fits_where_no_form_is_good_enough() -> None:
    ways, _, _ = problem(0, 4, 2)
    assert pinned(ways, 1e9, -1.0) is None and optimum(ways, 1e9, -1.0) is None


def test_bytes_that_are_shared_count_once_and_by_hand() -> None:
    """Two experts of one average: in memory it takes 8 KiB in all, and neither reads anything."""
    use = np.array([0.5, 0.5])
    ways = options(forms([0.5, 0.5], 1, 0)[:1], use, COSTS)
    read, kept = np.zeros(2, np.int64), np.ones(2, np.int64)
    compute_ms = 8192 / 1e7
    assert ways.total(kept)[:2] == (pytest.approx(compute_ms), 8192)
    assert ways.total(read)[:2] == (pytest.approx(compute_ms + 8192 / 1e5 + 0.1), 0)


def test_part_of_a_nested_form_may_be_in_memory() -> None:
    use = np.array([1.0])
    ways = options(forms([1.0], 1, 0)[2:3], use, COSTS)
    (costs_ms,), (nbytes,) = ways.cost.tolist(), ways.nbytes.tolist()
    half = [cost for cost, size in zip(costs_ms, nbytes, strict=True) if size == 12288]
    assert half == pytest.approx([24576 / 1e7 + 12288 / 1e5 + 0.1] * 2)
    assert sorted(nbytes) == [0, 12288, 12288, 24576]


@given(costs, st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_multipliers_of_nothing_lead_to_the_least_cost_and_large_ones_to_the_least_bytes(
    rates: Costs, seed: int
) -> None:
    use = np.random.default_rng(seed).dirichlet(np.ones(5))
    ways = options(forms(use.tolist(), 2, seed), use, rates)
    assert ways.total(ways.best(0.0, 0.0))[0] == pytest.approx(ways.cost.min(1).sum())
    assert ways.held(ways.best(1e9, 0.0)) == 0
    assert ways.total(ways.best(0.0, 1e12))[2] == pytest.approx(ways.loss.min(1).sum())
