"""The certificate: what each form of all experts costs in quality, measured on text that nothing was fitted to."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comoe.make.protocol import Evaluation
from comoe.make.score import Loss, Score, compare
from comoe.runtime.generate import tokenizer_of
from comoe.runtime.load import Loader
from comoe.runtime.options import Options
from comoe.store.manifest import Certificate
from comoe.store.pack import Pack

Windows = Mapping[str, list[list[int]]]

MIN_HELD_OUT = 4
"""With fewer windows an interval says nothing, and there is no certificate: no plan will use a form without one."""

SAMPLED = 16
"""Positions of a batch whose whole distribution is kept: a large vocabulary takes half a megabyte for each."""

CACHE_BYTES = 256 << 20
"""Experts that may be in memory while a form is scored: a pass takes every expert once, so that more saves no read."""


def certify(
    folder: Path, steps: Sequence[str], windows: Windows, progress: Callable[[float], None], threads: int | None = None
) -> dict[str, Certificate]:
    """The certificate of each of `steps`, of the chain of the pack in `folder` or one of its forms.

    `progress` is told the fraction done.
    """
    loader = Loader(Pack(folder), Options(dtype="float32", threads=threads))
    found: dict[str, Certificate] = {}
    measured = _measured(loader, ["exact", *steps], windows)
    _, exact, wanted = next(measured)
    for step, score, sample in measured:
        found[step] = certificate(compare(score, exact), wanted, sample)
        progress(len(found) / len(steps))
    return found


def certificate(loss: Loss, exact: Tensor, sample: Tensor) -> Certificate:
    """What a pack keeps of a loss and of log probabilities (P, V) of the same positions, `exact`'s and the step's."""
    return Certificate(
        loss=loss.mean,
        loss_ci95=loss.ci95,
        loss_worst_domain=loss.worst,
        loss_worst_domain_ci95=loss.worst_ci95,
        worst_domain=loss.worst_domain,
        kl=max(0.0, float((exact.exp() * (exact - sample)).sum(-1).mean())),
        top1_agreement=float((exact.argmax(-1) == sample.argmax(-1)).float().mean()),
    )


class Sample:
    """Log probabilities of a few positions: of one window of every batch, `SAMPLED` spread over it."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []

    def __call__(self, logits: Tensor) -> None:
        step = max(1, logits.shape[1] // SAMPLED)
        self._found.append(logits[0, ::step][:SAMPLED].float().log_softmax(-1).clone())

    @property
    def log_probabilities(self) -> Tensor:
        return torch.cat(self._found)


def _measured(loader: Loader, rungs: Sequence[str], windows: Windows) -> Iterator[tuple[str, Score, Tensor]]:
    """Nats and sampled log probabilities of the model with every expert in one rung, for each of `rungs`; in float32.

    The dense part is loaded once.
    """
    tokenizer = tokenizer_of(loader.pack.folder)
    model: Any = None
    for rung in rungs:
        model = loader.streamed(rung, CACHE_BYTES, model)
        with model.comoe.cache:
            evaluation = Evaluation.for_model(model, tokenizer)
            sample = Sample()
            score = Score({name: evaluation.nats(found, sample) for name, found in windows.items()})
            yield rung, score, sample.log_probabilities
    loader.pack.close()
