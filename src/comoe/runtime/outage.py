"""A link that is gone: somebody waits for it, as long as the session's patience lasts."""

import logging
from time import monotonic, sleep
from typing import Protocol

from comoe.types import RemoteUnavailable

AGAIN_S = 0.25
"""Between two questions whether what is missing can be had now."""

LOG = logging.getLogger("comoe")


class Counting(Protocol):
    """What counts the seconds that were waited."""

    link_wait_s: float


class Outage:
    """Waited for from the first `wait` on, `patience_s` at most, and as long again whenever something came. Every
    second of it is counted.
    """

    def __init__(self, patience_s: float, counts: Counting) -> None:
        self._patience_s, self._counts = patience_s, counts
        self._since_s: float | None = None
        self._seen_s, self._had = 0.0, 0

    def wait(self, error: RemoteUnavailable, had: int) -> None:
        """Wait a little, since no more than `had` could be had for this reason. Raises it once patience is over."""
        now_s, counts = monotonic(), self._counts
        if had > self._had:
            self._since_s = None
        self._had = had
        since_s = now_s if self._since_s is None else self._since_s
        if self._since_s is not None:
            counts.link_wait_s += now_s - self._seen_s
        if now_s - since_s >= self._patience_s:
            raise error
        if self._since_s is None:
            LOG.warning(f"waiting for a link: {error}")
        sleep(AGAIN_S)
        self._since_s, self._seen_s = since_s, monotonic()
        counts.link_wait_s += self._seen_s - now_s
