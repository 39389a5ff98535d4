"""Which resident blob should go first: bookkeeping only.

A policy knows the blobs that may be evicted and how they were used. What is pinned, how many bytes there are and when
to evict is `residency`'s business. A new policy is a class here and a subclass of the contract in tests/policies.py.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol

from comoe.types import BlobId


class Policy(Protocol):
    """Orders resident blobs for eviction; every blob is inserted once, then touched or removed."""

    def inserted(self, blob: BlobId, nbytes: int) -> None:
        """`blob`, of `nbytes` bytes, has become resident."""
        ...

    def touched(self, blob: BlobId) -> None:
        """`blob` was asked for. KeyError where it is not inserted."""
        ...

    def removed(self, blob: BlobId) -> None:
        """`blob` was evicted, or pinned for ever. KeyError where it is not inserted."""
        ...

    def victims(self) -> Iterator[BlobId]:
        """Every inserted blob, the one to evict first first; the caller skips those in use.

        Lazy: nothing may be inserted, touched or removed while it runs.
        """
        ...


class LRU:
    """Least recently asked for goes first."""

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
