"""What a link should bring next, and what a use does meanwhile whose expert is not there in the form wanted. Pure.

A plan for a link is a step of the chain, towards which experts are read in the order of what each byte is worth, and
what a miss does. It is worth the tokens that it foretells, each as likely as the coarse model finds what the exact one
says: see docs/decisions/021. What is in memory, and at which rate more comes, are arguments.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Literal, NamedTuple

import numpy as np

from comoe.plan.ladder import Array, Flags, Indices, Ladder, Rung
from comoe.store.manifest import Manifest

Miss = Literal["coarse", "remote", "wait"]
Reads = Literal["all", "missed", "none"]
MISSES: tuple[Miss, ...] = ("coarse", "remote", "wait")
"""Take the best form that is there; run the exact expert on the edge node; wait until the form has come."""

HORIZON_S = 10.0
"""So far ahead, plans are compared."""

TIE = 0.01
"""Rungs whose worth differs by less are worth the same: the coarsest of them has fewer bytes to bring."""

MARGIN = 0.05
"""Another plan must be worth so much more."""

LEAST = 0.001
"""And so much where nothing is left to be read for this one: the link would be idle."""

HOLD_S = 1.0
"""A plan stays so long at least, unless the rate fell below `FALL` of what it was made for."""

FALL = 0.6

KEPT = 2.0
"""Reading an expert anew is worth it where it is worth so many times what would leave for it."""

NO_FORM = 1.0
"""The error of an expert that is there in no form, about: that of leaving it out."""

MOMENTS = 6
"""Of a horizon, at which a plan's worth is foretold."""


class LinkPlan(NamedTuple):
    """What to read of rung `target`, and what a `miss` does.

    Reads are in the order of what bytes are worth; only those of experts that were missed where `reads` says so, or
    none but those that are waited for. With a `floor` nothing is answered before all of that rung is there.
    """

    target: str
    miss: Miss
    floor: str | None = None
    reads: Reads = "all"


class Pace(NamedTuple):
    """What tokens take and are worth.

    `token_s` is what one takes with everything there, `reader_s` what a reader takes for one: faster ones are worth no
    more. `remote_s` is what a layer takes whose experts run elsewhere, `rtt_s` what a read takes beside its bytes.
    `nats` are those of a token by the exact model; one that loses more than `max_loss` is worth nothing.
    """

    token_s: float
    reader_s: float
    remote_s: float
    rtt_s: float
    nats: float
    max_loss: float

    def worth(self, loss: Array) -> Array:
        """Of tokens that lose so much, how likely the text still is, over how likely it is by the exact model."""
        return np.where(loss <= self.max_loss, np.exp(-self.nats * np.maximum(loss, 0.0)), 0.0)


@dataclass(frozen=True)
class Forms:
    """What N experts may be in memory, in F forms: `needs` (F, N, P) blobs of B, -1 for none, `error` (F, N) that a use
    in it adds to its layer's relative squared error, by its share of the layer's gates; exact is the last.

    `sizes` (B + 1,) are bytes to be read. `layer` (N,) says whose experts they are. `curve` (2, K) has losses by mean
    errors of layers, from 0 on.
    """

    needs: Indices
    error: Array
    sizes: Indices
    layer: Indices
    curve: Array

    @property
    def num_layers(self) -> int:
        return int(self.layer.max()) + 1

    def have(self, resident: Flags) -> Flags:
        """Which forms (F, N) are whole where blobs (B + 1,) are resident; the last of them stands for none."""
        return np.asarray(resident[self.needs].all(2))

    def errors(self, resident: Flags) -> Array:
        """The error (N,) of every expert in the best form that is there."""
        found: Array = np.where(self.have(resident), self.error, np.inf).min(0)
        return found

    def errors_at(self, resident: Flags, experts: Indices) -> Array:
        """The same, of some experts alone."""
        have = resident[self.needs[:, experts]].all(2)
        found: Array = np.where(have, self.error[:, experts], np.inf).min(0)
        return found

    def best_needs(self, resident: Flags, expert: int) -> Indices:
        """The blobs of the best form of an expert that is there."""
        have = resident[self.needs[:, expert]].all(1)
        found: Indices = self.needs[int(np.where(have, self.error[:, expert], np.inf).argmin()), expert]
        return found

    def loss(self, error: Array) -> Array:
        """The loss of a mean error of layers: between certified steps by interpolation."""
        x, y = self.curve
        found: Array = np.interp(error, x, y)
        beyond = (y[-1] - y[-2]) / max(x[-1] - x[-2], 1e-12)
        return np.where(np.asarray(error) > x[-1], y[-1] + beyond * (np.asarray(error) - x[-1]), found)


