"""The fastest (floor, streamed form, cache, wait threshold) under a byte budget and a loss bound. Pure.

All pairs of certified rungs are compared at once, by tables: see `plan.pairs`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from comoe.defaults import POLICY
from comoe.plan.cost import Costs
from comoe.plan.ladder import Array, Band, Indices, Ladder
from comoe.plan.pairs import Pairs, Uses, pairs_of, uses_of
from comoe.types import DoesNotFit

TIE = 0.05
"""Predicted times that differ by less are the same: rates are measured no better."""

BACKGROUND_SHARE = 0.5
"""Of its time, what a read costs that nobody waits for, since the floor answers: it takes the processor's."""

UPPER = 1.5
"""The upper end of a predicted time of experts, over the lower."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to keep, what to stream, and what a miss does.

    `floor` is resident for every expert (None: nothing is); `target` is the form that is wanted; a use whose gate is
    below `wait_threshold` does not wait for a missing target but takes the floor. Bytes are memory.
    """

    name: str
    floor: str | None
    target: str
    floor_bytes: int
    refinement_bytes: int
    wait_threshold: float
    ms_per_token: Band
    loss: Band
    start_seconds: float
    fetch_bytes: int
    shares: dict[str, float]
    hit_rate: float

    @property
    def total_bytes(self) -> int:
        return self.floor_bytes + self.refinement_bytes

    def document(self) -> dict[str, Any]:
        """The plan for JSON: an infinite threshold, which takes the floor for every miss, is None."""
        threshold = self.wait_threshold if self.wait_threshold < float("inf") else None
        return {**asdict(self), "total_bytes": self.total_bytes, "wait_threshold": threshold}


class Candidates(NamedTuple):
    """What K pairs of `Pairs` would do in a budget, each (K,); `coarse` and `missed` are shares of streamed uses."""

    pair: Indices
    room: Indices
    missed: Array
    coarse: Array
    ms: Array
    loss_low: Array
    loss_high: Array


