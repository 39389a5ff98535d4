"""How many missing experts of a layer an edge node runs: what is done first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comoe.plan.missrule import MissTimes, num_away
from comoe.plan.planner import BACKGROUND_SHARE


@pytest.mark.parametrize(
    ("nbytes", "times", "away"),
    [
        ([], (1.0, 0.0, 0.0), 0),
        ([10], (0.1, 2.0, 0.1), 0),  # a read of a second against an exchange of two
        ([10], (0.1, 0.3, 0.1), 1),  # 0.4 s, and half a second for reading it in the background
        ([10], (0.1, 0.5, 0.1), 0),
        ([10, 10, 10, 10], (0.1, 1.0, 0.1), 3),  # 1.0 s of reading while 1.3 s away, and 1.5 s in the background
        ([10, 10], (0.1, 1.5, 0.5), 0),
        ([10, 10], (0.1, 0.1, 1.0), 1),
    ],
)
def test_examples(nbytes: list[int], times: tuple[float, float, float], away: int) -> None:
    assert num_away(nbytes, MissTimes(*times)) == away


@given(
    st.lists(st.integers(1, 1000), max_size=8),
    st.tuples(*[st.floats(0, 10, allow_nan=False, width=16)] * 3),
)
def test_it_never_costs_more_than_reading_all_and_a_free_node_gets_all(
    nbytes: list[int], times: tuple[float, float, float]
) -> None:
    byte_s, exchange_s, run_s = times
    away = num_away(nbytes, MissTimes(*times))
    read_s = sum(nbytes[: len(nbytes) - away]) * byte_s
    taken = max(read_s, exchange_s + away * run_s if away else 0.0)
    taken += BACKGROUND_SHARE * sum(nbytes[len(nbytes) - away :]) * byte_s
    assert taken <= sum(nbytes) * byte_s * (1 + 1e-9)
    if byte_s > 0:
        assert num_away(nbytes, MissTimes(byte_s, 0.0, 0.0)) == len(nbytes)
