"""`comoe bench ladder`: what comoe's chain and published methods make of a model's experts, at equal bytes.

All experts are resident, nothing is streamed; every row is scored by the evaluation protocol with transformers' own
arithmetic. Ablations leave out one ingredient of the chain at a time.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter

import msgspec
import torch

from comoe.bench.bank import Approximation, Bank, Windows
from comoe.bench.document import Document, checkpoints, published, settings, workplace
from comoe.bench.gate import CHANGES, changed
from comoe.bench.ladder_figures import figures, page
from comoe.bench.losses import RAW, raw
from comoe.bench.material import Material, read_material
from comoe.bench.published import METHODS
from comoe.bench.rows import Job, Row, RowFile, collect
from comoe.bench.subject import Subject
from comoe.bench.upcycled import NAME as UPCYCLED
from comoe.bench.upcycled import make_upcycled
from comoe.make.calibrate import cut, fitted
from comoe.make.chain import restricted, with_chain
from comoe.make.export import expert_weights
from comoe.make.pack import BATCH_WINDOWS
from comoe.make.recipe import Recipe
from comoe.make.score import Score
from comoe.make.shared import AS_MEASURED, SHARING, Sharing
from comoe.make.text import windows
from comoe.runtime.experts import SiteMath
from comoe.store.manifest import FORM_PARTS, ChainStep, Manifest
from comoe.store.pack import Pack
from comoe.types import ExpertId, Progress

NAME = "ladder"
OURS = "comoe"


@dataclass(frozen=True, slots=True)
class Scope:
    """How much is measured. `windows` are of each domain; `domains` None: all there are."""

    domains: int | None
    windows: int
    calibration_tokens: int
    shares: tuple[float, ...]
    ablated_shares: tuple[float, ...]
    gate: bool
    upcycled: bool


FULL = Scope(None, 48, 49152, (0.55, 0.3, 0.16, 0.08), (0.16, 0.08, 0.03), gate=True, upcycled=True)
QUICK = Scope(2, 4, 5120, (0.16,), (), gate=False, upcycled=False)


def _without(*forms: str) -> tuple[str, ...]:
    return tuple(form for form in FORM_PARTS if form not in (*forms, "exact"))


ALL, OWN = _without(), _without(*SHARING)


@dataclass(frozen=True, slots=True)
class Ablation:
    """A chain of `forms` alone, of a pack whose recipe was changed. Nothing is certified: shared forms are taken
    wherever local errors speak for them."""

    forms: tuple[str, ...] = ALL
    sharing: Sharing = AS_MEASURED
    compensated: bool = True

    def recipe(self, whole: Recipe) -> Recipe:
        """The recipe of the pack that the chain is made from."""
        return replace(
            whole, forms=ALL, pruned=False, certified=False, sharing=self.sharing, compensated=self.compensated
        )

    def chained(self, manifest: Manifest) -> Manifest:
        """A pack's manifest with this chain alone."""
        bare = msgspec.structs.replace(manifest, chain=())
        forms = [form for form in manifest.forms if form in (*self.forms, "exact")]
        return with_chain(restricted(bare, forms), None, shared=bool({*SHARING} & {*self.forms}), pruned=False)


ABLATIONS = {
    "all forms": Ablation(),
    "all but merged": Ablation(_without("merged")),
    "all but lowrank and residual": Ablation(_without("lowrank", "residual")),
    "all, no distillation": Ablation(sharing=Sharing(distil_steps=0)),
    "all, no alignment": Ablation(sharing=Sharing(aligned=False)),
    "own forms": Ablation(OWN),
    "own forms, no dropping": Ablation(OWN[1:]),
    "own forms, no error compensation": Ablation(OWN, compensated=False),
}


class Contest(Subject):
    """One model: what methods are given, what they are scored on, and comoe's packs of it."""

    def __init__(self, folder: Path, material: Material, scope: Scope, work: Path) -> None:
        super().__init__(folder, work)
        self._material, self._scope, self._work = material, scope, work

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe(texts=self._material.calibration, num_tokens=self._scope.calibration_tokens)

    @cached_property
    def calibration(self) -> dict[str, list[list[int]]]:
        """The windows of calibration text by domain, those that forms are fitted to and others."""
        return cut(self.tokenizer, self.recipe.texts, self.window_length, self.recipe.num_tokens)

    @cached_property
    def bank(self) -> Bank:
        chosen = fitted(self.calibration)
        batches = [chosen[at : at + BATCH_WINDOWS] for at in range(0, len(chosen), BATCH_WINDOWS)]
        return Bank(self.folder, self.tokenizer, batches, self._work / f"{self.name}.inputs")

    @cached_property
    def windows(self) -> Windows:
        """What is scored: the validation text of every domain."""
        length, number = self.window_length, self._scope.windows
        return {name: windows(self.tokenizer, text, length, number) for name, text in self._material.valid.items()}


def run(models: Path, shared: Path, *, quick: bool, out: Path | None, progress: Progress) -> Document:
    """The benchmark's document, of every model in a folder of `models` and of one that is upcycled here.

    In `out`, finished rows are kept and gone on with, as are packs and the upcycled model. Raises UsageError.
    """
    scope = QUICK if quick else FULL
    material = read_material(shared, scope.domains, items=0)
    with workplace(out) as folder:
        work = folder / "work"
        folders = checkpoints(models)
        if scope.upcycled:
            folders.append(_upcycled(folders, shared, work, progress))
        contests = [Contest(found, material, scope, work) for found in folders]
        conditions = settings(
            material, quick=quick, windows_per_domain=scope.windows, calibration_tokens=scope.calibration_tokens
        )
        jobs = [job for contest in contests for job in _jobs(contest, scope, conditions)]
        jobs += [job for contest in contests for job in _ablations(contest, scope, conditions)]
        rows = collect(jobs, RowFile(folder / f"{NAME}.rows.jsonl"), progress)
        hashes = {contest.name: contest.hash for contest in contests}
        return published(folder, NAME, conditions, hashes, figures(rows), page)


