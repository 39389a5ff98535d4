"""Ranges that are fetched together: the same bytes by fewer requests."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from comoe.net.coalesce import GAP_NBYTES, MOST_NBYTES, Range, coalesced


def row(at: int, nbytes: int = 1000) -> Range:
    return Range(4096 + at * 4096, nbytes, str(at))


def test_neighbours_are_fetched_together_and_what_is_far_is_not() -> None:
    far = row(10 + 2 * GAP_NBYTES // 4096)
    assert coalesced([far, row(2), row(0), row(1)]) == [[row(0), row(1), row(2)], [far]]
    assert coalesced([]) == []


def test_no_more_is_fetched_at_once_than_memory_is_for() -> None:
    large = [Range(at * MOST_NBYTES // 2, MOST_NBYTES // 2, str(at)) for at in range(5)]
    assert [len(together) for together in coalesced(large)] == [2, 2, 1]
    huge = Range(0, 3 * MOST_NBYTES, "huge")
    assert coalesced([huge]) == [[huge]]


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(1, 40_000)), max_size=40))
def test_every_range_is_fetched_once_by_never_more_requests_and_little_else(rows: list[tuple[int, int]]) -> None:
    ranges = [Range(at * 40_000, nbytes, f"{at}-{nbytes}") for at, nbytes in rows]
    found = coalesced(ranges)
    flat = [one for together in found for one in together]
    assert sorted(flat) == sorted(set(ranges))
    for together in found:
        assert len(together) == 1 or together[-1].stop - together[0].start <= MOST_NBYTES
        gaps = [after.start - before.stop for before, after in pairwise(together)]
        assert all(gap <= GAP_NBYTES for gap in gaps)
