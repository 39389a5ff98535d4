"""What a routing bias costs: the loss of the exact model where its routers prefer a fixed set of experts.

The set stands in for a cache. See docs/decisions/018 for why the largest of what a strong bias costs is the price.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comoe.make.certify import CACHE_BYTES, Windows
from comoe.make.protocol import Evaluation
from comoe.make.score import Score, compare
from comoe.runtime.bias import Answer, Router, moved, routers
from comoe.runtime.generate import tokenizer_of
from comoe.runtime.load import Loader
from comoe.runtime.options import Options
from comoe.store.manifest import LayerEntry
from comoe.store.pack import Pack
from comoe.types import UsageError

RESIDENT_SHARES = (0.25, 0.5)
"""Of every layer's experts, those most used, that stand in for what a cache holds."""

STRONG = 4.0
"""Logits: a bias this strong moves nearly all that any could, and of all biases loses most for what it moves."""

PASSES = 1 + len(RESIDENT_SHARES)
"""Passes of held-out text that a price takes."""


@dataclass(slots=True)
class Tally:
    """Shares moved so far, and of how many tokens' gates."""

    share: float = 0.0
    tokens: int = 0


def routing_price(folder: Path, windows: Windows, threads: int | None = None) -> float | None:
    """The loss where all gates of the pack in `folder` move, by the upper end of its interval; None where none can.

    Linear in the share that moves, and of several sets of experts the dearest one's.
    """
    loader = Loader(Pack(folder), Options(dtype="float32", threads=threads))
    model = loader.streamed("exact", CACHE_BYTES)
    with model.comoe:
        try:
            found = routers(model)
        except UsageError:
            return None
        evaluation = Evaluation.for_model(model, tokenizer_of(folder))

        def score() -> Score:
            return Score({name: evaluation.nats(some) for name, some in windows.items()})

        exact, prices = score(), []
        for share in RESIDENT_SHARES:
            sets = [most_used(layer, share) for layer in loader.pack.manifest.layers]
            with preferring(found, sets, STRONG) as tally:
                loss = compare(score(), exact)
            if tally.share:
                prices.append(max(0.0, loss.ci95[1]) * tally.tokens / tally.share)
    return max(prices, default=None)


@contextmanager
def preferring(found: Sequence[Router], residents: Sequence[Tensor], delta: float) -> Iterator[Tally]:
    """While it lasts, every router prefers, by `delta` logits, the experts of its layer's set (E,), for all tokens."""
    tally = Tally()
    with ExitStack() as hooks:
        for (module, renormalised), resident in zip(found, residents, strict=True):
            hook = _Preferring(resident, delta, tally, renormalised=renormalised)
            hooks.callback(module.register_forward_hook(hook).remove)
        yield tally


class _Preferring:
    def __init__(self, resident: Tensor, delta: float, tally: Tally, *, renormalised: bool) -> None:
        self._resident, self._delta, self._tally, self._renormalised = resident, delta, tally, renormalised

    def __call__(self, module: Any, args: Any, answer: Answer) -> Answer:
        found = moved(answer, self._resident, self._delta, renormalised=self._renormalised)
        self._tally.share += float(found.share.double().sum())
        self._tally.tokens += len(found.share)
        return answer[0], found.gates.to(answer[1].dtype), found.experts


def most_used(layer: LayerEntry, share: float) -> Tensor:
    """Which experts (E,) of a layer are the most used `share` of them, at least one."""
    order = np.argsort(-np.array(layer.frequency or [0.0] * layer.num_experts), kind="stable")
    found = torch.zeros(layer.num_experts, dtype=torch.bool)
    found[order[: max(1, round(share * layer.num_experts))].copy()] = True
    return found
