"""The joint benchmark: its figures by hand, and whole on a tiny model."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from corpora import bench_folders

from comoe.bench import joint
from comoe.bench.joint_figures import figures, page
from comoe.bench.match import Match, Way
from comoe.bench.rows import RowFile


def method(ms: float, loss: float, way: str = "q4", **more: Any) -> dict[str, Any]:
    times = {"ms": ms, "ms_p50_p95": [ms, 2 * ms], "prefill_ms": 10 * ms, "bytes_per_token": 2048.0, "hit_rate": 0.5}
    served = {"rung": way, "policy": "lfu", "prefetch": "auto", "floor": None, "bias": 0.0}
    lost = {"loss": loss, "loss_ci95": [loss - 0.001, loss + 0.001], "loss_worst_domain": 2 * loss}
    return {"fits": True, "way": served, "resident_bytes": 4096, **lost, **times, **more}


def cell(model: str, share: float, separable: float, together: float, loss: float = 0.001) -> dict[str, Any]:
    methods = {
        "separable": method(separable, 0.004),
        "joint": method(together, loss),
        "joint, as fast": method(separable, loss),
    }
    return {"kind": "cell", "model": model, "share": share, "ratio": 1.0, "methods": methods}


def live(model: str, separable: float, together: float, foretold: float) -> dict[str, Any]:
    """Times of two ways; the virtual clock says `foretold` of both."""
    methods = {
        name: {
            "way": way,
            "ms": ms,
            "ms_foretold": foretold,
            "ratio_of_times": ms / separable,
            "ratio_of_times_ci95": [part * ms / separable for part in span],
        }
        for (name, way, ms), span in zip(
            (("separable", "q4", separable), ("joint", "10%", together), ("joint, no bias", "q4", 9.0)),
            ((1.0, 1.0), (0.75, 1.25), (1.0, 1.0)),
            strict=True,
        )
    }
    return {"kind": "live", "model": model, "share": 0.16, "ratio": 1.0, "methods": methods}


ROWS = [
    {"kind": "device", "model": "a", "layer_s": 1.0},
    cell("a", 0.16, 10.0, 5.0),
    cell("b", 0.16, 10.0, 7.0, -0.001),
    cell("a", 0.4, 10.0, 10.2),
    {"kind": "cell", "model": "b", "share": 0.4, "ratio": 1.0, "methods": {"separable": {"fits": False}}},
]


def test_ratios_are_of_cells_in_which_both_fit() -> None:
    found = figures(ROWS)
    assert found["ratio_at_16"] == pytest.approx(0.6)
    assert found["loss_ratio_at_16"] == pytest.approx(0.125)
    assert (found["cells"], found["cells_no_worse"], found["median_ratio"]) == (3, 2, pytest.approx(0.7))


def test_live_times_are_compared_and_each_way_is_foretold_once() -> None:
    found = figures([*ROWS, live("a", 9.0, 4.5, 9.0), live("b", 9.0, 8.1, 9.0)])
    assert found["ratio_at_16_live"] == pytest.approx(0.7)
    assert found["foretold"]["ways"] == 4
    assert found["foretold"]["median_error"] == pytest.approx((0 + 1 / 9) / 2)
    assert found["foretold"]["p95_half_interval"] == pytest.approx(0.25)  # of what is compared with another


def test_where_nothing_fits_there_is_no_ratio() -> None:
    found = figures([ROWS[-1]])
    assert (found["ratio_at_16"], found["median_ratio"], found["cells"]) == (None, None, 0)
    assert (found["ratio_at_16_live"], found["foretold"]) == (None, None)


def test_the_page_has_a_line_for_every_method() -> None:
    told = method(1.0, 0.0)
    del told["loss"], told["way"]
    pruned = {"kind": "resident", "model": "a", "share": 0.16, "method": "reap", **method(2.0, 0.5)}
    rows = [
        *ROWS,
        pruned,
        {**pruned, "method": "hc-smoe", "fits": False},
        live("a", 9.0, 4.5, 9.0),
        {**cell("c", 0.16, 1.0, 1.0), "methods": {"clairvoyant": told, "other": {"fits": False}}},
    ]
    settings = {"comoe": "0", "bound": 0.005, "judged_tokens_per_domain": 8, "domains": ["x"]}
    shown = page({"settings": settings, "models": dict.fromkeys("abc", ""), **figures(rows)})
    line = "q4, lfu, auto | 4 KiB | 5.00 | 10.00 | 4.50 | 9.00 | 50 | 2 KiB | 50.0% | 0.00% | 0.10% (0.00% to 0.20%) |"
    assert f"| joint | {line} 0.20% |" in shown
    assert "| reap | 16% | 4 KiB | 2.00 |" in shown and "| hc-smoe | 16% | is never so small |" in shown
    assert "| the same, live | 0.50x |" in shown
    assert "| clairvoyant | the future is known |" in shown and "| other | does not fit |" in shown


def test_the_best_way_is_the_fastest_that_fits_and_keeps_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    ms = {"fast": 1.0, "slow": 3.0, "wide": None, "lossy": 0.5}
    contender = SimpleNamespace(told={"fast": 0.004, "slow": 0.0, "wide": 0.0, "lossy": 0.006})
    match = Match(contender, {}, 100, 1.0, 0.005)  # type: ignore[arg-type]
    monkeypatch.setattr(match, "chosen_ms", lambda way: ms[way.rung])
    ways = [Way(rung, "lfu", "off") for rung in ms]
    assert match.best(ways) == Way("fast", "lfu", "off")
    assert match.best(ways[1:2]) == Way("slow", "lfu", "off")
    assert match.best(ways[2:]) is None


def test_a_tiny_model_is_compared_and_rows_are_kept(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, shared, out = bench_folders(tmp_path, tiny_checkpoint)

    def run() -> dict[str, Any]:
        return joint.run(models, shared, quick=True, out=out, progress=lambda step, done: None)

    document = run()
    assert document.keys() >= {
        "name",
        "machine",
        "settings",
        "models",
        "ratio_at_16",
        "cells_no_worse",
        "cells",
        "rows",
    }
    found = next(row for row in document["rows"] if row["kind"] == "cell")["methods"]
    assert {*found} >= {
        "exact, lru",
        "exact, best offloader",
        "uniform, resident",
        "chain, resident",
        "separable",
        "joint",
    }
    assert found["exact, lru"]["loss"] == 0 and found["exact, lru"]["ms"] > 0
    timed = next(row for row in document["rows"] if row["kind"] == "live")["methods"]
    assert timed["separable"]["ms"] > 0 and timed["separable"]["ratio_of_times"] == 1
    assert timed["joint"]["ms_foretold"] > 0 and document["foretold"]["ways"] >= 2
    assert json.loads((out / "joint.json").read_text("utf-8")) == document
    monkeypatch.setattr(RowFile, "add", None)
    assert run() == document