def _upcycled(folders: list[Path], shared: Path, work: Path, progress: Progress) -> Path:
    """The upcycled model, trained now or found."""
    target = work / UPCYCLED
    if not target.exists():
        source = next(found for found in folders if "qwen3" in found.name)
        texts = sorted((shared / "data" / "corpus").glob("*.calib.txt"))
        make_upcycled(source, texts, target, progress)
    return target


def _jobs(contest: Contest, scope: Scope, conditions: Document) -> Iterator[Job]:
    depends = {"model": contest.hash, **conditions}
    named = {"model": contest.name}
    yield Job({"kind": "exact", **named}, depends, partial(_exact_row, contest))
    for change in CHANGES if scope.gate else ():
        yield Job({"kind": "gate", **named, "change": change}, depends, partial(_gate_row, contest, change))
    for share in scope.shares:
        measure = partial(_our_row, contest, share)
        yield Job({"kind": OURS, **named, "method": OURS, "share": share}, depends, measure)
        for method in METHODS:
            measure = partial(_published_row, contest, method, share)
            yield Job({"kind": "published", **named, "method": method, "share": share}, depends, measure)


def _ablations(contest: Contest, scope: Scope, conditions: Document) -> Iterator[Job]:
    depends, named = {"model": contest.hash, **conditions}, {"model": contest.name}
    for name, ablation in ABLATIONS.items():
        for share in scope.ablated_shares:
            measure = partial(_ablated_row, contest, ablation, share)
            yield Job({"kind": "ablation", **named, "method": name, "share": share}, depends, measure)


def _exact_row(contest: Contest) -> Row:
    return {"bytes": contest.bank.nbytes, **_scored(contest.bank.nats(None, contest.windows))}


def _gate_row(contest: Contest, change: str) -> Row:
    return _scored(contest.bank.nats(changed(contest.bank, change), contest.windows))


def _published_row(contest: Contest, method: str, share: float) -> Row:
    start_s = perf_counter()
    made = METHODS[method](contest.bank, share)
    seconds = perf_counter() - start_s
    if made is None:
        return {"reaches": False}
    score = contest.bank.nats(made, contest.windows)
    return {"reaches": True, "bytes": made.nbytes, "seconds": seconds, **_scored(score)}


def _our_row(contest: Contest, share: float) -> Row:
    opened = Pack(contest.pack(contest.recipe))
    row = _step_row(contest, opened, opened.manifest, share)
    certified = {step.name: step.certificate for step in opened.manifest.chain}.get(row.get("step", ""))
    return {**row, "certified_loss": certified.loss if certified else None}


def _ablated_row(contest: Contest, ablation: Ablation, share: float) -> Row:
    opened = Pack(contest.pack(ablation.recipe(contest.recipe)))
    return _step_row(contest, opened, ablation.chained(opened.manifest), share)


def _step_row(contest: Contest, opened: Pack, manifest: Manifest, share: float) -> Row:
    """The row of the finest step of a chain within `share` of the experts' bytes. Closes the pack."""
    with closing(opened):
        found = step_within(opened, manifest, contest.bank, share)
    if found is None:
        return {"reaches": False}
    step, made = found
    return {
        "reaches": True,
        "bytes": made.nbytes,
        "step": step.name,
        "resident_bytes": step.resident_bytes,
        "forms": _form_shares(manifest, step.name),
        **_scored(contest.bank.nats(made, contest.windows)),
    }


def step_within(opened: Pack, manifest: Manifest, bank: Bank, share: float) -> tuple[ChainStep, Approximation] | None:
    """The finest step of a chain within `share` of the experts' bytes, and its weights; None where there is none.

    `manifest` is the pack's, or has another chain of its forms.
    """
    sizes = {step: manifest.form_bytes(step.name) for step in manifest.chain}
    small = [step for step, nbytes in sizes.items() if nbytes <= share * bank.nbytes]
    if not small:
        return None
    step = max(small, key=sizes.__getitem__)
    return step, rung_weights(opened, manifest, bank, step.name)


def rung_weights(opened: Pack, manifest: Manifest, bank: Bank, rung: str) -> Approximation:
    """The weights of a form or a step; `manifest` is the pack's, or has another chain of its forms."""
    assignment = enumerate(manifest.assignment(rung))
    weights = [_layer_weights(opened, bank, layer, forms) for layer, forms in assignment]
    return Approximation(weights, manifest.form_bytes(rung))


def _layer_weights(opened: Pack, bank: Bank, layer: int, forms: tuple[str, ...]) -> list[dict[str, torch.Tensor]]:
    studied = bank.layers[layer]
    maths = SiteMath(studied.module, studied.site, torch.float32)
    return [expert_weights(opened, maths, ExpertId(layer, index), form) for index, form in enumerate(forms)]


def _form_shares(manifest: Manifest, step: str) -> dict[str, float]:
    """Share of experts by form."""
    forms = [form for layer in manifest.assignment(step) for form in layer]
    return {form: forms.count(form) / len(forms) for form in manifest.forms if form in forms}


def _scored(score: Score) -> Row:
    return {"nats": score.mean, RAW: raw(score)}
