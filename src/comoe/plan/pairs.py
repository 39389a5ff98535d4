"""All pairs of a floor and a target of a ladder as arrays, so that a plan for another budget takes no loop. Pure.

What depends on the ladder alone is `Pairs`, which is made once; what depends on how a session uses experts is `Uses`.
"""

from dataclasses import dataclass

import numpy as np

from comoe.plan.curve import Curves, curves
from comoe.plan.ladder import Array, Flags, Indices, Ladder, Rung, shares_of

MIN_GROUPS = 2
"""Experts that the cache must hold beside the floor: one that computes while the next is read."""


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """P pairs of certified rungs; the first one streams the exact form beside no floor.

    `floor` (P,) and `target` (P,) are indices into `rungs`, -1 where there is no floor. Of bytes of memory: those of
    the floor, what the target needs beside it, and the least of it that a cache must hold, all (P,). `streamed` (P, N)
    says which experts are not whole in the floor, `nbytes` (rungs, N) are all that an expert needs. `low` and `high`
    are the ends (rungs + 1,) of certified losses, 0 for no floor, `price` (rungs + 1,) the losses to reckon with.
    """

    rungs: tuple[Rung, ...]
    floor: Indices
    target: Indices
    floor_bytes: Indices
    whole: Indices
    reserve: Indices
    streamed: Flags
    nbytes: Array
    low: Array
    high: Array
    price: Array

    def allowed(self, max_loss: float) -> Indices:
        """The pairs whose target alone keeps the bound. A bound of 0 means the exact form."""
        if max_loss <= 0:
            return np.zeros(1, np.int64)
        found = self.price[self.target] <= max_loss
        found[0] = True
        return np.flatnonzero(found)


def pairs_of(ladder: Ladder) -> Pairs:
    """Every certified rung beside none and beside every coarser one."""
    rungs, last = ladder.certified, len(ladder.certified) - 1
    ends = [(-1, last), *((i, j) for j in range(last + 1) for i in range(-1, j) if (i, j) != (-1, last))]
    held = np.stack([*(rung.held for rung in rungs), np.zeros_like(rungs[0].held)])
    sizes = rungs[0].sizes
    floor, target = np.array(ends).T
    beside = np.where(held[floor], 0, sizes)
    groups = np.stack([beside[at][rungs[j].needs].sum(1) for at, j in enumerate(target)])
    whole = np.where(held[target], beside, 0).sum(1)
    losses = np.array([(*rung.loss_ci95, rung.price) for rung in rungs] + [(0.0, 0.0, 0.0)])
    return Pairs(
        rungs=rungs,
        floor=floor,
        target=target,
        floor_bytes=(held @ sizes)[floor],
        whole=whole,
        reserve=np.minimum(whole, MIN_GROUPS * groups.max(1, initial=0)),
        streamed=groups > 0,
        nbytes=np.stack([rung.groups_beside(None) for rung in rungs]),
        low=losses[:, 0],
        high=losses[:, 1],
        price=losses[:, 2],
    )


@dataclass(frozen=True, slots=True, eq=False)
class Uses:
    """How a session uses the experts of P pairs, per token.

    `streamed` (P,) are uses of what is not whole in the floor, `exposure` (P,) how often that is over how often the
    certified text did; `touched` (rungs, forms) bytes of weights that experts take from memory; `curves` the hits of a
    cache; `total` all uses.
    """

    streamed: Array
    exposure: Array
    touched: Array
    curves: Curves
    total: float


def uses_of(pairs: Pairs, ladder: Ladder, policy: str) -> Uses:
    """For the ladder's use of experts and a cache of `policy`."""
    use, certified = np.concatenate(ladder.use), np.concatenate(ladder.calibrated)
    num_forms = len(ladder.exact.forms)
    touched = use * pairs.nbytes
    return Uses(
        streamed=pairs.streamed @ use,
        exposure=shares_of(use, pairs.streamed, 0.0) / shares_of(certified, pairs.streamed),
        touched=np.stack(
            [np.bincount(rung.form, each, num_forms) for rung, each in zip(pairs.rungs, touched, strict=True)]
        ),
        curves=curves(use, pairs.streamed, policy),
        total=float(use.sum()),
    )
