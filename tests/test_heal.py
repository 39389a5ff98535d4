"""Healing: scales learn, nothing else changes, held-out text stays unread, and it must prove itself."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from commands import Comoe, calibration_text
from packs import write_pack
from safetensors.torch import load_file, save_file

from comoe.device.memory import MemoryLimit
from comoe.make import heal as subject
from comoe.make import pack as packing
from comoe.make.calibrate import cut, fitted, held_out, texts_of
from comoe.make.estimate import Left, blank, seconds_to_pack
from comoe.make.heal import (
    BATCH,
    RATE,
    Lessons,
    better,
    bytes_to_heal,
    healed_steps,
    log_probabilities,
    rewritten,
    train,
)
from comoe.make.pack import pack
from comoe.make.protocol import Evaluation
from comoe.make.pupil import HEALED, PackedExperts, PupilLayer
from comoe.make.recipe import Recipe
from comoe.make.study import blob_fields
from comoe.runtime.generate import tokenizer_of
from comoe.runtime.skeleton import load_skeleton
from comoe.store.checkpoint import Checkpoint
from comoe.store.manifest import FORM_PARTS, Certificate, Manifest, read_manifest
from comoe.store.pack import Pack
from comoe.types import BlobId, UsageError

TOKENS = 4096
STEPS = 8
LOUD = 10.0
"""What the tiny model's expert weights are multiplied by, so that they matter."""

QUIET = lambda step, done: None  # noqa: E731


