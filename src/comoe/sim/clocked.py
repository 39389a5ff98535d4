"""A cache of real bytes on a virtual clock: a model is served as ever, and its milliseconds are a device's to be.

With `sim.replay`, which needs no model, it shares the clock: what that foretells of a trace, this does while routers
may still choose otherwise. Nats and milliseconds come from one run, whatever else the machine does.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from comoe.memory.arena import Buffer
from comoe.memory.cache import BlobCache
from comoe.memory.policy import Policy
from comoe.memory.residency import Group, Ticket, first_ready
from comoe.sim.reader import Reader, Times
from comoe.store.source import Source
from comoe.types import BlobId


class ClockedCache(BlobCache):
    """A cache whose owner reads, in virtual time, when what it asks for is not there. One thread uses it.

    `times.token_s` is the owner's to pass, by `advance`. Reads that fail raise at once.
    """

    def __init__(
        self, source: Source, capacity: int, times: Times, *, largest_group: int = 0, policy: Policy | None = None
    ) -> None:
        super().__init__(source, capacity, largest_group=largest_group, policy=policy, io_threads=0)
        self._times = times
        self._reader = Reader(self._residency, source.nbytes, times.load_s, self._arrived)

    def now_s(self) -> float:
        return self._reader.now_s

    def advance(self, seconds: float) -> None:
        """Compute for so long; reads that end meanwhile have ended, and the next have begun."""
        self._reader.advance(seconds)

    def serve(
        self, groups: Sequence[Group], ahead: Sequence[Group] = (), until: Callable[[], bool] | None = None
    ) -> Iterator[tuple[int, tuple[Buffer, ...]]]:
        if ahead:
            self.advance(self._times.ahead_s)
        for position, blobs in super().serve(groups, ahead, until):
            self.advance(self._times.use_s)
            yield position, blobs

    def _demand(self, groups: Sequence[Group], ahead: Sequence[Group]) -> dict[int, Ticket]:
        tickets = super()._demand(groups, ahead)
        self._reader.begin()
        return tickets

    def _next_ready(self, tickets: dict[int, Ticket], until: Callable[[], bool] | None) -> int | None:
        while (position := first_ready(tickets)) is None and not (until is not None and until()):
            self._reader.end()
        return position

    def _release(self, tickets: Iterable[Ticket]) -> None:
        super()._release(tickets)
        self._reader.begin()

    def _arrived(self, blob: BlobId) -> None:
        self._apply_evictions()
        self._buffers[blob] = self._arena.take(self._source.nbytes(blob))
        error = self._read(blob, self._buffers[blob])
        if error is not None:
            raise error
