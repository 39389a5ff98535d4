"""The chain: nested assignments of a form to every expert, from few bytes to exact. Pure.

One multiplier prices a byte against error; every expert takes its cheapest form, where experts that share a blob pay
for it together. A sweep over the multiplier gives the lower hull of error against bytes (Shoham and Gersho, 1988).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from comoe.plan.ladder import Array, Flags, Indices

HALVINGS = 50
"""Of the interval in which the multiplier for a budget lies."""

MOST_PER_BYTE = 1e3
"""A multiplier, in the whole error per share of all bytes, at which no byte is worth its price."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A form that experts may take: `errors` (N,) that each adds in it, `nbytes` (N,) of blobs of its own.

    `shared`: it needs the expert's shared blob, too.
    """

    form: str
    errors: Array
    nbytes: Array
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Choices:
    """What N experts may become: `candidates` from coarse to fine, the last one always possible.

    `cluster` (N,) says whose shared blob is whose, `shared_nbytes` (C,) how large they are; both empty where nothing is
    shared.
    """

    candidates: tuple[Candidate, ...]
    cluster: Indices
    shared_nbytes: Array

    def nbytes(self, assignment: Indices) -> int:
        """Bytes of all blobs of an assignment (N,) of indices into `candidates`, shared ones once."""
        own = _picked(np.stack([candidate.nbytes for candidate in self.candidates]), assignment).sum()
        return int(own + self.shared_nbytes[self._open(assignment)].sum())

    def error(self, assignment: Indices) -> float:
        return float(_picked(np.stack([candidate.errors for candidate in self.candidates]), assignment).sum())

    def best(self, per_byte: float, finest: Indices | None = None, *, sharing: bool = True) -> Indices:
        """The assignment of least error + `per_byte` x bytes. Exact: clusters do not depend on each other.

        No expert is finer than in the assignment `finest`; without `sharing` none needs a shared blob.
        """
        prices = np.stack([candidate.errors + per_byte * candidate.nbytes for candidate in self.candidates])
        if finest is not None:
            prices[np.arange(len(prices))[:, None] > finest] = np.inf
        own = np.array([not candidate.shared for candidate in self.candidates])
        alone = np.where(own[:, None], prices, np.inf).argmin(0)
        if not (sharing and len(self.shared_nbytes)):
            return np.asarray(alone)
        together = prices.argmin(0)
        saved = _picked(prices, alone) - _picked(prices, together)
        worth = np.bincount(self.cluster, saved, len(self.shared_nbytes)) > per_byte * self.shared_nbytes
        return np.asarray(np.where(worth[self.cluster], together, alone))

    def _open(self, assignment: Indices) -> Flags:
        """Which shared blobs (C,) an assignment needs."""
        found = np.zeros(len(self.shared_nbytes), np.bool_)
        needing = np.array([candidate.shared for candidate in self.candidates])[assignment]
        if len(found):
            found[self.cluster[needing]] = True
        return found


def sweep(choices: Choices, budgets: Sequence[int], shared_up_to: float = np.inf) -> list[Indices]:
    """The best assignment within each of `budgets`, ascending; a coarser step has no expert in a finer form.

    Blobs are shared within budgets up to `shared_up_to`. Budgets that give the same assignment give one step; those
    that nothing fits give none.
    """
    steps: list[Indices] = []
    for budget in sorted(budgets, reverse=True):
        found = within(choices, budget, steps[-1] if steps else None, sharing=budget <= shared_up_to)
        if found is not None and (not steps or not np.array_equal(found, steps[-1])):
            steps.append(found)
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
