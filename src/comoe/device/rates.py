"""The rate of real transfers: a source that takes the time of its reads."""

import threading
from collections.abc import Callable

from comoe.device.probe import Clock
from comoe.store.source import Source, Through
from comoe.types import BlobId

RECENT = 0.1
"""The weight of the last read in the recent rate."""


class TimedSource(Through):
    """`source`, whose reads are counted: bytes, and the seconds that they took. A read that fails counts nothing.

    `tier` says from where a blob would come now.
    """

    def __init__(self, source: Source, clock: Clock, tier: Callable[[BlobId], str] = lambda blob: "flash") -> None:
        super().__init__(source)
        self._clock, self._tier = clock, tier
        self._lock = threading.Lock()
        self._nbytes, self._seconds = 0, 0.0
        self._recent: dict[str, float] = {}

    def expected_s(self, blob: BlobId) -> float | None:
        """Seconds that a blob would take, as recent reads of its tier did; None before the first."""
        with self._lock:
            byte_s = self._recent.get(self._tier(blob))
        return None if byte_s is None else byte_s * self.nbytes(blob)

    def read(self, blob: BlobId, into: memoryview) -> str:
        start_s, came_from = self._clock(), self._tier(blob)
        tier = self._source.read(blob, into)
        seconds = self._clock() - start_s
        with self._lock:
            self._nbytes += self._source.nbytes(blob)
            self._seconds += seconds
            last = seconds / max(1, self._source.nbytes(blob))
            before = self._recent.get(came_from, last)
            self._recent[came_from] = before + RECENT * (last - before)
        return tier

    def take_bps(self) -> float | None:
        """The rate of one read since this was last asked; None where there was none."""
        with self._lock:
            nbytes, seconds = self._nbytes, self._seconds
            self._nbytes, self._seconds = 0, 0.0
        return nbytes / seconds if seconds else None
