"""`comoe demo`: the main job, whole, on the model that ships."""

import json
from pathlib import Path

import pytest
from commands import call

from comoe.store.pack import Pack

QUICK = {"OWN_FORMS": ("q3", "q4"), "CALIBRATION_TOKENS": 4096, "MEASURED_TOKENS": 256}
"""For the sake of time: fewer forms, a third of the text, and half as many tokens compared."""


def test_the_demo_is_identical_within_its_budget_and_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, few in QUICK.items():
        monkeypatch.setattr(f"comoe.make.demo.{name}", few)
    result = call(capsys, monkeypatch, "demo", "--json", "--keep", tmp_path / "kept")
    assert result.code == 0, result.err
    got = json.loads(result.out)
    assert got.keys() >= {
        "identical", "budget_bytes", "resident_expert_bytes", "expert_bytes_total", "ms_per_token",
        "resident_ms_per_token", "hit_rate", "bytes_read", "quality_bound", "quality_loss", "seconds",
    }  # fmt: skip
    assert got["identical"] is True
    assert 0 < got["resident_expert_bytes"] <= 0.31 * got["expert_bytes_total"]
    assert got["quality_loss"] <= got["quality_bound"]
    assert 0 < got["hit_rate"] < 1
    assert got["bytes_read"]["flash"] > 0
    assert len(got["plans"]) == 3
    assert Pack(tmp_path / "kept").manifest.expert_bytes_bf16 == got["expert_bytes_total"]
