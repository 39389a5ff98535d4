"""The certificate: what each form of all experts costs in quality, measured on text that nothing was fitted to."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from comoe.make.protocol import Evaluation
from comoe.make.score import Score, compare
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
    loader = Loader(Pack(folder), Options(dtype="float32", threads=threads))
    scores = {}
    for form, found in _scores(loader, ["exact", *forms], windows):
        scores[form] = found
        progress(len(scores) / (len(forms) + 1))
    steps = []
    for form in forms:
        loss = compare(scores[form], scores["exact"])
        steps.append(
            ChainStep(
                form=form,
                resident_bytes=loader.ladder.rung(form).nbytes,
                loss=loss.mean,
                loss_ci95=loss.ci95,
                loss_worst_domain=loss.worst,
                worst_domain=loss.worst_domain,
            )
        )
    exact_step = ChainStep("exact", loader.ladder.exact.nbytes, 0.0, (0.0, 0.0), 0.0, sorted(windows)[0])
    return (*steps, exact_step)


def _scores(loader: Loader, forms: Sequence[str], windows: Windows) -> Iterator[tuple[str, Score]]:
    """Nats of the model with every expert in one form, for each of `forms`; in float32.

    The dense part is loaded once; in memory are the experts of one layer at a time.
    """
    tokenizer = tokenizer_of(loader.pack.folder)
    model: Any = None
    for form in forms:
        rung = loader.ladder.rung(form)
        room = min(rung.nbytes, max(MIN_CACHE_BYTES, loader.largest_layer(form)))
        model = loader.streamed(form, room, model)
        with model.comoe.cache:
            evaluation = Evaluation.for_model(model, tokenizer)
            yield form, Score({name: evaluation.nats(found) for name, found in windows.items()})
    loader.pack.close()
