"""The quality benchmark: whole on a tiny model; its rows on the trained model that ships."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import DOMAINS, bench_folders, shared_folder

from comoe.bench import quality
from comoe.bench.figures import with_losses
from comoe.bench.forms import form_row, reference_row
from comoe.bench.material import Material, Scope, read_material
from comoe.bench.plans import decode_windows, plan_row
from comoe.bench.served import Served
from comoe.make.recipe import Recipe
from comoe.runtime import experts
from comoe.store.shipped import demo_checkpoint
from comoe.types import UsageError

SCOPE = Scope(
    domains=2, windows=2, decode_tokens=32, items=2, calibration_tokens=2560, bounds=(0.0, 0.02), shares=(0.5, 0.3)
)


def run(models: Path, shared: Path, out: Path | None) -> dict[str, Any]:
    return quality.run(models, shared, quick=True, out=out, progress=lambda step, done: None)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, dict[str, Any]]:
    """(models, shared, out, the document of a first run) of a tiny model."""
    folder = tmp_path_factory.mktemp("bench")
    models, shared, out = bench_folders(folder, tiny_checkpoint)
    return models, shared, out, run(models, shared, out)


def test_a_document_has_the_contracts_keys_and_a_row_for_all_that_was_asked(tiny: Any) -> None:
    document = tiny[3]
    assert document.keys() >= {
        "name", "machine", "settings", "rows", "models", "reference_max_difference", "nats", "loss", "loss_ci95",
        "next_chunk", "resident_bytes", "identical", "within_bound", "within_bound_ci95", "exceeded",
    }  # fmt: skip
    names = [(row["kind"], row.get("form"), row.get("bound")) for row in document["rows"]]
    forms = [("form", form, None) for form in ("exact", *reversed(quality.LADDER))]
    assert names == [("reference", None, None), *forms, ("plan", None, 0.0), ("plan", None, 0.02)]
    plan = document["rows"][-1]
    assert plan.keys() >= {
        "loss", "loss_ci95", "worst_domain", "loss_worst_domain", "ms_per_token", "ms_per_token_p95", "ms_over_exact",
        "ms_over_exact_ci95", "hit_rate", "floor_rate", "bytes_read", "resident_bytes", "plan", "loss_ledger",
        "within_bound", "within_bound_ci95", "identical", "budget_bytes", "dtype",
    }  # fmt: skip


def test_exact_loses_nothing_and_a_bound_of_nothing_gives_identical_nats(tiny: Any) -> None:
    document = tiny[3]
    assert document["loss"]["tiny"]["exact"] == pytest.approx(0.0, abs=1e-5)
    exact = next(row for row in document["rows"] if row.get("bound") == 0.0)
    assert (exact["identical"], exact["loss"], document["identical"]) == (True, 0.0, True)
    assert exact["hit_rate"] < 1 and exact["bytes_read"]["flash"] > 0
    assert exact["resident_bytes"] <= exact["budget_bytes"]


def test_the_document_and_its_page_are_left_beside_the_rows_and_name_no_folder(tiny: Any) -> None:
    models, _, out, document = tiny
    kept = (out / "quality.json").read_text("utf-8")
    assert json.loads(kept) == document
    assert "| q2 |" in (out / "quality.md").read_text("utf-8")
    assert len((out / "quality.rows.jsonl").read_text("utf-8").splitlines()) == len(document["rows"])
    assert not any(str(models.parent) in path.read_text("utf-8") for path in out.glob("quality.*"))


def refuse(*_: Any) -> dict[str, Any]:
    raise AssertionError("measured again")


def forbid_measuring(monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
    for kind in kinds:
        monkeypatch.setattr(quality, f"{kind}_row", refuse)


def test_a_second_run_measures_nothing_again(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    models, shared, out, document = tiny
    forbid_measuring(monkeypatch, "reference", "form", "plan")
    assert run(models, shared, out) == document


def test_rows_that_are_deleted_are_measured_again_and_no_others(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, shared, out, document = tiny
    lines = (out / "quality.rows.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "quality.rows.jsonl").write_text("".join(line for line in lines if '"plan"' not in line[:30]), "utf-8")
    (tmp_path / "packs").symlink_to(out / "packs")
    forbid_measuring(monkeypatch, "reference", "form")
    again = run(models, shared, tmp_path)
    before = document["rows"]
    assert [row for row in again["rows"] if row["kind"] != "plan"] == [row for row in before if row["kind"] != "plan"]
    measured = [row["nats"] for row in again["rows"] if row["kind"] == "plan"]
    assert len(measured) == 2
    assert measured[0] == next(row["nats"] for row in before if row["kind"] == "plan")


def test_rows_of_other_texts_or_models_are_not_reused(
    tiny: Any, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, shared, out, _ = tiny
    (tmp_path / "quality.rows.jsonl").write_bytes((out / "quality.rows.jsonl").read_bytes())
    other = tmp_path / "models" / "tiny"
    other.mkdir(parents=True)
    for path in tiny_checkpoint.iterdir():
        (other / path.name).symlink_to(path)
    (other / "eval.json").write_text("{}", "utf-8")
    forbid_measuring(monkeypatch, "reference")
    with pytest.raises(AssertionError, match="measured again"):
        run(tmp_path / "models", shared, tmp_path)
    with pytest.raises(AssertionError, match="measured again"):
        run(models, changed(shared, tmp_path / "shared"), tmp_path)


def changed(shared: Path, copy: Path) -> Path:
    """The texts with one letter more."""
    for path in shared.rglob("*.*"):
        target = copy / path.relative_to(shared)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes() + (b"a" if path.name == "bible_en.valid.txt" else b""))
    return copy


def test_a_folder_without_models_is_a_usage_error(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no models"):
        run(tmp_path, tiny[1], None)
    with pytest.raises(UsageError, match="any domain"):
        run(tiny[0], tmp_path, None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The model that ships, on a little of the text that ships, in few forms."""
    folder = tmp_path_factory.mktemp("trained")
    material = read_material(shared_folder(folder / "shared"), SCOPE.domains, SCOPE.items)
    with pytest.MonkeyPatch.context() as patch, Served(demo_checkpoint(), material, SCOPE, folder / "packs") as found:
        patch.setattr("comoe.bench.served.Recipe", partial(Recipe, forms=("q4", "q8")))
        yield found


