"""Who leaves first: a policy is only bookkeeping. Bytes, pins and reads are `memory.residency`'s."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol

from comoe.types import BlobId


class Policy(Protocol):
    """Order of eviction of the blobs that may leave."""

    def inserted(self, blob: BlobId, nbytes: int) -> None:
        """`blob` came in."""
        ...

    def touched(self, blob: BlobId) -> None:
        """`blob` was used."""
        ...

    def removed(self, blob: BlobId) -> None:
        """`blob` went."""
        ...

    def victims(self) -> Iterator[BlobId]:
        """Blobs in the order in which they should leave. The caller skips those that may not, and stops early."""
        ...


class LRU:
    """Least recently used first."""

    def __init__(self) -> None:
        self._order: OrderedDict[BlobId, None] = OrderedDict()

    def inserted(self, blob: BlobId, nbytes: int) -> None:
        self._order[blob] = None

    def touched(self, blob: BlobId) -> None:
        self._order.move_to_end(blob)

    def removed(self, blob: BlobId) -> None:
        del self._order[blob]

    def victims(self) -> Iterator[BlobId]:
        return iter(self._order)