@dataclass(frozen=True)
class Planner:
    """A ladder on a device, for a cache of `policy`: everything but the budget and the bound.

    Its tables are made at first use; after that, a plan for another budget or bound takes well under a millisecond.
    """

    ladder: Ladder
    costs: Costs
    policy: str = POLICY

    @cached_property
    def pairs(self) -> Pairs:
        """What depends on the ladder alone."""
        return pairs_of(self.ladder)

    @cached_property
    def uses(self) -> Uses:
        """What depends on how experts are used."""
        return uses_of(self.pairs, self.ladder, self.policy)

    @cached_property
    def _computing_ms(self) -> Array:
        """Time (rungs,) of a token's experts where all are resident."""
        per_byte = np.array([self.costs.expert_ms(1.0, form) for form in self.ladder.exact.forms])
        found: Array = self.uses.touched @ per_byte
        return found

    def using(self, use: Sequence[Array]) -> "Planner":
        """The planner for a session that uses experts as in `use`; what depends on the ladder alone is kept."""
        found = Planner(self.ladder.using(use), self.costs, self.policy)
        rungs = tuple(rung for rung in found.ladder.certified)
        found.__dict__["pairs"] = replace(self.pairs, rungs=rungs)
        return found

    def best(self, budget: int, max_loss: float, *, name: str = "bounded") -> Plan:
        """The fastest plan in `budget` bytes of expert memory with at most `max_loss` predicted loss.

        Of plans that are as fast within `TIE`, the one that loses least: a bound is a permission, not a wish. Raises
        DoesNotFit with the smallest budget at which there is one.
        """
        found = self.candidates(self.pairs.allowed(max_loss), budget, max_loss)
        if not len(found.pair):
            smallest = self.smallest(max_loss)
            raise DoesNotFit(f"experts need at least {smallest} bytes of memory, {budget} were given.", smallest)
        upper = self.costs.framework_ms.high + UPPER * found.ms
        tied = np.flatnonzero(upper <= upper.min() * (1 + TIE))
        least = tied[np.lexsort((upper[tied], found.loss_high[tied]))[0]]
        return self._plan(name, found, int(least))

    def smallest(self, max_loss: float) -> int:
        """The least expert memory at which `best` finds a plan."""
        allowed = self.pairs.allowed(max_loss)
        return int((self.pairs.floor_bytes + self.pairs.reserve)[allowed].min())

    def candidates(self, allowed: Indices, budget: int, max_loss: float) -> Candidates:
        """What those of `allowed` pairs do that fit."""
        pairs, uses = self.pairs, self.uses
        room = np.minimum(budget - pairs.floor_bytes[allowed], pairs.whole[allowed])
        fits = room >= pairs.reserve[allowed]
        at, room = allowed[fits], room[fits]
        floor, target, whole = pairs.floor[at], pairs.target[at], pairs.whole[at]
        unit = whole / np.maximum(self._num_streamed[at], 1)
        held = np.where(room >= whole, np.inf, room / np.maximum(unit, 1e-12))
        missed = 1.0 - uses.curves.hits(at, held)
        gap = uses.exposure[at] * (pairs.price[floor] - pairs.price[target])
        left = (max_loss - pairs.price[target]) / np.where(gap > 0, gap, 1.0)
        coarse = np.where(floor < 0, 0.0, np.where(gap > 0, np.minimum(missed, left), missed))
        waits = uses.streamed[at] * (missed - coarse + BACKGROUND_SHARE * coarse)
        ms = self._computing_ms[target] + self.costs.read_ms(1.0, 0.0) * waits * unit + self.costs.read_ms(0, 1) * waits
        low, high = ((end[floor], end[target]) for end in (pairs.low, pairs.high))
        return Candidates(at, room, missed, coarse, ms, *mixed_loss(low, high, coarse * uses.exposure[at]))

    @cached_property
    def _num_streamed(self) -> Indices:
        found: Indices = self.pairs.streamed.sum(1)
        return found

    def _plan(self, name: str, found: Candidates, at: int) -> Plan:
        pairs, uses, pair = self.pairs, self.uses, int(found.pair[at])
        floor = pairs.rungs[pairs.floor[pair]] if pairs.floor[pair] >= 0 else None
        target, floor_bytes = pairs.rungs[pairs.target[pair]], int(pairs.floor_bytes[pair])
        missed, coarse, ms = float(found.missed[at]), float(found.coarse[at]), float(found.ms[at])
        unit = pairs.whole[pair] / max(int(self._num_streamed[pair]), 1)
        streamed = float(uses.streamed[pair])
        return Plan(
            name=name,
            floor=floor.name if floor else None,
            target=target.name,
            floor_bytes=floor_bytes,
            refinement_bytes=int(found.room[at]),
            wait_threshold=self._threshold(coarse / missed if missed else 1.0) if floor else 0.0,
            ms_per_token=Band(self.costs.framework_ms.low + ms, self.costs.framework_ms.high + UPPER * ms),
            loss=Band(float(found.loss_low[at]), float(found.loss_high[at])),
            start_seconds=self.costs.read_ms(floor_bytes, 1) / 1e3,
            fetch_bytes=floor_bytes + round(streamed * missed * float(unit)),
            shares=target.shares_over(floor, coarse),
            hit_rate=1.0 - missed * streamed / max(uses.total, 1e-12),
        )

    def _threshold(self, share: float) -> float:
        """The gate below which lies `share` of all uses' gates."""
        quantiles = np.array(self.ladder.gate_quantiles or (0.0, 1.0))
        if share >= 1.0:
            return float("inf")
        middles = (quantiles[1:] + quantiles[:-1]) / 2
        mass = np.concatenate([[0.0], np.cumsum(middles) / max(middles.sum(), 1e-12)])
        return float(np.interp(share, mass, quantiles))


def frontier(planner: Planner, budget: int, max_loss: float) -> list[Plan]:
    """A few plans to choose from: exact and within the bound at `budget`, and the smallest within the bound.

    Plans that do not fit are left out; the list is empty where none does.
    """
    plans = []
    asked = [("exact", budget, 0.0), ("bounded", budget, max_loss)] if max_loss else [("exact", budget, 0.0)]
    for name, nbytes, bound in [*asked, ("smallest", min(budget, planner.smallest(max_loss)), max_loss)]:
        try:
            plans.append(planner.best(nbytes, bound, name=name))
        except DoesNotFit:
            continue
    return plans


def uniform(ladder: Ladder, form: str) -> Plan:
    """The plan that keeps every expert resident, in `form` or a step of the chain: the reference of comparisons."""
    rung = ladder.rung(form)
    unknown = Band(0.0, float("inf"))
    return Plan(form, None, form, 0, rung.nbytes, 0.0, unknown, rung.loss_ci95, 0.0, rung.nbytes, rung.shares, 1.0)


def mixed_loss(low: tuple[Array, Array], high: tuple[Array, Array], coarse: Array) -> tuple[Array, Array]:
    """The interval of the loss where `coarse` of the streamed uses take the floor: all on certified text make its own.

    `low` and `high` are those of (floor, target). A session that uses the floor's more may have more than all.
    """
    lower, upper = (target + coarse * (floor - target) for floor, target in (low, high))
    return np.maximum(np.minimum(lower, upper), 0.0), np.maximum(upper, 0.0)
