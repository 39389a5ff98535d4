"""Which edge node serves: a state machine with at most one of them, or none. Pure: the clock is an argument.

A better link must be better by a margin, and for a while; a link that went silent, or that answers probes but sends
nothing that was asked for, is left at once. See docs/decisions/021.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Literal, NamedTuple

Kind = Literal["attached", "handover", "lost", "back", "stalled", "announced"]
KINDS: tuple[Kind, ...] = ("attached", "handover", "lost", "back", "stalled", "announced")
LOGGED = 1000


class Sight(NamedTuple):
    """A node as it is seen now: what a request is expected to take, how long nothing came from it, and for how long no
    request had a byte, while one was open (0 where none is)."""

    expected_s: float
    silent_s: float
    waiting_s: float = 0.0


class Event(NamedTuple):
    """What happened at a moment. `node` is whom it is about; `before` who served until then, of a handover."""

    kind: Kind
    at_s: float
    node: str
    before: str | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """When to move.

    A candidate must be expected to take less than `1 - hysteresis` of what the serving node takes, for `trigger_s`.
    Silence of `lost_s` is a lost link; an open request without a byte for `stalled_s`, though probes are answered, is a
    stalled node, which is avoided for `barred_s`, twice as long each time up to `most_barred_s`, after which it is
    forgotten. A link is back once it was there for `back_s`.
    """

    hysteresis: float = 0.3
    trigger_s: float = 1.0
    lost_s: float = 1.0
    stalled_s: float = 1.0
    back_s: float = 0.5
    barred_s: float = 1.0
    most_barred_s: float = 60.0


DEFAULT_RULE = Rule()


@dataclass(slots=True)
class NextNode:
    """Who will serve next, guessed from who came after whom: a chain of first order."""

    _after: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    @staticmethod
    def from_history(nodes: Iterable[str]) -> "NextNode":
        """Of nodes that served one after the other."""
        found, before = NextNode(), None
        for node in nodes:
            if before is not None and node != before:
                found.moved(before, node)
            before = node
        return found

    def moved(self, before: str, node: str) -> None:
        """`node` came after `before`."""
        self._after[before][node] += 1

    def guess(self, node: str) -> str | None:
        """Who most often came after `node`; None where nobody has."""
        after = self._after.get(node)
        return min(after, key=lambda name: (-after[name], name)) if after else None


@dataclass(slots=True)
class Handover:
    """Who serves, by a rule. `serving` is None where there is no link; `counts` and `log` keep what happened."""

    rule: Rule = DEFAULT_RULE
    history: NextNode = field(default_factory=NextNode)
    serving: str | None = None
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(KINDS, 0)))
    log: deque[Event] = field(default_factory=lambda: deque(maxlen=LOGGED))
    _since_s: float = -inf
    _silent_s: float = -inf
    _before: str | None = None
    _candidate: str | None = None
    _candidate_s: float = 0.0
    _seen_s: dict[str, float] = field(default_factory=dict)
    _barred: dict[str, tuple[float, float]] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def tick(self, sights: Mapping[str, Sight], now_s: float) -> list[Event]:
        """What happened now, oldest first; at the end of it `serving` serves. Nodes that are not seen are not there."""
        events: list[Event] = []
        there = self._there(sights, now_s)
        if self.serving is not None and (reason := self._broken(sights.get(self.serving), now_s)) is not None:
            events.append(self._drop(reason, now_s))
            there.pop(events[-1].node, None)
        if self.serving is None:
            events += self._attach(there, now_s)
        else:
            hangs = sights[self.serving].waiting_s > self.rule.stalled_s / 2
            events += self._compare(self.serving, there, now_s, hangs=hangs)
        for event in events:
            self.counts[event.kind] += 1
            self.log.append(event)
        return events

    def _there(self, sights: Mapping[str, Sight], now_s: float) -> dict[str, float]:
        """What a request takes, by node, of those that answer and are not barred; keeps since when they do."""
        found = {}
        for node, sight in sights.items():
            if sight.silent_s > self.rule.lost_s or sight.expected_s == inf:
                self._seen_s.pop(node, None)
                continue
            self._seen_s.setdefault(node, now_s)
            if self._barred.get(node, (-inf, 0.0))[0] <= now_s:
                found[node] = sight.expected_s
        for node in self._seen_s.keys() - sights.keys():
            del self._seen_s[node]
        return found

    def _broken(self, sight: Sight | None, now_s: float) -> Literal["lost", "stalled"] | None:
        """Why the serving node is to be left, if it is. After a silence, requests are given the time to go on."""
        if sight is None or sight.silent_s > self.rule.lost_s:
            return "lost"
        if sight.silent_s > self.rule.stalled_s / 2:
            self._silent_s = now_s
        answered_s = now_s - max(self._silent_s, self._since_s)
        return "stalled" if min(sight.waiting_s, answered_s) > self.rule.stalled_s else None

    def _drop(self, reason: Literal["lost", "stalled"], now_s: float) -> Event:
        node = self.serving
        assert node is not None
        if reason == "stalled":
            until_s, last_s = self._barred.get(node, (-inf, 0.0))
            again = now_s - until_s < self.rule.most_barred_s
            barred_s = min(2 * last_s, self.rule.most_barred_s) if again else self.rule.barred_s
            self._barred[node] = (now_s + barred_s, barred_s)
        self.serving, self._before, self._candidate = None, node, None
        return Event(reason, now_s, node)

    def _attach(self, there: Mapping[str, float], now_s: float) -> list[Event]:
        """Take the best node that is there, at once where one was just lost; later, once it has been there a while."""
        node = min(there, key=lambda name: (there[name], name), default=None)
        if node is None:
            self._before = None
            return []
        before, first = self._before, self._since_s == -inf
        if before is None and not first:
            steady = [name for name in there if now_s - self._seen_s[name] >= self.rule.back_s]
            if not steady:
                return []
            node = min(steady, key=lambda name: (there[name], name))
        kind: Kind = "attached" if first else "handover" if before is not None else "back"
        return self._serve(kind, node, before, now_s)

    def _serve(self, kind: Kind, node: str, before: str | None, now_s: float) -> list[Event]:
        """Let a node serve; one that takes over without having been told what is used is told now."""
        events = [Event(kind, now_s, node, before)]
        if before is not None and before != node:
            self.history.moved(before, node)
            if node not in self._told:
                events.append(Event("announced", now_s, node))
        self.serving, self._since_s, self._candidate, self._before = node, now_s, None, None
        self._told.clear()
        return events

    def _compare(self, serving: str, there: Mapping[str, float], now_s: float, *, hangs: bool) -> list[Event]:
        """Move to a better node; where a request `hangs`, first see whether the serving one is stalled or goes on."""
        limit = (1 - self.rule.hysteresis) * there.get(serving, inf)
        better = {node: takes for node, takes in there.items() if node != serving and takes < limit}
        if not better:
            self._candidate = None
            return []
        if self._candidate not in better:
            self._candidate, self._candidate_s = min(better, key=lambda name: (better[name], name)), now_s
            return self._announce(serving, self._candidate, now_s)
        waited_s = now_s - max(self._candidate_s, self._since_s)
        if waited_s < self.rule.trigger_s or hangs:
            return []
        return self._serve("handover", self._candidate, serving, now_s)

    def _announce(self, serving: str, candidate: str, now_s: float) -> list[Event]:
        """Tell who may serve next, by what is seen and by history, what the session uses: each once."""
        guessed = self.history.guess(serving)
        nodes = [node for node in dict.fromkeys((candidate, guessed)) if node is not None and node not in self._told]
        self._told.update(nodes)
        return [Event("announced", now_s, node) for node in nodes]
