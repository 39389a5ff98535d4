"""The certificate: what each form of all experts costs in quality, measured on text that nothing was fitted to."""

from collections.abc import Callable, Mapping
from pathlib import Path

from comoe.make.protocol import Evaluation
from comoe.make.score import Score, compare
from comoe.plan.ladder import ladder_of
from comoe.runtime.generate import tokenizer_of
from comoe.runtime.load import Loader, Options
from comoe.store.manifest import ChainStep
from comoe.store.pack import Pack

Windows = Mapping[str, list[list[int]]]

MIN_CACHE_BYTES = 256 << 20
"""Experts that may be in memory while a form is scored, however small a layer is."""


def certify(
    folder: Path, forms: list[str], windows: Windows, progress: Callable[[float], None], threads: int | None = None
) -> tuple[ChainStep, ...]:
    """A step per form, coarse to fine, then the exact one. `progress` is told the fraction done."""
    exact = score(folder, "exact", windows, threads)
    steps = []
    for done, form in enumerate(forms, 1):
        progress(done / (len(forms) + 1))
        loss = compare(score(folder, form, windows, threads), exact)
        steps.append(
            ChainStep(
                form=form,
                resident_bytes=_resident_bytes(folder, form),
                loss=loss.mean,
                loss_ci95=loss.ci95,
                loss_worst_domain=loss.worst,
                worst_domain=loss.worst_domain,
            )
        )
    everywhere = sorted(windows)[0]
    exact_step = ChainStep("exact", _resident_bytes(folder, "exact"), 0.0, (0.0, 0.0), 0.0, everywhere)
    return (*steps, exact_step)


def score(folder: Path, form: str, windows: Windows, threads: int | None = None) -> Score:
    """Nats of the model with every expert in `form`, in float32; in memory are the experts of one layer at a time."""
    loader = Loader(Pack(folder), Options(dtype="float32", threads=threads))
    rung = loader.ladder.rung(form)
    model = loader.streamed(form, min(rung.nbytes, max(MIN_CACHE_BYTES, loader.largest_layer(form))))
    with model.comoe:
        evaluation = Evaluation.for_model(model, tokenizer_of(folder))
        return Score({name: evaluation.nats(found) for name, found in windows.items()})


def _resident_bytes(folder: Path, form: str) -> int:
    return ladder_of(Pack(folder).manifest).rung(form).nbytes
