"""Recorded links: what they carry by when, windows of them, files read and refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comoe.sim.traces import (
    BPS_PER_MBPS,
    LinkRate,
    LinkTrace,
    read_bench_list,
    read_link_trace,
    without_artefacts,
)
from comoe.types import UsageError

HEADER = "t_s,down_mbps,up_mbps,rtt_ms,cell_id,tech,speed_mps,lat,lon\n"

rates = st.lists(
    st.tuples(st.floats(0.1, 10), st.one_of(st.just(0.0), st.floats(1, 1000))), min_size=1, max_size=8
).map(
    lambda parts: LinkRate.of(
        np.append(0.0, np.cumsum([seconds for seconds, _ in parts])[:-1]),
        np.array([bps for _, bps in parts]),
        float(np.cumsum([seconds for seconds, _ in parts])[-1]),
    )
)


def stepped() -> LinkRate:
    return LinkRate.of(np.array([0.0, 2.0, 3.0]), np.array([100.0, 0.0, 50.0]), 5.0)


def test_a_rate_holds_until_the_next_one() -> None:
    link = stepped()
    assert [link.at(now) for now in (0, 1.9, 2, 2.9, 3, 4.9)] == [100, 100, 0, 0, 50, 50]
    assert link.at(5) == 0 and link.at(-1) == 0


def test_bytes_wait_for_a_link_that_is_gone() -> None:
    link = stepped()
    assert link.done_s(1.0, 100) == 2.0
    assert link.done_s(1.0, 110) == pytest.approx(3.2)
    assert link.done_s(2.5, 0) == 2.5
    assert link.done_s(0, 301) == float("inf")
    assert link.mean(1, 4) == pytest.approx(50)


def test_a_steady_link_is_the_same_all_the_time() -> None:
    assert LinkRate.steady(8.0, 10.0).done_s(1, 40) == pytest.approx(6)


def test_what_is_no_rate_is_refused() -> None:
    for start_s, bps in (([1.0], [1.0]), ([0.0, 0.0], [1.0, 1.0]), ([0.0], [-1.0]), ([], []), ([0.0], [float("nan")])):
        with pytest.raises(ValueError, match="rates need times"):
            LinkRate.of(np.array(start_s), np.array(bps), 5.0)


@given(rates, st.floats(0, 1), st.floats(0.01, 5000))
def test_what_was_asked_for_has_been_carried_when_it_is_done(link: LinkRate, share: float, nbytes: float) -> None:
    begin_s = share * link.end_s
    done_s = link.done_s(begin_s, nbytes)
    if done_s == float("inf"):
        assert link.sent(link.end_s) - link.sent(begin_s) <= nbytes * (1 + 1e-9) + 1e-6
    else:
        assert begin_s <= done_s <= link.end_s + 1e-6
        assert link.sent(done_s) - link.sent(begin_s) == pytest.approx(nbytes, rel=1e-6, abs=1e-6)


@given(rates, st.floats(0, 0.5), st.floats(0.1, 0.5))
def test_a_window_carries_what_the_link_does(link: LinkRate, begin: float, length: float) -> None:
    begin_s, seconds = begin * link.end_s, length * link.end_s
    window = link.window(begin_s, seconds)
    assert window.sent(seconds) == pytest.approx(link.sent(begin_s + seconds) - link.sent(begin_s), abs=1e-5)
    assert window.scaled(0.5).sent(seconds) == pytest.approx(window.sent(seconds) / 2)


def test_a_window_beyond_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no link"):
        stepped().window(1, 5)


def test_windows_are_drawn_by_the_seed_and_the_name() -> None:
    rate = LinkRate.of(np.arange(200.0), np.arange(200.0), 200.0)
    one, other = LinkTrace("one", rate, np.zeros(200), ()), LinkTrace("other", rate, np.zeros(200), ())
    assert one.window(0)[0] == one.window(0)[0]
    assert len({one.window(0)[0], one.window(1)[0], other.window(0)[0]}) == 3
    begin_s, window = one.window(3)
    assert window.end_s == 45 and window.at(0) == begin_s
    with pytest.raises(UsageError, match="lasts 200 s"):
        one.window(0, 201)


def test_short_zeros_are_the_loggers_and_long_ones_are_outages() -> None:
    bps = np.array([0, 5, 0, 0, 7, 0, 0, 0, 4, 0], float)
    assert without_artefacts(np.arange(10.0), bps).tolist() == [0, 5, 5, 5, 7, 0, 0, 0, 4, 0]


def test_a_file_is_read_in_bytes_per_second(tmp_path: Path) -> None:
    path = tmp_path / "ucc5g_x.csv"
    path.write_text(HEADER + "10,8,,40,17,LTE,,,\n11,0,,,17,LTE,,,\n12,16,,,18,LTE,,,\n")
    trace = read_link_trace(path)
    assert trace.name == "ucc5g_x" and trace.cells == ("17", "17", "18")
    assert trace.rate.bps.tolist() == [8 * BPS_PER_MBPS, 8 * BPS_PER_MBPS, 16 * BPS_PER_MBPS]
    assert trace.rate.end_s == 3 and trace.rtt_s[0] == 0.04 and np.isnan(trace.rtt_s[1])
    path.rename(tmp_path / "other.csv")
    assert read_link_trace(tmp_path / "other.csv").rate.bps[1] == 0


@pytest.mark.parametrize(
    "text", ["", HEADER, "t_s,down_mbps\n1,2\n", HEADER + "0,1,,,,,,,\n", HEADER + "0,x,,,,,,,\n1,1,,,,,,,\n",
             HEADER + "0,1,,,,,,,\n0,1,,,,,,,\n", HEADER + "0,-1,,,,,,,\n1,1,,,,,,,\n"],
)  # fmt: skip
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(UsageError):
        read_link_trace(path)


def test_a_folder_without_traces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"bench_list\.txt"):
        read_bench_list(tmp_path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_link_trace(tmp_path / "none.csv")


def test_the_shared_traces_are_read_and_have_windows(shared: Path) -> None:
    paths = read_bench_list(shared / "data" / "traces")
    assert len(paths) == 13
    for path in paths:
        begin_s, window = read_link_trace(path).window(0)
        assert begin_s >= 0 and window.end_s == 45 and window.sent(45) > 0
