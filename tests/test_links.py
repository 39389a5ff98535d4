"""What is known of links: means that fall at once and rise slowly, losses, and what a request takes."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comoe.net.links import FIRST_BPS, Link, Mean, states

MBIT = 125_000.0


def fed(link: Link, bps: float, seconds: float, start_s: float = 0.0, step_s: float = 0.1) -> Link:
    for at in range(round(seconds / step_s)):
        link.transferred(int(bps * step_s), step_s, start_s + step_s * (at + 1))
    return link


def test_a_mean_forgets_half_in_its_half_life() -> None:
    mean = Mean(2.0)
    assert mean.value is None
    mean.add(8.0, 100.0)
    mean.add(0.0, 2.0)
    assert mean.value == pytest.approx(4.0, rel=1e-6)


@given(st.lists(st.tuples(st.floats(0, 1e9), st.floats(0.01, 5)), min_size=1))
def test_a_mean_lies_between_what_it_is_of(parts: list[tuple[float, float]]) -> None:
    mean = Mean(1.0)
    for value, seconds in parts:
        mean.add(value, seconds)
    values = [value for value, _ in parts]
    assert mean.value is not None
    assert min(values) * (1 - 1e-9) - 1e-9 <= mean.value <= max(values) * (1 + 1e-9)


def test_a_fall_from_100_to_5_mbit_shows_within_two_seconds() -> None:
    link = fed(Link(), 100 * MBIT, 10)
    assert link.rate_bps == pytest.approx(100 * MBIT, rel=1e-3)
    assert fed(link, 5 * MBIT, 2, 10).rate_bps < 12 * MBIT


def test_a_rise_must_last() -> None:
    link = fed(Link(), 5 * MBIT, 10)
    assert fed(link, 100 * MBIT, 1, 10).rate_bps < 30 * MBIT
    assert fed(link, 100 * MBIT, 20, 11).rate_bps > 90 * MBIT


def test_seconds_in_which_nothing_came_count_and_are_not_heard() -> None:
    link = fed(Link(), 8 * MBIT, 2)
    heard_s = link.heard_s
    assert fed(link, 0, 1, 2).rate_bps < 3 * MBIT
    assert link.heard_s == heard_s == pytest.approx(2)
    before = link.rate_bps
    link.transferred(100, 0.0, 9.0)
    assert link.rate_bps == before and link.heard_s == heard_s


def test_a_request_takes_a_round_trip_and_its_bytes_and_more_where_some_fail() -> None:
    link = Link()
    assert link.expected_s(100) == inf and link.rate_bps == FIRST_BPS
    link.probed(0.05, 1.0)
    assert link.expected_s(125_000) == pytest.approx(1.05)
    fed(link, 10 * MBIT, 20)
    clean_s = link.expected_s(125_000)
    link.failed()
    assert link.loss == pytest.approx(0.2) and link.expected_s(125_000) == pytest.approx(clean_s / 0.8)
    for _ in range(30):
        link.succeeded(30.0)
    assert link.expected_s(125_000) == pytest.approx(clean_s, rel=0.01)


def test_round_trips_are_smoothed() -> None:
    link = Link()
    for rtt_s in (0.1, 0.1, 0.5):
        link.probed(rtt_s, 1.0)
    assert link.rtt_s == pytest.approx(0.2)


def test_a_probe_that_waited_behind_reads_can_but_show_a_shorter_round_trip() -> None:
    link = Link()
    link.probed(0.02, 1.0)
    link.probed(0.5, 2.0, loaded=True)
    assert link.rtt_s == 0.02 and link.heard_s == 2.0
    link.probed(0.01, 3.0, loaded=True)
    assert link.rtt_s is not None and 0.01 < link.rtt_s < 0.02


def test_a_link_that_carries_nothing_takes_for_ever() -> None:
    link = Link()
    link.probed(0.02, 0.0)
    link.transferred(0, 1.0, 1.0)
    assert link.expected_s(1) == inf


def test_states_are_of_all_links() -> None:
    link = Link()
    link.probed(0.02, 3.0)
    found = states({"a": link, "b": Link()}, 125_000, 5.0)
    assert found["a"].silent_s == 2 and found["a"].expected_s == pytest.approx(0.02)
    fed(link, MBIT, 20)
    assert states({"a": link}, 125_000, 20.0)["a"].expected_s == pytest.approx(1.02, rel=1e-3)
    assert found["b"].silent_s == inf and found["b"].expected_s == inf and found["b"].rtt_s is None


def test_a_rate_that_is_old_is_taken_to_be_the_best_that_is_fresh() -> None:
    old, fresh, never = fed(Link(), MBIT, 5), fed(Link(), 40 * MBIT, 20, 20), Link()
    for link in (old, fresh, never):
        link.probed(0.02, 40.0)
    found = states({"old": old, "fresh": fresh, "never": never}, 125_000, 40.0)
    assert {node: round(state.rate_bps / MBIT) for node, state in found.items()} == {
        "old": 40,
        "fresh": 40,
        "never": 40,
    }
    assert states({"old": old}, 125_000, 40.0)["old"].rate_bps == FIRST_BPS
