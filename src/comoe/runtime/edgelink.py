"""An edge node that runs experts: whether its answers are this device's, and what an exchange with it takes.

Which node is asked is `runtime.edgetier`'s; the exchange itself is `net.remote_run`'s.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import inf
from statistics import median
from typing import NamedTuple

import numpy as np

from comoe.forms.plain import Floats, PlainMath
from comoe.net.remote_run import RemoteRun, Timed
from comoe.net.wire import RunRequest, Uses
from comoe.store.pack import Pack
from comoe.types import ComoeError, ExpertId, Otherwise, RemoteUnavailable

PROBES, PROBING_S = 5, 0.5
"""So many exchanges, or those that end in so long, tell what one takes."""

RECENT = 0.2
"""The weight of the last exchange in what the next is expected to take."""

REST_S, LONGEST_REST_S = 1.0, 30.0
"""How long a node is left alone after a failure, and after several: twice as long each time."""

CLOSE = 1e-3
"""Of the largest output: how far a node's numbers may be from the device's where outputs may lose something."""

LOG = logging.getLogger("comoe")


class Known(NamedTuple):
    """A question of one use, this device's answer, and how far from it a node's may be."""

    question: RunRequest
    answer: Floats
    tolerance: float

    @property
    def lossy(self) -> bool:
        """Whether outputs may lose something."""
        return self.tolerance > 0


@dataclass(slots=True)
class Link:
    """A node, and what exchanges with it take: `exchange_s` beside the `run_s` of each use. `thread` talks to it.

    It runs nothing while it is not `well`: before it was `measured`, and so found right, and after a failure until it
    has answered the known question. What `failures` in a row cost in rest only an answer of experts makes good. Its
    last `warm` answers, since it began to serve, were of experts that it had in memory.
    """

    remote: RemoteRun
    known: Known
    thread: ThreadPoolExecutor
    exchange_s: float = 0.0
    run_s: float = 0.0
    measured: bool = False
    well: bool = False
    failures: int = 0
    rests_until_s: float = -inf
    heard_s: float = -inf
    warm: int = 0

    def begin(self, request: RunRequest) -> "Future[Timed]":
        """Let the node run a request, after what it is at."""
        return self.thread.submit(self.remote.run, request)

    def ran(self, timed: Timed, uses: int, now_s: float) -> None:
        """It answered a request of experts."""
        self.learn(timed, uses, now_s)
        self.failures = 0
        self.warm = 0 if timed.answer.read else self.warm + 1

    def learn(self, timed: Timed, uses: int, now_s: float) -> None:
        """Take an exchange into account."""
        self.exchange_s += RECENT * (max(0.0, timed.seconds - timed.answer.seconds) - self.exchange_s)
        self.run_s += RECENT * (timed.answer.seconds / uses - self.run_s)
        self.heard(now_s)

    def heard(self, now_s: float) -> None:
        self.well, self.heard_s = True, now_s

    def ask(self) -> Timed:
        """Ask the known question. Raises RemoteUnavailable where the answer is wrong."""
        timed = self.remote.run(replace(self.known.question, identity=self.remote.identity))
        difference = float(np.abs(timed.answer.y - self.known.answer).max())
        if not difference <= self.known.tolerance:  # NaN is wrong, too
            raise Otherwise(
                f"{self.remote.url} computes experts otherwise than this device, by {difference:.2g}: exact outputs "
                "need the same kernel there; allow a loss with --max-loss, or leave out --edge."
            )
        return timed

    def measure(self, clock: Callable[[], float]) -> None:
        """What exchanges take. Raises RemoteUnavailable where the node is not there, or wrong."""
        start_s, found = clock(), [self.ask()]
        while len(found) <= PROBES and clock() - start_s < PROBING_S:
            found.append(self.ask())
        found = found[1:] or found  # blobs may have to be read for the first
        self.exchange_s = median(max(0.0, timed.seconds - timed.answer.seconds) for timed in found)
        self.run_s = median(timed.answer.seconds for timed in found)
        self.measured = True
        self.heard(clock())

    def ask_again(self, clock: Callable[[], float]) -> None:
        """Ask, without waiting, how the node is."""
        self.thread.submit(self._again, clock)

    def _again(self, clock: Callable[[], float]) -> None:
        """Is the node there, right, and how quick?"""
        try:
            if self.measured:
                self.learn(self.ask(), 1, clock())
            else:
                self.measure(clock)
        except ComoeError:
            self.failed(clock())

    def close(self) -> None:
        """Waits for an exchange that is under way."""
        self.thread.shutdown(cancel_futures=True)
        self.remote.close()

    def failed(self, now_s: float) -> None:
        self.rests_until_s = now_s + min(LONGEST_REST_S, REST_S * 2**self.failures)
        self.failures += 1
        self.well, self.heard_s = False, -inf

    def met(self) -> None:
        """The node serves from now on: it is asked the known question at once."""
        self.rests_until_s = self.heard_s = -inf
        self.warm = 0


def open_links(
    clients: Sequence[RemoteRun], there: Collection[str], pack: Pack, known: Known, clock: Callable[[], float]
) -> list[Link]:
    """Links to nodes, of which those whose URLs are `there` are asked now a known question, which this device answered.

    A pack on the network is served without them, too: none needs to answer now. RemoteUnavailable where they answer
    otherwise, or none of them does for a pack that is here; UsageError where one does not know the token.
    """
    links = [Link(client, known, ThreadPoolExecutor(1, "comoe-edge")) for client in clients]
    problems = []
    with ExitStack() as on_failure:
        for link in links:
            on_failure.callback(link.close)
        for link in (link for link in links if link.remote.url in there):
            try:
                link.measure(clock)
            except RemoteUnavailable as error:
                link.failed(clock())
                problems.append(error)
        if problems and not any(link.measured for link in links):
            wrong = next((error for error in problems if isinstance(error, Otherwise)), None)
            if wrong is not None or not pack.remote:
                raise wrong or problems[0]
            LOG.warning(f"{problems[0]} It is asked again.")
        on_failure.pop_all()
    return links


def known_answer(pack: Pack, plain: PlainMath, *, exact: bool) -> Known:
    """A question about an expert of the pack's first layer: an exact one where answers must be this device's to the
    bit, else one in the form that is soonest read."""
    manifest = pack.manifest

    def nbytes(form: str) -> int:
        return sum(map(pack.nbytes, manifest.blobs(ExpertId(0, 0), form)))

    form = "exact" if exact else min(filter(nbytes, manifest.forms), key=nbytes)
    blobs = manifest.blobs(ExpertId(0, 0), form)
    data = [np.frombuffer(pack.read_bytes(blob), np.uint8) for blob in blobs]
    x = np.random.default_rng(0).standard_normal((1, plain.site.leaves[0].cols)).astype(np.float32)
    one = np.zeros(1, np.uint16)
    uses = Uses(one, one, np.ones(1, np.float32), np.array([manifest.forms.index(form)], np.uint8))
    question = RunRequest(b"", 0, "float32", plain.activation, plain.gated, uses, x)
    answer = plain.run(form, data, x)
    return Known(question, answer, 0.0 if exact else CLOSE * float(np.abs(answer).max()))
