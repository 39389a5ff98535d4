"""Policies: the contract of all, whom each lets go first, and that asking for a few victims costs little."""

from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policies import PolicyContract, blob

from comoe.memory import ranking
from comoe.memory.policy import GDSF, LFU, LRU, POLICIES, Fixed, Policy, read_seconds
from comoe.memory.ranking import Ranking


def rows(policy: Policy) -> list[int]:
    return [name.row for name in policy.victims()]


def came(policy: Policy, row: int, nbytes: int = 1) -> None:
    """The blob came in for a use."""
    policy.inserted(blob(row), nbytes)
    policy.touched(blob(row))


class TestLRU(PolicyContract):
    def make(self) -> Policy:
        return LRU()

    def test_the_least_recently_used_goes_first(self) -> None:
        policy = self.filled(3)
        policy.touched(blob(0))
        assert rows(policy) == [1, 2, 0]


class TestLFU(PolicyContract):
    def make(self) -> Policy:
        return LFU()

    def test_the_least_often_used_goes_first_however_long_ago(self) -> None:
        policy = self.filled(3)
        for row in (0, 0, 2):
            policy.touched(blob(row))
        assert rows(policy) == [1, 2, 0]

    @pytest.mark.parametrize(("half_life", "first"), [(1.0, 0), (100.0, 1)])
    def test_old_uses_count_less(self, half_life: float, first: int) -> None:
        policy = LFU(half_life)
        for row in (0, 1, 2):
            came(policy, row)
        for row in (0, 0, 0, 2, 2, 2, 1):
            policy.touched(blob(row))
        assert next(policy.victims()) == blob(first)

    @given(st.lists(st.integers(0, 4), max_size=40), st.floats(0.5, 50))
    def test_the_order_is_that_of_scores_which_decay_at_every_use(self, uses: list[int], half_life: float) -> None:
        policy, scores = LFU(half_life), dict.fromkeys(range(5), 0.0)
        for row in [*range(5), *uses]:
            policy.touched(blob(row)) if scores[row] else came(policy, row)
            scores = {of: score * 0.5 ** (1 / half_life) + (of == row) for of, score in scores.items()}
        order = [scores[row] for row in rows(policy)]
        assert order == pytest.approx(sorted(order), rel=1e-9)

    @pytest.mark.parametrize(("known", "first"), [(3, 0), (100, 1)])
    def test_the_more_blobs_there_are_the_longer_uses_count(self, known: int, first: int) -> None:
        policy = LFU()
        for row in range(known):
            came(policy, row)
        for row in (*[0] * 5, *[2] * 12, 1, 1):
            policy.touched(blob(row))
        assert next(row for row in rows(policy) if row in (0, 1)) == first

    def test_what_came_ahead_of_a_use_goes_before_what_was_used(self) -> None:
        policy = LFU()
        came(policy, 0)
        policy.inserted(blob(1), 1)
        came(policy, 2)
        assert rows(policy)[0] == 1

    def test_a_blob_that_comes_back_is_remembered(self) -> None:
        policy = self.filled(2)
        for _ in range(3):
            policy.touched(blob(0))
        policy.removed(blob(0))
        policy.touched(blob(1))
        policy.inserted(blob(0), 1)
        assert rows(policy) == [1, 0]

    def test_scores_never_overflow(self) -> None:
        policy = LFU(half_life=0.01)
        policy.inserted(blob(0), 1)
        policy.inserted(blob(1), 1)
        for _ in range(2000):
            policy.touched(blob(0))
        assert rows(policy) == [1, 0]


