"""How fast bytes come while requests are open."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comoe.net.links import Link
from comoe.net.meter import SERVER_S, SOUGHT_S, Meter
from comoe.net.nodes import PIECE_S


def test_time_without_requests_does_not_count() -> None:
    meter = Meter(Link())
    for start_s in (0.0, 100.0, 200.0):
        request = meter.begin(start_s)
        for at in range(1, 101):
            meter.came(request, 1000, start_s + 0.1 * at)
        meter.end(request, start_s + 10)
    assert meter.link.rate_bps == pytest.approx(10_000, rel=1e-3)
    assert meter.waiting_s(300.0) == 0


def test_the_round_trip_of_a_lone_request_does_not_count() -> None:
    meter = Meter(Link(rtt_s=0.5))
    request = meter.begin(0.0)
    meter.came(request, 1000, 0.6)
    meter.end(request, 0.6)
    assert meter.link.rate_bps == pytest.approx(10_000)


def test_requests_share_a_link() -> None:
    meter = Meter(Link())
    one, other = meter.begin(0.0), meter.begin(0.0)
    for at in range(1, 101):
        meter.came(one, 500, 0.1 * at)
        meter.came(other, 500, 0.1 * at)
    assert meter.link.rate_bps == pytest.approx(10_000, rel=1e-2)


def test_a_request_that_gets_nothing_waits_and_slows_the_link() -> None:
    meter = Meter(Link())
    request = meter.begin(0.0)
    meter.came(request, 10_000, 1.0)
    before = meter.link.rate_bps
    meter.flush(3.0)
    assert meter.waiting_s(3.0) == 2.0 and meter.link.rate_bps < before / 2
    meter.end(request, 3.0, failed=True)
    assert meter.link.loss > 0 and meter.waiting_s(4.0) == 0


@given(st.lists(st.tuples(st.integers(0, 10_000), st.floats(0.001, 2)), min_size=1))
def test_no_byte_is_counted_twice_and_none_but_the_first_are_lost(pieces: list[tuple[int, float]]) -> None:
    told: list[tuple[int, float]] = []

    class Told(Link):
        def transferred(self, nbytes: int, seconds: float, now_s: float) -> None:
            told.append((nbytes, seconds))

    meter, now_s = Meter(Told()), 0.0
    request = meter.begin(now_s)
    for nbytes, seconds in pieces:
        now_s += seconds
        meter.came(request, nbytes, now_s)
    now_s += 0.001
    meter.end(request, now_s)
    first, first_s = pieces[0]
    alone = len(pieces) == 1
    quick = first_s < SERVER_S
    begins = quick and not alone
    assert sum(nbytes for nbytes, _ in told) == sum(nbytes for nbytes, _ in pieces) - (first if begins else 0)
    counted_s = now_s - (first_s if begins else 0.0 if quick else SERVER_S)
    assert sum(seconds for _, seconds in told) == pytest.approx(counted_s)


def test_what_a_node_looks_for_slows_no_link() -> None:
    """It pulls from an origin of its own, and then sends as fast as ever."""
    meter, now_s = Meter(Link(rtt_s=0.05)), 0.0
    for _ in range(20):
        request, now_s = meter.begin(now_s), now_s + 0.25
        for _ in range(5):
            meter.came(request, 1000, now_s)
            now_s += 0.01
        meter.end(request, now_s - 0.01)
    assert meter.link.rate_bps == pytest.approx(100_000, rel=0.01)


def test_round_trips_between_requests_one_after_the_other_do_not_count_though_the_next_is_open_already() -> None:
    meter = Meter(Link(rtt_s=0.5))
    request, now_s = meter.begin(0.0), 0.5
    for _ in range(20):
        now_s += 0.1
        meter.came(request, 1000, now_s)
        following = meter.begin(now_s)
        meter.end(request, now_s)
        request, now_s = following, now_s + 0.5
    assert meter.link.rate_bps == pytest.approx(10_000, rel=0.02)


def test_a_request_that_is_overdue_counts() -> None:
    meter = Meter(Link(rtt_s=0.1))
    first = meter.begin(0.0)
    meter.came(first, 10_000, 1.1)
    second = meter.begin(1.1)
    meter.end(first, 1.1)
    before = meter.link.rate_bps
    meter.flush(5.0)
    assert meter.link.rate_bps < before / 2
    meter.end(second, 5.0, failed=True)


@pytest.mark.parametrize("bps", [20_000, 125_000, 2_500_000])
@pytest.mark.parametrize("looks_s", [0.0, 0.04, 0.2])
def test_pieces_that_are_as_large_as_the_rate_says_do_not_make_it_smaller(bps: float, looks_s: float) -> None:
    """Each comes in eight parts, once its node has found it."""
    meter, now_s = Meter(Link(rtt_s=0.05)), 0.0
    request = meter.begin(now_s)
    for _ in range(100):
        now_s += 0.05
        meter.came(request, int(0.05 * bps), now_s)
    meter.end(request, now_s)
    for _ in range(100):
        piece = int(PIECE_S * meter.link.rate_bps)
        request, now_s = meter.begin(now_s), now_s + 0.05 + looks_s
        for _ in range(8):
            now_s += piece / 8 / bps
            meter.came(request, piece // 8, now_s)
        meter.end(request, now_s)
    assert meter.link.rate_bps == pytest.approx(bps, rel=0.1)


def test_what_comes_at_once_shows_at_most_that_a_link_is_quicker() -> None:
    meter, now_s = Meter(Link(rtt_s=0.05)), 0.0
    for took_s, bps in ((0.15, 10_000), (0.45, 10_000), (0.06, 20_000)):
        for _ in range(200):
            request, now_s = meter.begin(now_s), now_s + took_s
            meter.came(request, 1000, now_s)
            meter.end(request, now_s)
        assert meter.link.rate_bps >= bps * 0.99
    assert meter.link.rate_bps > 20_000


def test_first_bytes_are_those_of_their_request() -> None:
    meter = Meter(Link(rtt_s=0.0))
    one, other = meter.begin(0.0), meter.begin(0.9)
    meter.came(one, 16_000, 0.9)
    meter.end(other, 0.95, failed=True)
    assert meter.link.rated_s == -inf or meter.link.rate_bps == 0


def test_a_node_that_seeks_is_waited_for_but_not_for_ever() -> None:
    meter = Meter(Link())
    meter.begin(0.0)
    assert meter.waiting_s(2.0) == 2.0
    meter.sought(1.9)
    assert meter.waiting_s(2.0) == pytest.approx(0.1)
    meter.sought(SOUGHT_S)
    assert meter.waiting_s(SOUGHT_S + 0.1) == SOUGHT_S + 0.1
