"""A floor that comes while the model runs already: until an expert's is there, an edge node runs that expert."""

import threading
from collections import deque
from collections.abc import Sequence
from time import monotonic

from comoe.runtime.layer import Serving
from comoe.runtime.outage import AGAIN_S, Outage
from comoe.store.pack import Pack
from comoe.types import BlobId, DoesNotFit, RemoteUnavailable

SOON_S, REST = 20.0, 3.0
"""A floor that takes longer comes at a quarter of the link: after each read it rests so many times as long."""

AT_ONCE = 8
"""Blobs that are asked for together while nothing runs elsewhere."""

LONGEST_REST_S, RECENT = 2.0, 2
"""No rest is longer: the link may be another one by then. The quicker of so many reads counts: one that waited for a
link that was gone for a moment says nothing about the floor."""


def lay(serving: Serving, pack: Pack, blobs: Sequence[BlobId]) -> None:
    """Hold the `blobs` of a floor before anything runs, waiting for a link as misses do. Raises RemoteUnavailable."""
    outage, there = Outage(serving.patience_s, serving.counts), False
    while not there:
        try:
            pack.bring(blobs)
            serving.cache.hold(blobs)
            there = True
        except RemoteUnavailable as error:
            outage.wait(error, pack.came)


class Laying:
    """Holds the `blobs` of a floor in a thread of its own, in their order, until all are there or `close`.

    Without a link, or while memory is short, it waits. `serving.laying` says whether it is under way, and
    `serving.broken` is what it could not go on from.
    """

    def __init__(self, serving: Serving, blobs: Sequence[BlobId]) -> None:
        self._serving, self._blobs = serving, blobs
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="comoe-laying")

    def start(self) -> "Laying":
        self._serving.laying = True
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ask for no more; what was asked for still comes."""
        self._stop.set()

    def join(self) -> None:
        """Wait for the thread's end, which `stop` and the end of the cache bring about."""
        self._thread.join()

    def _run(self) -> None:
        try:
            recent: deque[float] = deque(maxlen=RECENT)
            at = 0
            while at < len(self._blobs):
                few = self._blobs[at : at + (1 if self._shares else AT_ONCE)]
                start_s = monotonic()
                while not self._stop.is_set() and not self._held(few):
                    self._stop.wait(AGAIN_S)
                    start_s = monotonic()  # what it waited for was no link
                at += len(few)
                recent.append((monotonic() - start_s) / len(few))
                if self._shares and min(recent) * (len(self._blobs) - at) > SOON_S:
                    self._stop.wait(min(REST * min(recent), LONGEST_REST_S))
            self._serving.laying = self._stop.is_set()
        except Exception as error:
            if not self._stop.is_set():
                self._serving.broken = error

    @property
    def _shares(self) -> bool:
        """Whether experts run elsewhere, too."""
        return self._serving.remote is not None and self._serving.remote.runs

    def _held(self, blobs: Sequence[BlobId]) -> bool:
        try:
            self._serving.cache.hold(blobs)
        except (RemoteUnavailable, DoesNotFit):
            return False
        return True
