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


def method(ms: float, loss: float, way: str = "q4", **more: Any) -> dict[str, Any]:
    times = {"ms": ms, "ms_p50_p95": [ms, 2 * ms], "prefill_ms": 10 * ms, "bytes_per_token": 2048.0, "hit_rate": 0.5}
    served = {"rung": way, "policy": "lfu", "prefetch": "auto", "floor": None}
    return {"fits": True, "way": served, "loss": loss, **times, **more}


def cell(model: str, share: float, separable: float, together: float, loss: float = 0.001) -> dict[str, Any]:
    methods = {
        "separable": method(separable, 0.004),
        "joint": method(together, loss),
        "joint, as fast": method(separable, loss),
    }
    return {"kind": "cell", "model": model, "share": share, "ratio": 1.0, "methods": methods}


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


def test_where_nothing_fits_there_is_no_ratio() -> None:
    found = figures([ROWS[-1]])
    assert (found["ratio_at_16"], found["median_ratio"], found["cells"]) == (None, None, 0)


def test_the_page_has_a_line_for_every_method() -> None:
    told = method(1.0, 0.0, floor=None)
    del told["loss"], told["way"]
    rows = [*ROWS, {**cell("c", 0.16, 1.0, 1.0), "methods": {"clairvoyant": told, "other": {"fits": False}}}]
    settings = {"comoe": "0", "bound": 0.005, "judged_tokens_per_domain": 8, "domains": ["x"]}
    shown = page({"settings": settings, "models": dict.fromkeys("abc", ""), **figures(rows)})
    assert "| joint | q4, lfu, auto | 5.00 | 10.00 | 50 | 2 KiB | 50.0% | 0.10% |" in shown
    assert "| clairvoyant | the future is known | 1.00 |" in shown and "| other | does not fit |" in shown


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
    assert json.loads((out / "joint.json").read_text("utf-8")) == document
    monkeypatch.setattr(joint, "Match", None)
    assert run() == document
