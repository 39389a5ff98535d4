"""Figures of devices under way, on lines and counters made by hand."""

from math import exp
from typing import Any

import pytest

from comoe.bench.driven_figures import (
    PULLED,
    RAM,
    TOLD,
    Count,
    Known,
    edge_counts,
    gaps_ms,
    hit_share,
    identical,
    moved_bytes,
    ratios,
    recovery_s,
    waits_s,
    window,
)

KNOWN = [Known([1.0, 2.0], [5, 6]), Known([3.0], [7])]
LAST = {"failed": None, "stats": {"uses": 3}, "loaded_s": 0.5, "events": []}


def token(turn: int, at: int, at_s: float, nats: float, greedy: int = 0, ms: float = 10.0) -> dict[str, Any]:
    return {"turn": turn, "at": at, "at_s": at_s, "nats": nats, "greedy": greedy, "ms": ms}


def asked(at_s: float, hits: float, misses: float, **more: float) -> Count:
    return Count(at_s, {RAM.format("hit"): hits, RAM.format("miss"): misses, **more})


def test_a_window_is_worth_as_many_tokens_as_it_has_where_nothing_is_lost() -> None:
    lines = [token(0, 0, 1.0, 1.0), token(0, 1, 2.0, 2.0), token(1, 0, 3.0, 3.0), token(2, 0, 4.0, 1.0), LAST]
    found = window(lines, KNOWN)
    assert found["worth"] == found["tokens"] == 4 and found["loss"] == 0 and found["first_s"] == 1.0


def test_what_a_window_loses_makes_its_tokens_worth_less_and_what_it_gains_not_more() -> None:
    lost = window([token(0, 0, 1.0, 1.5), token(0, 1, 2.0, 2.1), LAST], KNOWN)
    assert lost["worth"] == pytest.approx(2 * exp(-0.3)) and lost["loss"] == pytest.approx(0.2)
    assert window([token(0, 0, 1.0, 0.5), LAST], KNOWN)["worth"] == 1


def test_a_window_without_tokens_is_worth_nothing() -> None:
    assert window([LAST], KNOWN)["worth"] == 0


def test_tokens_are_identical_to_the_bit_or_not_at_all() -> None:
    right = [token(0, 0, 1.0, 1.0, 5), token(1, 0, 2.0, 3.0, 7), token(2, 1, 3.0, 2.0, 6), LAST]
    assert identical(right, KNOWN)
    assert not identical([token(0, 0, 1.0, 1.0 + 1e-12, 5), LAST], KNOWN)
    assert not identical([token(0, 0, 1.0, 1.0, 4), LAST], KNOWN)


def test_waits_are_between_tokens_and_up_to_the_end() -> None:
    lines = [token(0, 0, at_s, 1.0) for at_s in (1.0, 3.0, 4.0)]
    assert waits_s([*lines, LAST], 2.0, 10.0) == [1.0, 1.0, 6.0]


def test_tokens_soon_after_a_move_are_told_apart() -> None:
    lines = [token(0, 0, at_s, 1.0, ms=at_s) for at_s in (1.0, 9.0, 10.0, 15.0, 15.5)]
    assert gaps_ms([*lines, LAST], [10.0], 5.0) == ([9.0, 10.0, 15.0, 15.5], [10.0, 15.0])


def test_a_node_that_was_asked_nothing_has_no_share_of_hits() -> None:
    counts = [asked(0.0, 10, 10), asked(1.0, 10, 10), asked(2.0, 13, 11)]
    assert hit_share(counts, 0.0, 1.0) is None and hit_share(counts, 1.0, 2.0) == 0.75
    assert hit_share([], 0.0, 1.0) is None


def test_a_node_is_back_once_it_hits_nearly_as_often_as_the_one_before() -> None:
    before = [asked(float(at_s), 10 * at_s, 0) for at_s in range(11)]
    after = [asked(float(at_s), 0, 0) for at_s in range(11)]
    after += [asked(11.0, 5, 5), asked(12.0, 10, 10), asked(13.0, 20, 10), asked(14.0, 30, 10), asked(15.0, 40, 10)]
    assert recovery_s(before, after, 10.0) == 2.0
    assert recovery_s(before, after[:13], 10.0) is None
    assert recovery_s([], after, 10.0) is None


def test_the_edge_tier_has_what_whichever_node_answered_had() -> None:
    lines = [{"at_s": float(at), "edge_runs": 10 * at, "edge_read": min(at, 2)} for at in range(5)]
    counts = edge_counts([*lines, LAST])
    assert [hit_share(counts, at, at + 1.0) for at in (0.0, 2.0)] == [0.9, 1.0]


def test_bytes_that_an_announcement_moved_are_neither_more_than_was_told_nor_than_was_pulled() -> None:
    counts = [
        asked(0.0, 0, 0),
        asked(10.0, 0, 0, **{TOLD: 3, PULLED: 500.0}),
        asked(20.0, 0, 0, **{TOLD: 3, PULLED: 900.0}),
    ]
    assert moved_bytes(counts, 8.0, 100) == 300
    assert moved_bytes(counts, 8.0, 1000) == 500


def test_ratios_are_medians_over_windows_and_of_all_together() -> None:
    rows = [{"a": {"worth": a}, "b": {"worth": b}} for a, b in ((4.0, 2.0), (3.0, 2.0), (9.0, 3.0), (0.0, 0.0))]
    all_answer = {"answered": 3, "answered_gain": 16 / 7}
    assert ratios(rows, "a", "b") == {"gain": 2.0, "gain_ci95": [1.5, 3.0], "total_gain": 16 / 7, **all_answer}
    some = ratios([*rows, {"a": {"worth": 5.0}, "b": {"worth": 0.0}}], "a", "b")
    assert (some["total_gain"], some["answered"], some["answered_gain"]) == (21 / 7, 3, 16 / 7)
    assert ratios([{"a": {"worth": 1.0}, "b": {"worth": 0.0}}], "a", "b")["gain"] is None