def losses(subject: Served, *forms: str) -> list[float]:
    rows = [{"kind": "reference", "model": "m", **reference_row(subject)}]
    rows += [{"kind": "form", "model": "m", "form": form, **form_row(subject, form)} for form in forms]
    return [row["loss"] for row in with_losses(rows)[1:]]


def test_a_form_with_a_wrong_scale_shows_as_a_loss(trained: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    right = experts.dequantise

    def wrong(*args: Any) -> torch.Tensor:
        return 1.5 * right(*args)

    exact, q4 = losses(trained, "exact", "q4")
    assert exact == pytest.approx(0.0, abs=1e-5)
    assert abs(q4) < 0.02
    monkeypatch.setattr(experts, "dequantise", wrong)
    exact, broken = losses(trained, "exact", "q4")
    assert exact == pytest.approx(0.0, abs=1e-5)
    assert broken > 0.05


def test_a_plan_at_a_bound_decodes_the_tokens_asked_for_within_its_bytes(trained: Served) -> None:
    lossy, exact = plan_row(trained, 0.02, 0.3), plan_row(trained, 0.0, 0.3)
    assert lossy["tokens"] == exact["tokens"] == len(DOMAINS) * SCOPE.decode_tokens
    assert lossy["exact_nats"] == exact["nats"]
    assert exact["identical"] and exact["loss_ledger"] == 0
    assert lossy["loss_ledger"] <= 0.02
    assert lossy["identical"] == (lossy["plan"]["target"] == "exact")  # which one is chosen follows from measured rates
    for row in (lossy, exact):
        assert 0 < row["resident_bytes"] <= row["budget_bytes"]
        assert {name: len(found["nats"]) for name, found in row["windows"].items()} == dict.fromkeys(DOMAINS, 2)


def test_a_budget_below_two_experts_is_a_row_that_says_what_would_fit(trained: Served) -> None:
    row = plan_row(trained, 0.0, 0.001)
    assert not row["fits"] and row["budget_bytes"] < row["smallest_bytes"]


@pytest.mark.parametrize(
    ("domains", "tokens", "expected"),
    [(None, 512, (3, 255)), (None, 255, (2, 255)), (2, 32, (2, 16)), (2, 600, (3, 200))],
)
def test_windows_are_decoded_to_their_ends_unless_little_is_asked_for(
    trained: Served, domains: int | None, tokens: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained, "scope", replace(SCOPE, domains=domains, decode_tokens=tokens))
    found, each = decode_windows(trained, trained.evaluation(trained.exact))
    assert ({len(cut) for cut in found.values()}, each) == ({expected[0]}, expected[1])


def test_material_spreads_a_few_domains_over_all_and_takes_items_of_each(tmp_path: Path) -> None:
    shared = shared_folder(tmp_path)
    whole: Material = read_material(shared, None, None)
    assert (tuple(whole.valid), len(whole.items)) == (DOMAINS, 8)
    one = read_material(shared, 1, 3)
    assert (tuple(one.valid), [item.domain for item in one.items]) == (DOMAINS[:1], [DOMAINS[0]] * 3)
    assert whole.hash != one.hash
