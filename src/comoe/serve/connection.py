"""One connection of an edge node: uvicorn's protocol, with limits on what a client may leave half done.

uvicorn bounds the time between requests only. A head that never ends, a head without bounds and a reader that takes
nothing are ended here; so is the connection that waits longest, where there are too many.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from comoe.serve.limits import Limits


class Waiting:
    """Connections without a request at work, the longest waiting first. `refused` is told why one was ended."""

    def __init__(self, limits: Limits, refused: Callable[[str], None]) -> None:
        self.limits, self.refused = limits, refused
        self._found: dict[Connection, None] = {}

    def add(self, connection: "Connection") -> None:
        self._found[connection] = None

    def discard(self, connection: "Connection") -> None:
        self._found.pop(connection, None)

    def end_oldest(self) -> None:
        """End the connection that waits longest, to make room for another."""
        oldest = next(iter(self._found), None)
        if oldest is not None:
            self.discard(oldest)
            oldest.end("connections")


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with time limits; `waiting` is shared by all connections of a node."""

    def __init__(self, waiting: Waiting, **of_uvicorn: Any) -> None:
        super().__init__(**of_uvicorn)
        self._waiting = waiting
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._waiting.limits.connections:
            self._waiting.end_oldest()
        self._waiting.add(self)
        self._start("head", self._waiting.limits.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting.discard(self)
        for reason in list(self._timers):
            self._stop(reason)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._head_bytes += len(data)
            self._start("head", self._waiting.limits.head_s)
        super().data_received(data)
        if "head" in self._timers and self._head_bytes > self._waiting.limits.head_bytes:
            self.end("head size")

    def on_headers_complete(self) -> None:
        self._stop("head")
        self._head_bytes = 0
        self._waiting.discard(self)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and not self.pipeline:
            self._waiting.add(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start("stall", self._waiting.limits.stall_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("stall")

    def end(self, reason: str) -> None:
        """Drop the connection at once, whatever it was about."""
        self._waiting.refused(reason)
        self.transport.abort()

    def _start(self, reason: str, seconds: float) -> None:
        if reason not in self._timers:
            self._timers[reason] = self.loop.call_later(seconds, self.end, reason)

    def _stop(self, reason: str) -> None:
        timer = self._timers.pop(reason, None)
        if timer is not None:
            timer.cancel()
