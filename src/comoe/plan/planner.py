"""Plan v0: the fastest (floor, streamed form, cache, wait threshold) under a byte budget and a loss bound.

Pure and well under a millisecond per candidate; enumerates the few pairs of certified rungs. The joint planner
replaces the inside of `best` and keeps its signature.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from comoe.plan.cost import Costs, hit_rate
from comoe.plan.ladder import Band, Ladder, Rung
from comoe.types import DoesNotFit

TIE = 0.05
"""Predicted times that differ by less are the same: rates are measured no better."""

BACKGROUND_SHARE = 0.5
"""Of its time, what a read costs that nobody waits for, since the floor answers: it takes the processor's."""

MIN_GROUPS = 2
"""Experts that the cache must hold beside the floor: one that computes while the next is read."""


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


@dataclass(frozen=True, slots=True)
class Planner:
    """A ladder on a device: everything but the budget and the bound."""

    ladder: Ladder
    costs: Costs

    def best(self, budget: int, max_loss: float, *, name: str = "bounded") -> Plan:
        """The fastest plan in `budget` bytes of expert memory with at most `max_loss` predicted loss.

        Of plans that are as fast within `TIE`, the one that loses least: a bound is a permission, not a wish. Raises
        DoesNotFit with the smallest budget at which there is one.
        """
        plans = [
            plan
            for floor, target in self._pairs(max_loss)
            if (plan := self._plan(name, floor, target, budget, max_loss)) is not None
        ]
        if not plans:
            smallest = self.smallest(max_loss)
            raise DoesNotFit(f"experts need at least {smallest} bytes of memory, {budget} were given.", smallest)
        fastest = min(plan.ms_per_token.high for plan in plans)
        tied = [plan for plan in plans if plan.ms_per_token.high <= fastest * (1 + TIE)]
        return min(tied, key=lambda plan: (plan.loss.high, plan.ms_per_token.high))

    def smallest(self, max_loss: float) -> int:
        """The least expert memory at which `best` finds a plan."""
        return min(_floor_bytes(floor) + self._reserve(floor, target) for floor, target in self._pairs(max_loss))

    def _pairs(self, max_loss: float) -> Iterator[tuple[Rung | None, Rung]]:
        """Pairs of a floor and a target whose target alone keeps the bound. A bound of 0 means the exact form."""
        exact = self.ladder.exact
        yield None, exact
        if max_loss <= 0:
            return
        certified = self.ladder.certified
        for i, target in enumerate(certified):
            if target.price <= max_loss:
                yield from ((floor, target) for floor in (None, *certified[:i]) if (floor, target) != (None, exact))

    def _reserve(self, floor: Rung | None, target: Rung) -> int:
        return min(target.beside(floor), MIN_GROUPS * target.group_beside(floor))

    def _plan(self, name: str, floor: Rung | None, target: Rung, budget: int, max_loss: float) -> Plan | None:
        whole = target.beside(floor)
        room = min(budget - _floor_bytes(floor), whole)
        if room < self._reserve(floor, target):
            return None
        use, streamed = target.use, target.streamed_beside(floor)
        unit = whole / max(int((target.groups_beside(floor) > 0).sum()), 1)
        missed = 1.0 - hit_rate(streamed[streamed > 0], len(use) if room >= whole else room / unit)
        exposure = self.ladder.exposure(target, floor)
        coarse = _coarse_share(floor, target, missed, max_loss, exposure)
        num_streamed = float(streamed.sum())
        waits = num_streamed * (missed - coarse + BACKGROUND_SHARE * coarse)
        ms = sum(self.costs.expert_ms(nbytes, form) for form, nbytes in target.touched.items())
        ms += self.costs.read_ms(waits * unit, waits)
        fetch = _floor_bytes(floor) + round(num_streamed * missed * unit)
        return Plan(
            name=name,
            floor=floor.name if floor else None,
            target=target.name,
            floor_bytes=_floor_bytes(floor),
            refinement_bytes=room,
            wait_threshold=self._threshold(coarse / missed if missed else 1.0) if floor else 0.0,
            ms_per_token=Band(self.costs.framework_ms.low + ms, self.costs.framework_ms.high + 1.5 * ms),
            loss=_mixed_loss(floor, target, coarse * exposure),
            start_seconds=self.costs.read_ms(_floor_bytes(floor), 1) / 1e3,
            fetch_bytes=fetch,
            shares=target.shares_over(floor, coarse),
            hit_rate=1.0 - missed * num_streamed / max(float(use.sum()), 1e-12),
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


def _floor_bytes(floor: Rung | None) -> int:
    return floor.nbytes if floor else 0


def _coarse_share(floor: Rung | None, target: Rung, missed: float, max_loss: float, exposure: float) -> float:
    """Share of streamed uses that may take the floor: all misses, or what the bound leaves beside the target's loss."""
    if floor is None:
        return 0.0
    gap = exposure * (floor.price - target.price)
    return missed if gap <= 0 else min(missed, (max_loss - target.price) / gap)


def _mixed_loss(floor: Rung | None, target: Rung, coarse: float) -> Band:
    """The loss where `coarse` of the streamed uses take the floor: all that there are on certified text make its own.

    A session that uses them more may have more than all.
    """
    low, high = target.loss_ci95
    if floor is not None:
        low += coarse * (floor.loss_ci95.low - low)
        high += coarse * (floor.loss_ci95.high - high)
    return Band(max(0.0, min(low, high)), max(0.0, high))
