"""`comoe bench quality`: what forms and plans cost in quality, on trained models, by the evaluation protocol.

For every model: eager transformers against the figures that it carries, every form with all experts in it, and the
plan for every bound and budget. Ratios and losses of plans are against the exact model decoding beside them.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from comoe.bench.figures import figures, page, with_losses
from comoe.bench.forms import form_row, reference_row
from comoe.bench.material import FULL, QUICK, Material, Scope, read_material
from comoe.bench.plans import plan_row
from comoe.bench.rows import Job, RowFile, collect
from comoe.bench.subject import CONTEXT, Subject
from comoe.defaults import FORMS
from comoe.device.machine import machine
from comoe.types import Progress, UsageError

NAME = "quality"
LADDER = ("merged", "q2", "q3", "q4", "q8")
"""The forms that are scored alone, with all experts in one."""


def run(models: Path, shared: Path, *, quick: bool, out: Path | None, progress: Progress) -> dict[str, Any]:
    """The benchmark's document, of every model in a folder of `models`; texts and tasks come from `shared`.

    In `out`, finished rows are kept and gone on with (quality.rows.jsonl), as are packs; the document is left there
    as JSON and as a page. Raises UsageError.
    """
    scope = QUICK if quick else FULL
    material = read_material(shared, scope.domains, scope.items)
    with ExitStack() as stack:
        folder = out or Path(stack.enter_context(TemporaryDirectory(prefix="comoe-bench-")))
        folder.mkdir(parents=True, exist_ok=True)
        subjects = [stack.enter_context(Subject(m, material, scope, folder / "packs")) for m in checkpoints(models)]
        settings = _settings(scope, material, quick=quick)
        jobs = [job for subject in subjects for job in _jobs(subject, settings)]
        rows = with_losses(collect(jobs, RowFile(folder / f"{NAME}.rows.jsonl"), progress))
        document = {
            "name": NAME,
            "machine": machine(),
            "settings": settings,
            "models": {subject.name: subject.hash for subject in subjects},
            **figures(rows),
            "rows": rows,
        }
        (folder / f"{NAME}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
        (folder / f"{NAME}.md").write_text(page(document), "utf-8")
    return document


def checkpoints(models: Path) -> list[Path]:
    """The checkpoints in folders of `models`. UsageError where there are none."""
    found = sorted(path.parent for path in models.glob("*/config.json"))
    if not found:
        raise UsageError(f"{models} holds no models: name a folder of checkpoints by --models or COMOE_SHARED.")
    return found


def _settings(scope: Scope, material: Material, *, quick: bool) -> dict[str, Any]:
    """What all rows depend on, beside their model."""
    return {
        "comoe": version("comoe"),
        "quick": quick,
        "domains": list(material.valid),
        "windows_per_domain": scope.windows,
        "decode_tokens_per_domain": scope.decode_tokens,
        "calibration_tokens": scope.calibration_tokens,
        "context": CONTEXT,
        "threads": torch.get_num_threads(),
        "texts": material.hash,
    }


def _jobs(subject: Subject, settings: dict[str, Any]) -> Iterator[Job]:
    depends = {"model": subject.hash, "machine": machine(), **settings}
    named = {"model": subject.name}
    yield Job({"kind": "reference", **named}, depends, partial(reference_row, subject))
    for form in ("exact", *reversed(LADDER)):
        yield Job({"kind": "form", **named, "form": form}, depends, partial(form_row, subject, form))
    for bound in subject.scope.bounds:
        for share in subject.scope.shares:
            measure = partial(plan_row, subject, bound, share)
            ladder = {"forms": FORMS}
            yield Job({"kind": "plan", **named, "bound": bound, "share": share}, {**depends, **ladder}, measure)
