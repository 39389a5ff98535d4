"""Whether a session turned to another domain, told from what its routers choose. Pure."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.float64]

WINDOW_TOKENS = 16
"""Uses of so many tokens are compared with what came before."""

REMEMBERED = 8
"""Windows of the domain so far that the next one is compared with, together."""

LEAST = 3
"""Windows that a domain must have had before it can end."""

EXCESS = 1.6
"""Times as far as windows of one domain are from each other: see decisions/016."""

DEVIATIONS = 4.0
"""Or so many standard deviations farther, where few experts are used and chance is large."""


class Distance(NamedTuple):
    """Chi-square of two samples over its degrees of freedom, which is 1 by chance, and those."""

    far: float
    freedom: int


@dataclass(slots=True)
class ShiftDetector:
    """Compares each window of uses with those of the domain so far.

    `starts` are the layers' first experts in a window's array (N,). Far is what differs by `EXCESS` times as much as
    windows of this very session do, since uses of neighbouring tokens are alike and so vary more than independent ones.
    """

    starts: Sequence[int]
    _seen: "deque[Counts]" = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _usual: "deque[float]" = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def add(self, uses: Counts) -> bool:
        """Whether the window `uses` (N,) begins another domain; if so, what came before is forgotten."""
        if not self._seen:
            self._seen.append(uses)
            return False
        far, freedom = distance(uses, np.sum(self._seen, axis=0), self.starts)
        by_chance = 1 + DEVIATIONS * sqrt(2 / max(freedom, 1))
        if len(self._seen) >= LEAST and far > max(EXCESS, by_chance) * max(float(np.mean(self._usual)), 1.0):
            self._seen.clear()
            self._usual.clear()
            self._seen.append(uses)
            return True
        self._seen.append(uses)
        self._usual.append(far)
        return False


def distance(window: Counts, before: Counts, starts: Sequence[int]) -> Distance:
    """How far uses (N,) are from those before.

    Layers are `starts` to the next; those that saw nothing count nothing.
    """
    total, freedom = 0.0, 0
    for layer, known in zip(np.split(window, starts[1:]), np.split(before, starts[1:]), strict=True):
        both = layer + known
        used = both > 0
        if not layer.sum() or not known.sum():
            continue
        ratio = np.sqrt(known.sum() / layer.sum())
        total += float(((layer[used] * ratio - known[used] / ratio) ** 2 / both[used]).sum())
        freedom += int(used.sum()) - 1
    return Distance(total / max(freedom, 1), freedom)
