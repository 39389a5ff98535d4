"""`comoe pack`: a checkpoint becomes a pack, layer by layer, in a folder that takes its name only when it is whole.

Work goes to `PACK.partial`: each finished step leaves a file there, so that a killed run goes on where it stopped.
The same input gives the same bytes.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec
import torch
from blake3 import blake3

from comoe.device import process
from comoe.make.calibrate import LayerInputs, check_calibratable, cut, fitted, held_out, record, recorded
from comoe.make.certify import MIN_HELD_OUT, certify
from comoe.make.chain import chosen, with_chain
from comoe.make.dense import dense_entry, write_dense_part
from comoe.make.estimate import (
    Left,
    blank,
    bytes_outside_experts,
    bytes_to_pack,
    healing_bytes,
    recording_bytes,
    seconds_to_pack,
)
from comoe.make.folder import file_hashes, remove_unused
from comoe.make.heal import Lessons, better, check_healable, heal, rewritten
from comoe.make.layers import build
from comoe.make.price import routing_price
from comoe.make.protocol import Evaluation
from comoe.make.recipe import CALIBRATED_FORMS, Recipe, Report
from comoe.make.routing import gate_quantiles, write_routing
from comoe.make.study import Layer
from comoe.runtime.generate import tokenizer_of
from comoe.runtime.skeleton import load_skeleton
from comoe.runtime.threads import use_threads
from comoe.store.checkpoint import Checkpoint
from comoe.store.families import experts_modules
from comoe.store.layout import quantised
from comoe.store.manifest import (
    FORM_PARTS,
    FORMAT_VERSION,
    MANIFEST,
    Certificate,
    LayerEntry,
    Manifest,
    Provenance,
    decode,
    encode,
)
from comoe.store.pack import Pack, header_hash, source_entry
from comoe.store.whole import UNFINISHED, disk_errors, whole
from comoe.types import CheckpointError, Progress, StorageFull, UsageError
from comoe.units import format_seconds, format_size

INPUTS, JUDGED = "inputs", "judged"
"""Folders of what layers see: of the text that forms are fitted to, and of that which is held out."""

BATCH_WINDOWS = 16


def pack(
    source: str | Path, target: Path, recipe: Recipe, progress: Progress, say: Callable[[str], None] = lambda text: None
) -> Report:
    """Make the pack `target` of the checkpoint `source`. Raises CheckpointError, UsageError or StorageFull.

    A folder `target`.partial of an earlier, killed run with the same input is gone on with. `say` is told first how
    long it will take.
    """
    start_s = perf_counter()
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target} exists: choose another name or remove it first.")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"{target.absolute().parent} is not a folder: make it first, or choose another place.")
    use_threads(recipe.threads)
    process.steady_malloc()
    process.bound_kernel_caches()
    checkpoint = Checkpoint.open(source)
    if recipe.texts:
        check_calibratable(checkpoint)
    packer = Packer(checkpoint, target, recipe, progress, say)
    if recipe.heal:
        check_healable(checkpoint, packer.forms, calibrated=bool(recipe.texts))
    with disk_errors(target), packer.alone(), packer.removed_when_refused():
        manifest = packer.run()
    return Report(
        model_type=manifest.model_type,
        layers=len(manifest.layers),
        experts_per_layer=max(layer.num_experts for layer in manifest.layers),
        expert_bytes_bf16=manifest.expert_bytes_bf16,
        pack_bytes=Pack(target).own_bytes,
        forms=manifest.forms,
        seconds=perf_counter() - start_s,
        estimated_seconds=packer.estimated_s,
        peak_bytes=process.peak_bytes(),
    )


class Packer:
    """The steps of packing; each is skipped where its result is there already."""

    def __init__(
        self, checkpoint: Checkpoint, target: Path, recipe: Recipe, progress: Progress, say: Callable[[str], None]
    ) -> None:
        unknown = sorted(set(recipe.forms) - set(FORM_PARTS))
        if unknown:
            raise UsageError(f"there is no form {unknown[0]!r}: choose from {', '.join(FORM_PARTS)}.")
        self._checkpoint, self._target, self._recipe = checkpoint, target, recipe
        self._progress, self._say = progress, say
        self._folder = target.with_name(f"{target.name}.partial")
        self._work = self._folder / "work"
        forms = {"exact", *recipe.forms} - (set() if recipe.texts else CALIBRATED_FORMS)
        if not all(any(quantised(leaf) for leaf in site.leaves) for site in checkpoint.sites):
            forms &= {"exact"}
        self.forms = tuple(form for form in FORM_PARTS if form in forms)
        self.estimated_s = 0.0

    def run(self) -> Manifest:
        self._begin()
        self._estimate()
        dense_bytes = self._dense()
        if dropped := [form for form in self._recipe.forms if form not in self.forms and self._recipe.texts]:
            self._say(f"No rows of these experts divide into groups of 32, so there will be no {', '.join(dropped)}.")
        inputs = self._calibrate()
        layers = self._layers(inputs)
        process.trim_malloc()
        manifest = self._manifest(dense_bytes, layers, inputs)
        self._write(MANIFEST, encode(manifest))
        if self._recipe.texts:
            manifest = self._priced(self._with_chain(manifest))
            self._write(MANIFEST, encode(manifest))
            remove_unused(self._folder, manifest)
        shutil.rmtree(self._work)
        self._folder.replace(self._target)
        return manifest

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the partial folder: nobody else's is touched, and two packs of one name do not work in it at once."""
        if self._folder.exists() and any(self._folder.iterdir()) and not (self._work / "input").exists():
            raise UsageError(f"{self._folder} exists and is not of comoe pack: move it, or choose another name.")
        self._folder.mkdir(exist_ok=True)
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise UsageError(f"another comoe pack is making {self._target}: wait for it, or stop it.") from error
        finally:
            os.close(descriptor)

    @contextmanager
    def removed_when_refused(self) -> Iterator[None]:
        """What was made of a checkpoint that turned out to be damaged is of no use: nothing is left."""
        try:
            yield
        except (CheckpointError, UsageError):
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        except StorageFull:
            if not self._work.exists():
                self._folder.rmdir()
            raise

    def _estimate(self) -> None:
        """Say how long the rest will take, from the time that one expert's steps take here."""
        copied = (self._work / "dense").exists()
        sites = enumerate(self._checkpoint.sites)
        left = Left(
            num_experts=sum(site.num_experts for at, site in sites if not self._entry(at).exists()),
            dense_bytes=0 if copied else bytes_outside_experts(self._checkpoint),
            recorded=(self._work / "calibrated").exists(),
            healed=(self._work / "healed.json").exists(),
            text=self._windows if self._recipe.texts else {},
        )
        self.estimated_s = seconds_to_pack(
            self._checkpoint, self._blank, self._recipe, self.forms, left, self._work / "sample"
        )
        seconds, nbytes = format_seconds(self.estimated_s), format_size(self._pack_bytes)
        takes = f"goes on: about {seconds} more, {nbytes}" if copied else f"takes about {seconds} and {nbytes}"
        self._say(f"Packing {self._checkpoint.folder} {takes} of disk.")

    @property
    def _pack_bytes(self) -> int:
        return bytes_to_pack(self._checkpoint, self.forms, self_contained=self._recipe.self_contained)

    def _entry(self, layer: int) -> Path:
        """Where a layer's entry of the manifest is kept once the layer is done."""
        return self._work / f"{layer:03}.json"

    def _begin(self) -> None:
        """Make the partial folder, or clear one that another input left. Raises UsageError for anybody else's."""
        print_ = self._fingerprint()
        mark = self._work / "input"
        if not (mark.exists() and mark.read_text() == print_):
            self._check_space()
            for path in self._folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._work.mkdir()
            mark.write_text(print_)
        for path in self._folder.rglob(f"*{UNFINISHED}"):
            path.unlink()

    def _check_space(self) -> None:
        recording = recording_bytes(self._checkpoint, self._recipe.num_tokens) if self._recipe.texts else 0
        healed = healing_bytes(self._checkpoint, self.forms) if self._recipe.heal else 0
        needed = self._pack_bytes + recording + healed
        parent = next(folder for folder in (self._folder, *self._folder.absolute().parents) if folder.exists())
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise StorageFull(
                f"the pack needs {format_size(needed)} in {parent}, {format_size(free)} are free: make room."
            )

    def _fingerprint(self) -> str:
        """Everything that the pack's bytes depend on."""
        checkpoint = self._checkpoint
        files = [(name, header_hash(checkpoint.folder / name)) for name in checkpoint.files]
        config = (checkpoint.folder / "config.json").read_text()
        return blake3(repr((version("comoe"), files, config, self._recipe)).encode()).hexdigest()

    def _dense(self) -> int:
        """The dense part, the config and the tokenizer."""
        done = self._work / "dense"
        if not done.exists():
            self._progress("dense part", 0.0)
            done.write_text(str(write_dense_part(self._checkpoint, self._folder)))
        return int(done.read_text())

    def _calibrate(self) -> bool:
        """Run the calibration text once; False where there is none."""
        if not self._recipe.texts:
            return False
        done = self._work / "calibrated"
        if not done.exists():
            texts = {domain: fitted({domain: found}) for domain, found in self._windows.items()}
            self._record(texts.values(), INPUTS, 0.0, 0.15)
            self._record([[w for found in held_out(self._windows).values() for w in found]], JUDGED, 0.15, 0.2)
            experts = [site.num_experts for site in self._checkpoint.sites]
            write_routing(self._folder, partial(self._recorded, INPUTS), experts, texts)
            done.touch()
        return True

    def _record(self, texts: Iterable[list[list[int]]], name: str, start: float, end: float) -> None:
        evaluation = self._evaluation
        batches = [text[at : at + BATCH_WINDOWS] for text in texts for at in range(0, len(text), BATCH_WINDOWS)]
        for count in record(evaluation.model, self._checkpoint, batches, evaluation, self._work / name):
            self._progress("calibration", start + (end - start) * count / len(batches))

    @cached_property
    def _model(self) -> Any:
        return load_skeleton(self._folder, torch.float32)

    @cached_property
    def _evaluation(self) -> Evaluation:
        return Evaluation.for_model(self._model, tokenizer_of(self._folder))

    @cached_property
    def _blank(self) -> Any:
        return blank(self._checkpoint)

    @cached_property
    def _windows(self) -> dict[str, list[list[int]]]:
        evaluation = Evaluation.for_model(self._blank, tokenizer_of(self._checkpoint.folder))
        return cut(evaluation.tokenizer, self._recipe.texts, evaluation.window_length, self._recipe.num_tokens)

    def _recorded(self, name: str, layer: int) -> LayerInputs:
        return recorded(self._work / name, layer)

    @property
    def _inputs(self) -> Iterator[LayerInputs]:
        """What every layer saw of the text that forms are fitted to."""
        return (self._recorded(INPUTS, layer) for layer in range(len(self._checkpoint.sites)))

    def _layers(self, calibrated: bool) -> tuple[LayerEntry, ...]:
        entries = []
        sites = self._checkpoint.sites
        for index, (_, module) in enumerate(experts_modules(self._model)):
            self._progress(f"layer {index + 1} of {len(sites)}", 0.2 + 0.6 * index / len(sites))
            done = self._entry(index)
            if not done.exists():
                layer = self._layer(index, module, calibrated=calibrated)
                entry = build(layer, self.forms, self._recipe.sharing, self_contained=self._recipe.self_contained)
                self._write(f"work/{done.name}", encode(entry))
            entries.append(decode(done.read_bytes(), LayerEntry, done))
        return tuple(entries)

    def _layer(self, index: int, module: Any, *, calibrated: bool) -> Layer:
        layer = Layer(self._checkpoint, index, module, None, self._folder)
        if not calibrated:
            return layer
        inputs, judged = (self._recorded(name, index) for name in (INPUTS, JUDGED))
        return replace(layer, inputs=inputs, judged=judged, compensated=self._recipe.compensated)

    def _manifest(self, dense_bytes: int, layers: tuple[LayerEntry, ...], calibrated: bool) -> Manifest:
        checkpoint, recipe = self._checkpoint, self._recipe
        texts = "".join(text.text for text in recipe.texts)
        referring = any(part.file is None for layer in layers for part in layer.parts.values())
        return Manifest(
            format_version=FORMAT_VERSION,
            model_type=checkpoint.model_type,
            dtype=checkpoint.dtype,
            experts_per_token=checkpoint.experts_per_token,
            forms=self.forms,
            layers=layers,
            chain=(),
            provenance=Provenance(
                comoe=version("comoe"),
                transformers=version("transformers"),
                calibration=blake3(texts.encode()).hexdigest() if texts else "none",
                calibration_tokens=recipe.num_tokens if texts else 0,
                seed=recipe.seed,
            ),
            dense_bytes=dense_bytes,
            dense=dense_entry(checkpoint.config),
            gate_quantiles=gate_quantiles(self._inputs) if calibrated else (),
            files=file_hashes(self._folder),
            source=source_entry(checkpoint.folder.resolve(), checkpoint.files) if referring else None,
        )

    def _with_chain(self, manifest: Manifest) -> Manifest:
        """The manifest with its chain, certified where there is text enough; forms that it does not use are left out
        where nobody named them."""
        recipe = self._recipe
        self._drop_model()
        certify = self._certify if self._judges else None
        if not recipe.heal:
            return with_chain(manifest, certify, shared=recipe.shared, pruned=recipe.pruned)
        choose = partial(chosen, manifest, certify, shared=recipe.shared, pruned=recipe.pruned)
        plain = self._kept("chosen", choose)
        return better(plain, self._kept("healed", partial(self._healed, plain)), certify, self._say)

    @property
    def _judges(self) -> bool:
        """Whether losses are measured: wanted, and of text enough."""
        return self._recipe.certified and sum(map(len, held_out(self._windows).values())) >= MIN_HELD_OUT

    def _priced(self, manifest: Manifest) -> Manifest:
        """The manifest with what a routing bias costs, where that can be measured."""
        if not self._judges or self._checkpoint.experts_per_token < 2:
            return manifest
        self._write(MANIFEST, encode(manifest))
        price = routing_price(self._folder, held_out(self._windows), self._recipe.threads)
        return msgspec.structs.replace(manifest, routing_price=price)

    def _drop_model(self) -> None:
        for name in ("_model", "_evaluation"):
            self.__dict__.pop(name, None)

    def _kept(self, name: str, make: Callable[[], Manifest]) -> Manifest:
        """A manifest on the way to the last one, made now or by an earlier run."""
        path = self._work / f"{name}.json"
        if not path.exists():
            self._write(f"work/{path.name}", encode(make()))
        found: Manifest = decode(path.read_bytes(), Manifest, path)
        return found

    def _healed(self, manifest: Manifest) -> Manifest:
        """`manifest` with healed scales, in files beside those that were."""
        self._write(MANIFEST, encode(manifest))
        number = self._recipe.heal
        lessons = Lessons(
            number, self._recipe.seed, lambda at, _: self._progress("healing", 0.8 + 0.2 * (at + 1) / number)
        )
        with closing(Pack(self._folder)) as opened:
            scales = heal(opened, self._checkpoint, self._evaluation, fitted(self._windows), lessons)
            modules = enumerate(experts_modules(self._model))
            layers = (self._layer(at, module, calibrated=True) for at, (_, module) in modules)
            entries = tuple(rewritten(layer, opened, scales) for layer in layers)
        self._drop_model()
        provenance = msgspec.structs.replace(manifest.provenance, healing_steps=number if scales else 0)
        return msgspec.structs.replace(manifest, layers=entries, provenance=provenance)

    def _certify(self, manifest: Manifest) -> dict[str, Certificate]:
        """Certificates of the manifest's chain, but for exact, by step."""
        self._write(MANIFEST, encode(manifest))
        steps = [step.name for step in manifest.chain if step.name != "exact"]
        told = f"certificate of {len(steps)} sizes"
        windows, threads = held_out(self._windows), self._recipe.threads
        return certify(self._folder, steps, windows, lambda done: self._progress(told, 0.8 + 0.2 * done), threads)

    def _write(self, name: str, data: bytes) -> None:
        """Write a file of the partial folder so that it is whole or not there."""
        with whole(self._folder / name) as file:
            file.write(data)
