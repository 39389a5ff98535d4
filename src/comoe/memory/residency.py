"""Which blobs are in memory, which are coming and which must go: a sans-I/O core.

Events in (`demand`, `loaded`, `release`, ...), actions out (`next_load`, `take_evictions`). No clock, no threads, no
buffers: the runtime's cache and the simulator drive the same code. What is demanded is read first, then what is
foreseen, then what was merely hinted at.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain, count

from comoe.memory.policy import Policy
from comoe.types import BlobId, DoesNotFit

Group = tuple[BlobId, ...]

MOST_HINTS = 1 << 14
"""Of more blobs that were merely hinted at, the oldest hints are forgotten: whoever hints may never stop."""


class Phase(Enum):
    """A ticket's life: waiting for room, waiting for bytes, pinned and whole, or broken."""

    QUEUED = "queued"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(slots=True)
class Ticket:
    """A demand for all blobs of a group at once. They stay pinned from admission to `release`."""

    number: int
    group: Group
    phase: Phase = Phase.QUEUED
    missing: set[BlobId] = field(default_factory=set)
    error: Exception | None = None


@dataclass(slots=True)
class Entry:
    """A blob that takes room: resident, or on its way where `loading`."""

    nbytes: int
    loading: bool
    pins: int = 0
    prefetched: bool = False


@dataclass(slots=True)
class Tally:
    """What prefetching was worth, in bytes of memory; how many blobs were evicted."""

    prefetched: int = 0
    prefetch_used: int = 0
    prefetch_wasted: int = 0
    prefetch_failed: int = 0
    evicted: int = 0


def first_ready(tickets: Mapping[int, Ticket]) -> int | None:
    """The position of the first ticket that is whole or broken, in the order in which they were demanded."""
    return next((at for at, ticket in tickets.items() if ticket.phase in (Phase.READY, Phase.FAILED)), None)


