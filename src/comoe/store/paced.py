"""A source as slow as one wishes: a small model's experts then take as long to read as a big model's.

What a big model is to a device, its experts' reading time over its layers' time says; pacing gives a small trained one
the same, so that milliseconds and nats come from one run: the scale model.
"""

from collections.abc import Callable
from time import perf_counter, sleep

from comoe.store.source import Source, Through
from comoe.types import BlobId


class Paced(Through):
    """`source`, whose reads of so many bytes take `seconds`, or as long as they do where that is more."""

    def __init__(self, source: Source, seconds: Callable[[int], float]) -> None:
        super().__init__(source)
        self._seconds = seconds

    def read(self, blob: BlobId, into: memoryview) -> str:
        end_s = perf_counter() + self._seconds(self.nbytes(blob))
        tier = self._source.read(blob, into)
        sleep(max(0.0, end_s - perf_counter()))
        return tier
