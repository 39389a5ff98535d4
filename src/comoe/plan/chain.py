"""The chain: nested assignments of a form to every expert, from few bytes to exact. Pure.

One multiplier prices a byte against error; every expert takes its cheapest form, where experts that share a blob pay
for it together. A sweep over the multiplier gives the lower hull of error against bytes (Shoham and Gersho, 1988).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from comoe.plan.ladder import Array, Indices

HALVINGS = 50
"""Of the interval in which the multiplier for a budget lies."""

MOST_PER_BYTE = 1e3
"""A multiplier, in the whole error per share of all bytes, at which no byte is worth its price."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A form that experts may take: `errors` (N,) that each adds in it, `nbytes` (N,) of blobs of its own.

    `shared` names the part of which it needs its cluster's blob, too, if any.
    """

    form: str
    errors: Array
    nbytes: Array
    shared: str | None = None


@dataclass(frozen=True, slots=True)
class Choices:
    """What N experts may become: `candidates` from coarse to fine, the last one always possible.

    `cluster` (N,) says whose shared blobs are whose, `shared_nbytes` how large those (C,) of every shared part are;
    both are empty where nothing is shared.
    """

    candidates: tuple[Candidate, ...]
    cluster: Indices
    shared_nbytes: Mapping[str, Array]

    def nbytes(self, assignment: Indices) -> int:
        """Bytes of all blobs of an assignment (N,) of indices into `candidates`, shared ones once."""
        total = _picked(np.stack([candidate.nbytes for candidate in self.candidates]), assignment).sum()
        for part, sizes in self.shared_nbytes.items():
            needing = np.array([candidate.shared == part for candidate in self.candidates])[assignment]
            total += sizes[np.unique(self.cluster[needing])].sum()
        return int(total)

    def error(self, assignment: Indices) -> float:
        return float(_picked(np.stack([candidate.errors for candidate in self.candidates]), assignment).sum())

    def best(self, per_byte: float, finest: Indices | None = None, *, sharing: bool = True) -> Indices:
        """The assignment of least error + `per_byte` x bytes. Exact: clusters do not depend on each other.

        No expert is finer than in the assignment `finest`; without `sharing` none needs a shared blob.
        """
        prices = np.stack([candidate.errors + per_byte * candidate.nbytes for candidate in self.candidates])
        if finest is not None:
            prices[np.arange(len(prices))[:, None] > finest] = np.inf
        if not (sharing and self.shared_nbytes):
            return self._among(prices, ())[0]
        opened = [parts for n in range(len(self.shared_nbytes) + 1) for parts in combinations(self.shared_nbytes, n)]
        ways, costs = [], []
        for parts in opened:
            way, price = self._among(prices, parts)
            ways.append(way)
            costs.append(np.bincount(self.cluster, price) + per_byte * sum(self.shared_nbytes[p] for p in parts))
        cheapest = np.stack(costs).argmin(0)[self.cluster]
        found: Indices = np.stack(ways)[cheapest, np.arange(len(cheapest))]
        return found

    def _among(self, prices: Array, parts: Sequence[str]) -> tuple[Indices, Array]:
        """The cheapest candidate (N,) of those that need no shared blob or one of `parts`, and its price."""
        possible = np.array([candidate.shared is None or candidate.shared in parts for candidate in self.candidates])
        masked = np.where(possible[:, None], prices, np.inf)
        return masked.argmin(0), masked.min(0)


def sweep(choices: Choices, budgets: Sequence[int], shared_up_to: float = np.inf) -> list[Indices]:
    """The best assignment within each of `budgets`, ascending; a coarser step has no expert in a finer form.

    Blobs are shared within budgets up to `shared_up_to`; there the order starts anew. A budget in which the next finer
    step fits gives no step of its own, nor does one that nothing fits.
    """
    steps: list[Indices] = []
    finest, was_sharing = None, False
    for budget in sorted(budgets, reverse=True):
        sharing = bool(choices.shared_nbytes) and budget <= shared_up_to
        if sharing is not was_sharing:
            finest, was_sharing = None, sharing
        if finest is not None and choices.nbytes(finest) <= budget:
            continue
        found = within(choices, budget, finest, sharing=sharing)
        if found is not None and not (steps and choices.nbytes(found) >= choices.nbytes(steps[-1])):
            steps.append(found)
            finest = found
    return steps[::-1]


def within(choices: Choices, budget: int, finest: Indices | None = None, *, sharing: bool = True) -> Indices | None:
    """The best assignment that the sweep over multipliers meets within `budget` bytes, none finer than `finest`."""
    low, high = 0.0, MOST_PER_BYTE / max(budget, 1)
    found = choices.best(high, finest, sharing=sharing)
    if choices.nbytes(found) > budget:
        return None
    for _ in range(HALVINGS):
        middle = np.sqrt(max(low, high * 1e-12) * high)
        tried = choices.best(middle, finest, sharing=sharing)
        if choices.nbytes(tried) > budget:
            low = middle
        else:
            high, found = middle, tried
    return found


def _picked(table: npt.NDArray[np.float64], assignment: Indices) -> Array:
    """Of a table (F, N) the entries of each column that `assignment` (N,) names."""
    found: Array = table[assignment, np.arange(table.shape[1])]
    return found
