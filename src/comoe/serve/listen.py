"""The process of an edge node: its socket, TLS, and the end: on SIGTERM it finishes what runs, and then stops."""

import asyncio
import logging
import resource
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from types import FrameType

import uvicorn

from comoe.net.address import host_port
from comoe.serve.connection import Connection, Waiting
from comoe.serve.edge import EdgeNode
from comoe.types import UsageError

BACKLOG = 1024
ACCEPT_AGAIN_S = 0.05
FILES_BESIDE = 128
"""Open files that are no connections."""


class EdgeServer(uvicorn.Server):
    """Serves `node` on `listener`; `ready` is called when it does."""

    def __init__(
        self, node: EdgeNode, listener: socket.socket, tls: ssl.SSLContext | None, ready: Callable[[], None]
    ) -> None:
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
        super().__init__(
            uvicorn.Config(
                node.app,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=int(node.limits.idle_s),
                timeout_graceful_shutdown=1,
            )
        )
        self._node, self._listener, self._tls, self._ready = node, listener, tls, ready
        self._drain_until_s = float("inf")
        listener.setblocking(False)

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        limits = replace(self._node.limits, connections=min(self._node.limits.connections, _most_connections()))
        make = partial(
            Connection,
            Waiting(limits, self._node.gate.refused),
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        self._door = asyncio.create_task(self._accept(make))
        self.servers = []  # uvicorn's own, of which there are none
        self.started = True
        self._ready()

    async def shutdown(self, sockets: Sequence[socket.socket] | None = None) -> None:
        self._door.cancel()
        self._listener.close()
        await super().shutdown()

    async def _accept(self, make: Callable[[], Connection]) -> None:
        """Take connections in; of too many that are not made yet, the one that takes longest makes room."""
        loop = asyncio.get_running_loop()
        making: dict[asyncio.Task[None], None] = {}
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError:  # gone before it was taken in, or no more files
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            if len(making) >= self._node.limits.handshakes:
                self._node.gate.refused("handshakes")
                oldest = next(iter(making))
                oldest.cancel()
                making.pop(oldest)
            task = asyncio.create_task(self._make(make, connection))
            making[task] = None
            task.add_done_callback(lambda done: making.pop(done, None))

    async def _make(self, make: Callable[[], Connection], connection: socket.socket) -> None:
        """One connection, with its handshake."""
        loop, tls = asyncio.get_running_loop(), self._tls
        timeout = self._node.limits.head_s if tls is not None else None
        with suppress(OSError):  # of TLS too; asyncio closes what it does not finish
            await loop.connect_accepted_socket(make, connection, ssl=tls, ssl_handshake_timeout=timeout)

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop: told so, and nothing runs any more or it has had its time."""
        gate = self._node.gate
        done = gate.draining and (not gate.running or monotonic() > self._drain_until_s)
        return await super().on_tick(counter) or done

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets what runs finish, the second does not."""
        if self._node.gate.draining:
            self.should_exit = self.force_exit = True
        self._node.gate.draining = True
        self._drain_until_s = monotonic() + self._node.limits.drain_s


def listener_of(listen: str) -> socket.socket:
    """A bound socket of `HOST:PORT`, port 0 for any free one. Raises UsageError where it cannot be."""
    host, port = host_port(listen)
    try:
        return socket.create_server((host, port), family=_family(host), backlog=BACKLOG)
    except OSError as error:
        raise UsageError(f"nothing can listen on {listen}: {error.strerror or error}.") from error


def tls_of(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """TLS with a certificate chain and its key, as PEM files; None without. Raises UsageError."""
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise UsageError("TLS needs both: give --cert and --key.")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"{cert} and {key} are no certificate and its key: {error}.") from error
    return context


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _most_connections() -> int:
    """As many as this process may have files open, which it raises as far as it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(1, hard - FILES_BESIDE) if hard != resource.RLIM_INFINITY else 1 << 20
