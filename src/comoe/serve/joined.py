"""Several packs as one source, so that one cache bounds the bytes of all of them."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from time import perf_counter

from comoe.store.source import Source
from comoe.types import BlobId

Heard = Callable[[str, int, float], None]


class Joined:
    """`sources` one behind the other: the layers of each are numbered on from those of the one before it.

    `num_layers` says how many layers each has; `heard` is told of every read: its tier, bytes and seconds.
    """

    def __init__(self, sources: Sequence[Source], num_layers: Sequence[int], heard: Heard) -> None:
        self._sources, self._heard = sources, heard
        self._starts = [0, *accumulate(num_layers)]

    def blob(self, at: int, blob: BlobId) -> BlobId:
        """The name here of `blob` of the source at position `at`."""
        return blob._replace(layer=self._starts[at] + blob.layer)

    def nbytes(self, blob: BlobId) -> int:
        source, own = self._own(blob)
        return source.nbytes(own)

    def read(self, blob: BlobId, into: memoryview) -> str:
        source, own = self._own(blob)
        start_s = perf_counter()
        tier = source.read(own, into)
        self._heard(tier, source.nbytes(own), perf_counter() - start_s)
        return tier

    def _own(self, blob: BlobId) -> tuple[Source, BlobId]:
        at = bisect_right(self._starts, blob.layer) - 1
        if not 0 <= at < len(self._sources):
            raise KeyError(blob)
        return self._sources[at], blob._replace(layer=blob.layer - self._starts[at])
