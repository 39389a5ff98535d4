"""A small network: a device, edge nodes and an origin, each a host of its own, with servers as real processes.

Every edge node and the origin have a wire to the device, which may be shaped, and a relay in front of their server. The
wires between edge nodes and origin are as fast as the machine.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from comoe.sim.traces import LinkRate
from comoe.testbed.namespaces import Host, Wire
from comoe.testbed.shaping import Shaped, shape

SERVER_PORT, RELAY_PORT = 8000, 8001
READY_S = 30.0
LISTENS = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 1).close()"


class Trip(NamedTuple):
    """A round trip in seconds, and the share of packets that are lost."""

    rtt_s: float = 0.0
    loss: float = 0.0


class Node:
    """A host with a server, seen by the device over `wire` behind a relay, and by other nodes at `inside`."""

    def __init__(self, site: "Site", host: Host, wire: Wire, path: Trip) -> None:
        self._site, self.host, self.wire, self._path = site, host, wire, path
        self.server: subprocess.Popen[str] | None = None
        self._relay: subprocess.Popen[str] | None = None

    @property
    def device(self) -> Host:
        """The device of its site."""
        return self._site.device

    @property
    def url(self) -> str:
        """Where the device finds the server."""
        return f"http://{self.wire.far}:{RELAY_PORT}"

    def serve(self, command: Sequence[str | Path], **options: Any) -> None:
        """Start a server that listens at `SERVER_PORT` of all addresses, and wait until it does. OSError where it
        never does."""
        self.server = self.host.start(command, **options)
        self._site.wait_for(self.host, "127.0.0.1", SERVER_PORT, self.server)

    def kill(self) -> None:
        """End the server as a power cut does: SIGKILL."""
        assert self.server is not None
        self.server.kill()
        self.server.wait()

    def signal(self, number: int) -> None:
        """Send its server a signal."""
        assert self.server is not None
        self.server.send_signal(number)

    def cut(self) -> None:
        """Let nothing more through to the device."""
        shape(self.host, self.wire.far_interface, 0.0)

    def mend(self, bps: float) -> None:
        """Let so many bytes per second through to the device."""
        shape(self.host, self.wire.far_interface, bps)

    def shaped(self, rate: LinkRate) -> Shaped:
        """Its link to the device as recorded, while the context lasts."""
        return Shaped(self.host, self.wire.far_interface, rate)

    def start_relay(self) -> None:
        """Put the relay before the server."""
        words = (str(RELAY_PORT), "127.0.0.1", str(SERVER_PORT), *_words(self._path))
        command = [sys.executable, "-m", "comoe.testbed.relay", *words]
        self._relay = self.host.start(command, stdin=subprocess.PIPE)
        self._site.wait_for(self.host, "127.0.0.1", RELAY_PORT, self._relay)

    def move(self, path: Trip) -> None:
        """Let the device be so far away from now on."""
        assert self._relay is not None and self._relay.stdin is not None
        self._path = path
        self._relay.stdin.write(" ".join(_words(path)) + "\n")
        self._relay.stdin.flush()

    def close(self) -> None:
        """Let go of the relay, which its host ends."""
        if self._relay is not None and self._relay.stdin is not None:
            with suppress(BrokenPipeError):
                self._relay.stdin.close()


class Site:
    """A device, as many edge nodes as there are `edges`, and an `origin`; OSError where it cannot be: see
    `namespaces.missing`. Wires of the device carry packets of `mtu` bytes. Leaving the context ends everything that
    runs."""

    def __init__(self, edges: Sequence[Trip], origin: Trip, mtu: int = 1500) -> None:
        self._paths, self._mtu = [*edges, origin], mtu
        self._stack = ExitStack()

    def __enter__(self) -> "Site":
        with ExitStack() as stack:
            self.device = stack.enter_context(Host("device"))
            names = [*(f"edge{at}" for at in range(len(self._paths) - 1)), "origin"]
            hosts = [stack.enter_context(Host(name)) for name in names]
            nodes = [
                Node(self, host, Wire(self.device, host, self._mtu), path)
                for host, path in zip(hosts, self._paths, strict=True)
            ]
            self.edges, self.origin = nodes[:-1], nodes[-1]
            self.backhaul = [Wire(edge.host, self.origin.host) for edge in self.edges]
            for node in nodes:
                stack.callback(node.close)
                node.start_relay()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def origin_url(self, edge: int) -> str:
        """Where an edge node finds the origin's server."""
        return f"http://{self.backhaul[edge].far}:{SERVER_PORT}"

    def wait_for(self, host: Host, address: str, port: int, process: "subprocess.Popen[str]") -> None:
        """Until something listens. OSError where the process ends before, or it takes too long."""
        command = [sys.executable, "-c", LISTENS, address, str(port)]
        eventually(lambda: host.run(command, READY_S).returncode == 0 or process.poll() is not None)
        if process.poll() is not None:
            raise OSError(f"a server ended with {process.returncode} before it listened at port {port}")


def _words(path: Trip) -> tuple[str, str]:
    """A round trip as the relay takes it."""
    return str(1e3 * path.rtt_s), str(path.loss)


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until it holds. TimeoutError after `READY_S`."""
    until_s = time.monotonic() + READY_S
    while not holds():
        if time.monotonic() > until_s:
            raise TimeoutError("it takes too long")
        time.sleep(0.05)
