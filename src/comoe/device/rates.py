"""The rate of real transfers: a source that takes the time of its reads."""

import threading

from comoe.device.probe import Clock
from comoe.store.source import Source, Through
from comoe.types import BlobId

RECENT = 0.1
"""The weight of the last read in the recent rate."""


class TimedSource(Through):
    """`source`, whose reads are counted: bytes, and the seconds that they took. A read that fails counts nothing."""

    def __init__(self, source: Source, clock: Clock) -> None:
        super().__init__(source)
        self._clock = clock
        self._lock = threading.Lock()
        self._nbytes, self._seconds = 0, 0.0
        self._recent: float | None = None

    @property
    def byte_s(self) -> float | None:
        """Seconds that a byte takes, latency included, in recent reads; None before the first."""
        return self._recent

    def read(self, blob: BlobId, into: memoryview) -> str:
        start_s = self._clock()
        tier = self._source.read(blob, into)
        seconds = self._clock() - start_s
        with self._lock:
            self._nbytes += self._source.nbytes(blob)
            self._seconds += seconds
            last = seconds / max(1, self._source.nbytes(blob))
            self._recent = last if self._recent is None else self._recent + RECENT * (last - self._recent)
        return tier

    def take_bps(self) -> float | None:
        """The rate of one read since this was last asked; None where there was none."""
        with self._lock:
            nbytes, seconds = self._nbytes, self._seconds
            self._nbytes, self._seconds = 0, 0.0
        return nbytes / seconds if seconds else None
