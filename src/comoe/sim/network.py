"""A session on a link whose rate changes, in virtual time: what plans make of it, token by token.

The live cache's residency, `plan.stream`'s plans and `net.links`' idea of the rate, on the clock of `sim.reader`. No
model runs: a trace says what tokens use, and errors of forms say what they lose.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from math import inf
from typing import NamedTuple, Protocol

import numpy as np

from comoe.memory.policy import LFU
from comoe.memory.residency import Phase, Residency
from comoe.net.links import Link
from comoe.plan.ladder import Array, Flags
from comoe.plan.stream import LinkPlan, Streaming
from comoe.sim.reader import Reader
from comoe.sim.traces import LinkRate
from comoe.store.trace import Chunk, Trace
from comoe.types import BlobId

STEP_S = 0.5
"""Between two looks at the plan."""

SAMPLE_S = 0.1
"""Between two samples of the rate."""

PRIOR_TOKENS = 16.0
"""As many tokens as the calibration's use of experts counts for, beside those of the session."""


class Air(NamedTuple):
    """A link: its rate, its round trip, and the bytes that an expert's rows take when it runs elsewhere."""

    rate: LinkRate
    rtt_s: float
    remote_nbytes: float = 0.0


class Told(NamedTuple):
    """What a controller sees at a step: blobs (B + 1,) that are there, uses (N,) of a token, the measured rate."""

    now_s: float
    resident: Flags
    use: Array
    rate_bps: float


class Controller(Protocol):
    """Who decides: another plan, or None for the one that there is. The first answer must be a plan."""

    def tick(self, told: Told) -> LinkPlan | None: ...


class Switch(NamedTuple):
    at_s: float
    plan: LinkPlan


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a window came to: tokens (T,) that came at `at_s`, the mean error of their layers, how many experts were
    used, found as wanted, run elsewhere and waited for; the switches of the plan; the bytes that were read."""

    at_s: Array
    error: Array
    uses: int
    hits: int
    remote: int
    waited: int
    switches: tuple[Switch, ...]
    bytes_read: int

    def worth(self, streaming: Streaming) -> float:
        """In tokens of the exact model: each as likely as the text is, by its second's mean error."""
        seconds = self.at_s.astype(np.int64)
        mean = np.bincount(seconds, self.error) / np.maximum(np.bincount(seconds), 1)
        return float(streaming.pace.worth(streaming.forms.loss(mean[seconds])).sum()) if len(seconds) else 0.0

    def loss(self, streaming: Streaming) -> float:
        """The loss of the mean error of all tokens."""
        return float(streaming.forms.loss(np.array(self.error.mean()))) if len(self.error) else 0.0


class LinkReader(Reader):
    """Reads over a link: a round trip where it was idle, and bytes as they come. Ends may be never: inf."""

    def __init__(
        self, residency: Residency, nbytes: Callable[[BlobId], int], air: Air, read: Callable[[BlobId], None]
    ) -> None:
        super().__init__(residency, nbytes, lambda nbytes: 0.0, read)
        self._air = air
        self._begun_s, self._idle_s, self._busy_s, self._carried = 0.0, 0.0, 0.0, 0.0

    @property
    def next_end_s(self) -> float:
        """When the read in flight ends; inf where there is none, or never."""
        return self._reading[1] if self._reading is not None else inf

    def begin(self) -> None:
        if self._reading is None and (blob := self._residency.next_load()) is not None:
            idle = self.now_s > self._idle_s
            self._begun_s = self.now_s + (self._air.rtt_s if idle else 0.0)
            self._reading = blob, self._air.rate.done_s(self._begun_s, self._nbytes(blob))

    def end(self) -> None:
        assert self._reading is not None
        blob, end_s = self._reading
        self._busy_s += end_s - self._begun_s
        self._carried += self._nbytes(blob)
        self._idle_s = end_s
        super().end()

    def seen(self) -> tuple[float, float]:
        """(bytes, seconds) that reads have had until now, those of the one in flight too."""
        if self._reading is None or self.now_s <= self._begun_s:
            return self._carried, self._busy_s
        rate = self._air.rate
        partial = rate.sent(self.now_s) - rate.sent(self._begun_s)
        return self._carried + partial, self._busy_s + self.now_s - self._begun_s


