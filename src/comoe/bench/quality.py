"""`comoe bench quality`: what forms and plans cost in quality, on trained models, by the evaluation protocol.

For every model: eager transformers against the figures that it carries, every form with all experts in it, and the
plan for every bound and budget. Ratios and losses of plans are against the exact model decoding beside them.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from comoe.bench.document import Document, checkpoints, published, settings, workplace
from comoe.bench.figures import figures, page, with_losses
from comoe.bench.forms import form_row, reference_row
from comoe.bench.material import FULL, QUICK, read_material
from comoe.bench.plans import plan_row
from comoe.bench.rows import Job, RowFile, collect
from comoe.bench.served import CONTEXT, Served
from comoe.defaults import FORMS
from comoe.device.machine import machine
from comoe.types import Progress

NAME = "quality"
LADDER = ("q2", "q3", "q4", "q8")
"""The forms that are scored alone, with all experts in one."""


def run(models: Path, shared: Path, *, quick: bool, out: Path | None, progress: Progress) -> Document:
    """The benchmark's document, of every model in a folder of `models`; texts and tasks come from `shared`.

    In `out`, finished rows are kept and gone on with (quality.rows.jsonl), as are packs; the document is left there
    as JSON and as a page. Raises UsageError.
    """
    scope = QUICK if quick else FULL
    material = read_material(shared, scope.domains, scope.items)
    with workplace(out) as folder, ExitStack() as stack:
        subjects = [stack.enter_context(Served(m, material, scope, folder / "packs")) for m in checkpoints(models)]
        conditions = settings(
            material,
            quick=quick,
            windows_per_domain=scope.windows,
            calibration_tokens=scope.calibration_tokens,
            decode_tokens_per_domain=scope.decode_tokens,
            context=CONTEXT,
        )
        jobs = [job for subject in subjects for job in _jobs(subject, conditions)]
        rows = with_losses(collect(jobs, RowFile(folder / f"{NAME}.rows.jsonl"), progress))
        hashes = {subject.name: subject.hash for subject in subjects}
        return published(folder, NAME, conditions, hashes, figures(rows) | {"rows": rows}, page)


def _jobs(subject: Served, conditions: Document) -> Iterator[Job]:
    depends = {"model": subject.hash, "machine": machine(), **conditions}
    named = {"model": subject.name}
    yield Job({"kind": "reference", **named}, depends, partial(reference_row, subject))
    for form in ("exact", *reversed(LADDER)):
        yield Job({"kind": "form", **named, "form": form}, depends, partial(form_row, subject, form))
    for bound in subject.scope.bounds:
        for share in subject.scope.shares:
            measure = partial(plan_row, subject, bound, share)
            ladder = {"forms": FORMS}
            yield Job({"kind": "plan", **named, "bound": bound, "share": share}, {**depends, **ladder}, measure)
