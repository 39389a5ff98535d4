"""Experts that an edge node runs for a model, while the device reads others: one more way to serve a miss.

When that is worth it is `plan.missrule`'s, which node serves `net.nodes`', what is known of each `runtime.edgelink`'s.
A node is used only where its answer to a known question was right, and left alone for a while after each failure: then
the device reads, as ever. One that begins to serve has little in memory: as long as it must read, the one before is
asked the same, and the first answer is taken (hedged requests: Dean and Barroso, The Tail at Scale, 2013).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from math import inf
from time import monotonic
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from comoe.forms.plain import PlainMath
from comoe.net.remote_run import Timed
from comoe.net.wire import RunRequest, Uses, fits
from comoe.plan.missrule import needs_help, num_away
from comoe.runtime.edgelink import Link
from comoe.store.pack import Pack
from comoe.types import BlobId, ComoeError

PATIENCE = 4.0
LEAST_PATIENCE_S, LINK_PATIENCE_S = 0.05, 1.0
"""An answer that takes longer than so many times what was expected, than this, and than reading instead, is not waited
for; longer where reads come over the same link, from a node that has to find the same bytes."""

REFRESH_S = 2.0
"""A node that was not used for so long is asked the known question, to know what its link is now."""


class Wanted(NamedTuple):
    """A use that misses: its position in the chunk, expert, form, what to read for it, and rows (R,) of the chunk with
    their gates."""

    position: int
    expert: int
    form: str
    blobs: tuple[BlobId, ...]
    rows: Tensor
    gates: Tensor


@dataclass(slots=True)
class RemoteCounts:
    """Since the model was loaded: uses that nodes ran, those of them whose experts the node had to read first, requests
    that failed (where no other node answered, the device read), bytes of both directions."""

    uses: int = 0
    read: int = 0
    failures: int = 0
    nbytes: int = 0


class Exchange(NamedTuple):
    """What a node answers, and of how many uses."""

    answer: "Future[Timed]"
    link: Link
    uses: int


@dataclass(frozen=True, slots=True)
class Sent:
    """Uses that nodes run now, which rows of the chunk were sent with them, and the exchanges: any of them will do."""

    wanted: tuple[Wanted, ...]
    rows: Tensor
    exchanges: tuple[Exchange, ...]
    patience_s: float

    @property
    def positions(self) -> list[int]:
        """Of the uses, in the chunk."""
        return [use.position for use in self.wanted]

    def cancel(self) -> None:
        """Give up what did not begin."""
        for exchange in self.exchanges:
            exchange.answer.cancel()


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
        self._at: Link | None = None
        self._helper: Link | None = None
        self._unheard: list[Exchange] = []
        self._since_s, self._used_s = -inf, clock()  # what is asked first finds no link full of reads
        self._last: tuple[Exchange, ...] = ()
        self.counts = RemoteCounts()

    def ready(self) -> bool:
        """Whether there is a node to ask that is known to be right. One that failed is asked, after its rest, how it
        is."""
        return bool(self._askable(self._clock()))

    @property
    def runs(self) -> bool:
        """Whether a node runs experts, did lately, or is asked whether it is back."""
        asked = any(not exchange.answer.done() for exchange in self._last)
        return asked or self._clock() - self._used_s < REFRESH_S

    @property
    def layer_s(self) -> float:
        """Seconds that a layer takes whose misses the node that serves runs; inf while none does that is known to be
        right."""
        url = self._serving()
        link = self._links[url] if url is not None else None
        return link.exchange_s + link.run_s if link is not None and link.well else inf

    def send(self, layer: int, plain: PlainMath, wanted: Sequence[Wanted], x: Tensor) -> Sent | None:
        """Let nodes run those of `wanted` that are sooner there so than read; None where none are."""
        now_s = self._clock()
        links = self._askable(now_s)
        if not links:
            return None
        soonest = min(links, key=lambda link: link.exchange_s + link.run_s)
        timed = sorted(((sum(map(self._read_s, use.blobs)), use) for use in wanted), key=lambda pair: pair[0])
        away = num_away([read_s for read_s, _ in timed], soonest.exchange_s, soonest.run_s)
        if not away:
            return None
        slowest = timed[len(timed) - away :]
        some = tuple(use for _, use in slowest)
        request, rows = self._request(soonest, layer, plain, some, x)
        if not fits(request):
            return None
        self._used_s = now_s
        expected_s = max(link.exchange_s + len(request.uses) * link.run_s for link in links)
        patience_s = max(self._patience_s, PATIENCE * expected_s, sum(read_s for read_s, _ in slowest))
        self._last = tuple(Exchange(link.begin(request), link, len(request.uses)) for link in links)
        return Sent(some, rows, self._last, patience_s)

    def outputs(self, sent: Sent, dtype: torch.dtype) -> list[Ran] | None:
        """What a node computed, of all uses together where it summed. None where all failed, or are too late."""
        found = self._first(sent)
        if found is None:
            return None
        link, timed = found
        rows = [len(use.rows) for use in sent.wanted]
        self.counts.uses += len(rows)
        self.counts.read += timed.answer.read
        y = torch.from_numpy(timed.answer.y).to(dtype)
        if link.known.lossy:
            return [Ran(sent.positions, sent.rows, y)]
        return [
            Ran([use.position], use.rows, (part * use.gates[:, None]).to(dtype))
            for use, part in zip(sent.wanted, torch.split(y, rows), strict=True)
        ]

    def close(self) -> None:
        for link in self._links.values():
            link.close()

    def _first(self, sent: Sent) -> tuple[Link, Timed] | None:
        """The first answer, and whose it is. Nodes that fail, or are too late, rest."""
        waiting, until_s = list(sent.exchanges), monotonic() + sent.patience_s
        try:
            while waiting and (left_s := until_s - monotonic()) > 0:
                wait([one.answer for one in waiting], left_s, FIRST_COMPLETED)
                for one in [one for one in waiting if one.answer.done()]:
                    waiting.remove(one)
                    if (timed := self._hear(one)) is not None:
                        self._unheard += waiting
                        return one.link, timed
            at_work = [one.link for one in self._unheard]
            for one in waiting:
                if not (one.answer.cancel() and one.link in at_work):  # else it is not this one that is late
                    self._failed(one.link)
            return None
        finally:
            sent.cancel()

    def _hear(self, one: Exchange) -> Timed | None:
        """Take an exchange that is done into account; its answer, None where it failed."""
        try:
            timed = one.answer.result()
        except ComoeError:
            self._failed(one.link)
            return None
        self._used_s = self._clock()
        one.link.ran(timed, one.uses, self._used_s)
        self.counts.nbytes += timed.nbytes
        return timed

    def _hear_late(self) -> None:
        """What became of exchanges whose answers nobody waited for: their nodes have read meanwhile, or failed."""
        done = [one for one in self._unheard if one.answer.done()]
        self._unheard = [one for one in self._unheard if not one.answer.done()]
        for one in done:
            if not one.answer.cancelled():
                self._hear(one)

    def _failed(self, link: Link) -> None:
        link.failed(self._clock())
        self.counts.failures += 1

    def _askable(self, now_s: float) -> list[Link]:
        """The node that serves, if it is known to be right; and the one before, while it is of help.

        One that is at work for an answer that came from the other takes the next question after that: what it reads
        will be wanted again. One that was not heard of for a while is asked how it is, without waiting for it.
        """
        self._hear_late()
        url = self._serving()
        link = self._links[url] if url is not None else None
        if link is not None and link is not self._at:
            link.met()
            self._helper, self._since_s = self._at, now_s
        self._at = link
        if link is None:
            return []
        helper, cold = self._helper, needs_help(link.warm, now_s - self._since_s)
        help_ = [helper] if helper is not None and helper.well and cold else []
        if now_s < link.rests_until_s:
            return help_
        if now_s - link.heard_s > REFRESH_S:
            link.heard_s = now_s
            if not link.well:
                self._used_s = now_s
            link.ask_again(self._clock)
        return [link, *help_] if link.well else help_

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