@dataclass(slots=True)
class Counts:
    uses: int = 0
    hits: int = 0
    remote: int = 0
    waited: int = 0


@dataclass(slots=True)
class Session:
    """One window of a link, from nothing but dense weights in memory, by plans of `streaming` that `controller` makes.

    `blobs` (B,) are the pack's in the order of `streaming.forms`; `prior` (N,) are uses of a token by calibration.
    """

    streaming: Streaming
    air: Air
    controller: Controller
    blobs: Sequence[BlobId]
    prior: Array
    plan: LinkPlan = field(init=False)
    _residency: Residency = field(init=False)
    _reader: LinkReader = field(init=False)
    _link: Link = field(init=False, default_factory=Link)
    _seen: tuple[float, float] = (0.0, 0.0)
    _next_sample_s: float = SAMPLE_S
    _next_step_s: float = 0.0
    _used: Array = field(init=False)
    _use: Array = field(init=False)
    _missed: Flags = field(init=False)
    _tokens: int = 0
    _resident: Flags = field(init=False)
    _number: dict[BlobId, int] = field(init=False)
    _counts: Counts = field(init=False, default_factory=Counts)
    _switches: list[Switch] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        sizes = self.streaming.forms.sizes
        self._number = {blob: at for at, blob in enumerate(self.blobs)}
        self._residency = Residency(self.streaming.capacity, self._size, LFU())
        self._reader = LinkReader(self._residency, self._size, self.air, self._arrived)
        self._used, self._missed = np.zeros(len(self.prior)), np.zeros(len(self.prior), np.bool_)
        self._resident = np.zeros(len(sizes), np.bool_)
        self._resident[-1] = True
        self._link.probed(self.air.rtt_s, 0.0)

    def run(self, trace: Trace) -> Outcome:
        """Decode the tokens of a trace, again and again, at the reader's pace, until the window is over."""
        end_s, pace = self.air.rate.end_s, self.streaming.pace
        at_s, errors = [], []
        due_s = 0.0
        self._look()
        for chunks in cycle(list(decoded(trace))):
            self._until(due_s)
            self._start()
            start_s = self._reader.now_s
            self._until(start_s + pace.token_s)
            error = np.mean([self._layer(chunk) for chunk in chunks])
            self._tokens += 1
            if self._reader.now_s >= end_s:
                break
            at_s.append(self._reader.now_s)
            errors.append(float(error))
            due_s = max(self._reader.now_s, start_s + pace.reader_s)
        counts = self._counts
        return Outcome(
            np.array(at_s), np.array(errors), counts.uses, counts.hits, counts.remote, counts.waited,
            tuple(self._switches), self._reader.bytes_read,
        )  # fmt: skip

    def _layer(self, chunk: Chunk) -> float:
        """Serve a layer's experts; the error of its output."""
        forms, rung = self.streaming.forms, self.streaming.target(self.plan)
        first = int(np.searchsorted(forms.layer, chunk.layer))
        experts = first + np.array(chunk.experts)
        gates = np.array(chunk.gates)
        self._used[experts] += chunk.counts
        self._see()
        now, wanted = forms.errors_at(self._resident, experts), self.streaming.errors_of(self.plan.target)[experts]
        missing = now > wanted + 1e-12
        self._missed[experts[missing]] = True
        self._counts.uses += len(experts)
        self._counts.hits += int((~missing).sum())
        for expert, here in zip(experts.tolist(), missing.tolist(), strict=True):
            if not here:
                self._touch(expert)
        if missing.any() and self.plan.miss == "remote":
            self._counts.remote += int(missing.sum())
            self._remote()
            now = np.where(missing, 0.0, now)
        elif missing.any() and self.plan.miss == "wait":
            self._counts.waited += int(missing.sum())
            self._wait([rung.needs[expert] for expert in experts[missing].tolist()])
            self._see()
            now = forms.errors_at(self._resident, experts)
        return float(gates @ now / max(gates.sum(), 1e-12))

    def _start(self) -> None:
        """Wait until the plan's floor is there."""
        while self.plan.floor is not None and not self.streaming.complete(self.plan.floor, self._resident, self._use):
            if not self._next():
                return

    def _touch(self, expert: int) -> None:
        """Tell the policy of a use of what is there."""
        needs = self.streaming.forms.best_needs(self._resident, expert)
        group = [self.blobs[at] for at in needs if at >= 0]
        if group and self._residency.resident(group):
            self._residency.release(self._residency.demand(group))

    def _remote(self) -> None:
        pace, start_s = self.streaming.pace, self._reader.now_s
        done_s = max(start_s + pace.remote_s, self.air.rate.done_s(start_s + self.air.rtt_s, self.air.remote_nbytes))
        self._until(done_s)

    def _wait(self, needs: Iterable[Array]) -> None:
        groups = [[self.blobs[at] for at in group.tolist() if at >= 0] for group in needs]
        tickets = [self._residency.demand(group) for group in groups]
        self._reader.begin()
        while any(ticket.phase is not Phase.READY for ticket in tickets) and self._next():
            pass
        for ticket in tickets:
            self._residency.release(ticket)
        self._reader.begin()

    def _next(self) -> bool:
        """Let time pass until something may have changed; False at the end."""
        before_s = self._reader.now_s
        self._until(min(self._reader.next_end_s, self._next_sample_s))
        if self._reader.now_s == before_s < self.air.rate.end_s:
            self._reader.advance(0.0)  # a read that ends at this very moment
            self._see()
        return self._reader.now_s < self.air.rate.end_s

    def _until(self, until_s: float) -> None:
        """Let time pass, looking at the rate and the plan as often as they are due; no farther than the end."""
        until_s = min(until_s, self.air.rate.end_s)
        while self._reader.now_s < until_s:
            self._reader.advance(min(until_s, self._next_sample_s) - self._reader.now_s)
            self._see()
            if self._reader.now_s >= self._next_sample_s - 1e-9:
                self._sample()

    def _sample(self) -> None:
        self._next_sample_s += SAMPLE_S
        carried, busy_s = self._reader.seen()
        before = self._seen
        self._seen = carried, busy_s
        self._link.transferred(max(0, round(carried - before[0])), busy_s - before[1], self._reader.now_s)
        if self._reader.now_s >= self._next_step_s - 1e-9:
            self._look()

    def _look(self) -> None:
        """Ask for a plan, and read towards it."""
        self._next_step_s += STEP_S
        self._see()
        use = (PRIOR_TOKENS * self.prior + self._used) / (PRIOR_TOKENS + self._tokens)
        told = Told(self._reader.now_s, self._resident, use, self._link.rate_bps)
        plan = self.controller.tick(told)
        if plan is not None and (not self._switches or plan != self.plan):
            self.plan = plan
            self._switches.append(Switch(told.now_s, plan))
        self._use = use
        nothing = np.zeros_like(self._resident)
        groups, stays = self.streaming.towards(self.plan, self._resident, use, self._missed, nothing)
        self._residency.aim(self.blobs[at] for at in np.flatnonzero(stays[:-1]).tolist())
        self._residency.foresee([tuple(self.blobs[at] for at in needs.tolist()) for needs in groups])
        self._reader.begin()

    def _arrived(self, blob: BlobId) -> None:
        self._see()
        self._resident[self._number[blob]] = True

    def _see(self) -> None:
        """Note what left."""
        for blob in self._residency.take_evictions():
            self._resident[self._number[blob]] = False

    def _size(self, blob: BlobId) -> int:
        return int(self.streaming.forms.sizes[self._number[blob]])


def decoded(trace: Trace) -> Iterator[list[Chunk]]:
    """The chunks of every decoded token of a trace."""
    found: list[Chunk] = []
    for chunk in trace:
        if trace.tokens[chunk.in_pass] != 1:
            continue
        if found and found[-1].in_pass != chunk.in_pass:
            yield found
            found = []
        found.append(chunk)
    if found:
        yield found
