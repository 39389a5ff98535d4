"""The edge nodes of a session: one of them serves the pack's files, and who may serve next is told what is hot.

Which one serves is `net.roaming`'s. What runs there is `runtime.edgetier`'s.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from threading import Lock
from time import monotonic
from typing import NamedTuple

from comoe.net.address import Access
from comoe.net.breaker import Throttle
from comoe.net.handover import Event, Kind
from comoe.net.links import LinkState
from comoe.net.origin import Leash, Origin
from comoe.net.probe import Probe
from comoe.net.remote_run import HotExpert, Node, RemoteRun
from comoe.net.roaming import Roaming
from comoe.types import ComoeError, UsageError

PIECE_S, SEARCHING_S, LEAST_PIECE = 0.05, 0.5, 2048
"""While a node runs experts, too, what is read comes in pieces of so many seconds of the link, one at a time: an answer
waits for one of them, or for what was asked for before. In larger ones while none serves, so that probes, which may
take twice as long, come through. In bytes at least."""

PROBE_S = 1.0
"""How long a node may take to say that it is there."""

FIRST_S = 8.0
"""So long a session waits at its start until every node was asked once."""

NEAR = Leash(connect_s=1.0, silent_s=1.5, whole_s=60.0, attempts=1, busy_attempts=1)
"""Of a node beside which there is an origin, and maybe others."""

LOG = logging.getLogger("comoe")

SENTENCES: dict[Kind, str] = {
    "attached": "serves.",
    "handover": "serves, after {before}.",
    "lost": "is lost: nothing comes from it.",
    "back": "serves: there is a link again.",
    "stalled": "answers, but sends nothing: it is left alone for a while.",
    "announced": "may serve next: it is told what this session uses.",
}


class Announced(NamedTuple):
    """Experts that nodes were told of, and announcements that nobody took."""

    experts: int = 0
    failures: int = 0


class EdgeNodes:
    """The `nodes` that may serve the pack whose manifest has the SHA-256 `identity`, watched until `close`.

    No more comes than `throttle` lets through, but for health. `hot`, called from a thread of this, says what the
    session uses most; `runs` whether the node runs experts, too. Every event is logged.
    Raises RemoteUnavailable where no node answers, or none for a while where these are `awaited`; UsageError where one
    does not know the token. One that is asked for the first time later, and does not, never serves.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        identity: str,
        throttle: Throttle | None = None,
        *,
        awaited: bool = False,
    ) -> None:
        self._nodes = {node.url: node for node in nodes}
        self._identity, self._throttle = identity, throttle
        self._probes = {
            node.url: Probe(
                node.url, PROBE_S, identity, node.trust() if node.url.startswith("https") else None, node.token
            )
            for node in nodes
        }
        self._files: dict[str, Origin] = {}
        self._teller = ThreadPoolExecutor(1, "comoe-hot")
        self._turn, self._searching = Lock(), Lock()
        self.announced = Announced()
        self.runs: Callable[[], bool] = lambda: False
        self.hot: Callable[[], Sequence[HotExpert]] = list
        self._roaming = Roaming(
            [(node.url, self._probes[node.url]) for node in nodes], self._heard, lambda: self.runs()
        ).start()
        try:
            self._roaming.first(FIRST_S, awaited=awaited)
        except ComoeError:
            self.close()
            raise

    @property
    def serving(self) -> str | None:
        """The URL of the node that serves now; None where there is no link."""
        return self._roaming.serving

    @property
    def there(self) -> list[str]:
        """The URLs of the nodes that answered when they were asked last."""
        return self._roaming.there

    @property
    def counts(self) -> dict[str, int]:
        """How often each kind of event happened."""
        return self._roaming.counts

    @property
    def log(self) -> list[Event]:
        """The last events; their times are seconds on `monotonic`'s clock."""
        return self._roaming.log

    def links(self) -> dict[str, LinkState]:
        """All links now, by the node's URL."""
        return self._roaming.links()

    @property
    def link(self) -> LinkState | None:
        """The link to the node that serves; None without one."""
        serving = self.serving
        return None if serving is None else self.links()[serving]

    def clients(self, clock: Callable[[], float]) -> list[RemoteRun]:
        """Of each node what has it run experts. Whoever takes them closes them."""
        return [self._client(node, clock) for node in self._nodes.values()]

    @contextmanager
    def sharing(self, rate_bps: Callable[[], float]) -> Iterator[int | None]:
        """How many bytes to ask for now, so that a link of such a rate is not full; None for all of them.

        While experts run elsewhere, others that share the link wait meanwhile: ask the node and nobody else.
        """
        if self.serving is None:
            yield max(LEAST_PIECE, int(rate_bps() * SEARCHING_S))
        elif self.runs():
            with self._turn:
                yield max(LEAST_PIECE, int(rate_bps() * PIECE_S))
        else:
            yield None

    @contextmanager
    def searching(self) -> Iterator[None]:
        """Around asking somebody else for a piece: while none serves, one at a time, as long as that does not take for
        ever."""
        alone = self.serving is None and self._searching.acquire(timeout=2 * SEARCHING_S)
        try:
            yield
        finally:
            if alone:
                self._searching.release()

    def fetch(self, name: str, start: int, into: memoryview) -> int:
        """Fill `into` from byte `start` of the file `name`; how many bytes came before no node was left to ask.

        What breaks, or belongs to a node that serves no more, goes on at the next one. Who reads checks the bytes.
        """
        at = 0
        while at < len(into):
            node = None
            try:
                with self._roaming.reading() as (node, came):
                    for chunk in self._origin(node).stream(name, start + at, start + len(into)):
                        into[at : at + len(chunk)] = chunk
                        at += len(chunk)
                        came(len(chunk))
                        if self.serving != node:
                            break
            except ComoeError as error:
                if isinstance(error, UsageError) and node is not None:
                    self._probes[node].doubt()
                if self.serving in (node, None):
                    return at
        return at

    def close(self) -> None:
        """Stop all threads; idempotent."""
        self._roaming.close()
        self._teller.shutdown(cancel_futures=True)

    def __enter__(self) -> "EdgeNodes":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _client(self, node: Node, clock: Callable[[], float]) -> RemoteRun:
        return RemoteRun(node, self._identity, clock, self._throttle)

    def _origin(self, node: str) -> Origin:
        url = node + self._probes[node].folder
        if url not in self._files:
            known = self._nodes[node]
            self._files[url] = Origin(url, Access(token=known.token, ca=known.ca), NEAR, self._throttle)
        return self._files[url]

    def _heard(self, event: Event) -> None:
        LOG.info(f"edge node {event.node} {SENTENCES[event.kind].format(before=event.before)}")
        if event.kind == "announced":
            self._teller.submit(self._announce, event.node)

    def _announce(self, node: str) -> None:
        """Tell a node what the session uses most."""
        experts = list(self.hot())
        if not experts:
            return
        with closing(self._client(self._nodes[node], monotonic)) as client:
            try:
                client.announce(experts)
            except ComoeError:
                self.announced = self.announced._replace(failures=self.announced.failures + 1)
            else:
                self.announced = self.announced._replace(experts=self.announced.experts + len(experts))