def forms_of(manifest: Manifest, ladder: Ladder) -> Forms:
    """Of a calibrated pack with a certified chain. ValueError for another."""
    names = [form for form in manifest.forms if all(form in layer.errors for layer in manifest.layers)]
    names = [*(name for name in names if name != "exact"), "exact"]
    mass = np.concatenate([np.maximum(np.array(layer.mass), 1e-4) for layer in manifest.layers if layer.mass])
    if len(mass) != ladder.num_experts or len(names) < 2 or len(ladder.certified) < 2:
        raise ValueError("the pack was not calibrated, or has no certified chain")
    numbers = {form: ladder.rung(form) for form in names}
    error = [
        np.concatenate([np.array(layer.errors[form]) for layer in manifest.layers]) / mass
        if form != "exact"
        else np.zeros(len(mass))
        for form in names
    ]
    return Forms(
        needs=np.stack([numbers[form].needs for form in names]),
        error=np.stack(error),
        sizes=ladder.exact.sizes,
        layer=np.repeat(np.arange(len(manifest.layers)), [layer.num_experts for layer in manifest.layers]),
        curve=_curve(ladder),
    )


def _curve(ladder: Ladder) -> Array:
    """Losses (2, K) by mean error, both rising from 0."""
    points = sorted((rung.mean_error or 0.0, max(rung.loss or 0.0, 0.0)) for rung in ladder.certified)
    x, y = np.array([(0.0, 0.0), *points]).T
    kept = np.append(True, np.diff(x) > 1e-9)
    return np.stack([x[kept], np.maximum.accumulate(y[kept])])


