"""Experts that an edge node runs for a model, while the device reads others: one more way to serve a miss.

When that is worth it is `plan.missrule`'s, which node serves `net.nodes`', the exchange `net.remote_run`'s. A node is
used only where its answer to a known question was right, and left alone for a while after each failure: then the
device reads, as ever.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import inf
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from comoe.forms.plain import Floats, PlainMath
from comoe.net.remote_run import Node, RemoteRun, Timed, manifest_hash
from comoe.net.wire import RunRequest, Uses, fits
from comoe.plan.missrule import num_away
from comoe.store.pack import Pack
from comoe.types import BlobId, ComoeError, ExpertId, Otherwise, RemoteUnavailable

PROBES, PROBING_S = 5, 0.5
"""So many exchanges, or those that end in so long, tell what one takes."""

RECENT = 0.2
"""The weight of the last exchange in what the next is expected to take."""

PATIENCE = 4.0
LEAST_PATIENCE_S, LINK_PATIENCE_S = 0.05, 1.0
"""An answer that takes longer than so many times what was expected, than this, and than reading instead, is not waited
for; longer where reads come over the same link, from a node that has to find the same bytes."""

REST_S, LONGEST_REST_S = 1.0, 30.0
"""How long a node is left alone after a failure, and after several: twice as long each time."""

REFRESH_S = 2.0
"""A node that was not used for so long is asked the known question, to know what its link is now."""

CLOSE = 1e-3
"""Of the largest output: how far a node's numbers may be from the device's where outputs may lose something."""

LOG = logging.getLogger("comoe")


class Wanted(NamedTuple):
    """A use that misses: its position in the chunk, expert, form, what to read for it, and rows (R,) of the chunk with
    their gates."""

    position: int
    expert: int
    form: str
    blobs: tuple[BlobId, ...]
    rows: Tensor
    gates: Tensor


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
    has answered the known question. What `failures` in a row cost in rest only an answer of experts makes good.
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

    def again(self, clock: Callable[[], float]) -> None:
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


@dataclass(slots=True)
class RemoteCounts:
    """Since the model was loaded: uses that nodes ran, requests that failed, bytes of both directions."""

    uses: int = 0
    failures: int = 0
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Sent:
    """Uses that a node runs now, and which rows of the chunk were sent with them."""

    wanted: tuple[Wanted, ...]
    rows: Tensor
    exchange: "Future[Timed]"
    link: Link
    patience_s: float

    @property
    def positions(self) -> list[int]:
        """Of the uses, in the chunk."""
        return [use.position for use in self.wanted]


class Ran(NamedTuple):
    """What some uses come to: their positions, and what (R, H) is added to which rows (R,) of the chunk."""

    positions: list[int]
    rows: Tensor
    y: Tensor


class RemoteTier:
    """The edge nodes of a pack's model, of which the one of the URL `serving` runs experts. One thread calls.

    Each node has a thread that talks to it. `read_s` says what reading a blob takes here.
    """

    def __init__(
        self,
        links: Sequence[Link],
        serving: Callable[[], str | None],
        pack: Pack,
        read_s: Callable[[BlobId], float],
        clock: Callable[[], float],
    ) -> None:
        self._links, self._serving = {link.remote.url: link for link in links}, serving
        self._patience_s = LINK_PATIENCE_S if pack.remote else LEAST_PATIENCE_S
        self._read_s, self._clock = read_s, clock
        self._forms = {form: at for at, form in enumerate(pack.manifest.forms)}
        self._before: str | None = None
        self._sent_s = -inf
        self.counts = RemoteCounts()

    def ready(self) -> bool:
        """Whether a node serves that is known to be right. One that failed is asked, after its rest, how it is."""
        return self._link(self._clock()) is not None

    @property
    def runs(self) -> bool:
        """Whether a node was asked to run experts lately, or is asked whether it is back."""
        return self._clock() - self._sent_s < REFRESH_S

    @property
    def layer_s(self) -> float:
        """Seconds that a layer takes whose misses the node runs; inf while none serves that is known to be right."""
        url = self._serving()
        link = self._links[url] if url is not None else None
        return link.exchange_s + link.run_s if link is not None and link.well else inf

    def send(self, layer: int, plain: PlainMath, wanted: Sequence[Wanted], x: Tensor) -> Sent | None:
        """Let the node run those of `wanted` that are sooner there so than read; None where none are."""
        now_s = self._clock()
        link = self._link(now_s)
        if link is None:
            return None
        timed = sorted(((sum(map(self._read_s, use.blobs)), use) for use in wanted), key=lambda pair: pair[0])
        away = num_away([read_s for read_s, _ in timed], link.exchange_s, link.run_s)
        if not away:
            return None
        slowest = timed[len(timed) - away :]
        some = tuple(use for _, use in slowest)
        request, rows = self._request(link, layer, plain, some, x)
        if not fits(request):
            return None
        self._sent_s = now_s
        expected_s = link.exchange_s + len(request.uses) * link.run_s
        exchange = link.thread.submit(link.remote.run, request)
        reading_s = sum(read_s for read_s, _ in slowest)
        return Sent(some, rows, exchange, link, max(self._patience_s, PATIENCE * expected_s, reading_s))

    def outputs(self, sent: Sent, dtype: torch.dtype) -> list[Ran] | None:
        """What a node computed, of all uses together where it summed. None where it failed, or is too late."""
        try:
            timed = sent.exchange.result(sent.patience_s)
        except (ComoeError, Late):
            sent.exchange.cancel()
            sent.link.failed(self._clock())
            self.counts.failures += 1
            return None
        rows = [len(use.rows) for use in sent.wanted]
        sent.link.learn(timed, sum(rows), self._clock())
        sent.link.failures = 0
        self.counts.uses += len(rows)
        self.counts.nbytes += timed.nbytes
        found = torch.from_numpy(timed.answer.y).to(dtype)
        if sent.link.known.lossy:
            return [Ran(sent.positions, sent.rows, found)]
        return [
            Ran([use.position], use.rows, (y * use.gates[:, None]).to(dtype))
            for use, y in zip(sent.wanted, torch.split(found, rows), strict=True)
        ]

    def close(self) -> None:
        for link in self._links.values():
            link.close()

    def _link(self, now_s: float) -> Link | None:
        """The node that serves, if it is known to be right. One that was not heard of for a while is asked how it is,
        without waiting for it."""
        url = self._serving()
        link = self._links[url] if url is not None else None
        if url != self._before and link is not None:
            link.met()
        self._before = url
        if link is None or now_s < link.rests_until_s:
            return None
        if now_s - link.heard_s > REFRESH_S:
            link.heard_s = now_s
            if not link.well:
                self._sent_s = now_s
            link.thread.submit(link.again, self._clock)
        return link if link.well else None

    def _request(
        self, link: Link, layer: int, plain: PlainMath, wanted: Sequence[Wanted], x: Tensor
    ) -> tuple[RunRequest, Tensor]:
        """The uses, and those rows of `x` that they are of. Where outputs may lose something, the node sums them: its
        answer is a part of what all outputs would be, and sums in another order."""
        rows, summed = [len(use.rows) for use in wanted], link.known.lossy
        sent, row = torch.unique(torch.cat([use.rows for use in wanted]), return_inverse=True)
        gates = torch.cat([use.gates for use in wanted]).float().numpy() if summed else np.ones(sum(rows), np.float32)
        uses = Uses(
            np.repeat([use.expert for use in wanted], rows).astype(np.uint16),
            row.numpy().astype(np.uint16),
            gates,
            np.repeat([self._forms[use.form] for use in wanted], rows).astype(np.uint8),
        )
        dtype = str(x.dtype).removeprefix("torch.")
        x_f32 = x[sent].float().contiguous().numpy()
        request = RunRequest(link.remote.identity, layer, dtype, plain.activation, plain.gated, uses, x_f32, summed)
        return request, sent


def open_links(
    nodes: Sequence[Node], there: Sequence[Node], pack: Pack, known: Known, clock: Callable[[], float]
) -> list[Link]:
    """`nodes`, of which those that are `there` are asked now whether they answer a known question as this device does.

    A pack on the network is served without them, too: none needs to answer now. RemoteUnavailable where they answer
    otherwise, or none of them does for a pack that is here; UsageError where one does not know the token.
    """
    identity = manifest_hash(pack.folder)
    links = [Link(RemoteRun(node, identity, clock), known, ThreadPoolExecutor(1, "comoe-edge")) for node in nodes]
    problems = []
    with ExitStack() as on_failure:
        for link in links:
            on_failure.callback(link.close)
        for link in (link for link, node in zip(links, nodes, strict=True) if node in there):
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
