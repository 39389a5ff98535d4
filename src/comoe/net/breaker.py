"""When to stop asking a node that does not answer, and how fast to ask one that does. Pure; clocks are arguments."""

import threading
from collections.abc import Callable

FAILURES, COOL_S, LONGEST_S = 3, 1.0, 4.0
"""So many failures in a row open the circuit; it stays open so long, twice as long after each trial that fails, as far
as a session may wait that whose link is back."""


class Breaker:
    """A circuit breaker: open, nobody asks; then one may try, and what becomes of that decides. Any thread calls."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._failures, self._cool_s, self._until_s, self._trying = 0, COOL_S, 0.0, False

    def admits(self) -> bool:
        """Whether one may ask now; who was admitted says what became of it."""
        with self._lock:
            if self._failures < FAILURES:
                return True
            if self._trying or self._clock() < self._until_s:
                return False
            self._trying = True
            return True

    @property
    def open(self) -> bool:
        """Whether nobody may ask now."""
        return self._failures >= FAILURES and (self._trying or self._clock() < self._until_s)

    def succeeded(self) -> None:
        with self._lock:
            self._failures, self._cool_s, self._trying = 0, COOL_S, False

    def failed(self) -> None:
        with self._lock:
            self._failures += 1
            if self._trying:
                self._cool_s = min(2 * self._cool_s, LONGEST_S)
            self._trying = False
            self._until_s = self._clock() + self._cool_s


class Throttle:
    """A token bucket: on average no more than `bps` bytes per second, a tenth of a second's worth at once."""

    def __init__(self, bps: float, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self._bps, self._clock, self._sleep = bps, clock, sleep
        self._lock = threading.Lock()
        self._free_s = clock()

    def take(self, nbytes: int) -> None:
        """Wait until so many bytes may have come."""
        with self._lock:
            self._free_s = max(self._free_s, self._clock() - 0.1) + nbytes / self._bps
            wait_s = self._free_s - self._clock()
        if wait_s > 0:
            self._sleep(wait_s)