@dataclass(eq=False)
class Streaming:
    """The plans of a ladder for a link, in `capacity` bytes of memory, at a pace: both may change."""

    forms: Forms
    rungs: tuple[Rung, ...]
    capacity: int
    pace: Pace

    @cached_property
    def plans(self) -> tuple[LinkPlan, ...]:
        """Every rung, with everything that a miss may do."""
        return tuple(LinkPlan(rung.name, miss) for rung in self.rungs for miss in MISSES)

    @cached_property
    def _by_name(self) -> dict[str, Rung]:
        return {rung.name: rung for rung in self.rungs}

    @cached_property
    def _errors_of(self) -> dict[str, Array]:
        return {rung.name: self._error(rung) for rung in self.rungs}

    def _error(self, rung: Rung) -> Array:
        """The error (N,) of every expert in a rung."""
        resident = np.zeros(len(self.forms.sizes), np.bool_)
        resident[-1] = True
        found = np.zeros(len(self.forms.layer))
        for expert, needs in enumerate(rung.needs):
            same = (np.sort(self.forms.needs[:, expert], axis=1) == np.sort(needs)).all(1)
            found[expert] = self.forms.error[:, expert][same].min()
        return found

    def target(self, plan: LinkPlan) -> Rung:
        """The rung that a plan reads towards."""
        return self._by_name[plan.target]

    def errors_of(self, rung: str) -> Array:
        """The error (N,) of every expert in a rung."""
        return self._errors_of[rung]

    def order(self, rung: str, resident: Flags, use: Array) -> Indices:
        """The experts (n,) that still need something in a rung to be better, the bytes that are worth most first."""
        gain, nbytes = self._gains(rung, self.forms.errors(resident), resident, use)
        wanted = np.flatnonzero((gain > 0) & (nbytes > 0))
        found: Indices = wanted[np.argsort(-gain[wanted] / nbytes[wanted], kind="stable")]
        return found

    def groups(self, plan: LinkPlan, resident: Flags, use: Array, missed: Flags) -> Iterator[Indices]:
        """The blobs of experts to read, in order; `missed` (N,) are experts that were missed so far."""
        if plan.floor is not None:
            floor, resident = self._by_name[plan.floor].needs, resident.copy()
            for expert in self.order(plan.floor, resident, use).tolist():
                yield floor[expert][floor[expert] >= 0]
            resident[floor] = True
        needs = self._by_name[plan.target].needs
        for expert in self.order(plan.target, resident, self._wanted(plan, use, missed)).tolist():
            yield needs[expert][needs[expert] >= 0]

    def towards(
        self, plan: LinkPlan, resident: Flags, use: Array, missed: Flags, held: Flags
    ) -> tuple[list[Indices], Flags]:
        """Of `groups` what to read, in their order, and what (B + 1,) is to stay beside blobs that are `held`: of the
        plan what is worth most, as far as there is room. What is there counts `KEPT` times as much."""
        needs, stays = self._by_name[plan.target].needs, held.copy()
        stays[-1] = True
        if plan.floor is not None:
            stays[self._by_name[plan.floor].needs] = True
        there = resident[needs].all(1)
        wanted = self._wanted(plan, use, missed)
        gain, nbytes = self._gains(plan.target, np.minimum(self.forms.errors(stays), NO_FORM), stays, wanted)
        better, _ = self._gains(plan.target, self.forms.errors(resident), resident, wanted)
        order = np.argsort(-gain / np.maximum(nbytes, 1.0) * np.where(there, KEPT, 1.0), kind="stable")
        order = order[(there | (better > 0))[order]]
        groups = needs[order]
        sizes = np.zeros(groups.size, np.int64)
        blobs, first = np.unique(groups, return_index=True)
        sizes[first] = np.where(stays, 0, self.forms.sizes)[blobs]
        room = self.capacity - int(self.forms.sizes[stays].sum())
        fits = np.cumsum(sizes.reshape(groups.shape).sum(1)) <= room
        stays[groups[fits]] = True
        return [group for group in self.groups(plan, resident, use, missed) if stays[group].all()], stays

    def _wanted(self, plan: LinkPlan, use: Array, missed: Flags) -> Array:
        """The uses (N,) that a plan reads for."""
        return {"all": use, "missed": use * missed, "none": np.zeros_like(use)}[plan.reads]

    def complete(self, rung: str, resident: Flags, use: Array) -> bool:
        """Whether all of a rung is there, or what is better, as far as it is used."""
        return not len(self.order(rung, resident, use))

    def _gains(self, rung: str, now: Array, resident: Flags, use: Array) -> tuple[Array, Array]:
        """(worth, bytes), each (N,), of bringing every expert from its error now to a rung."""
        needs = self._by_name[rung].needs
        nbytes = np.where(resident, 0, self.forms.sizes)[needs].sum(1).astype(np.float64)
        gain = use * np.maximum(now - self._errors_of[rung], 0.0)
        return gain, nbytes

    def foretold(self, resident: Flags, use: Array, nbytes: Array, rate_bps: float) -> Array:
        """Tokens per second (rungs, misses, T) that plans are worth once `nbytes` (T,) more have come.

        `use` (N,) are uses of a token. Bytes beyond the capacity bring nothing.
        """
        now = self.forms.errors(resident)
        room = max(self.capacity - int(self.forms.sizes[resident].sum()), 0)
        ahead = (self._ahead(rung.name, now, resident, use, np.minimum(nbytes, room)) for rung in self.rungs)
        return np.array([[self._worth(miss, found, rate_bps) for miss in MISSES] for found in ahead])

    def _ahead(self, rung: str, now: Array, resident: Flags, use: Array, nbytes: Array) -> "Ahead":
        """What tokens find once so many bytes (T,) have come on the way to a rung."""
        gain, size = self._gains(rung, now, resident, use)
        done, layers = np.minimum(now, self._errors_of[rung]), self.forms.num_layers
        of_layer = np.bincount(self.forms.layer, use, layers)
        share = use / np.maximum(of_layer, 1e-12)[self.forms.layer] / max(int((of_layer > 0).sum()), 1)
        missing = (gain > 0) & (size > 0)
        order = np.flatnonzero(missing)[np.argsort(-(gain / np.maximum(size, 1.0))[missing], kind="stable")]
        taken = np.append(0.0, np.cumsum(size[order]))

        def after(start: float, steps: Array) -> Array:
            return np.interp(nbytes, taken, start + np.append(0.0, np.cumsum(steps)))

        misses = after(float(use[missing].sum()), -use[order])
        by_layer = np.bincount(self.forms.layer, np.where(missing, use, 0.0), layers)
        left = misses / max(float(use[missing].sum()), 1e-12)
        return Ahead(
            coarse=after(float(share @ now), (share * (done - now))[order]),
            remote=after(float(share @ np.where(missing, 0.0, now)), (share * done)[order]),
            wait=np.full(len(nbytes), float(share @ done)),
            misses=misses,
            layers=(1 - np.exp(-by_layer[:, None] * left)).sum(0),
            wanted=float(size[missing].mean()) if missing.any() else 0.0,
        )

    def _worth(self, miss: Miss, ahead: "Ahead", rate_bps: float) -> Array:
        """Worth per second (T,) of tokens whose misses do so."""
        pace, took_s = self.pace, np.full(len(ahead.misses), self.pace.token_s)
        if miss == "remote":
            took_s = took_s + ahead.layers * pace.remote_s
        if miss == "wait":
            took_s = took_s + ahead.misses * (pace.rtt_s + ahead.wanted / max(rate_bps, 1.0))
        loss = self.forms.loss({"coarse": ahead.coarse, "remote": ahead.remote, "wait": ahead.wait}[miss])
        found: Array = pace.worth(loss) / np.maximum(took_s, pace.reader_s)
        return found


