"""A budget and a rate at which ways of serving a model are tried on the virtual clock."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from comoe.bench.contender import Contender
from comoe.bench.losses import loss_columns
from comoe.bench.rows import Row
from comoe.bench.staged import Answer
from comoe.make.score import compare
from comoe.make.trace import Turn
from comoe.memory.policy import POLICIES, Fixed, Policy
from comoe.plan.pin import Pin
from comoe.sim.belady import belady
from comoe.sim.reader import Times
from comoe.sim.replay import Cell, Replayed, reading_ahead, replay
from comoe.store.trace import Trace
from comoe.types import BlobId, DoesNotFit

LEAST_BOUND = 1e-6
"""What is left of a bound that a form has used up: a bias, which needs one, moves nothing then."""

FIXED = "fixed"
"""The policy by which what calibration text uses most stays, whatever is used."""


class Way(NamedTuple):
    """One way of serving: `rung` is wanted, experts leave by `policy`, a miss takes the `floor` where there is one.

    Routers prefer experts in memory by `bias` logits, as far as the ledger allows it.
    """

    rung: str
    policy: str
    prefetch: str
    floor: str | None = None
    bias: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether what it answers does not depend on what is in memory: a trace tells what it takes."""
        return self.floor is None and not self.bias


class Match:
    """`capacity` bytes for experts of `of`; reading an exact one takes `ratio` times a layer; `bound` may be lost.

    `timing` is what the device was measured to take: see `Contender.timed`.
    """

    def __init__(self, of: Contender, timing: Row, capacity: int, ratio: float, bound: float) -> None:
        self._of, self._timing, self._ratio = of, timing, ratio
        self._chosen: dict[Way, float | None] = {}
        self._judged: dict[Way, Row] = {}
        self.capacity, self.bound = capacity, bound

    def holds(self, rung: str) -> bool:
        """Whether a floor leaves room for two exact experts."""
        ladder = self._of.ladder
        return ladder.rung(rung).nbytes + 2 * ladder.exact.group_beside(None) <= self.capacity

    def best(self, ways: Sequence[Way]) -> Way | None:
        """Of `ways` within the bound, by calibration text, the fastest on the choosing text; None where none fits."""
        ranked = self.ranked(ways)
        return ranked[0] if ranked else None

    def ranked(self, ways: Sequence[Way]) -> list[Way]:
        """Those of `ways` that fit and are within the bound, by calibration text; the fastest on it first."""
        within = [way for way in dict.fromkeys(ways) if self._of.told[way.rung] <= self.bound]
        timed = {way: ms for way in within if (ms := self.chosen_ms(way)) is not None}
        return sorted(timed, key=timed.__getitem__)

    def chosen_ms(self, way: Way) -> float | None:
        """Milliseconds of a token decoded of the choosing text; None where that way does not fit or loses too much."""
        if way not in self._chosen:
            self._chosen[way] = self._replayed_ms(way) if way.is_plain else self._staged_ms(way)
        return self._chosen[way]

    def judged(self, way: Way | None) -> Row:
        """What a way of serving comes to on the judging text."""
        if way is None:
            return {"fits": False}
        if way not in self._judged:
            self._judged[way] = self._judge(way)
        return self._judged[way]

    def clairvoyant(self, rung: str) -> Row:
        """Who streams this rung, reads nothing ahead and knows what comes: nobody has more hits."""
        trace = self._of.traces[1]
        cell = belady(trace, self._of.group_of(rung), self.capacity)
        try:
            return {"fits": True, **_columns(self._replayed(trace, cell, rung), trace)}
        except DoesNotFit:
            return {"fits": False}

    def _judge(self, way: Way) -> Row:
        told: Row = {"fits": True, "way": way._asdict(), "resident_bytes": self._resident(way)}
        try:
            if not way.is_plain:
                row, found = self._staged(way, judging=True)
                return {**told, **row, **loss_columns(found, self._of.exact_score(judging=True))}
            trace = self._of.traces[1]
            return {**told, **_columns(self._replayed(trace, self._cell(way, trace), way.rung), trace),
                    **self._of.loss(way.rung)}  # fmt: skip
        except DoesNotFit:
            return {"fits": False}

    def at(self, timing: Row) -> "Match":
        """The same, reads as slow as here, on a device that was measured to take this to compute."""
        return Match(self._of, {**timing, "layer_s": self._timing["layer_s"]}, self.capacity, self._ratio, self.bound)

    @property
    def compute_s(self) -> dict[str, float]:
        """Seconds of computing an expert, by form."""
        found: dict[str, float] = self._timing["compute_s"]
        return found

    def times(self, rung: str) -> Times:
        """What a device of this match takes that serves a rung."""
        of, timing = self._of, self._timing
        per_byte_s = self._ratio * timing["layer_s"] * sum(of.experts) / of.packed.manifest.expert_bytes_bf16
        shares = of.ladder.rung(rung).shares
        compute_s = sum(share * self.compute_s.get(form, 0.0) for form, share in shares.items())
        use_s = timing["use_s"] + compute_s
        beside = timing["wake_s"], timing["ahead_s"]
        return Times(lambda nbytes: per_byte_s * nbytes, use_s, timing["outside_s"], *beside)

    def answers(self, way: Way, turns: Sequence[Turn]) -> list[Answer]:
        """What a way makes of `turns` on the virtual clock. Raises DoesNotFit."""
        pin, how = self.options(way)
        return self._of.answers(pin, self.capacity, self.times(way.rung), turns, **how)

    def options(self, way: Way) -> tuple[Pin, dict[str, Any]]:
        """What a loader serves a way by."""
        pin = Pin(way.floor, way.rung, float("inf") if way.floor else 0.0)
        how = {"policy": way.policy, "prefetch": way.prefetch, "routing_bias": way.bias}
        return pin, {**how, "max_loss": self._left(way)}

    def _resident(self, way: Way) -> int:
        """The most that its experts take of memory."""
        ladder = self._of.ladder
        floor = ladder.rung(way.floor) if way.floor else None
        return min(self.capacity, (floor.nbytes if floor else 0) + ladder.rung(way.rung).beside(floor))

    def _replayed_ms(self, way: Way) -> float | None:
        trace = self._of.traces[0]
        try:
            found = self._replayed(trace, self._cell(way, trace), way.rung)
        except DoesNotFit:
            return None
        return float(found.ms[trace.tokens == 1].mean())

    def _staged_ms(self, way: Way) -> float | None:
        try:
            row, found = self._staged(way, judging=False)
        except DoesNotFit:
            return None
        ms: float = row["ms"]
        return ms if compare(found, self._of.exact_score(judging=False)).mean <= self.bound else None

    def _staged(self, way: Way, *, judging: bool) -> tuple[Row, Any]:
        pin, how = self.options(way)
        return self._of.staged(pin, self.capacity, self.times(way.rung), judging=judging, **how)

    def _left(self, way: Way) -> float:
        """The bound for the ledger, which knows nothing of what forms without a certificate lose."""
        certified = self._of.ladder.rung(way.rung).loss is not None
        return self.bound if certified else max(self.bound - self._of.told[way.rung], LEAST_BOUND)

    def _cell(self, way: Way, trace: Trace) -> Cell:
        cell = Cell(self.capacity, self._policy(way))
        ahead = way.prefetch != "off" and trace.ahead is not None
        return reading_ahead(cell, trace, self._of.foresight) if ahead else cell

    def _policy(self, way: Way) -> Policy:
        if way.policy != FIXED:
            return POLICIES[way.policy]()
        group_of, worth = self._of.group_of(way.rung), dict[BlobId, float]()
        for expert, uses in self._of.use.items():
            for blob in group_of(expert):
                worth[blob] = worth.get(blob, 0.0) + uses / max(1, self._of.packed.nbytes(blob))
        return Fixed(lambda blob: worth.get(blob, 0.0))

    def _replayed(self, trace: Trace, cell: Cell, rung: str) -> Replayed:
        of = self._of
        return replay(trace, cell, of.group_of(rung), of.packed.nbytes, self.times(rung))


def _columns(found: Replayed, trace: Trace) -> Row:
    decode = trace.tokens == 1
    ms, uses = found.ms[decode], found.uses[decode].sum()
    return {
        "ms": float(ms.mean()),
        "ms_p50_p95": np.quantile(ms, (0.5, 0.95)).tolist(),
        "prefill_ms": float(found.ms[~decode].mean()),
        "bytes_per_token": float(found.bytes_read[decode].mean()),
        "hit_rate": float(found.hits[decode].sum() / uses),
        "floor_rate": 0.0,
    }
