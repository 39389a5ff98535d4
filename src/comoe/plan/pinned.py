"""A pinned plan, expert by expert: which blobs stay in memory, and which form every expert is served in. Pure.

What a cache that keeps the same blobs all the time could do at best, each expert having a form of its own. It stands
beside the chain's plans, whose forms go together because they were certified together; `plan.oracle` says how near to
the optimum it is. Both read the same `Options`, whose docstring has the objective.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np

from comoe.plan.cost import Costs
from comoe.plan.ladder import Array, Flags, Indices, Rung

HALVINGS = 24
"""Of the logarithmic intervals in which the two multipliers lie."""

PER_BYTE, PER_LOSS = (1e-14, 1e2), (1e-8, 1e10)
"""Milliseconds that a byte and a whole loss are ever worth."""

FILLED = HALVINGS
"""Of the plans that multipliers lead to, the best so many are tried to be filled up."""

SWITCHES, CHANGES = 64, 256
"""Most times that one or two experts are changed where multipliers leave memory or loss unused, and the changes of one
expert that are tried each time."""


@dataclass(frozen=True, slots=True, eq=False)
class Options:
    """What each of N experts may do, in O ways: a form it is served in, and which of its blobs are in memory.

    `cost` (N, O) are milliseconds of a token: uses x (computing with the form + reading what is not in memory); inf
    where there is no such way. `nbytes` (N, O) of blobs of its own are in memory, `loss` (N, O) is added. `part` (N, O)
    is which of K shared blobs of its cluster must be in memory, -1 for none; `cluster` (N,) says whose is whose,
    `shared_nbytes` (K, C) how large they are. A plan has the least cost within bytes and loss.
    """

    cost: Array
    nbytes: Array
    loss: Array
    part: Indices
    cluster: Indices
    shared_nbytes: Array

    def total(self, chosen: Indices) -> tuple[float, float, float]:
        """(milliseconds, bytes, loss) of the ways `chosen` (N,)."""
        at = np.arange(len(chosen)), chosen
        return float(self.cost[at].sum()), self.held(chosen), float(self.loss[at].sum())

    def held(self, chosen: Indices) -> float:
        """Bytes in memory; shared ones count once."""
        at = np.arange(len(chosen)), chosen
        opened = self.opened(chosen)
        return float(self.nbytes[at].sum() + self.shared_nbytes[opened].sum())

    def opened(self, chosen: Indices) -> Flags:
        """Which shared blobs (K, C) are in memory."""
        part = self.part[np.arange(len(chosen)), chosen]
        found = np.zeros(self.shared_nbytes.shape, np.bool_)
        found[part[part >= 0], self.cluster[part >= 0]] = True
        return found

    def best(self, per_byte: float, per_loss: float) -> Indices:
        """The ways (N,) of least cost + `per_byte` x bytes + `per_loss` x loss. Exact: clusters do not meet."""
        price = self.cost + per_byte * self.nbytes + per_loss * self.loss
        parts = range(len(self.shared_nbytes))
        ways, costs = [], []
        for opened in (kept for n in range(len(parts) + 1) for kept in combinations(parts, n)):
            masked = price
            if len(parts):
                masked = np.where((self.part < 0) | np.isin(self.part, opened), price, np.inf)
            way = masked.argmin(1)
            ways.append(way)
            if len(parts):
                each = np.bincount(self.cluster, masked[np.arange(len(way)), way], self.shared_nbytes.shape[1])
                costs.append(each + per_byte * self.shared_nbytes[list(opened)].sum(0))
        cheapest = np.stack(costs).argmin(0)[self.cluster] if costs else np.zeros(len(price), np.int64)
        found: Indices = np.stack(ways)[cheapest, np.arange(len(cheapest))]
        return found


def options(forms: Sequence[tuple[Rung, Array]], use: Array, costs: Costs) -> Options:
    """Every way to serve experts with uses `use` (N,) in each of `forms` with the loss (N,) that each expert adds.

    In memory may be any of a form's blobs. Blobs that several experts need are their cluster's.
    """
    owners = [np.bincount(rung.needs[rung.needs >= 0], minlength=len(rung.sizes)) for rung, _ in forms]
    shared = [(owner[rung.needs] > 1) & (rung.needs >= 0) for owner, (rung, _) in zip(owners, forms, strict=True)]
    cluster, sizes, numbers = _clusters(forms, shared)
    columns: list[tuple[Array, Array, Array, Indices]] = []
    for number, (rung, loss), common in zip(numbers, forms, shared, strict=True):
        nbytes = rung.sizes[rung.needs].astype(np.float64)
        form = rung.forms[rung.form[0]]
        for kept in np.ndindex(*(2,) * rung.needs.shape[1]):
            inside = np.array(kept, np.bool_) & (rung.needs >= 0)
            if any(kept) and not inside[:, np.array(kept, np.bool_)].any(0).all():
                continue
            missing = np.where(inside, 0.0, nbytes).sum(1)
            ms = costs.expert_ms(1.0, form) * nbytes.sum(1) + costs.read_ms(1.0, 0.0) * missing
            ms = ms + costs.read_ms(0.0, 1.0) * (missing > 0)
            part = np.where((inside & common).any(1), number, -1)
            columns.append((use * ms, np.where(inside & ~common, nbytes, 0.0).sum(1), loss, part))
    cost, own, losses, parts = (np.stack(column, axis=1) for column in zip(*columns, strict=True))
    return Options(cost, own, losses, parts, cluster, sizes)


def pinned(ways: Options, budget: float, bound: float) -> Indices | None:
    """The ways (N,) of least cost that are found within `budget` bytes and a loss of `bound`; None where none is.

    Multipliers price both (Everett, 1963); what they leave unused goes to one expert after the other.
    """
    low, high = PER_LOSS
    free = _within(ways, budget, 0.0, bound)
    kept = [free] if free is not None and free.fits else []
    if not kept:
        for per_loss in (high, *(0.0,) * HALVINGS):
            per_loss = per_loss or float(np.sqrt(low * high))
            tried = _within(ways, budget, per_loss, bound)
            fits = tried is not None and tried.fits
            low, high = (low, per_loss) if fits else (per_loss, high)
            kept += [tried] if fits and tried is not None else []
            if not kept:
                return None
    kept.sort(key=lambda priced: ways.total(priced.chosen)[0])
    found = [
        _filled(ways, priced, budget, bound, greedy=greedy) for priced in kept[:FILLED] for greedy in (True, False)
    ]
    return min(found, key=lambda chosen: ways.total(chosen)[0])


class _Priced(NamedTuple):
    """Ways that two multipliers lead to, and whether their loss is within the bound."""

    chosen: Indices
    per_byte: float
    per_loss: float
    fits: bool


def _within(ways: Options, budget: float, per_loss: float, bound: float) -> _Priced | None:
    """What a loss priced at `per_loss` leads to within `budget`."""
    low, high = PER_BYTE
    per_byte, found = 0.0, ways.best(0.0, per_loss)
    if ways.held(found) > budget:
        per_byte, found = high, ways.best(high, per_loss)
        if ways.held(found) > budget:
            return None
        for _ in range(HALVINGS):
            middle = float(np.sqrt(low * high))
            tried = ways.best(middle, per_loss)
            if ways.held(tried) > budget:
                low = middle
            else:
                high, per_byte, found = middle, middle, tried
    return _Priced(found, per_byte, per_loss, ways.total(found)[2] <= bound)


def _filled(ways: Options, priced: _Priced, budget: float, bound: float, *, greedy: bool) -> Indices:
    """Its ways, one or two experts after the other changed for what saves most and still fits.

    Of changes those are tried that the multipliers find least dear, where `greedy` those too that save most alone; each
    pair of them, and each alone.
    """
    rows, found = np.arange(len(priced.chosen)), priced.chosen.copy()
    price = ways.cost + priced.per_byte * ways.nbytes + priced.per_loss * ways.loss
    for _ in range(SWITCHES):
        at, opened = (rows, found), ways.opened(found)
        more = ways.nbytes
        if len(opened):
            absent = (ways.part >= 0) & ~opened[ways.part, ways.cluster[:, None]]
            more = more + np.where(absent, ways.shared_nbytes[ways.part, ways.cluster[:, None]], 0.0)
        steps = [
            np.where(np.isfinite(ways.cost), table - table[at][:, None], np.inf)
            for table in (ways.cost, more, ways.loss)
        ]
        worth = price - price[at][:, None]
        worth[at] = np.inf
        _, held, lost = ways.total(found)
        alone = np.where((held + steps[1] <= budget) & (lost + steps[2] <= bound), steps[0], np.inf)
        last = min(CHANGES, worth.size - 1)
        tried = np.concatenate([[found[0]], np.argpartition(worth, last, axis=None)[:CHANGES]])
        if greedy:
            tried = np.union1d(tried[1:], np.argpartition(alone, last, axis=None)[:CHANGES])
            tried = np.concatenate([[found[0]], tried])
        cost, nbytes, loss = (step.ravel()[tried] for step in steps)
        expert = tried // ways.cost.shape[1]
        fits = (held + nbytes[:, None] + nbytes <= budget) & (lost + loss[:, None] + loss <= bound)
        fits &= (expert[:, None] != expert) | (np.arange(len(tried)) == 0)
        saved = np.where(fits, -(cost[:, None] + cost), -np.inf)
        one, two = np.unravel_index(saved.argmax(), saved.shape)
        if saved[one, two] <= 1e-12:
            break
        for change in (two, one):
            found[expert[change]] = tried[change] % ways.cost.shape[1]
    return found


def _clusters(forms: Sequence[tuple[Rung, Array]], shared: Sequence[Flags]) -> tuple[Indices, Array, list[int]]:
    """(cluster (N,), sizes (K, C) of their blobs, which of K each form needs or -1); forms share by the same tree."""
    blobs = [np.where(common, rung.needs, -1).max(1) for (rung, _), common in zip(forms, shared, strict=True)]
    distinct = [blob for blob in blobs if (blob >= 0).any()]
    if not distinct:
        return np.zeros(len(blobs[0]), np.int64), np.zeros((0, 1)), [-1] * len(forms)
    _, cluster = np.unique(np.stack(distinct, axis=1), axis=0, return_inverse=True)
    kinds: list[Indices] = []
    numbers = []
    for blob in blobs:
        if not (blob >= 0).any():
            numbers.append(-1)
            continue
        same = [at for at, kind in enumerate(kinds) if np.array_equal(kind, blob)]
        numbers.append(same[0] if same else len(kinds))
        kinds += [] if same else [blob]
    sizes = np.zeros((len(kinds), int(cluster.max()) + 1))
    for at, kind in enumerate(kinds):
        sizes[at, cluster] = forms[0][0].sizes[kind]
    return cluster.ravel().astype(np.int64), sizes, numbers
