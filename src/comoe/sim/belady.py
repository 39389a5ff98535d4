"""The offline optimum: a policy that knows the trace, or only its next tokens, to judge others by."""

from collections import defaultdict, deque
from itertools import chain
from math import inf

from comoe.memory.policy import LFU
from comoe.sim.replay import Cell, GroupOf, grouped
from comoe.store.trace import Trace
from comoe.types import BlobId

UNSEEN = -1e9
"""The rank of what no use is seen of, beside how often it was used: below that of any use."""


class Belady(LFU):
    """Farthest next use first (Belady, 1966): of blobs of one size none reads less, if a chunk's fit together.

    A chunk's blobs are wanted at once, so that a use is the number of a chunk; they are pinned, or wanted soonest. The
    policy sees this pass and `passes` more; what it sees no use of goes before, least frequently used first.
    """

    def __init__(self, trace: Trace, group_of: GroupOf, passes: float = inf) -> None:
        super().__init__()
        self._coming = deque(
            (at, chunk.in_pass, list(dict.fromkeys(chain(*groups))))
            for at, (chunk, groups) in enumerate(grouped(trace, group_of))
        )
        self._pass_of, self._passes = [in_pass for _, in_pass, _ in self._coming], passes
        self._uses: dict[BlobId, deque[int]] = defaultdict(deque)
        self._here: set[BlobId] = set()
        self._chunk = -1
        self._look(passes)

    def begin(self, chunk: int) -> None:
        """What is used from now on is used by the chunk of this number."""
        self._chunk = chunk
        self._look(self._pass_of[chunk] + self._passes)

    def inserted(self, blob: BlobId, nbytes: int) -> None:
        self._here.add(blob)
        self._put(blob, self._ranks.get(blob, -inf))

    def touched(self, blob: BlobId) -> None:
        self._put(blob, self._counted(blob))

    def removed(self, blob: BlobId) -> None:
        self._here.discard(blob)
        super().removed(blob)

    def used_elsewhere(self, blob: BlobId) -> bool:
        """Nothing is: a trace is of one device."""
        return False

    def _look(self, until: float) -> None:
        """See the uses of all passes up to this one."""
        while self._coming and self._coming[0][1] <= until:
            at, _, blobs = self._coming.popleft()
            for blob in blobs:
                self._uses[blob].append(at)
                if blob in self._here:
                    self._put(blob, self._ranks.get(blob, -inf))

    def _put(self, blob: BlobId, rank: float) -> None:
        uses = self._uses[blob]
        while uses and uses[0] <= self._chunk:
            uses.popleft()
        self._order.put(blob, -uses[0] if uses else UNSEEN + rank)


def belady(trace: Trace, group_of: GroupOf, capacity: int, passes: float = inf) -> Cell:
    """What replays `trace` as well as can be, or as well as who sees the next `passes` can."""
    policy = Belady(trace, group_of, passes)
    return Cell(capacity, policy, policy.begin)
