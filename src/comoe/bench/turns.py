"""Served models that decode the same windows in turns, so that whatever else the machine does falls on all of them."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from comoe.make.protocol import Evaluation
from comoe.make.score import Floats


@dataclass(slots=True)
class Side:
    """A served model and its decoding so far; `nats` and `ms` hold an array (tokens,) for every window.

    Every window is a request. `uses`, `bytes_read` and `expert_s` are those of decode steps; `bytes_read_first` those
    of every window's first step and of reading the prompt before it, as an encoder does.
    """

    evaluation: Evaluation
    nats: list[Floats] = field(default_factory=list)
    ms: list[Floats] = field(default_factory=list)
    ledger: list[float] = field(default_factory=list)
    uses: Counter[str] = field(default_factory=Counter)
    bytes_read: Counter[str] = field(default_factory=Counter)
    bytes_read_first: Counter[str] = field(default_factory=Counter)
    expert_s: float = 0.0

    def decode(self, window: Sequence[int], num_tokens: int, clock: Callable[[], float]) -> None:
        """Decode the first `num_tokens` of the window's target, teacher-forced."""
        handle = self.evaluation.model.comoe
        handle.begin_request()
        steps = self.evaluation.steps(window, clock)
        first = next(steps)
        before = handle.stats()
        nats, ms = np.array([first, *islice(steps, num_tokens - 1)]).T
        after = handle.stats()
        self.nats.append(nats)
        self.ms.append(ms)
        self.ledger.append(after["loss_ledger"])
        self.uses.update(_uses(after))
        self.uses.subtract(_uses(before))
        self.expert_s += after["expert_s"] - before["expert_s"]
        self.bytes_read.update(after["bytes_read"])
        self.bytes_read.subtract(before["bytes_read"])
        self.bytes_read_first.update(before["bytes_read"])

    def rate(self, kind: str) -> float:
        """Share of all uses that were `hit` or served by the `floor`."""
        return self.uses[kind] / max(self.uses["all"], 1)


def decode_in_turns(
    sides: Sequence[Side], windows: Iterable[Sequence[int]], num_tokens: int, clock: Callable[[], float]
) -> None:
    """Decode every window on all sides, forwards and backwards by turns."""
    for at, window in enumerate(windows):
        for side in sides if at % 2 else reversed(sides):
            side.decode(window, num_tokens, clock)


def _uses(stats: dict[str, Any]) -> dict[str, int]:
    uses = stats["uses"]
    return {"all": uses, "hit": round(stats["hit_rate"] * uses), "floor": round(stats["floor_rate"] * uses)}
