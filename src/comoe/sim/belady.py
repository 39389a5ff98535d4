"""The offline optimum: a policy that knows the trace, to judge others by."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from math import inf

from comoe.memory.ranking import Ranking
from comoe.sim.replay import Cell, GroupOf, grouped
from comoe.store.trace import Trace
from comoe.types import BlobId


class Belady:
    """Farthest next use first (Belady, 1966): of blobs of one size none reads less, if a chunk's fit together.

    A chunk's blobs are wanted at once, so that a use is the number of a chunk; they are pinned, or wanted soonest.
    """

    def __init__(self, trace: Trace, group_of: GroupOf) -> None:
        self._uses: dict[BlobId, list[int]] = defaultdict(list)
        for at, (_, groups) in enumerate(grouped(trace, group_of)):
            for blob in dict.fromkeys(chain(*groups)):
                self._uses[blob].append(at)
        for uses in self._uses.values():
            uses.reverse()
        self._now = -1
        self._order = Ranking()

    def begin(self, chunk: int) -> None:
        """What is used from now on is used by the chunk of this number."""
        self._now = chunk

    def inserted(self, blob: BlobId, nbytes: int) -> None:
        self._put(blob)

    def touched(self, blob: BlobId) -> None:
        self._put(blob)

    def removed(self, blob: BlobId) -> None:
        self._order.remove(blob)

    def victims(self) -> Iterator[BlobId]:
        return self._order.ascending()

    def used_elsewhere(self, blob: BlobId) -> bool:
        """Nothing is: a trace is of one device."""
        return False

    def age(self, half_lives: float) -> None:
        """Nothing: it looks ahead alone."""

    def _put(self, blob: BlobId) -> None:
        uses = self._uses[blob]
        while uses and uses[-1] <= self._now:
            uses.pop()
        self._order.put(blob, -uses[-1] if uses else -inf)


def belady(trace: Trace, group_of: GroupOf, capacity: int) -> Cell:
    """What replays `trace` as well as can be."""
    policy = Belady(trace, group_of)
    return Cell(capacity, policy, policy.begin)
