"""Several packs as one source, so that one cache bounds the bytes of all of them."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from comoe.store.source import Source
from comoe.types import BlobId


class Joined:
    """`sources` one behind the other: the layers of each are numbered on from those of the one before it.

    `num_layers` says how many layers each has. The tier is the first one's.
    """

    def __init__(self, sources: Sequence[Source], num_layers: Sequence[int]) -> None:
        self._sources = sources
        self._starts = [0, *accumulate(num_layers)]

    @property
    def tier(self) -> str:
        return self._sources[0].tier

    def blob(self, at: int, blob: BlobId) -> BlobId:
        """The name here of `blob` of the source at position `at`."""
        return blob._replace(layer=self._starts[at] + blob.layer)

    def nbytes(self, blob: BlobId) -> int:
        source, own = self._own(blob)
        return source.nbytes(own)

    def read(self, blob: BlobId, into: memoryview) -> None:
        source, own = self._own(blob)
        source.read(own, into)

    def _own(self, blob: BlobId) -> tuple[Source, BlobId]:
        at = bisect_right(self._starts, blob.layer) - 1
        if not 0 <= at < len(self._sources):
            raise KeyError(blob)
        return self._sources[at], blob._replace(layer=blob.layer - self._starts[at])
