"""`model.comoe`: what a program may ask of, and tell, a model that comoe serves while it runs."""

from types import TracebackType
from typing import Any

from comoe.device import process
from comoe.memory.cache import BlobCache
from comoe.plan.ledger import Ledger
from comoe.plan.planner import Plan
from comoe.runtime.layer import Counts, Serving
from comoe.store.pack import Pack
from comoe.types import DoesNotFit, UsageError

SLACK_BYTES = 8 << 20
"""Once the process is nearer than this to its budget, the cache gives way."""


class Comoe:
    """The handle of a served model. A context manager: leaving it stops the I/O thread.

    `context` is the longest prompt and answer together, in tokens; `memory` the budget of the whole process in bytes,
    None where only experts were given one.
    """

    def __init__(self, pack: Pack, serving: Serving, context: int, memory: int | None = None) -> None:
        self._pack, self._serving, self._context, self._memory = pack, serving, context, memory
        self._read_before: dict[str, int] = {}
        if memory is not None:
            self._overhead = memory - serving.cache.capacity
            serving.before_read = self._guard

    @property
    def plan(self) -> Plan:
        return self._serving.plan

    @property
    def ledger(self) -> Ledger:
        return self._serving.ledger

    @property
    def pack(self) -> Pack:
        return self._pack

    @property
    def cache(self) -> BlobCache:
        return self._serving.cache

    def resize(self, nbytes: int) -> None:
        """Change the budget to `nbytes`, of the process or of the experts, whichever `load` was given.

        Callable from any thread; obeyed between expert reads. Raises DoesNotFit, and changes nothing, below the
        floor and the two experts that must be there at once.
        """
        if self._memory is None:
            self.cache.resize(nbytes)
            return
        try:
            self.cache.resize(nbytes - self._overhead)
        except DoesNotFit as error:
            smallest = error.smallest + self._overhead
            raise DoesNotFit(f"the process needs {smallest} bytes of memory, {nbytes} were given.", smallest) from error
        self._memory = nbytes

    def stats(self) -> dict[str, Any]:
        """Counters of the request: rates as fractions, bytes as integers; what is resident is so now."""
        counts, read = self._serving.counts, self.cache.stats.bytes_read
        uses = max(counts.uses, 1)
        return {
            "uses": counts.uses,
            "hit_rate": counts.hits / uses,
            "floor_rate": counts.floor_uses / uses,
            "expert_s": counts.expert_s,
            "bytes_read": {tier: nbytes - self._read_before.get(tier, 0) for tier, nbytes in read.items()},
            "resident_bytes": self.cache.resident_bytes,
            "capacity_bytes": self.cache.capacity,
            "loss_ledger": self.ledger.loss,
            "shares": self.ledger.shares(),
        }

    def check_context(self, tokens: int) -> None:
        """Raise UsageError where prompt and answer together are longer than what memory was sized for."""
        if tokens > self._context:
            raise UsageError(f"prompt and answer have {tokens} tokens, memory is for {self._context}: raise --context.")

    @property
    def expert_s(self) -> float:
        """Seconds that the request's experts took so far, waiting for them included."""
        return self._serving.counts.expert_s

    def begin_request(self) -> None:
        """Start the ledger and the request's counters afresh."""
        self.ledger.clear()
        self._serving.counts = Counts()
        self._read_before = self.cache.stats.bytes_read

    def close(self) -> None:
        """Stop the I/O thread and close files. The model cannot run afterwards."""
        self.cache.close()
        self._pack.close()

    def __enter__(self) -> "Comoe":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _guard(self) -> None:
        """Keep the budget's promise where the process grew beyond what its warm-up showed: the cache gives way."""
        assert self._memory is not None
        excess = process.resident_bytes() + SLACK_BYTES - self._memory
        if excess <= 0:
            return
        process.trim_malloc()
        excess = process.resident_bytes() + SLACK_BYTES - self._memory
        room = self.cache.capacity - self.cache.smallest
        if excess > 0 and room > 0:
            self.cache.resize(self.cache.capacity - min(excess, room))
