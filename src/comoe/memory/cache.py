"""The blob cache: residency, arena and I/O threads joined. The only place of this floor that waits."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from types import TracebackType

from comoe.memory.arena import Arena, Buffer, held_size
from comoe.memory.policy import LRU, Policy
from comoe.memory.residency import Group, Residency, Tally, Ticket, first_ready
from comoe.store.source import Source
from comoe.types import BlobId, DoesNotFit


@dataclass(slots=True)
class CacheStats:
    """Reads so far; `bytes_read` by tier."""

    reads: int = 0
    bytes_read: dict[str, int] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)


HELD_AT_ONCE = 64
"""Blobs of a floor that are asked for together."""

LOOK_S = 0.05
"""So often who waits looks whether there is no more need to."""


class BlobCache:
    """Blobs of `source` within `capacity` bytes of anonymous memory.

    `largest_group` is the most bytes that blobs demanded together take; `io_threads` reads are in flight at once, one
    where there is none: then somebody else reads, see `sim.clocked`.
    One thread consumes (`serve`), others may hold; `resize`, `prefetch` and the properties may be called from any.
    """

    def __init__(
        self,
        source: Source,
        capacity: int,
        *,
        largest_group: int = 0,
        policy: Policy | None = None,
        io_threads: int = 1,
    ) -> None:
        self._source = source
        self._policy = policy or LRU()
        self._residency = Residency(
            capacity, self._held_size, self._policy, largest_group=largest_group, in_flight=max(1, io_threads)
        )
        if capacity < largest_group:
            raise DoesNotFit(f"experts need at least {largest_group} bytes, {capacity} were given.", largest_group)
        self._arena = Arena(capacity)
        self._buffers: dict[BlobId, Buffer] = {}
        self._stats = CacheStats()
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._run, daemon=True, name="comoe-io") for _ in range(io_threads)]
        for thread in self._threads:
            thread.start()

    def serve(
        self, groups: Sequence[Group], ahead: Sequence[Group] = (), until: Callable[[], bool] | None = None
    ) -> Iterator[tuple[int, tuple[Buffer, ...]]]:
        """Yield (position in `groups`, the blobs' bytes) as they are there: resident ones first, then by arrival.

        A group is pinned until the next is asked for. Groups `ahead` are likely asked for next, the likeliest first:
        they are read when nothing else is, until it is asked for other ones. Where `until` becomes true while it waits,
        the groups that are not there are left out. Raises what the source raised for a group; DoesNotFit where a group
        is larger than the capacity.
        """
        tickets = self._demand(groups, ahead)
        try:
            while tickets and (position := self._next_ready(tickets, until)) is not None:
                ticket = tickets.pop(position)
                try:
                    if ticket.error is not None:
                        raise ticket.error
                    yield position, tuple(self._bytes(blob) for blob in groups[position])
                finally:
                    self._release([ticket])
        finally:
            self._release(tickets.values())

    def resident(self, group: Group) -> bool:
        """Whether every blob of `group` is in memory now."""
        with self._changed:
            return self._residency.resident(group)

    def residents(self, groups: Sequence[Group]) -> list[bool]:
        """Of each group, whether every blob of it is in memory: of all at the same moment."""
        with self._changed:
            return [self._residency.resident(group) for group in groups]

    def hold(self, blobs: Sequence[BlobId]) -> None:
        """Read `blobs` and keep them for ever: the floor. Raises DoesNotFit where they leave no room for a group."""
        new = (blob for blob in dict.fromkeys(blobs) if not self._residency.held(blob))
        total = sum(map(self._held_size, new)) + self._residency.smallest
        if total > self.capacity:
            raise DoesNotFit(f"the floor needs {total} bytes of memory, {self.capacity} were given.", total)
        for at in range(0, len(blobs), HELD_AT_ONCE):
            few = blobs[at : at + HELD_AT_ONCE]
            for position, _ in self.serve([(blob,) for blob in few]):
                with self._changed:
                    self._residency.hold([few[position]])

    def resident_blobs(self) -> list[BlobId]:
        """All blobs in memory now."""
        with self._changed:
            return self._residency.residents()

    def prefetch(self, groups: Sequence[Group]) -> None:
        """Hint that `groups` will be wanted; read when nothing is demanded. Errors are counted, not raised."""
        with self._changed:
            for group in groups:
                self._residency.prefetch(group)
            self._wake_reader()

    def aim(self, groups: Sequence[Group], stay: Iterable[BlobId]) -> None:
        """Read towards this: of `groups` what is not there when nothing is demanded, and nothing else that was hinted
        at. What is to `stay` leaves for what is demanded alone."""
        with self._changed:
            self._residency.aim(stay)
            for group in groups:
                self._residency.prefetch(group)
            self._wake_reader()

    def used_elsewhere(self, groups: Sequence[Group]) -> None:
        """`groups` were used, but by somebody else: read when nothing is demanded, where they would stay."""
        with self._changed:
            for group in groups:
                self._residency.used_elsewhere(group)
            self._wake_reader()

    def resize(self, capacity: int) -> None:
        """Change the capacity. What is not pinned leaves at once, a pinned group when its consumer has done with it.

        Raises DoesNotFit, and changes nothing, below the floor and one group.
        """
        with self._changed:
            self._residency.resize(capacity)
            self._arena.capacity = capacity
            self._apply_evictions()
            self._arena.resize(capacity)
            self._changed.notify_all()

    def age(self, half_lives: float) -> None:
        """Let the policy forget: the text is another now."""
        with self._changed:
            self._policy.age(half_lives)

    def now_s(self) -> float:
        """Seconds on the clock by which reads take their time."""
        return perf_counter()

    @property
    def capacity(self) -> int:
        return self._residency.capacity

    @property
    def smallest(self) -> int:
        """The least capacity that `resize` accepts."""
        return self._residency.smallest

    @property
    def resident_bytes(self) -> int:
        """Memory of resident and arriving blobs."""
        return self._residency.used

    @property
    def stats(self) -> CacheStats:
        """A copy of the counters."""
        with self._changed:
            return replace(self._stats, bytes_read=dict(self._stats.bytes_read), tally=replace(self._residency.tally))

    def close(self) -> None:
        """Stop the I/O threads and let go of all memory, whoever still refers to the cache. May be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._buffers.clear()
        self._arena.clear()

    def __enter__(self) -> "BlobCache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _held_size(self, blob: BlobId) -> int:
        return held_size(self._source.nbytes(blob))

    def _bytes(self, blob: BlobId) -> Buffer:
        return self._buffers[blob][: self._source.nbytes(blob)]

    def _demand(self, groups: Sequence[Group], ahead: Sequence[Group]) -> dict[int, Ticket]:
        with self._changed:
            if self._closed:
                raise RuntimeError("the cache is closed")
            self._residency.foresee(ahead)
            try:
                tickets = self._residency.demand_all(groups)
            except DoesNotFit:
                self._release(())
                raise
            self._apply_evictions()
            self._wake_reader()
            return tickets

    def _next_ready(self, tickets: dict[int, Ticket], until: Callable[[], bool] | None) -> int | None:
        """The position of the first ticket that is whole or broken; waits for one, at most until `until` is true."""
        with self._changed:
            while not self._closed:
                position = first_ready(tickets)
                if position is not None or (until is not None and until()):
                    return position
                self._changed.wait(LOOK_S if until is not None else None)
            raise RuntimeError("the cache is closed")

    def _release(self, tickets: Iterable[Ticket]) -> None:
        with self._changed:
            for ticket in tickets:
                self._residency.release(ticket)
            self._apply_evictions()
            self._wake_reader()

    def _wake_reader(self) -> None:
        """Wake I/O threads if there is something to read: computing waits for its turn each time. The lock is held."""
        if self._residency.may_start:
            self._changed.notify_all()

    def _apply_evictions(self) -> None:
        """Give the buffers of evicted blobs back. The lock is held."""
        for blob in self._residency.take_evictions():
            buffer = self._buffers.pop(blob, None)
            if buffer is not None:
                self._arena.give(buffer)

    def _run(self) -> None:
        """An I/O thread's life: start what residency asks for, read it, report."""
        while (work := self._next_load()) is not None:
            blob, buffer = work
            error = self._read(blob, buffer)
            with self._changed:
                if error is None:
                    self._residency.loaded(blob)
                else:
                    self._residency.failed(blob, error)
                self._apply_evictions()
                self._changed.notify_all()

    def _next_load(self) -> tuple[BlobId, Buffer] | None:
        with self._changed:
            while not self._closed:
                blob = self._residency.next_load()
                self._apply_evictions()
                if blob is None:
                    self._changed.wait()
                    continue
                try:
                    buffer = self._buffers[blob] = self._arena.take(self._source.nbytes(blob))
                except (MemoryError, OSError) as error:
                    self._residency.failed(blob, error)
                    self._apply_evictions()
                    self._changed.notify_all()
                else:
                    return blob, buffer
            return None

    def _read(self, blob: BlobId, buffer: Buffer) -> Exception | None:
        try:
            tier = self._source.read(blob, buffer.data)
        except Exception as error:
            return error
        with self._changed:
            nbytes = self._source.nbytes(blob)
            self._stats.reads += 1
            self._stats.bytes_read[tier] = self._stats.bytes_read.get(tier, 0) + nbytes
        return None
