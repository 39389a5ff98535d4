"""How fast bytes come over a link while requests are open, one or several at once. Pure: the clock is an argument.

Time in which nothing was asked for does not count, nor do round trips in which nothing else could come, nor what a node
takes to find what it was asked for.
"""

from dataclasses import dataclass, field
from math import inf

from comoe.net.links import Link

SAMPLE_S = 0.05
"""Bytes and time are told to the link in pieces of at least so long."""

SOUGHT_S = 5.0
"""So long, a node to which bytes come is taken to look for what it was asked for: they may be another device's."""

SERVER_S = 1.0
"""So long, a node may look for what it was asked for, be it at an origin of its own; what takes longer is stalled."""


@dataclass(slots=True)
class Meter:
    """What the open requests of one link have had; `link` is told.

    `_open` has when each began, `_due` when its first byte came or may come at the earliest. Of a lone request, time
    counts from its first bytes on. These are `_first`, with their request; where no others come, they count only if
    they show a quicker link, since what else took time is not known.
    """

    link: Link
    _open: dict[int, float] = field(default_factory=dict)
    _due: dict[int, float] = field(default_factory=dict)
    _next: int = 0
    _nbytes: int = 0
    _first: tuple[int, int] = (0, 0)
    _counted_s: float = 0.0
    _heard_s: float = -inf
    _sought_s: float = -inf

    @property
    def busy(self) -> bool:
        """Whether a request is open."""
        return bool(self._open)

    def begin(self, now_s: float) -> int:
        """A request was sent; the answer names it from now on."""
        due_s = now_s + (self.link.rtt_s or 0.0) + SERVER_S
        if not self._open:
            self._nbytes, self._first, self._counted_s = 0, (0, 0), due_s
        self._next += 1
        self._open[self._next], self._due[self._next] = now_s, due_s
        return self._next

    def came(self, request: int, nbytes: int, now_s: float) -> None:
        """So many bytes more of a request have come."""
        self._heard_s = now_s
        self._due[request] = min(self._due[request], now_s)
        if now_s < self._counted_s:
            self._first, self._counted_s = (request, nbytes), now_s
        else:
            self._first, self._nbytes = (0, 0), self._nbytes + nbytes
        self.flush(now_s)

    def end(self, request: int, now_s: float, *, failed: bool = False) -> None:
        """A request has all of its bytes, or broke."""
        if self._first[0] == request:
            self._alone(self._first[1], now_s - self._open[request] - (self.link.rtt_s or 0.0), now_s)
            self._first, self._counted_s = (0, 0), now_s
        self._flush(now_s, 0.0)
        del self._open[request], self._due[request]
        self._counted_s = max(self._counted_s, min(self._due.values(), default=now_s))
        if failed:
            self.link.failed()
        else:
            self.link.succeeded(now_s)

    def _alone(self, nbytes: int, seconds: float, now_s: float) -> None:
        """A request brought so much at once."""
        quicker = seconds > 0 and nbytes / seconds > self.link.rate_bps
        if quicker or self.link.rated_s == -inf:
            self.link.transferred(nbytes, seconds, now_s)

    def flush(self, now_s: float) -> None:
        """Tell the link what came since it was last told, be it nothing."""
        self._flush(now_s, SAMPLE_S)

    def sought(self, now_s: float) -> None:
        """Bytes came to the node, which looks for what it was asked for: it is not stalled."""
        self._sought_s = now_s

    def waiting_s(self, now_s: float) -> float:
        """For how long no request had a byte, nor for a while the node itself, while one was open; 0 where none is."""
        waits_s = now_s - max(self._heard_s, min(self._open.values(), default=now_s))
        return waits_s if waits_s > SOUGHT_S else min(waits_s, now_s - self._sought_s)

    def _flush(self, now_s: float, least_s: float) -> None:
        seconds = now_s - self._counted_s
        if self._open and seconds > 0 and seconds >= least_s:
            self.link.transferred(self._nbytes, seconds, now_s)
            self._nbytes, self._counted_s = 0, now_s
