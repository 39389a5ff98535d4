"""Which blobs are in memory, which come next and which go: the sans-I/O core of the cache.

Events in (`demand`, `take`, `release`, `prefetch`, `loaded`, `failed`, `resize`), actions out (`next_load`, `evicted`,
`news`). No clock, threads, bytes or I/O: `cache` and the simulator drive the very same code, one call at a time.

The life of a claim, which is one group of blobs that somebody demanded:

    WAITING ──admitted: parts pinned, room for the absent ones made──> LOADING ──last part loaded──> READY ──> TAKEN ──> DONE
       ^                                                                  │                            │
       └───────────────── retracted, newest first, by a shrink ───────────┴────────────────────────────┘

A claim is admitted whole or not at all and in order of demand, so no two half-loaded groups can wait for each other:
whatever is taken is released some day, and then the head of the queue has its room.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from comoe.memory.policy import Policy
from comoe.types import BlobId, DoesNotFit

Group = tuple[BlobId, ...]


class Stage(Enum):
    WAITING = auto()
    LOADING = auto()
    READY = auto()
    TAKEN = auto()
    DONE = auto()


@dataclass(slots=True, eq=False)
class Entry:
    """A blob that has room: reserved (neither flag), loading or resident."""

    blob: BlobId
    nbytes: int
    pins: int = 0
    loading: bool = False
    resident: bool = False
    forever: bool = False
    fresh: bool = False  # read ahead and not asked for since
    waiters: "list[Claim]" = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Demand:
    """What one caller asked for in one go; `pending` of its claims were not taken yet."""

    claims: "list[Claim]" = field(default_factory=list)
    ready: "deque[Claim]" = field(default_factory=deque)
    taken: "Claim | None" = None
    pending: int = 0
    misses: int = 0


@dataclass(slots=True, eq=False)
class Claim:
    """One demanded group, the `position`-th of its demand. An `error` makes it READY with nothing pinned."""

    demand: Demand
    position: int
    blobs: Group
    stage: Stage = Stage.WAITING
    missing: int = 0
    entries: list[Entry] = field(default_factory=list)
    error: BaseException | None = None


@dataclass(slots=True)
class Counts:
    """Blobs, unless the name says bytes. `unclaimed_failures`: reads that failed with nobody waiting for them."""

    evictions: int = 0
    prefetched: int = 0
    prefetch_used: int = 0
    prefetch_wasted: int = 0
    prefetch_wasted_bytes: int = 0
    prefetch_dropped: int = 0
    unclaimed_failures: int = 0


class Residency:
    """Keeps at most `capacity` bytes resident, loading or reserved, and at most `in_flight` loads.

    `nbytes` is what a blob costs, in bytes. After each event the edge forgets the blobs in `evicted` (and empties the
    list), then calls `next_load` until it is None; `news` says that a claim became READY since somebody reset it.
    """

    def __init__(
        self, capacity: int, nbytes: Callable[[BlobId], int], policy: Policy, *, in_flight: int = 2
    ) -> None:
        self.capacity = capacity
        self.in_flight = in_flight
        self.counts = Counts()
        self.evicted: list[BlobId] = []
        self.news = False
        self.used_bytes = 0  # of every entry
        self.forever_bytes = 0
        self.largest_bytes = 0  # of a group, without its blobs that are pinned for ever
        self._nbytes = nbytes
        self._policy = policy
        self._locked_bytes = 0  # of the entries that no eviction can free now
        self._num_loading = 0
        self._entries: dict[BlobId, Entry] = {}
        self._forever: set[BlobId] = set()
        self._waiting: deque[Claim] = deque()
        self._wanted: Counter[BlobId] = Counter()  # by claims in _waiting
        self._admitted: dict[Claim, None] = {}  # LOADING or READY, oldest first
        self._reserved: deque[Entry] = deque()  # to load in this order; may hold entries since dropped
        self._ahead: dict[BlobId, None] = {}  # to read ahead in this order

    # ---- what is there

    @property
    def smallest(self) -> int:
        """The smallest capacity that `resize` would accept, in bytes."""
        return self.forever_bytes + self.largest_bytes

    @property
    def has_work(self) -> bool:
        """Whether `next_load` may find something, if not now then once pins or loads end."""
        return bool(self._waiting or self._reserved or self._ahead)

    @property
    def resident_bytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values() if entry.resident)

    def is_resident(self, group: Group) -> bool:
        return self._find_resident(group) is not None

    def is_forever(self, blob: BlobId) -> bool:
        """Whether `blob` is resident and pinned for ever."""
        entry = self._entries.get(blob)
        return entry is not None and entry.resident and entry.forever

    # ---- events: consumers

    def demand(self, groups: Sequence[Group]) -> Demand:
        """Ask for all `groups`: resident ones are READY at once in this order, the others queue in this order.

        DoesNotFit, and nothing asked, where a group and the blobs pinned for ever exceed the capacity.
        """
        found = [self._find_resident(blobs) for blobs in groups]
        if None in found:
            self._refuse_too_large(blobs for blobs, entries in zip(groups, found, strict=True) if entries is None)
        demand = Demand(pending=len(groups))
        for position, (blobs, entries) in enumerate(zip(groups, found, strict=True)):
            claim = Claim(demand, position, blobs)
            demand.claims.append(claim)
            if entries is None:
                self._queue(claim)
            else:
                self._use(claim, entries)
        demand.misses = found.count(None)
        return demand

    def take(self, demand: Demand) -> Claim | None:
        """The next READY claim, pinned until `release`; None where none is. Look at its `error` first."""
        if not demand.ready:
            return None
        claim = demand.ready.popleft()
        self._admitted.pop(claim, None)
        claim.stage = Stage.TAKEN
        demand.taken = claim
        demand.pending -= 1
        return claim

    def release(self, demand: Demand) -> None:
        """Unpin what `take` gave last, if anything."""
        claim = demand.taken
        if claim is None:
            return
        demand.taken = None
        self._drop(claim)
        claim.stage = Stage.DONE
        self._shrink()

    def cancel(self, demand: Demand) -> None:
        """Forget whatever is left of `demand`: its pins go, its loads under way end unpinned. Harmless if repeated."""
        for claim in demand.claims:
            if claim.stage is Stage.WAITING:
                self._unqueue(claim)
            self._admitted.pop(claim, None)
            self._drop(claim)
            claim.stage = Stage.DONE
        demand.ready.clear()
        demand.taken, demand.pending = None, 0
        self._shrink()

    def prefetch(self, blobs: Iterable[BlobId]) -> None:
        """Read `blobs` ahead in this order, after all that was asked for before, whenever nothing demanded waits."""
        self._ahead.update((blob, None) for blob in blobs if blob not in self._entries)

    def cancel_prefetch(self) -> None:
        """Forget what was to be read ahead and has not begun."""
        self._ahead.clear()

    # ---- events: the floor and the budget

    def pin_forever(self, blobs: Iterable[BlobId]) -> tuple[BlobId, ...]:
        """From now on, or from when they are loaded (`demand` them), never evict `blobs`; returns the new ones.

        DoesNotFit, and nothing changed, where they leave no room for the largest group asked for so far.
        """
        new = tuple(blob for blob in dict.fromkeys(blobs) if blob not in self._forever)
        nbytes = sum(map(self._nbytes, new))
        self._refuse_below(self.smallest + nbytes, self.capacity)
        self.forever_bytes += nbytes
        self._forever.update(new)
        for entry in self._residents(new):
            self._policy.removed(entry.blob)
            self._settle_forever(entry)
        return new

    def unpin_forever(self, blobs: Iterable[BlobId]) -> None:
        """Undo `pin_forever`. KeyError where a blob is not pinned for ever."""
        gone = tuple(blobs)
        for blob in gone:
            self._forever.remove(blob)
            self.forever_bytes -= self._nbytes(blob)
        for entry in self._residents(gone):
            entry.forever = False
            self._policy.inserted(entry.blob, entry.nbytes)
            self._unpin(entry)
        self._shrink()

    def resize(self, capacity: int, largest_bytes: int | None = None) -> None:
        """Change the capacity; evict at once what can go, the rest as takers release and loads end.

        Claims that are not taken yet lose their pins, newest first, and queue again. `largest_bytes`: the largest
        group that will be asked for, where that is less than it was. DoesNotFit below what is pinned for ever
        plus the largest group.
        """
        largest = self.largest_bytes if largest_bytes is None else max(largest_bytes, self._largest_claim())
        self._refuse_below(self.forever_bytes + largest, capacity)
        self.largest_bytes = largest
        self.capacity = capacity
        self._shrink()

    # ---- events: loads

    def next_load(self) -> BlobId | None:
        """The blob to begin to load now; report it by `loaded` or `failed`. Demands first, prefetches after."""
        if self._num_loading >= self.in_flight:
            return None
        entry = self._next_demanded() or self._next_ahead()
        if entry is None:
            return None
        entry.loading = True
        self._num_loading += 1
        return entry.blob

    def loaded(self, blob: BlobId) -> None:
        entry = self._entries[blob]
        self._num_loading -= 1
        entry.loading, entry.resident = False, True
        if entry.pins == 0:
            self._locked_bytes -= entry.nbytes
        if blob in self._forever:
            self._settle_forever(entry)
        else:
            self._policy.inserted(blob, entry.nbytes)
        for claim in entry.waiters:
            claim.missing -= 1
            if claim.missing == 0:
                self._ready(claim)
        entry.waiters.clear()
        self._shrink()

    def failed(self, blob: BlobId, error: BaseException) -> None:
        """The load ended with `error`: every claim on the blob becomes READY with it; a later demand tries again."""
        entry = self._entries[blob]
        self._num_loading -= 1
        entry.loading = False
        self.counts.unclaimed_failures += not entry.waiters
        claims = tuple(dict.fromkeys(entry.waiters))
        for claim in claims:
            claim.error = error
            del self._admitted[claim]
            self._drop(claim)
            self._ready(claim)
        if not claims:
            self._forget(entry)

    # ---- invariants

    def check(self) -> None:
        """Assert what must hold between any two events."""
        entries = self._entries.values()
        assert self.used_bytes == sum(entry.nbytes for entry in entries)
        locked = [entry for entry in entries if entry.pins or not entry.resident]
        assert self._locked_bytes == sum(entry.nbytes for entry in locked)
        assert self._num_loading == sum(entry.loading for entry in entries) <= self.in_flight
        assert self.smallest <= self.capacity
        # After a shrink only what is taken, pinned for ever or being loaded may stay, until it ends.
        over = self.used_bytes > self.capacity
        assert not over or (not self._admitted and self.used_bytes == self._locked_bytes)
        assert sorted(self._policy.victims()) == sorted(e.blob for e in entries if e.resident and not e.forever)
        assert all(entry.pins or entry.loading or entry.resident for entry in entries)
        assert +self._wanted == Counter(blob for claim in self._waiting for blob in claim.blobs)

    # ---- claims

    def _find_resident(self, group: Group) -> list[Entry] | None:
        """The group's entries if all are resident."""
        entries = []
        nbytes = 0
        for blob in group:
            entry = self._entries.get(blob)
            if entry is None or not entry.resident:
                return None
            entries.append(entry)
            if not entry.forever:
                nbytes += entry.nbytes
        return entries
