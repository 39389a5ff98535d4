"""The handover benchmark: its figures by hand, and whole on a tiny model and a made-up drive."""

import json
from pathlib import Path
from typing import Any

import pytest
from corpora import bench_folders

from comoe.bench import handover
from comoe.bench.handover_figures import POLICIES, figures, page


def policy(soon: float | None, recovery: list[float | None], share: float = 0.1) -> dict[str, Any]:
    return {
        "tokens": 100,
        "median_ms": 100.0,
        "p95_ms": 150.0,
        "soon_p95_ms": soon,
        "handovers": len(recovery),
        "returns": 0,
        "counts": {"lost": 1, "stalled": 0},
        "far_share": 0.25,
        "hit_rate": 0.9,
        "recovery_s": recovery,
        "node_recovery_s": recovery[1:],
        "announced_share": share,
    }


def drive(soon: float | None, recovery: list[float | None], share: float = 0.1) -> dict[str, Any]:
    told = dict.fromkeys(POLICIES, policy(soon, recovery, share))
    return {"kind": "drive", "model": "m", "drive": "d", "recorded": True, "seconds": 9.0, "stays": 2, "policies": told}


FAULT = {
    "kind": "fault",
    "model": "m",
    "fault": "kill",
    "longest_gap_ms": 900.0,
    "tokens_during": 40,
    "counts": {"lost": 1, "handover": 1, "back": 0},
    "moves": [[61.5, "edge-1", "handover"]],
}


def test_figures_are_of_what_happened_near_handovers() -> None:
    found = figures([drive(195.0, [0.5, None], 0.12), drive(None, [], 0.0), FAULT])
    assert found["gap_p95_over_median_token"] == pytest.approx(1.95)
    assert (found["hit_rate_recovery_s"], found["recovered"]) == (0.5, 0.5)
    assert (found["node_recovery_s"], found["node_recovered"]) == (None, 0.0)
    assert (found["bytes_moved_share"], found["handovers"], found["longest_gap_ms"]) == (0.12, 2, 900.0)
    assert found["identical"] is None


def test_without_handovers_there_is_nothing_to_tell() -> None:
    found = figures([])
    assert found["gap_p95_over_median_token"] is None and found["bytes_moved_share"] is None


def test_the_page_has_a_line_for_every_policy_and_fault() -> None:
    told = {"comoe": "0", "edges": 2, "capacity_share": 0.3, "hot_share": 0.15}
    rows = [drive(195.0, [0.5]), FAULT]
    shown = page({"settings": told, "models": {"m": ""}, **figures(rows)})
    assert "| 1, recorded rate | rule | 1 | 0 | 1, 0 | 25% | 100 | 150 | 195 | 0.5 | 90.0% |" in shown
    assert "| kill | 900 | 40 | 1 lost, 1 handover; handover edge-1 at 61.5 s |" in shown


def test_a_tiny_model_is_driven_about_and_rows_are_kept(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, shared, out = bench_folders(tmp_path, tiny_checkpoint)
    folder = shared / "data" / "mobility"
    folder.mkdir()
    (folder / "sites_cork_estimated.csv").write_text("node_id,lat,lon,observations\nA,51.9,-8.4,9\nB,51.9,-8.6,9\n")
    rows = "".join(f"d,{at},51.9,-8.4,0,1,{'A' if at < 40 else 'B'},LTE,-90\n" for at in range(80))
    header = "traj_id,t_s,lat,lon,speed_mps,cell_id,node_id,tech,rsrp_dbm\n"
    (folder / "traj_cork_drive_cells.csv").write_text(header + rows)

    def run() -> dict[str, Any]:
        return handover.run(models, shared, quick=True, out=out, progress=lambda step, done: None)

    document = run()
    assert [row["kind"] for row in document["rows"]] == ["drive", *["fault"] * 3]
    assert document["handovers"] == 1 and document["returns"] == 0
    assert all(row["tokens_during"] > 0 for row in document["rows"][1:])
    assert json.loads((out / "handover_policy.json").read_text("utf-8")) == document
    monkeypatch.setattr(handover, "Roamer", None)
    assert run() == document
