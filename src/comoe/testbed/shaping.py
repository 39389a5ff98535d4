"""A wire as fast as a recorded link: the token bucket of one end, changed whenever the rate does.

What an interface sends is shaped, so that the far end's shaping is the near end's download. A cut drops everything.
"""

import time
from threading import Event, Thread
from types import TracebackType

from comoe.sim.traces import LinkRate
from comoe.testbed.namespaces import Host

BURST_S = 0.01
"""Seconds at the rate that may go at once: timers are no finer."""

LEAST_BURST, USUAL_BURST, SLOW_BURST_S = 1600, 16384, 0.065
"""A packet, which a slow wire has; many of them, and the time that these may take. All go when rates change."""

WAITING_S, LEAST_WAITING = 0.1, 8000
"""Of what waits for its turn, in seconds and bytes; more is dropped, and slows the sender down."""

LEAST_BPS = 1000.0
"""Bytes per second below which a link is cut."""


def shape(host: Host, interface: str, bps: float) -> None:
    """Let `interface` send `bps` bytes per second from now on, or nothing. OSError where that cannot be."""
    if bps < LEAST_BPS:
        host.tool("tc", "qdisc", "replace", "dev", interface, "root", "handle", "2:", "blackhole")
        return
    burst = max(LEAST_BURST, round(bps * BURST_S), min(USUAL_BURST, round(bps * SLOW_BURST_S)))
    limit = burst + max(LEAST_WAITING, round(bps * WAITING_S))
    bucket = ("tbf", "rate", f"{round(8 * bps)}bit", "burst", str(burst), "limit", str(limit))
    host.tool("tc", "qdisc", "replace", "dev", interface, "root", "handle", "1:", *bucket)


class Shaped:
    """`interface` of `host` follows `rate` from when the context is entered, in a thread, and is cut at its end.

    An error of the thread is raised when the context is left.
    """

    def __init__(self, host: Host, interface: str, rate: LinkRate) -> None:
        self._host, self._interface, self._rate = host, interface, rate
        self._stop, self._error = Event(), None
        self._thread = Thread(target=self._follow, daemon=True)
        self.begun_s = 0.0

    _error: OSError | None

    def __enter__(self) -> "Shaped":
        self.begun_s = time.monotonic()
        shape(self._host, self._interface, self._rate.at(0.0))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    @property
    def now_s(self) -> float:
        """Seconds of the recorded link that have passed."""
        return time.monotonic() - self.begun_s

    def _follow(self) -> None:
        moments = [*self._rate.start_s.tolist()[1:], self._rate.end_s]
        try:
            for moment in moments:
                if self._stop.wait(max(0.0, moment - self.now_s)):
                    return
                shape(self._host, self._interface, self._rate.at(moment))
        except OSError as error:
            self._error = error
