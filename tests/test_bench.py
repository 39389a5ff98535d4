"""The ladder benchmark whole, on a tiny model; and the model whose experts share structure."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import bench_folders, shared_folder

from comoe.bench import ladder, upcycled
from comoe.bench.ladder import ABLATIONS, Scope
from comoe.bench.ladder_figures import page
from comoe.bench.published import METHODS
from comoe.store.checkpoint import Checkpoint

SCOPE = Scope(
    domains=2, windows=2, calibration_tokens=3072, shares=(0.5,), ablated_shares=(0.5,), gate=True, upcycled=False
)
ABLATED = ("all but merged", "own forms, no dropping")


def run(models: Path, shared: Path, out: Path, told: list[str]) -> dict[str, Any]:
    return ladder.run(models, shared, quick=True, out=out, progress=lambda step, done: told.append(step))


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, dict[str, Any]]:
    """(models, shared, out, the document of a first run) of a tiny model."""
    folder = tmp_path_factory.mktemp("bench")
    models, shared, out = bench_folders(folder, tiny_checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "QUICK", SCOPE)
        patch.setattr(ladder, "ABLATIONS", {name: ABLATIONS[name] for name in ABLATED})
        return models, shared, out, run(models, shared, out, [])


def test_a_document_has_the_contracts_keys_and_a_row_for_every_method(tiny: Any) -> None:
    document = tiny[3]
    assert document.keys() >= {"name", "machine", "settings", "models", "worst_excess_over_target", "beaten_by"}
    names = [(row["kind"], row.get("method")) for row in document["rows"]]
    published = [("published", method) for method in METHODS]
    assert names == [("exact", None), ("comoe", "comoe"), *published, *(("ablation", name) for name in ABLATED)]
    assert [gate["change"] for gate in document["gates"]] == ["shuffled", "layer mean"]
    assert json.loads((tiny[2] / "ladder.json").read_bytes()) == document
    assert (tiny[2] / "ladder.md").read_text("utf-8") == page(document)


def test_every_row_is_within_its_bytes(tiny: Any) -> None:
    document = tiny[3]
    whole = document["rows"][0]["bytes"]
    reached = [row for row in document["rows"][1:] if row["reaches"]]
    assert len(reached) > len(METHODS) / 2
    assert all(row["bytes"] <= row["share"] * whole for row in reached)
    assert all(row["loss_ci95"][0] <= row["loss"] <= row["loss_ci95"][1] for row in reached)


def test_finished_rows_and_packs_are_gone_on_with(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    models, shared, out, first = tiny
    monkeypatch.setattr(ladder, "QUICK", replace(SCOPE, ablated_shares=()))

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(ladder, "_step_row", refuse)
    monkeypatch.setattr(ladder, "_published_row", refuse)
    again = run(models, shared, out, [])
    assert again["rows"] == [row for row in first["rows"] if row["kind"] != "ablation"]


def test_an_upcycled_models_experts_are_one_expert_and_deltas_of_low_rank(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upcycled, "DENSE_STEPS", 2)
    monkeypatch.setattr(upcycled, "SPARSE_STEPS", 3)
    monkeypatch.setattr(upcycled, "BATCH_WINDOWS", 2)
    texts = sorted((shared_folder(tmp_path / "shared") / "data" / "corpus").glob("*.calib.txt"))
    done: list[float] = []
    upcycled.make_upcycled(tiny_checkpoint, texts, tmp_path / "made", lambda step, part: done.append(part))
    assert done == sorted(done) and done[-1] == pytest.approx(1.0)
    source, made = Checkpoint.open(tiny_checkpoint), Checkpoint.open(tmp_path / "made")
    sizes = [sum(site.num_experts * site.expert_bytes_bf16 for site in found.sites) for found in (source, made)]
    assert sizes[0] == sizes[1] and made.sites[0].num_experts == source.sites[0].num_experts // 2
    first, second = (made.expert(0, expert)["down_proj"].float() for expert in (0, 1))
    values = torch.linalg.svdvals(first - second)
    assert float(values[0]) > 0 and float(values[2 * upcycled.RANK :].max()) < 0.05 * float(values[0])


def test_a_chain_that_has_no_step_so_small_does_not_reach(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    models, shared, out, _ = tiny
    scope = replace(SCOPE, shares=(), ablated_shares=(0.001,), gate=False)
    monkeypatch.setattr(ladder, "QUICK", scope)
    monkeypatch.setattr(ladder, "ABLATIONS", {"own forms, no dropping": ABLATIONS["own forms, no dropping"]})
    rows = run(models, shared, out, [])["rows"]
    assert [(row["kind"], row.get("reaches")) for row in rows] == [("exact", None), ("ablation", False)]
