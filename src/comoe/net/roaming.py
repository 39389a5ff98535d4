"""Several edge nodes, probed and scored, of which one serves: `net.links` and `net.handover` on real sockets.

A thread for each node probes it, so that a dead one delays nobody. Who reads from a node tells what came by `reading`.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event as Flag
from threading import Lock, Thread
from time import monotonic
from typing import Protocol

from comoe.net.handover import DEFAULT_RULE, Event, Handover, NextNode, Rule, Sight
from comoe.net.links import Link, LinkState, states
from comoe.net.meter import Meter
from comoe.types import ComoeError, RemoteUnavailable, UsageError

LOG = logging.getLogger("comoe")

PERIOD_S = 0.25
"""Between two probes of a node."""

REFUSED_S = 5.0
"""Between two probes of a node that does not know the token."""

RECENT = 4
"""Probes of a node that is read from gently: of so many, one finds no piece before it."""

UNIT_NBYTES = 1 << 16
"""What links are compared by: the seconds that so many bytes are expected to take."""


class Asks(Protocol):
    """What asks a node for its round trip, and what came to it: `net.probe.Probe`."""

    @property
    def came(self) -> int: ...

    def ask(self) -> float: ...

    def close(self) -> None: ...


class Roaming:
    """Nodes by their URL, watched from `start` until `close`; `told` hears every event, from a thread of a node's.

    `gentle` says whether what is read leaves room for others: else round trips are those of a full link.

    UsageError where a node is named twice.
    """

    def __init__(
        self,
        probes: Sequence[tuple[str, Asks]],
        told: Callable[[Event], None] = lambda event: None,
        gentle: Callable[[], bool] = lambda: False,
        *,
        rule: Rule = DEFAULT_RULE,
        history: NextNode | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._probes, self._told, self._gentle, self._clock = dict(probes), told, gentle, clock
        if not probes or len(self._probes) < len(probes):
            raise UsageError("name every edge node once.")
        self._links = {node: Link() for node in self._probes}
        self._meters = {node: Meter(link) for node, link in self._links.items()}
        self._machine = Handover(rule, history or NextNode())
        self._problems: dict[str, ComoeError] = {}
        self._unasked = set(self._probes)
        self._lock, self._closing, self._asked = Lock(), Flag(), Flag()
        self._threads = [Thread(target=self._watch, args=(node,), daemon=True) for node in self._probes]

    def start(self) -> "Roaming":
        """Begin to probe."""
        for thread in self._threads:
            thread.start()
        return self

    def first(self, timeout_s: float, *, awaited: bool = False) -> None:
        """Wait until every node was asked once, and one answers if these are `awaited`.

        Raises RemoteUnavailable where none that was asked does; UsageError where one does not know the token.
        """
        until_s = self._clock() + timeout_s
        self._asked.wait(timeout_s)
        while awaited and not self.there and not self._refusals and self._clock() < until_s:
            self._closing.wait(PERIOD_S)
        with self._lock:
            if self._refusals:
                raise self._refusals[0]
            if not self.there and self._problems:
                raise next(iter(self._problems.values()))

    @property
    def _refusals(self) -> list[UsageError]:
        return [problem for problem in list(self._problems.values()) if isinstance(problem, UsageError)]

    @property
    def there(self) -> list[str]:
        """The nodes whose last probe was answered."""
        return [node for node in self._probes if node not in self._unasked and node not in self._problems]

    def close(self) -> None:
        """Stop probing: none serves from then on; idempotent."""
        self._closing.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self._machine.serving = None
        for probe in self._probes.values():
            probe.close()

    def __enter__(self) -> "Roaming":
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def serving(self) -> str | None:
        """The node that serves now; None where there is no link."""
        return self._machine.serving

    @property
    def counts(self) -> dict[str, int]:
        """How often each kind of event happened."""
        with self._lock:
            return dict(self._machine.counts)

    @property
    def log(self) -> list[Event]:
        """The last events."""
        with self._lock:
            return list(self._machine.log)

    def links(self) -> dict[str, LinkState]:
        """All links now, by node."""
        with self._lock:
            return states(self._links, UNIT_NBYTES, self._clock())

    @contextmanager
    def reading(self) -> Iterator[tuple[str, Callable[[int], None]]]:
        """The node to read from now, and whom to tell of every piece of bytes that comes; an error of comoe's counts
        as a failed request. Raises RemoteUnavailable without a link."""
        with self._lock:
            node = self._machine.serving
            if node is None:
                raise RemoteUnavailable("no edge node answers: look at the network, or go on without one.")
            request = self._meters[node].begin(self._clock())
        failed = False

        def came(nbytes: int) -> None:
            with self._lock:
                self._meters[node].came(request, nbytes, self._clock())

        try:
            yield node, came
        except (ComoeError, OSError):
            failed = True
            raise
        finally:
            with self._lock:
                self._meters[node].end(request, self._clock(), failed=failed)

    def _watch(self, node: str) -> None:
        probe, link, meter = self._probes[node], self._links[node], self._meters[node]
        recent: deque[float] = deque(maxlen=RECENT)
        came = probe.came
        while not self._closing.is_set():
            loaded = meter.busy
            try:
                rtt_s = probe.ask()
            except (RemoteUnavailable, UsageError) as error:
                with self._lock:
                    before, self._problems[node] = self._problems.get(node), error
                    link.failed()
                if self._asked.is_set() and isinstance(error, UsageError) and not isinstance(before, UsageError):
                    LOG.warning(error)
            else:
                with self._lock:
                    self._problems.pop(node, None)
                    if probe.came != came:
                        meter.sought(self._clock())
                        came = probe.came
                    recent.append(rtt_s)
                    if gentle := self._gentle():
                        rtt_s = min(recent)
                    link.probed(rtt_s, self._clock(), loaded=not gentle and (loaded or meter.busy))
            self._tick()
            self._unasked.discard(node)
            if not self._unasked:
                self._asked.set()
            self._closing.wait(REFUSED_S if isinstance(self._problems.get(node), UsageError) else PERIOD_S)

    def _tick(self) -> None:
        with self._lock:
            now_s = self._clock()
            for meter in self._meters.values():
                meter.flush(now_s)
            seen = {
                node: Sight(state.expected_s, state.silent_s, self._meters[node].waiting_s(now_s))
                for node, state in states(self._links, UNIT_NBYTES, now_s).items()
            }
            events = self._machine.tick(seen, now_s)
        for event in events:
            self._told(event)
