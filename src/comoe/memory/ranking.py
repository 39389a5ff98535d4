"""A changing order of blobs of which only the beginning is asked for: a heap that is tidied lazily."""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import count
from typing import NamedTuple

from comoe.types import BlobId

SLACK = 64
"""Outdated places may be as many as blobs, and so many more, before all are dropped."""


class Place(NamedTuple):
    """A blob's place in the order. Of equal ranks the one that was given first goes first; numbers differ."""

    rank: float
    number: int
    blob: BlobId


class Ranking:
    """Blobs by rank. A new rank costs O(log n), the first k blobs O(k log k)."""

    def __init__(self) -> None:
        self._current: dict[BlobId, Place] = {}
        self._heap: list[Place] = []
        self._numbers = count()

    def put(self, blob: BlobId, rank: float) -> None:
        """Give `blob` a place, in the order or a new one in it."""
        self._current[blob] = place = Place(rank, next(self._numbers), blob)
        heappush(self._heap, place)
        if len(self._heap) > 2 * len(self._current) + SLACK:
            self._heap = list(self._current.values())
            heapify(self._heap)

    def remove(self, blob: BlobId) -> float:
        """Take `blob` out; returns its rank."""
        return self._current.pop(blob).rank

    def ascending(self) -> Iterator[BlobId]:
        """The blobs, least rank first. The order must not change meanwhile."""
        heap = self._heap
        while heap and not self._is_current(heap[0]):
            heappop(heap)
        # A heap's children are not less than their parent, so a second heap of what may come next walks it in order.
        ahead = [(heap[0], 0)] if heap else []
        while ahead:
            place, at = heappop(ahead)
            for child in range(2 * at + 1, min(2 * at + 3, len(heap))):
                heappush(ahead, (heap[child], child))
            if self._is_current(place):
                yield place.blob

    def _is_current(self, place: Place) -> bool:
        return self._current.get(place.blob) is place
