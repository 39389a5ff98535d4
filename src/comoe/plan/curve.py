"""Hits of a cache by the experts that it holds, for many sets of experts at once. Pure.

LRU by Che's approximation (Che, Tung and Wang, 2002), tabulated by characteristic time: between two times the hits are
a cubic in the experts held, whose slopes at both are known. LFU keeps the most used.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from comoe.plan.ladder import Array, Flags, Indices

NODES = 96
"""Characteristic times that are tabulated, evenly on a logarithmic scale."""

LEAST = 1e-9
"""Of the busiest expert's use, below which none sets the last time."""

FIRST, LAST = 1e-2, 25.0
"""The least time, in those between two uses of the busiest expert, and the last, in those of the idlest."""


class Curves(Protocol):
    """Of P sets of experts, the hits of a cache."""

    def hits(self, of: Indices, held: Array) -> Array:
        """The share (K,) of uses that hit, of the sets `of` (K,) in caches of `held` (K,) experts."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Timed:
    """LRU: `held` (P, T) experts are there after each characteristic time, `rate` (P, T) of uses hit them.

    `slope` (P, T) is by how much more of them hit for each expert more; `used` (P,) experts are used at all.
    """

    held: Array
    rate: Array
    slope: Array
    used: Array

    def hits(self, of: Indices, held: Array) -> Array:
        table = self.held[of]
        after = np.clip((table <= held[:, None]).sum(1), 1, table.shape[1] - 1)
        left, right = (of, after - 1), (of, after)
        step = np.maximum(self.held[right] - self.held[left], 1e-300)
        x = np.clip((held - self.held[left]) / step, 0.0, 1.0)
        y = 1.0 - x
        low, rise = self.rate[left], self.rate[right] - self.rate[left]
        begin, end = (np.minimum(self.slope[at] * step, 3 * rise) for at in (left, right))  # steeper ones overshoot
        found = np.clip(low + x * rise + x * y * (y * (begin - rise) - x * (end - rise)), 0.0, 1.0)
        return np.where(held >= self.used[of], 1.0, np.where(held <= 0, 0.0, found))


@dataclass(frozen=True, slots=True, eq=False)
class Ranked:
    """LFU: of the uses of each set, `rate` (P, N + 1) hit if its most used 0 to N experts are held."""

    rate: Array

    def hits(self, of: Indices, held: Array) -> Array:
        last = self.rate.shape[1] - 1
        clipped = np.clip(held, 0.0, last)
        below = np.minimum(clipped.astype(np.int64), last - 1)
        low, high = self.rate[of, below], self.rate[of, below + 1]
        found: Array = low + (clipped - below) * (high - low)
        return found


def curves(use: Array, members: Flags, policy: str) -> Curves:
    """Of the sets `members` (P, N) of experts with uses `use` (N,); LFU ranks them, the others go by Che's times."""
    return _ranked(use, members) if policy == "lfu" else _timed(use, members)


def hit_rate(use: Array, num_cached: float, policy: str) -> float:
    """Share of uses that find their expert in a cache of `num_cached` experts of equal size; 1 where there are none.

    `use` (N,) are uses per token of all layers' experts.
    """
    every = np.ones((1, len(use)), np.bool_)
    return float(curves(use, every, policy).hits(np.zeros(1, np.int64), np.array([float(num_cached)]))[0])


def _timed(use: Array, members: Flags) -> Timed:
    used = use > 0
    scale = use.max(initial=0.0) or 1.0
    rates, counted = use[used] / scale, members[:, used].astype(np.float64)
    times = np.geomspace(FIRST, LAST / max(rates.min(initial=1.0), LEAST), NODES)
    gone = np.exp(-np.outer(rates, times))
    weights = np.concatenate([1.0 - gone, rates[:, None] * gone, (rates**2)[:, None] * gone], axis=1)
    held, missed, lost = np.split(counted @ weights, 3, axis=1)
    total = np.maximum(counted @ rates, 1e-300)[:, None]
    slope = lost / np.maximum(missed, 1e-300) / total
    first = (counted @ rates**2)[:, None] / total / total
    number, zero = counted.sum(1, keepdims=True), np.zeros((len(members), 1))
    return Timed(
        held=np.concatenate([zero, held, number], axis=1),
        rate=np.concatenate([zero, 1.0 - missed / total, zero + 1.0], axis=1),
        slope=np.concatenate([first, slope, zero], axis=1),
        used=number[:, 0],
    )


def _ranked(use: Array, members: Flags) -> Ranked:
    order = np.argsort(-use, kind="stable")
    rate = np.zeros((len(members), len(use) + 1))
    for at, flags in enumerate(members[:, order]):
        hits = np.cumsum(use[order][flags])
        rate[at, 1 : len(hits) + 1] = hits
        rate[at, len(hits) + 1 :] = hits[-1] if len(hits) else 0.0
    total = rate[:, -1:]
    return Ranked(np.where(total > 0, rate / np.where(total > 0, total, 1.0), 1.0))
