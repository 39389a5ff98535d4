"""What is known of the links to edge nodes: rate, round trip, losses, and what a request over them is expected to take.

Pure: who transfers and who probes tells `Link` what happened; the clock is an argument. Sockets are `net.probe`'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

FAST_S, SLOW_S = 0.5, 3.0
"""Half-lives, in seconds of transferring, of two means of the rate; the lower one counts. See docs/decisions/021."""

RTT_WEIGHT = 0.25
"""Of the newest round trip: probes are few."""

LOSS_WEIGHT = 0.2
"""Of the newest request: failed or not."""

FRESH_S = 10.0
"""So long, a rate says something about its link."""

FIRST_BPS = 125_000.0
"""What a link is taken to carry before anything was transferred: 1 Mbit/s."""


@dataclass(slots=True)
class Mean:
    """A mean that forgets half of what it knows in `half_life_s` seconds of what it averages."""

    half_life_s: float
    _sum: float = 0.0
    _weight: float = 0.0

    def add(self, value: float, seconds: float) -> None:
        """It was `value` for so long."""
        kept = 0.5 ** (seconds / self.half_life_s)
        self._sum = kept * self._sum + (1 - kept) * value
        self._weight = kept * self._weight + (1 - kept)

    @property
    def value(self) -> float | None:
        """The mean so far; None before there is any."""
        return self._sum / self._weight if self._weight else None


@dataclass(slots=True)
class Link:
    """One link, by what was seen of it.

    `rtt_s` is None until a probe was answered; `loss` the share of requests that failed, the newest counting most;
    `heard_s` when anything last came over it, `rated_s` when its rate was last seen.
    """

    rtt_s: float | None = None
    loss: float = 0.0
    heard_s: float = -inf
    rated_s: float = -inf
    _fast: Mean = field(default_factory=lambda: Mean(FAST_S))
    _slow: Mean = field(default_factory=lambda: Mean(SLOW_S))

    @property
    def rate_bps(self) -> float:
        """Bytes per second that may be counted on: the lower of a quick and a slow mean, so that a fall shows at once
        and a rise must last."""
        means = [mean for mean in (self._fast.value, self._slow.value) if mean is not None]
        return min(means, default=FIRST_BPS)

    def transferred(self, nbytes: int, seconds: float, now_s: float) -> None:
        """Bytes came for so long, while at least one request was open: none is told, too."""
        if seconds <= 0:
            return
        for mean in (self._fast, self._slow):
            mean.add(nbytes / seconds, seconds)
        self.rated_s = now_s
        if nbytes:
            self.heard_s = now_s

    def succeeded(self, now_s: float) -> None:
        """A request was answered in full."""
        self.loss *= 1 - LOSS_WEIGHT
        self.heard_s = now_s

    def probed(self, rtt_s: float, now_s: float, *, loaded: bool = False) -> None:
        """A probe came back after so long.

        Where the link was `loaded` it waited behind what was read: then it can but show that the round trip is shorter.
        """
        if self.rtt_s is None:
            self.rtt_s = rtt_s
        elif not loaded or rtt_s < self.rtt_s:
            self.rtt_s = (1 - RTT_WEIGHT) * self.rtt_s + RTT_WEIGHT * rtt_s
        self.succeeded(now_s)

    def failed(self) -> None:
        """A request or a probe was not answered, or broke."""
        self.loss += LOSS_WEIGHT * (1 - self.loss)

    def expected_s(self, nbytes: int, rate_bps: float | None = None) -> float:
        """Seconds that a request for so many bytes takes, tried again where it fails; inf for a link never heard of.

        At its own rate, or at another one where that is too old to say anything.
        """
        rate_bps = self.rate_bps if rate_bps is None else rate_bps
        if self.heard_s == -inf or self.loss >= 1 or rate_bps <= 0:
            return inf
        return ((self.rtt_s or 0.0) + nbytes / rate_bps) / (1 - self.loss)


@dataclass(frozen=True, slots=True)
class LinkState:
    """A link at one moment, for a snapshot of the network and for metrics: `expected_s` is for a unit of transfer."""

    rate_bps: float
    rtt_s: float | None
    loss: float
    silent_s: float
    expected_s: float


def states(links: Mapping[str, Link], unit_nbytes: int, now_s: float) -> dict[str, LinkState]:
    """All links now, by node.

    A rate that was not seen for `FRESH_S` is taken to be the best that was: the radio is the same for all, and round
    trips and losses tell them apart. Where none was seen lately, bytes are left out for all.
    """
    fresh = [link.rate_bps for link in links.values() if now_s - link.rated_s <= FRESH_S]
    typical = max([FIRST_BPS, *fresh])
    unit_nbytes = unit_nbytes if fresh else 0
    found = {}
    for node, link in links.items():
        rate_bps = link.rate_bps if now_s - link.rated_s <= FRESH_S else typical
        expected_s = link.expected_s(unit_nbytes, rate_bps)
        found[node] = LinkState(rate_bps, link.rtt_s, link.loss, now_s - link.heard_s, expected_s)
    return found
