"""`comoe pack`: the same input gives the same bytes, a killed run goes on, a refused one leaves nothing behind."""

import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import calibration_text, spawn
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from comoe.make.calibrate import texts_of
from comoe.make.estimate import Left, blank, seconds_to_pack
from comoe.make.pack import pack
from comoe.make.recipe import Recipe
from comoe.plan.ladder import ladder_of
from comoe.store.checkpoint import Checkpoint
from comoe.store.manifest import FORM_PARTS
from comoe.store.pack import Pack
from comoe.types import CheckpointError, MissingShard, NotFinite, StorageFull, TruncatedShard, UsageError

TOKENS = 4096
FORMS = ("merged", "q2", "q3", "q4", "q8")
QUIET = lambda step, done: None  # noqa: E731


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibration_text(tmp_path_factory.mktemp("text"))


def named(text: Path) -> Recipe:
    """`FORMS` and no others, as --forms asks for them."""
    return Recipe(forms=FORMS, pruned=False, texts=texts_of([text]), num_tokens=TOKENS)


def default(text: Path) -> Recipe:
    """What is made where nobody names forms."""
    return Recipe(texts=texts_of([text]), num_tokens=TOKENS)


@pytest.fixture(scope="module")
def packed(tiny_checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("packs") / "tiny.comoe"
    pack(tiny_checkpoint, target, named(text), QUIET)
    return target


@pytest.fixture(scope="module")
def by_default(tiny_checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("packs") / "tiny.comoe"
    pack(tiny_checkpoint, target, default(text), QUIET)
    return target


def test_the_same_input_gives_the_same_bytes(packed: Path, tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.comoe"
    pack(tiny_checkpoint, again, named(text), QUIET)
    assert files_of(again) == files_of(packed)


def test_another_seed_is_another_input(packed: Path, tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    pack(tiny_checkpoint, tmp_path / "p", replace(named(text), seed=1), QUIET)
    assert files_of(tmp_path / "p") != files_of(packed)


def test_every_step_below_exact_is_certified_and_takes_more_bytes_than_the_one_before(packed: Path) -> None:
    manifest = Pack(packed).manifest
    *steps, exact = manifest.chain
    assert len(steps) > 5 and exact.name == "exact"
    assert all(step.certificate is not None for step in steps)
    sizes = [manifest.form_bytes(step.name) for step in manifest.chain]
    assert sizes == sorted(sizes) and len({*sizes}) == len(sizes)
    memory = [step.resident_bytes for step in manifest.chain]  # of tiny blobs each takes a page, whatever its form
    assert all(took >= nbytes for took, nbytes in zip(memory, sizes, strict=True))


def test_finer_forms_lose_less_on_the_layers_outputs(packed: Path) -> None:
    layers = Pack(packed).manifest.layers
    assert all(len(found) == layer.num_experts for layer in layers for found in layer.errors.values())
    errors = [sum(sum(layer.errors[form]) for layer in layers) for form in FORMS]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 0


def test_forms_that_were_named_are_in_the_pack(packed: Path) -> None:
    manifest = Pack(packed).manifest
    assert manifest.forms == (*FORMS, "exact")
    assert all(layer.parts.keys() == {"merged", "q2", "q3", "high", "low", "exact"} for layer in manifest.layers)


@pytest.mark.parametrize(("pruned", "forms"), [(False, ("merged", "q4", "exact")), (True, ("q4", "exact"))])
def test_a_form_that_no_step_takes_stays_unless_forms_are_pruned(
    tiny_checkpoint: Path, text: Path, tmp_path: Path, pruned: bool, forms: tuple[str, ...]
) -> None:
    """With too little text to certify, no step shares experts."""
    recipe = Recipe(forms=("merged", "q4"), texts=texts_of([text]), num_tokens=1024, pruned=pruned)
    assert pack(tiny_checkpoint, tmp_path / "p", recipe, QUIET).forms == forms
    manifest = Pack(tmp_path / "p").manifest
    taken = {form for step in manifest.chain for layer in manifest.assignment(step.name) for form in layer}
    assert (manifest.forms, taken) == (forms, {"q4", "exact"})
    assert bool(list((tmp_path / "p").glob("*merged*"))) == (not pruned)


def test_by_default_forms_that_no_step_takes_are_left_out_and_their_files_too(by_default: Path) -> None:
    manifest = Pack(by_default).manifest
    taken = {form for step in manifest.chain for layer in manifest.assignment(step.name) for form in layer}
    assert {*manifest.forms} == taken and len(taken) < len(FORM_PARTS)
    parts = {part for form in taken for part in FORM_PARTS[form]}
    assert all(layer.parts.keys() == parts for layer in manifest.layers)
    assert all(layer.errors.keys() == taken - {"exact"} for layer in manifest.layers)
    files = {part.file for layer in manifest.layers for part in layer.parts.values() if part.file}
    assert {path.name for path in by_default.glob("[0-9]*")} == files
    assert Pack(by_default).broken_files() == []


def test_without_calibration_there_is_no_merged_form_and_no_certificate(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = pack(tiny_checkpoint, tmp_path / "plain", Recipe(), QUIET)
    manifest = Pack(tmp_path / "plain").manifest
    assert report.forms == manifest.forms == ("q2", "q3", "q4", "q8", "exact")
    assert manifest.chain == ()
    assert manifest.provenance.calibration == "none"


def test_exact_experts_stay_in_the_checkpoint_unless_the_pack_is_self_contained(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    by_reference = pack(tiny_checkpoint, tmp_path / "reference", Recipe(forms=("q4",)), QUIET)
    copied = pack(tiny_checkpoint, tmp_path / "copy", Recipe(forms=("q4",), self_contained=True), QUIET)
    assert copied.pack_bytes > by_reference.pack_bytes + by_reference.expert_bytes_bf16 * 0.9
    shutil.copytree(tmp_path / "copy", tmp_path / "moved")
    assert Pack(tmp_path / "moved").checkpoint is None


def test_the_estimate_comes_first(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    told: list[str] = []
    recipe = Recipe(texts=texts_of([text]), num_tokens=TOKENS)
    report = pack(tiny_checkpoint, tmp_path / "p", recipe, lambda step, done: told.append(step), told.append)
    assert "takes about" in told[0]
    assert "dense part" in told
    assert report.estimated_seconds > 0


def test_what_is_done_already_takes_no_time(
    tiny_checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comoe.make.estimate._timed", lambda call, warm=True: 1.0)
    checkpoint = Checkpoint.open(tiny_checkpoint)
    windows = {"a": [[0] * 256] * 16, "b": [[0] * 256] * 16}
    recipe, plain = Recipe(texts=texts_of([text])), Recipe()
    whole = Left(num_experts=16, dense_bytes=10**6, text=windows)
    recorded = replace(whole, dense_bytes=0, recorded=True)
    built = replace(recorded, num_experts=0)
    jobs = [(recipe, left) for left in (whole, recorded, replace(recorded, num_experts=8), built)]
    jobs += [(replace(recipe, certified=False), built), (plain, replace(built, text={}))]
    seconds = [
        seconds_to_pack(checkpoint, blank(checkpoint), how, FORMS, left, tmp_path / "sample") for how, left in jobs
    ]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[1] - seconds[2] == pytest.approx(seconds[2] - seconds[3])  # half of the experts
    assert seconds[3] > seconds[4] == seconds[5] == 0
    assert not (tmp_path / "sample").exists()


def test_an_expert_is_timed_by_building_it_in_a_folder_that_is_gone_afterwards(
    tiny_checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    checkpoint, recipe = Checkpoint.open(tiny_checkpoint), Recipe(texts=texts_of([text]))
    left = Left(num_experts=1, dense_bytes=0, text={})
    one, many = (
        seconds_to_pack(checkpoint, blank(checkpoint), recipe, FORMS, replace(left, num_experts=n), tmp_path / "sample")
        for n in (1, 1000)
    )
    assert 0 < one < many
    assert not (tmp_path / "sample").exists()


def test_a_sample_that_a_killed_run_left_is_no_hindrance(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "p.partial" / "work" / "sample").mkdir(parents=True)
    (tmp_path / "p.partial" / "work" / "input").write_text("another input")
    pack(tiny_checkpoint, tmp_path / "p", Recipe(forms=("q4",)), QUIET)
    checkpoint = Checkpoint.open(tiny_checkpoint)
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "000-high.1.unfinished").write_bytes(b"half")
    left = Left(num_experts=1, dense_bytes=0, text={})
    assert seconds_to_pack(checkpoint, blank(checkpoint), Recipe(), FORMS, left, tmp_path / "sample") > 0
    assert not (tmp_path / "sample").exists()


KILLED = {
    "with one layer done": ("layer 2", ("--forms", ",".join(FORMS)), ["000.json"]),
    "while its chain is certified": ("certificate", (), ["000.json", "001.json"]),
}


@pytest.mark.parametrize(("step", "forms", "layers"), KILLED.values(), ids=KILLED.keys())
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    packed: Path,
    by_default: Path,
    tiny_checkpoint: Path,
    text: Path,
    tmp_path: Path,
    step: str,
    forms: tuple[str, ...],
    layers: list[str],
) -> None:
    target = tmp_path / "killed.comoe"
    process = spawn("pack", tiny_checkpoint, "-o", target, "--calib", text, "--calib-tokens", TOKENS, *forms)
    assert process.stderr is not None
    for line in process.stderr:
        if step in line:
            process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not target.exists()
    done = sorted((tmp_path / "killed.comoe.partial" / "work").glob("*.json"))
    assert [path.name for path in done] == layers
    told: list[str] = []
    recipe, whole = (named(text), packed) if forms else (default(text), by_default)
    pack(tiny_checkpoint, target, recipe, lambda step, done: told.append(step), told.append)
    assert "goes on" in told[0]
    assert "calibration" not in told
    assert files_of(target) == files_of(whole)
    assert not (tmp_path / "killed.comoe.partial").exists()


def test_another_input_does_not_go_on_with_what_is_there(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    target = tmp_path / "p"
    stale = tmp_path / "p.partial" / "work"
    stale.mkdir(parents=True)
    (stale / "input").write_text("something else")
    (stale / "000.json").write_text("{}")
    pack(tiny_checkpoint, target, Recipe(), QUIET)
    assert not (target / "work").exists()


def damaged(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder)
    return folder / "model.safetensors"


def test_weights_that_are_not_finite_are_refused_and_nothing_is_left(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = damaged(tiny_checkpoint, tmp_path / "nan")
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NotFinite, match=r"expert 3, down_proj holds NaN"):
        pack(tmp_path / "nan", tmp_path / "p", Recipe(), QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nan"]


@pytest.mark.parametrize(("cut", "error"), [(100, TruncatedShard), (None, MissingShard)])
def test_a_damaged_checkpoint_is_refused_before_anything_is_written(
    tiny_checkpoint: Path, tmp_path: Path, cut: int | None, error: type[Exception]
) -> None:
    file = damaged(tiny_checkpoint, tmp_path / "source")
    data = file.read_bytes()
    file.unlink()
    if cut is not None:
        file.write_bytes(data[:-cut])
    with pytest.raises(error):
        pack(tmp_path / "source", tmp_path / "p", Recipe(), QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_experts_whose_rows_do_not_divide_into_groups_stay_exact(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=40,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "source")
    report = pack(tmp_path / "source", tmp_path / "p", Recipe(), QUIET)
    assert report.forms == Pack(tmp_path / "p").manifest.forms == ("exact",)


def test_weights_beyond_float16_scales_are_refused_by_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = damaged(tiny_checkpoint, tmp_path / "huge")
    tensors = load_file(file)
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    tensors[name] = torch.full_like(tensors[name], 1e7)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"expert 2, down_proj cannot be quantised.*--forms exact"):
        pack(tmp_path / "huge", tmp_path / "p", Recipe(), QUIET)


def test_a_pack_of_that_name_is_not_overwritten(packed: Path, tiny_checkpoint: Path) -> None:
    before = files_of(packed)
    with pytest.raises(UsageError, match="exists"):
        pack(tiny_checkpoint, packed, Recipe(), QUIET)
    assert files_of(packed) == before


def test_too_little_room_is_said_before_the_work(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageFull, match="make room"):
        pack(tiny_checkpoint, tmp_path / "p", Recipe(), QUIET)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB: the pack of the tiny checkpoint needs more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs to mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_is_named_and_the_run_goes_on_once_there_is_room(
    tiny_checkpoint: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage(small_disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1 << 40))
    with pytest.raises(StorageFull, match="Make room and run the same command"):
        pack(tiny_checkpoint, small_disk / "p", Recipe(self_contained=True), QUIET)
    assert not (small_disk / "p").exists()
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    pack(tiny_checkpoint, small_disk / "p", Recipe(self_contained=True), QUIET)
    assert [path.name for path in small_disk.iterdir()] == ["p"]


def test_a_partial_folder_of_somebody_else_is_left_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "p.partial").mkdir()
    (tmp_path / "p.partial" / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="is not of comoe pack"):
        pack(tiny_checkpoint, tmp_path / "p", Recipe(), QUIET)
    assert (tmp_path / "p.partial" / "mine.txt").read_text() == "precious"


def test_two_packs_of_one_name_do_not_work_at_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def start_another(step: str, done: float) -> None:
        if not refused:
            with pytest.raises(UsageError, match="another comoe pack") as error:
                pack(tiny_checkpoint, tmp_path / "p", Recipe(), QUIET)
            refused.append(str(error.value))

    pack(tiny_checkpoint, tmp_path / "p", Recipe(), start_another)
    assert refused
    assert Pack(tmp_path / "p").broken_files() == []


def test_calibration_files_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "fox.txt" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text("fox")
    with pytest.raises(UsageError, match="'fox'"):
        texts_of(paths)


def test_too_little_text_gives_no_certificate(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    pack(tiny_checkpoint, tmp_path / "p", Recipe(forms=("q4",), texts=texts_of([text]), num_tokens=1024), QUIET)
    manifest = Pack(tmp_path / "p").manifest
    assert len(manifest.chain) > 1 and all(step.certificate is None for step in manifest.chain)
    assert ladder_of(manifest).forms(0.5) == ("exact",)


def test_a_pack_is_no_checkpoint(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a pack already"):
        pack(packed, tmp_path / "p", Recipe(), QUIET)


def test_where_no_pack_can_be_is_said_first(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "p", tmp_path / "absent" / "p"):
        with pytest.raises(UsageError, match="choose another place"):
            pack(tiny_checkpoint, target, Recipe(), QUIET)
