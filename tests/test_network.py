"""A session on a link, in virtual time: by hand on steady links, through outages, and the benchmark whole."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import bench_folders
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import BLOBS, COARSE, EXACT, LAYERS, USE, N, decoding, streaming

from comoe.bench import network
from comoe.bench.network_figures import figures, page
from comoe.plan.stream import LinkFollower, LinkPlan, Streaming
from comoe.sim.network import STEP_S, Air, Controller, Outcome, Session, decoded
from comoe.sim.pilots import FETCH_ON_MISS, REMOTE_ONLY, Knowing, Live, Static, Watched
from comoe.sim.traces import LinkRate

TRACE = decoding(40)


def outcome(rate: LinkRate, controller: Controller, plans: Streaming | None = None) -> Outcome:
    return Session(plans or streaming(), Air(rate, 0.02, 100.0), controller, BLOBS, USE).run(TRACE)


def test_a_traces_tokens_are_decoded_ones() -> None:
    found = list(decoded(TRACE))
    assert len(found) == 40 and all(len(chunks) == LAYERS for chunks in found)


def test_remote_only_takes_its_time_and_loses_nothing() -> None:
    found = outcome(LinkRate.steady(1e6, 10.0), Static(REMOTE_ONLY))
    assert np.diff(found.at_s) == pytest.approx(0.02 + LAYERS * 0.2)
    assert found.error.max() == 0 and found.bytes_read == 0 and found.remote == found.uses


def test_fetch_on_miss_waits_for_every_expert_once() -> None:
    found = outcome(LinkRate.steady(1e5, 20.0), Static(FETCH_ON_MISS))
    assert found.error.max() == 0 and found.bytes_read == N * EXACT
    read_s = EXACT / 1e5
    assert found.at_s[0] == pytest.approx(0.02 + 4 * read_s + 2 * 0.02, abs=0.05)
    assert np.diff(found.at_s)[-5:] == pytest.approx(0.1)


def test_a_round_trip_is_waited_for_where_the_link_was_idle_and_not_between_reads() -> None:
    def first_s(rtt_s: float) -> float:
        air = Air(LinkRate.steady(1e5, 20.0), rtt_s)
        return float(Session(streaming(), air, Static(FETCH_ON_MISS), BLOBS, USE).run(TRACE).at_s[0])

    assert first_s(0.5) - first_s(0.0) == pytest.approx(0.5, abs=1e-6)


def test_a_floor_is_there_before_the_first_token() -> None:
    found = outcome(LinkRate.steady(1e4, 20.0), Static(LinkPlan("coarse", "coarse", "coarse", reads="missed")))
    assert found.at_s[0] == pytest.approx(0.02 + N * COARSE / 1e4, abs=0.1)
    assert found.error == pytest.approx(0.1) and found.hits == found.uses


def test_reading_ahead_goes_on_while_tokens_are_made() -> None:
    found = outcome(LinkRate.steady(1e5, 10.0), Static(LinkPlan("exact", "coarse")))
    assert found.error[0] > 0.5 and found.error[-1] == 0
    assert np.diff(found.at_s) == pytest.approx(0.1)
    assert found.bytes_read == N * EXACT


def test_nothing_comes_while_there_is_no_link() -> None:
    gone = LinkRate.of(np.array([0.0, 2.0, 8.0]), np.array([1e5, 0.0, 1e5]), 20.0)
    found = outcome(gone, Static(FETCH_ON_MISS))
    during = found.at_s[(found.at_s > 2.2) & (found.at_s < 8)]
    assert len(during) == 0 and found.at_s[-1] > 19
    dead = outcome(LinkRate.steady(0.0, 5.0), Static(FETCH_ON_MISS))
    assert len(dead.at_s) == 0 and dead.worth(streaming()) == 0 and dead.loss(streaming()) == 0


def test_a_coarse_session_never_stops_without_a_link() -> None:
    plans = streaming(max_loss=2.0)
    found = outcome(LinkRate.steady(0.0, 5.0), Static(LinkPlan("exact", "coarse")), plans)
    assert len(found.at_s) == 50 and 0 < found.worth(plans) < 50


def test_memory_holds_no_more_than_its_capacity() -> None:
    plans = streaming(capacity=3 * EXACT)
    session = Session(plans, Air(LinkRate.steady(1e6, 5.0), 0.02), Static(LinkPlan("exact", "coarse")), BLOBS, USE)
    session.run(TRACE)
    assert session._residency.used <= 3 * EXACT
    session._residency.check()
    assert [session._residency.resident([blob]) for blob in BLOBS] == session._resident[:-1].tolist()


@pytest.mark.parametrize("bps", [2e3, 1e4, 5e4, 1e6])
def test_following_the_link_is_worth_about_as_much_as_the_best_plan_that_stays(bps: float) -> None:
    rate, plans = LinkRate.steady(bps, 20.0), streaming()
    live = outcome(rate, Live(LinkFollower(plans))).worth(plans)
    rivals = [LinkPlan(name, miss) for name in ("coarse", "exact") for miss in ("coarse", "remote")]
    assert live >= 0.85 * max(outcome(rate, Static(plan)).worth(plans) for plan in rivals)


def test_after_a_fall_the_plan_is_soon_that_for_the_lower_rate() -> None:
    rate, plans = LinkRate.of(np.array([0.0, 2.0]), np.array([4e4, 2e3]), 20.0), streaming()
    watched = Watched(Live(LinkFollower(plans)), rate)
    found = outcome(rate, watched, plans)
    assert all(at_s < 4.0 for at_s in watched.poor_s if at_s >= 2.0)
    steps = [round(switch.at_s / STEP_S) for switch in found.switches]
    assert len(steps) == len(set(steps))


links = st.lists(st.sampled_from([0.0, 1e3, 1e4, 1e6]), min_size=1, max_size=6)


@given(links)
@settings(max_examples=40, deadline=None)
def test_whatever_the_link_does_time_passes_and_plans_change_once_in_a_step(bps: list[float]) -> None:
    rate, plans = LinkRate.of(np.arange(float(len(bps))), np.array(bps), float(len(bps))), streaming()
    for controller in (Live(LinkFollower(plans)), Knowing(plans, rate, 5.0), Static(FETCH_ON_MISS)):
        found = outcome(rate, controller, plans)
        assert (np.diff(found.at_s) > 0).all() and (found.at_s < rate.end_s).all()
        assert found.bytes_read <= rate.sent(rate.end_s) + 1
        steps = [round(switch.at_s / STEP_S) for switch in found.switches]
        assert len(steps) == len(set(steps))


# The benchmark


def window(live: float, static: float, joint: float, best: float, model: str = "m") -> dict[str, Any]:
    def columns(worth: float) -> dict[str, Any]:
        return {"worth": worth, "tokens": 9, "loss": 0.01}

    return {
        "kind": "window",
        "model": model,
        "trace": "t",
        "begin_s": 3.0,
        "mean_mbps": 5.0,
        "scale": 0.1,
        "large": "L",
        "live": {**columns(live), "switches": [[0.0, "a"], [0.5, "b"]]},
        "static": {"s": static, "worse": 0.0},
        "joint_static": {"j": joint},
        "clairvoyant": columns(best),
        "fetch_on_miss": columns(0.0),
        "remote_only": columns(1.0),
    }


FALLS = {"kind": "fall", "model": "m", "mbps": [100.0, 5.0], "at_s": 5.0, "settles_s": 1.5, "worth": [3.0, 2.0, 1.0]}


def test_ratios_are_medians_of_windows() -> None:
    found = figures([window(10, 5, 8, 10), window(9, 9, 9, 10), window(6, 0, 6, 8), FALLS])
    assert found["gain_over_best_static"] == 2.0 and found["share_of_clairvoyant"] == pytest.approx(0.9)
    assert found["clairvoyant_gain_over_best_static"] == 2.0
    assert found["gain_over_best_joint_static"] == 1.0 and found["gain_over_one_static"] == 1.0
    assert found["least_share_of_clairvoyant"] == 0.75
    assert (found["settles_s"], found["most_switches_per_step"], found["windows"]) == (1.5, 1, 3)


def test_without_anything_to_compare_there_is_no_ratio() -> None:
    found = figures([window(6, 0, 0, 6)])
    assert found["gain_over_best_static"] is None and found["share_of_clairvoyant"] == 1
    assert figures([])["share_of_clairvoyant"] is None


def test_the_page_has_a_line_for_every_window() -> None:
    told = {"comoe": "0", "max_loss": 0.05, "reader_s": 0.1, "share": 0.3, "rtt_s": 0.027}
    shown = page({"settings": told, "models": {"m": ""}, **figures([window(10, 0, 8, 10), FALLS])})
    assert "| t, 3 s | 5 | 10 | 9 | 1.00% | 2 | 0 | 8 (j) | 10 | 0 | 1 |" in shown and "settle in 1.5 s" in shown


def test_a_tiny_model_travels_and_rows_are_kept(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, shared, out = bench_folders(tmp_path, tiny_checkpoint)
    traces = shared / "data" / "traces"
    traces.mkdir()
    rows = "".join(f"{at},{5 + at % 7 * 9},,,,5G,,,\n" for at in range(60))
    (traces / "one.csv").write_text("t_s,down_mbps,up_mbps,rtt_ms,cell_id,tech,speed_mps,lat,lon\n" + rows)
    (traces / "bench_list.txt").write_text("one.csv\n")

    def run() -> dict[str, Any]:
        return network.run(models, shared, quick=True, out=out, progress=lambda step, done: None)

    document = run()
    assert document.keys() >= {"gain_over_best_static", "share_of_clairvoyant", "settles_s", "rows", "machine"}
    assert [row["kind"] for row in document["rows"]] == ["window", "fall"]
    assert document["rows"][0]["live"]["worth"] <= document["rows"][0]["clairvoyant"]["worth"]
    monkeypatch.setattr(network, "Session", None)
    assert run() == document