class TestGDSF(PolicyContract):
    def make(self) -> Policy:
        return GDSF()

    def test_of_equal_uses_the_blob_goes_first_whose_bytes_are_cheapest_to_read_again(self) -> None:
        policy = GDSF(read_seconds(latency_s=1.0, bps=10.0))
        for row, nbytes in ((0, 10), (1, 1000), (2, 100)):
            came(policy, row, nbytes)
        assert rows(policy) == [1, 2, 0]
        policy.touched(blob(1))
        assert rows(policy) == [2, 0, 1]

    def test_without_latency_size_does_not_matter_but_uses_do(self) -> None:
        policy = GDSF(read_seconds(latency_s=0.0, bps=10.0))
        for row, nbytes in ((0, 8), (1, 1024), (2, 128)):
            policy.inserted(blob(row), nbytes)
        policy.touched(blob(0))
        assert rows(policy) == [1, 2, 0]

    def test_what_comes_in_stands_above_what_left_so_that_old_fame_passes(self) -> None:
        policy = GDSF(lambda nbytes: nbytes)
        came(policy, 0)
        for _ in range(2):
            policy.touched(blob(0))  # a worth of 3
        for row in range(1, 4):
            came(policy, row)
            if row < 3:
                assert next(policy.victims()) == blob(row)
                policy.removed(blob(row))
        assert next(policy.victims()) == blob(0)


class TestFixed(PolicyContract):
    def make(self) -> Policy:
        return Fixed(lambda name: name.row % 3)

    def test_what_is_worth_least_goes_first_whatever_is_used(self) -> None:
        policy = self.filled(3)
        for row in (0, 0, 1):
            policy.touched(blob(row))
        assert rows(policy) == [0, 1, 2]


def test_what_runs_elsewhere_is_worth_reading_once_it_was_used_more_than_what_would_leave() -> None:
    policy = LFU(half_life=1e9)
    for row in (0, 1):
        policy.inserted(blob(row), 1)
    for row in (0, 1, 0, 1, 0):
        policy.touched(blob(row))
    more = [policy.used_elsewhere(blob(9)) for _ in range(20)]
    assert more == [False] * 15 + [True] * 5  # eight times two uses
    policy.inserted(blob(9), 1)
    assert next(policy.victims()) == blob(1)


def test_every_policy_has_a_name_and_is_made_afresh() -> None:
    assert {name: type(make()) for name, make in POLICIES.items()} == {"lru": LRU, "lfu": LFU, "gdsf": GDSF}
    assert all(make() is not make() for make in POLICIES.values())


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5) | st.none()), max_size=200))
def test_a_ranking_is_a_sorted_list_of_the_last_ranks(changes: list[tuple[int, int | None]]) -> None:
    order, last = Ranking(), dict[int, tuple[int, int]]()
    for at, (row, rank) in enumerate(changes):
        if rank is not None:
            order.put(blob(row), rank)
            last[row] = (rank, at)
        elif row in last:
            assert order.remove(blob(row)) == last.pop(row)[0]
    assert [name.row for name in order.ascending()] == sorted(last, key=last.__getitem__)
    assert [name.row for name in islice(order.ascending(), 3)] == sorted(last, key=last.__getitem__)[:3]


def test_a_few_victims_of_many_blobs_touch_a_few_places_only(monkeypatch: pytest.MonkeyPatch) -> None:
    order, pops = Ranking(), 0
    for row in range(10_000):
        order.put(blob(row * 7919 % 10_000), row * 7919 % 10_000)
    for row in range(1000):
        order.put(blob(row), 10_000 + row)  # the first thousand places are outdated

    def counted(heap: list[Any]) -> Any:
        nonlocal pops
        pops += 1
        return heappop(heap)

    heappop = ranking.heappop
    monkeypatch.setattr(ranking, "heappop", counted)
    for _ in range(100):
        assert len(list(islice(order.ascending(), 3))) == 3
    assert pops < 1500


def test_outdated_places_do_not_pile_up() -> None:
    order = Ranking()
    for at in range(10_000):
        order.put(blob(at % 3), at)
    assert len(order._heap) <= 2 * 3 + ranking.SLACK + 1
    assert [name.row for name in order.ascending()] == [1, 2, 0]
