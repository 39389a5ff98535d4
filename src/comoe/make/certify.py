"""The certificate: what each form of all experts costs in quality, measured on text that nothing was fitted to."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from comoe.make.protocol import Evaluation
from comoe.make.score import Loss, Score, compare
from comoe.runtime.generate import tokenizer_of
from comoe.runtime.load import Loader, Options
from comoe.store.manifest import Certificate
from comoe.store.pack import Pack

Windows = Mapping[str, list[list[int]]]

MIN_CACHE_BYTES = 256 << 20
"""Experts that may be in memory while a form is scored, however small a layer is."""


def certify(
    folder: Path, steps: Sequence[str], windows: Windows, progress: Callable[[float], None], threads: int | None = None
) -> dict[str, Certificate]:
    """The certificate of each of `steps`, of the chain of the pack in `folder` or one of its forms.

    `progress` is told the fraction done.
    """
    loader = Loader(Pack(folder), Options(dtype="float32", threads=threads))
    scores = {}
    for step, found in _scores(loader, ["exact", *steps], windows):
        scores[step] = found
        progress(len(scores) / (len(steps) + 1))
    return {step: certificate(compare(scores[step], scores["exact"])) for step in steps}


def certificate(loss: Loss) -> Certificate:
    """What a pack keeps of a loss."""
    return Certificate(
        loss=loss.mean,
        loss_ci95=loss.ci95,
        loss_worst_domain=loss.worst,
        loss_worst_domain_ci95=loss.worst_ci95,
        worst_domain=loss.worst_domain,
    )


def _scores(loader: Loader, rungs: Sequence[str], windows: Windows) -> Iterator[tuple[str, Score]]:
    """Nats of the model with every expert in one rung, for each of `rungs`; in float32.

    The dense part is loaded once; in memory are the experts of one layer at a time.
    """
    tokenizer = tokenizer_of(loader.pack.folder)
    model: Any = None
    for rung in rungs:
        room = min(loader.ladder.rung(rung).nbytes, max(MIN_CACHE_BYTES, loader.largest_layer(rung)))
        model = loader.streamed(rung, room, model)
        with model.comoe.cache:
            evaluation = Evaluation.for_model(model, tokenizer)
            yield rung, Score({name: evaluation.nats(found) for name, found in windows.items()})
    loader.pack.close()
