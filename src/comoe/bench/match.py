"""A budget and a rate at which ways of serving a model are tried on the virtual clock."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from comoe.bench.contender import Contender
from comoe.bench.rows import Row
from comoe.memory.policy import POLICIES
from comoe.plan.ledger import Ledger
from comoe.plan.missrule import MissRule
from comoe.plan.planner import uniform
from comoe.sim.belady import belady
from comoe.sim.replay import Cell, Replayed, Times, reading_ahead, replay
from comoe.store.trace import Trace
from comoe.types import DoesNotFit


class Way(NamedTuple):
    """One way of serving: `rung` is wanted, experts leave by `policy`, a miss takes the `floor` where there is one."""

    rung: str
    policy: str
    prefetch: str
    floor: str | None = None


class Match:
    """`capacity` bytes for experts of `of`; reading an exact one takes `ratio` times a layer; `bound` may be lost.

    `timing` is what the device was measured to take: see `Contender.timed`.
    """

    def __init__(self, of: Contender, timing: Row, capacity: int, ratio: float, bound: float) -> None:
        self._of, self._timing, self._ratio = of, timing, ratio
        self._chosen: dict[Way, float | None] = {}
        self.capacity, self.bound = capacity, bound

    def holds(self, rung: str) -> bool:
        """Whether a floor leaves room for two exact experts."""
        ladder = self._of.ladder
        return ladder.rung(rung).nbytes + 2 * ladder.exact.group_beside(None) <= self.capacity

    def best(self, ways: Sequence[Way]) -> Way | None:
        """Of `ways` within the bound, by calibration text, the fastest on the choosing trace; None where none fits."""
        within = [way for way in ways if self._of.told[way.rung] <= self.bound]
        timed = {way: ms for way in within if (ms := self.chosen_ms(way)) is not None}
        return min(timed, key=timed.__getitem__) if timed else None

    def chosen_ms(self, way: Way) -> float | None:
        """Milliseconds of a decoded token on the choosing trace; None where that way does not fit."""
        if way not in self._chosen:
            trace = self._of.traces[0]
            found = self._played(way, trace)
            self._chosen[way] = None if found is None else float(found[0].ms[trace.tokens == 1].mean())
        return self._chosen[way]

    def judged(self, way: Way | None) -> Row:
        """What a way of serving comes to on the judging trace."""
        trace = self._of.traces[1]
        found = self._played(way, trace) if way is not None else None
        if way is None or found is None:
            return {"fits": False}
        loss = self._of.loss(way.rung) if way.floor is None else {"loss_ledger": found[1].loss}
        return {"fits": True, "way": way._asdict(), **_columns(found[0], trace), **loss}

    def clairvoyant(self, rung: str) -> Row:
        """Who streams this rung, reads nothing ahead and knows what comes: nobody has more hits."""
        trace = self._of.traces[1]
        cell = belady(trace, self._of.group_of(rung), self.capacity)
        try:
            return {"fits": True, **_columns(self._replayed(trace, cell, rung), trace)}
        except DoesNotFit:
            return {"fits": False}

    def _played(self, way: Way, trace: Trace) -> tuple[Replayed, Ledger] | None:
        of, ladder = self._of, self._of.ladder
        ledger = Ledger(ladder.prices(way.rung, way.floor), self.bound)
        cell = Cell(self.capacity, POLICIES[way.policy]())
        if way.floor is not None:
            plan = replace(uniform(ladder, way.rung), floor=way.floor, wait_threshold=float("inf"))
            cell = cell._replace(miss=MissRule(plan, ledger), floor_of=of.group_of(way.floor))
        if way.prefetch != "off" and trace.ahead is not None:
            cell = reading_ahead(cell, trace, of.foresight)
        try:
            return self._replayed(trace, cell, way.rung), ledger
        except DoesNotFit:
            return None

    def _replayed(self, trace: Trace, cell: Cell, rung: str) -> Replayed:
        of, timing = self._of, self._timing
        per_byte_s = self._ratio * timing["layer_s"] * sum(of.experts) / of.packed.manifest.expert_bytes_bf16
        shares = of.ladder.rung(rung).shares
        compute_s = sum(share * timing["compute_s"].get(form, 0.0) for form, share in shares.items())
        times = Times(lambda nbytes: per_byte_s * nbytes, timing["use_s"] + compute_s, timing["outside_s"])
        return replay(trace, cell, of.group_of(rung), of.packed.nbytes, times)


def _columns(found: Replayed, trace: Trace) -> Row:
    decode = trace.tokens == 1
    ms, uses = found.ms[decode], found.uses[decode].sum()
    return {
        "ms": float(ms.mean()),
        "ms_p50_p95": np.quantile(ms, (0.5, 0.95)).tolist(),
        "prefill_ms": float(found.ms[~decode].mean()),
        "bytes_per_token": float(found.bytes_read[decode].mean()),
        "hit_rate": float(found.hits[decode].sum() / uses),
        "floor_rate": float(found.floor_uses[decode].sum() / uses),
    }