class Ahead(NamedTuple):
    """What tokens find at T moments, each (T,): the mean error of layers where misses take what is there, run
    elsewhere, or wait; the misses of a token and the layers that have any. `wanted` are the bytes of what misses."""

    coarse: Array
    remote: Array
    wait: Array
    misses: Array
    layers: Array
    wanted: float


@dataclass(slots=True)
class LinkFollower:
    """Follows a link by plans: another one where it is worth more by a margin, and not soon after the last.

    Only a fall of the rate is followed at once. What is decided counts as done.
    """

    streaming: Streaming
    horizon_s: float = HORIZON_S
    hold_s: float = HOLD_S
    plan: LinkPlan | None = None
    _since_s: float = -inf
    _rate_bps: float = 0.0

    def tick(self, resident: Flags, use: Array, rate_bps: float, now_s: float) -> LinkPlan | None:
        """The plan to follow from now on; None where it stays."""
        moments = self.horizon_s * np.arange(MOMENTS) / (MOMENTS - 1)
        return self.foresee(resident, use, rate_bps * moments, rate_bps, now_s)

    def foresee(self, resident: Flags, use: Array, nbytes: Array, rate_bps: float, now_s: float) -> LinkPlan | None:
        """The same, for one who knows what `nbytes` (T,) the link will have brought at moments from now on.

        A rung is worth what the best miss makes of it at each moment, since misses may do something else at any time.
        """
        worth = self.streaming.foretold(resident, use, nbytes, rate_bps)
        names = [rung.name for rung in self.streaming.rungs]
        before, rungs = self.plan, worth.max(1).mean(1)
        at = None if before is None else names.index(before.target)
        done = before is not None and self.streaming.complete(before.target, resident, use)
        free = done or now_s - self._since_s >= self.hold_s or rate_bps < FALL * self._rate_bps
        best = self._rung(rungs, at, idle=done) if free or at is None else at
        now = worth[best, :, 0]
        miss = MISSES[int(now.argmax())]
        if before is not None and now.max() <= (1 + MARGIN) * now[MISSES.index(before.miss)]:
            miss = before.miss
        plan = LinkPlan(names[best], miss)
        if plan == before:
            return None
        if best != at:
            self._since_s, self._rate_bps = now_s, rate_bps
        self.plan = plan
        return plan

    def _rung(self, worth: Array, before: int | None, *, idle: bool) -> int:
        """The rung to read towards: another one if it is worth more by a margin, or at all where the link is idle."""
        margin, tie = (0.0, LEAST) if idle else (MARGIN, TIE)
        best = int(np.flatnonzero(worth >= (1 - tie) * worth.max())[0])
        if before is not None and worth[best] <= (1 + max(margin, LEAST)) * worth[before]:
            return before
        return best
