"""A drive past edge nodes, in virtual time: who serves by which policy, and what tokens take meanwhile.

The session is exact: an expert that the device has not in memory runs on the node that serves, at a round trip for each
layer; where the node has it not in memory either, it reads it from the origin first. Without a link the device reads
its own flash. `net.handover` decides as it does on sockets. Which round trips nodes have is drawn, by who is near.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from math import inf
from typing import NamedTuple

import numpy as np

from comoe.net.handover import DEFAULT_RULE, Handover, NextNode, Rule, Sight
from comoe.net.links import Link, states
from comoe.plan.missrule import needs_help
from comoe.sim.mobility import Stay
from comoe.sim.traces import LinkRate
from comoe.types import BlobId

PROBE_S = 0.25
UNIT_NBYTES = 1 << 16
QUIET_BPS = 2000.0
"""Bytes per second below which nothing gets through in time."""


class RoundTrip(NamedTuple):
    """Of a log-normal distribution: its median and its 95th percentile, in seconds."""

    median_s: float
    high_s: float

    def draw(self, random: np.random.Generator) -> float:
        return float(self.median_s * np.exp(random.normal(0.0, np.log(self.high_s / self.median_s) / 1.645)))


class Costs(NamedTuple):
    """Seconds: of a token with everything in memory, of reading an expert from the device's flash, and of a node's
    reading one from the origin. Round trips to the node that is near, and to any other."""

    token_s: float
    flash_s: float
    origin_s: float
    near: RoundTrip
    far: RoundTrip


class Fault(NamedTuple):
    """From `begin_s` to `end_s`: the node that serves then is gone, or answers nothing but probes, or nothing gets
    through to any."""

    kind: str
    begin_s: float
    end_s: float


class Policy(NamedTuple):
    """Whether who is near serves at once, or by a `rule`, or the first one for ever (no rule); how many of the
    session's last experts are announced to who may serve next: `hot`; and whether the node before is asked, too:
    `both`."""

    rule: Rule | None = DEFAULT_RULE
    at_once: bool = False
    hot: int = 0
    both: bool = False


class Token(NamedTuple):
    """When it came, how long it took, and of what ran elsewhere how much the nodes that answered had in memory, and how
    much of it the one that serves."""

    at_s: float
    took_s: float
    remote: int
    warm: int
    own: int = 0


class Ran(NamedTuple):
    """When a node has run a group, its name, and how much it had in memory."""

    until_s: float
    node: str
    warm: int


@dataclass(frozen=True, slots=True, eq=False)
class Roamed:
    """What a drive came to.

    `moves` are the moments at which another node served, who, and the kind of event; `announced` counts the experts
    that were told, `counts` the events by kind, `far_s` the seconds with a node that was not near.
    """

    tokens: tuple[Token, ...]
    moves: tuple[tuple[float, str, str], ...]
    announced: int
    counts: dict[str, int]
    far_s: float


@dataclass(slots=True)
class Roamer:
    """A device on a drive of `stays`, over a radio of a `rate`, with the `misses` of every token, again and again.

    A token's misses are a group of blobs for every layer. `warm` says what nodes have in memory, and since when.
    """

    stays: Sequence[Stay]
    rate: LinkRate
    misses: Sequence[Sequence[Sequence[BlobId]]]
    costs: Costs
    policy: Policy
    fault: Fault | None = None
    history: NextNode = field(default_factory=NextNode)
    seed: int = 0
    warm: dict[str, dict[BlobId, float]] = field(default_factory=dict)
    _links: dict[str, Link] = field(init=False)
    _machine: Handover = field(init=False)
    _random: np.random.Generator = field(init=False)
    _recent: dict[BlobId, None] = field(init=False, default_factory=dict)
    _moves: list[tuple[float, str, str]] = field(init=False, default_factory=list)
    _free_s: dict[str, float] = field(init=False, default_factory=dict)
    _helper: str | None = None
    _since_s: float = 0.0
    _in_a_row: int = 0
    _announced: int = 0
    _victim: str | None = None
    _waiting_since_s: float | None = None
    _next_probe_s: float = 0.0
    _now_s: float = 0.0
    _far_s: float = 0.0

    def __post_init__(self) -> None:
        names = sorted({stay.node for stay in self.stays} | self.warm.keys())
        self._links = {name: Link() for name in names}
        self.warm = {name: dict(self.warm.get(name, {})) for name in names}
        self._machine = Handover(self.policy.rule or DEFAULT_RULE, self.history)
        self._random = np.random.default_rng(self.seed)

    def run(self) -> Roamed:
        """The drive to its end."""
        end_s = min(self.stays[-1].end_s, self.rate.end_s)
        tokens = []
        self._probe()
        for layers in cycle(self.misses):
            if self._now_s >= end_s:
                break
            begin_s, counts = self._now_s, np.zeros(3, np.int64)
            self._until(begin_s + self.costs.token_s)
            for group in layers:
                counts += self._layer(group)
            tokens.append(Token(self._now_s, self._now_s - begin_s, *counts.tolist()))
        return Roamed(tuple(tokens), tuple(self._moves), self._announced, dict(self._machine.counts), self._far_s)

    def near(self, now_s: float) -> str:
        """Whose cell the device is in."""
        return next((stay.node for stay in self.stays if now_s < stay.end_s), self.stays[-1].node)

    def _layer(self, group: Sequence[BlobId]) -> tuple[int, int, int]:
        """Run what misses of a layer; how much of it ran elsewhere, how much of that was in memory where it ran, and
        how much at the node that serves."""
        if not group:
            return 0, 0, 0
        node = self._machine.serving
        for blob in group:
            self._recent.pop(blob, None)
            self._recent[blob] = None
        if node is None:
            self._until(self._now_s + len(group) * self.costs.flash_s)
            return 0, 0, 0
        own = self._there(node, group)
        ran = self._soonest(node, group)
        self._waiting_since_s = self._now_s
        while self._now_s < ran.until_s or not self._through(ran.node):
            self._until(min(self._next_probe_s, ran.until_s) if self._now_s < ran.until_s else self._next_probe_s)
            if self._machine.serving != node:
                self._waiting_since_s = None
                self._until(self._now_s + len(group) * self.costs.flash_s)
                return 0, 0, 0
        self._waiting_since_s = None
        return len(group), ran.warm, own

    def _soonest(self, node: str, group: Sequence[BlobId]) -> Ran:
        """Ask the node that serves, and the one before where it may help; who answers first. What a node has not begun
        by then it never does."""
        helps = self.policy.both and needs_help(self._in_a_row, self._now_s - self._since_s)
        helper = self._helper if helps and self._helper is not None and self._through(self._helper) else None
        asked = [self._asked(one, group) for one in (node, helper) if one is not None]
        first = min(asked)
        for begin_s, ran in zip((self._free_s.get(one.node, 0.0) for one in asked), asked, strict=True):
            if ran is first or begin_s < first.until_s:
                self._free_s[ran.node] = ran.until_s
                self.warm[ran.node] |= {blob: min(ran.until_s, self.warm[ran.node].get(blob, inf)) for blob in group}
                if ran.node == node:
                    self._in_a_row = self._in_a_row + 1 if ran.warm == len(group) else 0
        return first

    def _asked(self, node: str, group: Sequence[BlobId]) -> Ran:
        """When a node would have run a group, once it is free."""
        there = self._there(node, group)
        begin_s = max(self._now_s, self._free_s.get(node, 0.0))
        return Ran(begin_s + self._trip(node) + (len(group) - there) * self.costs.origin_s, node, there)

    def _there(self, node: str, group: Sequence[BlobId]) -> int:
        """How much of a group a node has in memory now."""
        return sum(self.warm[node].get(blob, inf) <= self._now_s for blob in group)

    def _trip(self, node: str) -> float:
        return (self.costs.near if node == self.near(self._now_s) else self.costs.far).draw(self._random)

    def _through(self, node: str, *, probe: bool = False) -> bool:
        """Whether a node answers now."""
        if self._now_s < self.rate.end_s and self.rate.at(self._now_s) < QUIET_BPS:
            return False
        fault = self.fault
        if fault is None or not fault.begin_s <= self._now_s < fault.end_s:
            return True
        if fault.kind == "cut":
            return False
        if self._victim is None:
            self._victim = self._machine.serving
        return node != self._victim or (fault.kind == "stall" and probe)

    def _until(self, until_s: float) -> None:
        while self._next_probe_s <= until_s:
            self._pass(self._next_probe_s)
            self._probe()
        self._pass(until_s)

    def _pass(self, until_s: float) -> None:
        if self._machine.serving not in (None, self.near(self._now_s)):
            self._far_s += max(0.0, until_s - self._now_s)
        self._now_s = max(self._now_s, until_s)

    def _probe(self) -> None:
        self._next_probe_s += PROBE_S
        for node, link in self._links.items():
            if self._through(node, probe=True):
                link.probed(self._trip(node), self._now_s)
            else:
                link.failed()
        waiting_s = 0.0 if self._waiting_since_s is None else self._now_s - self._waiting_since_s
        seen = {
            node: Sight(state.expected_s, state.silent_s, waiting_s if node == self._machine.serving else 0.0)
            for node, state in states(self._links, UNIT_NBYTES, self._now_s).items()
        }
        self._decide(seen)

    def _decide(self, seen: dict[str, Sight]) -> None:
        before = self._machine.serving
        if self.policy.at_once:
            near = self.near(self._now_s)
            seen = {near: Sight(0.01, seen[near].silent_s, seen[near].waiting_s)}
        elif self.policy.rule is None:
            first = self.stays[0].node
            seen = {first: seen[first]}
        for event in self._machine.tick(seen, self._now_s):
            if event.kind == "announced" and self.policy.hot:
                self._announce(event.node)
            if event.kind in ("attached", "handover", "back"):
                self._moves.append((self._now_s, event.node, event.kind))
                self._helper, self._since_s, self._in_a_row = event.before, self._now_s, 0
        if self._machine.serving != before:
            self._waiting_since_s = None

    def _announce(self, node: str) -> None:
        """Tell a node the experts that ran last; it reads what it has not, one after the other."""
        at_s = self._now_s + self.costs.near.median_s
        for blob in list(self._recent)[-self.policy.hot :][::-1]:
            if self.warm[node].get(blob, inf) > at_s:
                at_s += self.costs.origin_s
                self.warm[node][blob] = at_s
                self._announced += 1


def recovery_s(tokens: Sequence[Token], move_s: float, span: int = 20, *, own: bool = False) -> float | None:
    """Seconds after a move until nodes have in memory, of `span` tokens, nine tenths of the share that they had of as
    many before; None where nothing can be said: too few ran elsewhere. Of nodes that answer, or of the serving one's
    `own` alone."""
    before = [token for token in tokens if token.at_s <= move_s][-span:]
    after = [token for token in tokens if token.at_s > move_s]
    wanted = 0.9 * _share(before, own=own)
    if not before or wanted == 0 or len(after) < span:
        return None
    for at in range(len(after) - span + 1):
        if _share(after[at : at + span], own=own) >= wanted:
            return float(max(0.0, after[at].at_s - after[at].took_s - move_s))
    return None


def _share(tokens: Sequence[Token], *, own: bool) -> float:
    return sum(token.own if own else token.warm for token in tokens) / max(1, sum(token.remote for token in tokens))


def handovers(roamed: Roamed) -> list[float]:
    """When one node took over from another."""
    return [at_s for at_s, _, kind in roamed.moves if kind == "handover"]


def after(roamed: Roamed, moments: Sequence[float], within_s: float) -> list[float]:
    """Seconds that tokens took that came within so long after any of the moments."""
    starts = np.array(moments)
    at_s = np.array([token.at_s for token in roamed.tokens])
    if not len(starts):
        return []
    last = np.searchsorted(starts, at_s, "right") - 1
    soon = (last >= 0) & (at_s - starts[np.maximum(last, 0)] <= within_s)
    return [token.took_s for token, here in zip(roamed.tokens, soon.tolist(), strict=True) if here]


def returns(roamed: Roamed, within_s: float = 10.0) -> int:
    """Moves that were undone within so long."""
    moves = roamed.moves
    return sum(
        first[1] == third[1] and third[0] - second[0] < within_s
        for first, second, third in zip(moves, moves[1:], moves[2:], strict=False)
    )
