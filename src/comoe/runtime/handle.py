"""`model.comoe`: what a program may ask of, and tell, a model that comoe serves while it runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from comoe.device import process
from comoe.memory.cache import BlobCache
from comoe.plan.ledger import Ledger
from comoe.plan.planner import Plan
from comoe.runtime.layer import Counts, Serving, Use
from comoe.store.pack import Pack
from comoe.store.profile import PHASES, Profile, Routed
from comoe.types import DoesNotFit, UsageError

SLACK_BYTES = 4 << 20
"""Memory may go so far beyond the sizes that were measured before the cache gives way, twice as much at a time."""


SESSION = "session"
"""What the domain of a served model's profile is called."""


class Promise(NamedTuple):
    """A budget of the whole process, in bytes: `memory`, of which `beside` are not the experts'.

    Of those again, `unseen` are no anonymous memory: pages of programs and files that must stay, and the kernel's own.
    """

    memory: int
    beside: int
    unseen: int


class Comoe:
    """The handle of a served model. A context manager: leaving it stops the I/O thread.

    `context` is the longest prompt and answer together, in tokens; `promise` the budget of the whole process, None
    where only experts were given one; `earlier_peak` the resident memory that loading took at most.
    """

    def __init__(
        self, pack: Pack, serving: Serving, context: int, promise: Promise | None = None, earlier_peak: int = 0
    ) -> None:
        self._pack, self._serving, self._context, self._promise = pack, serving, context, promise
        self._earlier_peak, self._planned = earlier_peak, serving.cache.capacity
        self._read_before: dict[str, int] = {}
        if promise is not None:
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

    @property
    def profile(self) -> Profile:
        """What routers chose since the model was loaded, by phase; the domain is `SESSION`."""
        routed = {}
        for phase, seen in zip(PHASES, zip(*self._serving.seen, strict=True), strict=True):
            tokens = np.array([layer.tokens for layer in seen])
            if tokens.any():
                uses, gates = ([getattr(layer, name) for layer in seen] for name in ("uses", "gates"))
                routed[SESSION, phase] = Routed(tokens, np.concatenate(uses), np.concatenate(gates))
        return Profile(tuple(layer.num_experts for layer in self._pack.manifest.layers), routed)

    @contextmanager
    def heeded(self, heed: Callable[[int, Tensor, Sequence[Use]], None]) -> Iterator[None]:
        """While it lasts, `heed` is told what every chunk uses: see `Serving`."""
        self._serving.heed = heed
        try:
            yield
        finally:
            self._serving.heed = None

    def resize(self, nbytes: int) -> None:
        """Change the budget to `nbytes`, of the process or of the experts, whichever `load` was given.

        Callable from any thread; obeyed between expert reads. Raises DoesNotFit, and changes nothing, below the
        floor and the two experts that must be there at once.
        """
        promise = self._promise
        beside = promise.beside if promise is not None else 0
        try:
            self.cache.resize(nbytes - beside)
        except DoesNotFit as error:
            if promise is None:
                raise
            smallest = error.smallest + beside
            raise DoesNotFit(f"the process needs {smallest} bytes of memory, {nbytes} were given.", smallest) from error
        self._planned = nbytes - beside
        if promise is not None:
            self._promise = promise._replace(memory=nbytes)

    def stats(self) -> dict[str, Any]:
        """Counters of the request: rates as fractions, bytes as integers; what is resident is so now.

        `prefetched_bytes` were read before they were asked for, `prefetch_wasted_bytes` of them left unused, since the
        model was loaded; `prefetching` says whether that goes on, None where there is nothing to go by.
        `yielded_bytes` are what the cache gave up to keep the budget; `beside_experts_bytes` what the process was
        measured to need beside it, None where experts alone have a budget; `peak_bytes` counts from its start.
        """
        counts, cache = self._serving.counts, self.cache.stats
        read, prefetcher = cache.bytes_read, self._serving.prefetcher
        uses = max(counts.uses, 1)
        return {
            "uses": counts.uses,
            "hit_rate": counts.hits / uses,
            "floor_rate": counts.floor_uses / uses,
            "expert_s": counts.expert_s,
            "bytes_read": {tier: nbytes - self._read_before.get(tier, 0) for tier, nbytes in read.items()},
            "prefetched_bytes": cache.tally.prefetched,
            "prefetch_wasted_bytes": cache.tally.prefetch_wasted,
            "prefetching": prefetcher.active if prefetcher is not None else None,
            "resident_bytes": self.cache.resident_bytes,
            "capacity_bytes": self.cache.capacity,
            "yielded_bytes": self._planned - self.cache.capacity,
            "beside_experts_bytes": self._promise.beside if self._promise is not None else None,
            "peak_bytes": max(self._earlier_peak, process.peak_bytes()),
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
        """Start the ledger and the request's counters afresh; what the cache yielded in the last one it gets back."""
        self.ledger.clear()
        self._serving.counts = Counts()
        self._read_before = self.cache.stats.bytes_read
        if self.cache.capacity < self._planned:
            self.cache.resize(self._planned)

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
        """Keep the budget's promise where the process grew beyond what its warm-up showed: the cache gives way.

        Anonymous memory alone is looked at: short of room, the kernel drops pages of programs first, which then seem
        to take less than they need.
        """
        if self._excess() <= SLACK_BYTES:
            return
        process.trim_malloc()
        excess = self._excess()
        room = self.cache.capacity - self.cache.smallest
        if excess > SLACK_BYTES and room > 0:
            self.cache.resize(self.cache.capacity - min(excess + SLACK_BYTES, room))

    def _excess(self) -> int:
        assert self._promise is not None
        return process.resident().anonymous + self._promise.unseen - self._promise.memory
