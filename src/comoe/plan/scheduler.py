"""When a running model gives memory back and when it takes some again. Pure: the clock is an argument.

Shrinks at once, grows rarely: see decisions/016.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from comoe.plan.snapshot import Snapshot

MARGIN = 0.05
"""Of what a process may have at most: so much is left to others."""

BAND = 0.025
"""Of the same: memory may move so far before anything is done, so that noise does nothing."""

HOLD_S, MOST_HOLD_S = 2.0, 120.0
"""Room must have been there so long before it is taken: at first, and after many shrinks."""

STALLED = 0.2
"""Others wait for memory in more of their time than this: the pressure is high, whatever is said to be available."""

GIVEN_UNDER_PRESSURE = 0.125
"""Of its bytes, what a cache gives in one `PRESSURE_S` of high pressure."""

PRESSURE_S = 10.0
"""The kernel's average over so long takes as long to tell that a shrink helped."""


class Resize(NamedTuple):
    """The cache's new capacity in bytes, and why: `memory`, `pressure` or `room`."""

    capacity: int
    reason: str


@dataclass(slots=True)
class Scheduler:
    """Decides the capacity of a cache, between `smallest` and what was `promised`.

    A hold-off doubles with every shrink, up to `MOST_HOLD_S`, and halves with every one that passes without any.
    """

    promised: int
    smallest: int
    capacity: int = field(init=False)
    _hold_s: float = field(init=False, default=HOLD_S)
    _roomy_since_s: float | None = field(init=False, default=None)
    _eased_s: float = field(init=False, default=float("-inf"))
    _shrunk_s: float = field(init=False, default=float("-inf"))

    def __post_init__(self) -> None:
        self.capacity = self.promised

    def promise(self, capacity: int) -> None:
        """So much may be had from now on, and is."""
        self.promised = self.capacity = capacity

    def tick(self, snapshot: Snapshot, used: int, now_s: float) -> Resize | None:
        """What to do now, where the cache holds `used` bytes; None nearly always.

        What is decided counts as done. A shrink is one to what leaves the margin and a band, whatever was used of the
        capacity until now: bytes that were promised but not yet taken are given up first.
        """
        affordable = used + snapshot.available - round(MARGIN * snapshot.limit)
        band = round(BAND * snapshot.limit)
        if affordable < self.capacity:
            return self._shrink(affordable - band, now_s, "memory")
        if snapshot.some is not None and snapshot.some > STALLED:
            self._roomy_since_s = None
            if now_s < self._eased_s + PRESSURE_S:
                return None
            self._eased_s = now_s
            held = min(used, self.capacity)
            return self._shrink(held - round(GIVEN_UNDER_PRESSURE * held), now_s, "pressure")
        return self._grow(affordable - band, band, now_s)

    def _shrink(self, capacity: int, now_s: float, reason: str) -> Resize | None:
        self._roomy_since_s = None
        capacity = max(capacity, self.smallest)
        if capacity >= self.capacity:
            return None
        self._hold_s = min(2 * self._hold_s, MOST_HOLD_S)
        self._shrunk_s, self.capacity = now_s, capacity
        return Resize(capacity, reason)

    def _grow(self, affordable: int, band: int, now_s: float) -> Resize | None:
        capacity = min(affordable, self.promised)
        worthwhile = capacity > self.capacity + min(band, self.promised - self.capacity - 1)
        if capacity <= self.capacity or not worthwhile:
            self._roomy_since_s = None
            return None
        if self._roomy_since_s is None:
            self._roomy_since_s = now_s
        if now_s - self._roomy_since_s < self._hold_s:
            return None
        if now_s - self._shrunk_s > 2 * self._hold_s:
            self._hold_s = max(self._hold_s / 2, HOLD_S)
        self._roomy_since_s, self.capacity = None, capacity
        return Resize(capacity, "room")