class Residency:
    """Byte-bounded residency of blobs.

    Invariant, held by `check`: resident and loading blobs together never take more than `capacity`, but for pinned
    ones after a shrink. `size_of` gives the memory that a blob takes; `largest_group` the most that one group takes
    beside held blobs: a smaller capacity is refused, so that the first demand can always be admitted.
    """

    def __init__(
        self,
        capacity: int,
        size_of: Callable[[BlobId], int],
        policy: Policy,
        *,
        largest_group: int = 0,
        in_flight: int = 1,
    ) -> None:
        self.capacity, self._size_of, self._policy = capacity, size_of, policy
        self._largest_group, self._in_flight = largest_group, in_flight
        self._entries: dict[BlobId, Entry] = {}
        self._held: set[BlobId] = set()
        self._held_bytes = 0
        self._queue: deque[Ticket] = deque()
        self._active: dict[int, Ticket] = {}
        self._hints: deque[BlobId] = deque(maxlen=MOST_HINTS)
        self._foreseen: dict[BlobId, None] = {}
        self._aimed: frozenset[BlobId] = frozenset()
        self._starting: deque[BlobId] = deque()
        self._evicting: list[BlobId] = []
        self._num_loading = 0
        self._numbers = count()
        self.used = 0
        self.tally = Tally()

    @property
    def smallest(self) -> int:
        """The least capacity: what is held for ever and one group."""
        return self._held_bytes + self._largest_group

    def resident(self, group: Iterable[BlobId]) -> bool:
        """Whether every blob of `group` is in memory."""
        entries = self._entries
        return all(blob in entries and not entries[blob].loading for blob in group)

    def demand(self, group: Sequence[BlobId]) -> Ticket:
        """Ask for all blobs of `group`. Demands are admitted in order. Raises DoesNotFit where none could ever be."""
        needed = self._held_bytes + sum(self._size_of(blob) for blob in set(group) - self._held)
        if needed > self.capacity:
            raise DoesNotFit(f"experts need at least {needed} bytes of memory, {self.capacity} were given.", needed)
        ticket = Ticket(next(self._numbers), tuple(dict.fromkeys(group)))
        self._active[ticket.number] = ticket
        self._queue.append(ticket)
        self._admit()
        return ticket

    def demand_all(self, groups: Sequence[Group]) -> dict[int, Ticket]:
        """Ask for every group, resident ones first, so that none leaves for the others; tickets by position.

        Serve them by `first_ready`. Raises DoesNotFit, and asks for none, where one could never be admitted.
        """
        order = sorted(range(len(groups)), key=lambda position: not self.resident(groups[position]))
        tickets: dict[int, Ticket] = {}
        try:
            for position in order:
                tickets[position] = self.demand(groups[position])
        except DoesNotFit:
            for ticket in tickets.values():
                self.release(ticket)
            raise
        return tickets

    def release(self, ticket: Ticket) -> None:
        """The consumer has done with `ticket`, or wants it no more."""
        del self._active[ticket.number]
        if ticket.phase is Phase.QUEUED:
            self._queue.remove(ticket)
        elif ticket.phase is not Phase.FAILED:
            self._withdraw(ticket)
        self._make_room(0, ())
        self._admit()

    def hold(self, group: Sequence[BlobId]) -> None:
        """Pin resident blobs for ever."""
        for blob in group:
            assert self.resident([blob])
            if blob not in self._held:
                self._held.add(blob)
                self._policy.removed(blob)
                self._entries[blob].pins += 1
                self._held_bytes += self._entries[blob].nbytes

    def held(self, blob: BlobId) -> bool:
        """Whether `blob` is pinned for ever."""
        return blob in self._held

    def residents(self) -> list[BlobId]:
        """All blobs in memory."""
        return [blob for blob, entry in self._entries.items() if not entry.loading]

    def prefetch(self, group: Iterable[BlobId]) -> None:
        """Read `group` when nothing is demanded and if room can be made. A hint: it may never happen."""
        aimed = self._aimed
        self._hints.extend(blob for blob in group if blob not in self._entries and (not aimed or blob in aimed))

    def used_elsewhere(self, group: Iterable[BlobId]) -> None:
        """`group` was used without being read. It is read as a hint if there is room, or all of it is worth more than
        what would leave."""
        absent = [blob for blob in group if blob not in self._entries]
        worth = [self._policy.used_elsewhere(blob) for blob in absent]
        room = self.used + sum(map(self._size_of, absent)) <= self.capacity
        if room or all(worth):
            self.prefetch(absent)

    def foresee(self, groups: Iterable[Group]) -> None:
        """What is likely demanded next, the likeliest first: read when nothing is demanded, last to be evicted.

        What was foreseen before is so no more: reads of it that have not begun never will.
        """
        self._foreseen = dict.fromkeys(chain.from_iterable(groups))

    def aim(self, blobs: Iterable[BlobId]) -> None:
        """What is read towards does not leave for what nobody demanded: else what was read ahead, and is not used yet,
        would leave for what is read next, again and again. Nothing else is hinted at, nor what was before."""
        self._aimed = frozenset(blobs)
        self._hints.clear()

    def next_load(self) -> BlobId | None:
        """The blob to read now, once what `take_evictions` names is gone; None where nothing may start."""
        self._admit()
        if self._num_loading >= self._in_flight:
            return None
        if not self._starting and not self._queue:
            self._take_foreseen() or self._take_hint()
        if not self._starting:
            return None
        self._num_loading += 1
        return self._starting.popleft()

    @property
    def may_start(self) -> bool:
        """Whether `next_load` may answer a blob: False where it is sure to have none."""
        wanted = bool(self._starting or self._queue or self._hints)
        wanted = wanted or bool(self._foreseen.keys() - self._entries.keys())
        return self._num_loading < self._in_flight and wanted

    def take_evictions(self) -> list[BlobId]:
        """Blobs that left since the last call: their memory is the caller's to free."""
        gone, self._evicting = self._evicting, []
        return gone

    def loaded(self, blob: BlobId) -> None:
        """The bytes of `blob` are there."""
        self._num_loading -= 1
        entry = self._entries[blob]
        entry.loading = False
        self._policy.inserted(blob, entry.nbytes)
        if entry.pins:
            self._policy.touched(blob)
        for ticket in self._active.values():
            if blob in ticket.missing:
                ticket.missing.discard(blob)
                if not ticket.missing:
                    ticket.phase = Phase.READY
        self._make_room(0, ())
        self._admit()

    def failed(self, blob: BlobId, error: Exception) -> None:
        """The bytes of `blob` could not be read: every ticket that waits for it fails; a later demand tries again."""
        self._num_loading -= 1
        for ticket in self._active.values():
            if blob in ticket.missing:
                ticket.phase, ticket.error = Phase.FAILED, error
                self._withdraw(ticket)
        entry = self._entries.pop(blob)
        self.used -= entry.nbytes
        self.tally.prefetch_failed += entry.prefetched * entry.nbytes
        self._evicting.append(blob)
        self._admit()

    def resize(self, capacity: int) -> None:
        """Change the capacity; what is pinned beyond it leaves when it is released. Raises DoesNotFit.

        Tickets that still wait for bytes beyond it queue again, newest first: their reads do not begin.
        """
        if capacity < self.smallest:
            raise DoesNotFit(
                f"experts need at least {self.smallest} bytes of memory, {capacity} were given.", self.smallest
            )
        self.capacity = capacity
        self.aim(())
        self._foreseen.clear()
        self._make_room(0, ())
        self._retract()
        self._make_room(0, ())
        self._admit()

    def check(self) -> None:
        """Assert the invariants."""
        assert self.used == sum(entry.nbytes for entry in self._entries.values())
        movable = [blob for blob, entry in self._entries.items() if not entry.pins and not entry.loading]
        assert self.used <= self.capacity or not movable
        assert all(self._entries[blob].pins > 0 for blob in self._held)
        admitted = [ticket for ticket in self._active.values() if ticket.phase in (Phase.LOADING, Phase.READY)]
        for blob, entry in self._entries.items():
            assert entry.pins == sum(blob in ticket.group for ticket in admitted) + (blob in self._held)

    def _admit(self) -> None:
        """Give room to queued tickets, in order, as far as it goes."""
        while self._queue:
            ticket = self._queue[0]
            absent = [blob for blob in ticket.group if blob not in self._entries]
            if not self._make_room(sum(map(self._size_of, absent)), ticket.group):
                return
            self._queue.popleft()
            for blob in absent:
                self._enter(blob)
            for blob in ticket.group:
                self._pin(blob)
            ticket.missing = {blob for blob in ticket.group if self._entries[blob].loading}
            ticket.phase = Phase.LOADING if ticket.missing else Phase.READY

    def _take_foreseen(self) -> bool:
        """Begin the likeliest read that is foreseen, unless no room can be made for it."""
        absent = next((blob for blob in self._foreseen if blob not in self._entries), None)
        return absent is not None and self._enter_ahead(absent)

    def _take_hint(self) -> bool:
        while self._hints:
            blob = self._hints.popleft()
            if blob not in self._entries and self._enter_ahead(blob):
                return True
        return False

    def _enter_ahead(self, blob: BlobId) -> bool:
        """Let an absent blob in that nobody demanded, for which nothing leaves that is foreseen."""
        if not self._make_room(self._size_of(blob), (blob,), ahead=True):
            return False
        self._enter(blob)
        self._entries[blob].prefetched = True
        self.tally.prefetched += self._entries[blob].nbytes
        return True

    def _enter(self, blob: BlobId) -> None:
        self._entries[blob] = Entry(self._size_of(blob), loading=True)
        self.used += self._entries[blob].nbytes
        self._starting.append(blob)

    def _pin(self, blob: BlobId) -> None:
        entry = self._entries[blob]
        entry.pins += 1
        if entry.prefetched:
            entry.prefetched = False
            self.tally.prefetch_used += entry.nbytes
        if not entry.loading and blob not in self._held:
            self._policy.touched(blob)

    def _unpin(self, group: Group) -> None:
        for blob in group:
            self._entries[blob].pins -= 1

    def _withdraw(self, ticket: Ticket) -> None:
        """Unpin an admitted ticket's blobs; reads that nobody wants any more and that have not begun are dropped."""
        self._unpin(ticket.group)
        for blob in ticket.missing:
            if not self._entries[blob].pins and blob in self._starting:
                self._starting.remove(blob)
                self.used -= self._entries.pop(blob).nbytes
        ticket.missing.clear()

    def _retract(self) -> None:
        for ticket in reversed(self._active.values()):
            if self.used <= self.capacity:
                return
            if ticket.phase is Phase.LOADING:
                self._withdraw(ticket)
                ticket.phase = Phase.QUEUED
                self._queue.appendleft(ticket)
                self._make_room(0, ())

    def _make_room(self, nbytes: int, keep: Sequence[BlobId], *, ahead: bool = False) -> bool:
        """Evict until `nbytes` more fit; False, and nothing evicted for it, where that cannot be.

        What is foreseen leaves last, and not for what is read `ahead`; nor does what is aimed at.
        """
        excess = self.used + nbytes - self.capacity
        if excess <= 0:
            return True
        leaving = []
        for blob in self._victims(ahead=ahead):
            if excess <= 0:
                break
            if not self._entries[blob].pins and blob not in keep:
                leaving.append(blob)
                excess -= self._entries[blob].nbytes
        if excess > 0 and nbytes:
            return False
        for blob in leaving:
            self._evict(blob)
        return excess <= 0

    def _victims(self, *, ahead: bool) -> Iterator[BlobId]:
        victims, foreseen, aimed = self._policy.victims, self._foreseen, self._aimed
        if ahead and (foreseen or aimed):
            return (blob for blob in victims() if blob not in foreseen and blob not in aimed)
        if not foreseen:
            return victims()
        others = (blob for blob in victims() if blob not in foreseen)
        return chain(others, (blob for blob in victims() if blob in foreseen))

    def _evict(self, blob: BlobId) -> None:
        entry = self._entries.pop(blob)
        self._policy.removed(blob)
        self.used -= entry.nbytes
        self.tally.evicted += 1
        self.tally.prefetch_wasted += entry.prefetched * entry.nbytes
        self._evicting.append(blob)