@pytest.fixture(scope="module")
def loud(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, its experts louder."""
    folder = tmp_path_factory.mktemp("loud") / "source"
    shutil.copytree(tiny_checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    made = {name: LOUD * tensor if ".experts." in name else tensor for name, tensor in tensors.items()}
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Of a pack in low bits that is not certified, and not healed yet."""
    text = calibration_text(tmp_path_factory.mktemp("text"))
    forms = ("merged", "residual", "q2", "q3", "q4", "q8")
    return Recipe(forms=forms, pruned=False, texts=texts_of([text]), num_tokens=TOKENS, certified=False, shared=True)


@pytest.fixture(scope="module")
def plain(loud: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("packs") / "plain"
    pack(loud, target, recipe, QUIET)
    return target


@pytest.fixture(scope="module")
def healed(loud: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("packs") / "healed"
    pack(loud, target, replace(recipe, heal=STEPS), QUIET)
    return target


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def windows_of(source: Path, recipe: Recipe) -> dict[str, list[list[int]]]:
    checkpoint = Checkpoint.open(source)
    evaluation = Evaluation.for_model(blank(checkpoint), tokenizer_of(source))
    return cut(evaluation.tokenizer, recipe.texts, evaluation.window_length, recipe.num_tokens)


def test_the_divergence_of_every_coarse_step_falls_on_the_text_that_is_learnt_from(
    plain: Path, loud: Path, recipe: Recipe
) -> None:
    opened, checkpoint = Pack(plain), Checkpoint.open(loud)
    assignments = [opened.manifest.assignment(step.name) for step in healed_steps(opened.manifest)]
    assert len(assignments) > 1
    text = fitted(windows_of(loud, recipe))
    evaluation = Evaluation.for_model(load_skeleton(plain, torch.float32), tokenizer_of(plain))
    experts = [PackedExperts(opened, checkpoint, at) for at in range(2)]
    layers = [PupilLayer(found, 8) for found in experts]
    uses = [(at, e, form) for made in assignments for at, forms in enumerate(made) for e, form in enumerate(forms)]
    grids = {blob: found for at, e, form in uses for blob, found in experts[at].grids(e, form).items()}
    factors = [grid.factor for found in grids.values() for grid in found.values()]
    train(evaluation, layers, assignments, factors, text, Lessons(0))

    @torch.no_grad()
    def divergences() -> list[float]:
        exact = log_probabilities(evaluation, layers, [["exact"] * 8] * 2, text)
        pupils = [log_probabilities(evaluation, layers, assignment, text) for assignment in assignments]
        return [float((exact.exp() * (exact - pupil)).sum(-1).mean()) for pupil in pupils]

    before = divergences()
    told: list[float] = []
    train(evaluation, layers, assignments, factors, text, Lessons(60, heed=lambda at, found: told.append(found)))
    assert len(told) == 60 and min(told) > 0
    for earlier, later in zip(before, divergences(), strict=True):
        assert later < 0.97 * earlier


def test_only_scales_change_and_no_byte_is_added(plain: Path, healed: Path) -> None:
    before, after = Pack(plain), Pack(healed)
    assert {path.name.rpartition("-")[0] for path in plain.glob("[0-9]*")} == {
        path.name.rpartition("-")[0] for path in healed.glob("[0-9]*")
    }
    assert before.blob_ids() == after.blob_ids()
    changed = set()
    for blob in before.blob_ids():
        old, new = before.read_bytes(blob), after.read_bytes(blob)
        if blob.part not in HEALED:
            assert old == new
            continue
        site = before.manifest.site(blob.layer)
        fields, others = (blob_fields(site, blob.part, found) for found in (old, new))
        for (leaf, plane), tensor in fields.items():
            if plane == "scales":
                ratio = (others[leaf, plane].float() / tensor.float()).nan_to_num(1.0)
                assert float((ratio - 1).abs().max()) < STEPS * RATE + 0.01
                changed |= {blob.part} if not torch.equal(tensor, others[leaf, plane]) else set()
            else:
                assert torch.equal(tensor, others[leaf, plane])
    taken = {part for step in healed_steps(before.manifest) for part in parts_of(before.manifest, step.name)}
    assert changed == taken & {*HEALED} and len(changed) > 1
    assert [step.resident_bytes for step in before.manifest.chain] == [
        step.resident_bytes for step in after.manifest.chain
    ]


def parts_of(manifest: Manifest, step: str) -> set[str]:
    return {part for layer in manifest.assignment(step) for form in layer for part in FORM_PARTS[form]}


def test_the_manifest_says_what_was_done_and_errors_are_those_of_the_new_scales(plain: Path, healed: Path) -> None:
    before, after = Pack(plain).manifest, Pack(healed).manifest
    assert (before.provenance.healing_steps, after.provenance.healing_steps) == (0, STEPS)
    for old, new in zip(before.layers, after.layers, strict=True):
        assert old.errors.keys() == new.errors.keys()
        same = {form for form in old.errors if old.errors[form] == new.errors[form]}
        assert {"q4", "q8"} <= same < old.errors.keys()
        for form, found in new.errors.items():
            assert sum(found) == pytest.approx(sum(old.errors[form]), rel=0.2)


def test_the_same_input_gives_the_same_bytes_and_another_seed_others(
    healed: Path, loud: Path, recipe: Recipe, tmp_path: Path
) -> None:
    pack(loud, tmp_path / "again", replace(recipe, heal=STEPS), QUIET)
    assert files_of(tmp_path / "again") == files_of(healed)
    pack(loud, tmp_path / "other", replace(recipe, heal=STEPS, seed=1), QUIET)
    names = [{path.name for path in folder.glob("*-q2-*")} for folder in (healed, tmp_path / "other")]
    assert not names[0] & names[1]


class Killed(BaseException):
    pass


def killing(step: str, after: float) -> Callable[[str, float], None]:
    def progress(told: str, done: float) -> None:
        if told.startswith(step) and done > after:
            raise Killed

    return progress


def test_a_run_killed_while_healing_begins_that_anew_and_ends_with_the_same_bytes(
    healed: Path, loud: Path, recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        pack(loud, tmp_path / "p", replace(recipe, heal=STEPS), killing("healing", 0.9))
    told: list[str] = []
    pack(loud, tmp_path / "p", replace(recipe, heal=STEPS), lambda step, done: told.append(step))
    assert told.count("healing") == STEPS and "calibration" not in told
    assert files_of(tmp_path / "p") == files_of(healed)


def test_a_run_killed_after_healing_does_not_heal_again(loud: Path, recipe: Recipe, tmp_path: Path) -> None:
    certified = replace(recipe, heal=STEPS, certified=True)
    with pytest.raises(Killed):
        pack(loud, tmp_path / "p", certified, killing("certificate", 0.9))
    assert (tmp_path / "p.partial" / "work" / "healed.json").exists()
    told: list[str] = []
    pack(loud, tmp_path / "p", certified, lambda step, done: told.append(step))
    assert "healing" not in told and "certificate of 3 sizes" in told
    pack(loud, tmp_path / "whole", certified, QUIET)
    assert files_of(tmp_path / "p") == files_of(tmp_path / "whole")


def test_held_out_text_is_not_learnt_from(
    loud: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[int]] = []
    whole = subject.log_probabilities

    def spied(evaluation, layers, assignment, windows):  # type: ignore[no-untyped-def]
        read.extend(windows)
        return whole(evaluation, layers, assignment, windows)

    monkeypatch.setattr(subject, "log_probabilities", spied)
    pack(loud, tmp_path / "p", replace(recipe, heal=4), QUIET)
    text = windows_of(loud, recipe)
    kept_back = [window for windows in held_out(text).values() for window in windows]
    assert len(read) == 2 * 4 * BATCH
    assert all(window in fitted(text) for window in read)
    assert kept_back and not any(window in read for window in kept_back)


def judged(tmp_path: Path, after: float) -> tuple[Manifest, Manifest, Manifest, list[str]]:
    """A manifest, its healed one, the better of the two, and what was said; healing moves losses by `after`."""
    write_pack(tmp_path / "toy", None)
    plain = Pack(tmp_path / "toy").manifest
    tried = msgspec.structs.replace(plain, provenance=msgspec.structs.replace(plain.provenance, healing_steps=9))

    def certify(manifest: Manifest) -> dict[str, Certificate]:
        loss = 0.1 * (after if manifest.provenance.healing_steps else 1.0)
        found = Certificate(loss, (loss, loss), loss, (loss, loss), "poems")
        return {step.name: found for step in manifest.chain if step.name != "exact"}

    said: list[str] = []
    return plain, tried, better(plain, tried, certify, said.append), said


def test_what_healing_makes_worse_is_undone_and_that_is_said(tmp_path: Path) -> None:
    plain, _, found, said = judged(tmp_path, 1.5)
    assert found.provenance == plain.provenance
    assert {step.certificate.loss for step in found.chain[:-1] if step.certificate} == {0.1}
    assert len(said) == 1 and "10.00% to 15.00%" in said[0] and "undone" in said[0]


def test_what_healing_makes_better_is_kept_with_its_own_certificates(tmp_path: Path) -> None:
    _, tried, found, said = judged(tmp_path, 0.5)
    assert found.provenance == tried.provenance
    assert {step.certificate.loss for step in found.chain[:-1] if step.certificate} == {0.05}
    assert len(said) == 1 and "10.00% to 5.00%" in said[0] and "undone" not in said[0]


def test_what_was_undone_leaves_the_pack_that_is_made_without_healing(
    loud: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = packing.certify

    def worse(folder, *rest):  # type: ignore[no-untyped-def]
        spoilt = float(read_manifest(folder).provenance.healing_steps > 0)
        found = whole(folder, *rest)
        return {name: msgspec.structs.replace(made, loss=made.loss + spoilt) for name, made in found.items()}

    monkeypatch.setattr(packing, "certify", worse)
    certified = replace(recipe, certified=True)
    said: list[str] = []
    pack(loud, tmp_path / "spoilt", replace(certified, heal=4), QUIET, said.append)
    assert "undone" in said[-1]
    pack(loud, tmp_path / "plain", certified, QUIET)
    assert files_of(tmp_path / "spoilt") == files_of(tmp_path / "plain")


def test_a_layer_without_new_scales_is_left_as_it_is(plain: Path) -> None:
    opened = Pack(plain)
    layer = subject.Layer(Checkpoint.open(opened.checkpoint or plain), 1, None, None, plain)
    assert rewritten(layer, opened, {BlobId(0, "q2", 0): {}}) == opened.manifest.layers[1]


# --- what is refused ---


def refusal(loud: Path, target: Path, how: Recipe) -> str:
    with pytest.raises(UsageError) as caught:
        pack(loud, target, how, QUIET)
    return str(caught.value)


def test_too_little_memory_is_said_before_the_work_and_costs_nothing_that_was_done(
    loud: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        pack(loud, tmp_path / "p", replace(recipe, heal=STEPS), killing("layer 2", 0.0))
    before = files_of(tmp_path / "p.partial")
    monkeypatch.setattr(subject, "memory_limit", lambda: MemoryLimit(1 << 20, "a small machine"))
    assert "leave out --heal" in refusal(loud, tmp_path / "p", replace(recipe, heal=STEPS))
    assert files_of(tmp_path / "p.partial") == before


@pytest.mark.parametrize(
    ("change", "told"),
    [({"texts": ()}, "calibration text"), ({"forms": ("q4", "q8")}, "nothing to heal")],
)
def test_what_cannot_be_healed_is_refused(
    loud: Path, recipe: Recipe, tmp_path: Path, change: dict[str, tuple[str, ...]], told: str
) -> None:
    assert told in refusal(loud, tmp_path / "p", replace(recipe, heal=STEPS, **change))
    assert list(tmp_path.iterdir()) == []


def test_the_flag_asks_for_it(comoe: Comoe, loud: Path, tmp_path: Path) -> None:
    found = comoe("pack", loud, "-o", tmp_path / "p", "--calibrate", "none", "--heal", 5)
    assert found.code == 2 and "--heal" in found.sentence


# --- what it takes ---


def test_larger_models_take_more_memory(loud: Path, tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(loud)
    assert bytes_to_heal(checkpoint) > 13 * checkpoint.sites[0].expert_bytes_bf16 // 2 * 16


def test_the_estimate_counts_every_step_and_what_is_done_takes_no_time(
    loud: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comoe.make.estimate._timed", lambda call, warm=True: 1.0)
    checkpoint = Checkpoint.open(loud)
    left = Left(num_experts=0, dense_bytes=0, text=windows_of(loud, recipe), recorded=True)

    def seconds(how: Recipe, left: Left) -> float:
        return seconds_to_pack(checkpoint, blank(checkpoint), how, recipe.forms, left, tmp_path / "sample")

    none, ten, twenty = (seconds(replace(recipe, heal=steps), left) for steps in (0, 10, 20))
    assert ten - none == pytest.approx(twenty - ten)
    assert ten > none
    assert seconds(replace(recipe, heal=10), replace(left, healed=True)) == none
