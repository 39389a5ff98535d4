"""The rate of real transfers: a source that takes the time of its reads."""

import threading

from comoe.device.probe import Clock
from comoe.store.source import Source, Through
from comoe.types import BlobId


class TimedSource(Through):
    """`source`, whose reads are counted: bytes, and the seconds that they took. A read that fails counts nothing."""

    def __init__(self, source: Source, clock: Clock) -> None:
        super().__init__(source)
        self._clock = clock
        self._lock = threading.Lock()
        self._nbytes, self._seconds = 0, 0.0

    def read(self, blob: BlobId, into: memoryview) -> str:
        start_s = self._clock()
        tier = self._source.read(blob, into)
        seconds = self._clock() - start_s
        with self._lock:
            self._nbytes += self._source.nbytes(blob)
            self._seconds += seconds
        return tier

    def take_bps(self) -> float | None:
        """The rate of one read since this was last asked; None where there was none."""
        with self._lock:
            nbytes, seconds = self._nbytes, self._seconds
            self._nbytes, self._seconds = 0, 0.0
        return nbytes / seconds if seconds else None
