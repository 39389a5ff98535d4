"""How many missing experts of a layer an edge node runs: what is done first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comoe.plan.missrule import AWAY_SHARE, num_away


@pytest.mark.parametrize(
    ("nbytes", "times", "away"),
    [
        ([], (1.0, 0.0, 0.0), 0),
        ([10], (0.1, 2.0, 0.1), 0),  # a read of a second against an exchange of two
        ([10], (0.1, 0.7, 0.1), 1),  # 0.8 s, and a tenth of a second for reading it in the background
        ([10], (0.1, 0.9, 0.1), 0),
        ([10, 10, 10, 10], (0.1, 1.0, 0.1), 3),  # 1.0 s of reading while 1.3 s away, and 0.3 s in the background
        ([10, 10], (0.1, 1.5, 0.5), 0),
        ([10, 10], (0.1, 0.1, 1.0), 1),
    ],
)
def test_examples(nbytes: list[int], times: tuple[float, float, float], away: int) -> None:
    byte_s, exchange_s, run_s = times
    assert num_away([byte_s * size for size in nbytes], exchange_s, run_s) == away


@given(st.lists(st.floats(0, 100, width=16), max_size=8), st.floats(0, 10, width=16), st.floats(0, 10, width=16))
def test_it_never_costs_more_than_reading_all_and_a_free_node_gets_all(
    read_s: list[float], exchange_s: float, run_s: float
) -> None:
    away = num_away(read_s, exchange_s, run_s)
    here_s = sum(read_s[: len(read_s) - away])
    taken = max(here_s, exchange_s + away * run_s if away else 0.0)
    taken += AWAY_SHARE * (sum(read_s) - here_s)
    assert taken <= sum(read_s) * (1 + 1e-9)
    if all(read_s):
        assert num_away(read_s, 0.0, 0.0) == len(read_s)
