"""Connections that are left half done, never end or take nothing: ended in time, while others are served."""

import resource
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest
from blake3 import blake3
from certificates import self_signed
from edges import Edge, exchange, https, running, until
from packs import edit, write_pack

from comoe.serve.edge import EdgeNode
from comoe.serve.limits import Limits
from comoe.serve.listen import EdgeServer, listener_of
from comoe.serve.metrics import Metrics
from comoe.serve.shelf import Shelf
from comoe.store.manifest import MANIFEST
from comoe.store.pack import Pack

HALF_OPEN = 1000
FLAT_BYTES = 32 << 20
"""So much more memory a thousand connections may take."""

LARGE_BYTES = 64 << 20
"""More than sockets hold."""

HALF_A_HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Half: "


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("connection") / "toy.comoe"
    write_pack(folder, None)
    content = bytes(LARGE_BYTES)
    (folder / "large.bin").write_bytes(content)
    edit(folder, lambda document: document.update(files={"large.bin": blake3(content).hexdigest()}))
    return folder


@contextmanager
def node_of(toy: Path, limits: Limits) -> Iterator[tuple[EdgeNode, int]]:
    """A node in a thread of this process, and its port."""
    metrics = Metrics()
    shelf = Shelf({toy.name: Pack(toy)}, metrics)
    shelf.open(1 << 20)
    node, listener, ready = EdgeNode(shelf, None, limits, metrics), listener_of("127.0.0.1:0"), threading.Event()
    port = listener.getsockname()[1]
    server = EdgeServer(node, listener, None, ready.set)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(30)
        yield node, port
    finally:
        server.handle_exit(15, None)
        thread.join(60)
        node.close()
        assert not thread.is_alive()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def is_ended(connection: socket.socket) -> bool:
    """Whether the other side has closed it; waits for it."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return True


def serves(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    found = exchange(connection, f"/packs/toy.comoe/{MANIFEST}").status == 200
    connection.close()
    return found


def test_a_head_that_does_not_end_is_ended(toy: Path) -> None:
    with node_of(toy, Limits(head_s=0.3)) as (node, port), ExitStack() as stack:
        loris = [stack.enter_context(connect(port)) for _ in range(20)]
        done = threading.Event()

        def drip() -> None:
            while not done.wait(0.05):
                for connection in loris:
                    try:
                        connection.send(b"x")
                    except OSError:
                        return

        for connection in loris:
            connection.sendall(HALF_A_HEAD)
        thread = threading.Thread(target=drip)
        thread.start()
        assert serves(port)
        assert all(map(is_ended, loris))
        done.set()
        thread.join()
        assert serves(port)
        assert b'refusals_total{reason="head"} 20' in node.metrics.text()


def test_a_second_request_is_bounded_as_the_first(toy: Path) -> None:
    with node_of(toy, Limits(head_s=0.3)) as (_, port), connect(port) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        connection.sendall(HALF_A_HEAD)
        assert is_ended(connection)


def test_a_connection_that_says_nothing_is_ended(toy: Path) -> None:
    with node_of(toy, Limits(head_s=0.3, idle_s=1)) as (_, port), connect(port) as silent, connect(port) as idle:
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert is_ended(silent) and is_ended(idle)


def test_a_head_without_bounds_is_ended(toy: Path) -> None:
    with node_of(toy, Limits(head_s=30)) as (node, port), connect(port) as connection:
        connection.sendall(HALF_A_HEAD)
        with pytest.raises(OSError):
            for _ in range(10_000):
                connection.sendall(b"x" * 4096)
        assert b'refusals_total{reason="head size"} 1' in node.metrics.text()
        assert serves(port)


def test_a_body_that_does_not_come_is_answered(toy: Path) -> None:
    with node_of(toy, Limits(body_s=0.3)) as (_, port), connect(port) as connection:
        connection.sendall(b"POST /packs/toy.comoe/run HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nCMRQ")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert is_ended(connection)


@pytest.mark.parametrize(
    "said", [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01"]
)
def test_what_is_no_http_is_ended(toy: Path, said: bytes) -> None:
    with node_of(toy, Limits(head_s=1)) as (_, port), connect(port) as connection:
        connection.sendall(said)
        assert is_ended(connection) and serves(port)


def test_a_reader_that_takes_nothing_is_ended(toy: Path) -> None:
    with node_of(toy, Limits(stall_s=0.3, requests=2)) as (node, port), ExitStack() as stack:
        for _ in range(2):
            lazy = stack.enter_context(connect(port))
            lazy.sendall(b"GET /packs/toy.comoe/large.bin HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: node.gate.running == 2)
        until(lambda: node.gate.running == 0)
        assert serves(port)
        assert b'refusals_total{reason="stall"} 2' in node.metrics.text()


def test_a_client_that_goes_away_is_read_for_no_more(toy: Path) -> None:
    with node_of(toy, Limits()) as (node, port):
        connection = connect(port)
        connection.sendall(b"GET /packs/toy.comoe/large.bin HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.recv(1000)
        connection.close()
        until(lambda: node.gate.running == 0)
        assert node.metrics.sent.labels("files")._value.get() < LARGE_BYTES


def test_beyond_the_most_connections_the_one_that_waits_longest_makes_room(toy: Path) -> None:
    with node_of(toy, Limits(connections=10, head_s=600, idle_s=600)) as (_, port), ExitStack() as stack:
        waiting = [stack.enter_context(connect(port)) for _ in range(30)]
        assert serves(port)
        assert all(map(is_ended, waiting[:15]))
        waiting[-1].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert waiting[-1].recv(1000).startswith(b"HTTP/1.1 200 ")


@pytest.fixture
def many_files() -> Iterator[None]:
    """A thousand connections and more in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def half_open(edge: Edge, stack: ExitStack, said: bytes) -> None:
    for _ in range(HALF_OPEN):
        connection = stack.enter_context(edge.connect())
        if said:
            connection.sendall(said)


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize("said", [b"", HALF_A_HEAD], ids=["silent", "half a head"])
def test_a_thousand_half_open_connections_leave_memory_flat_and_others_served(toy: Path, said: bytes) -> None:
    with running(toy) as edge, ExitStack() as stack:
        assert serves(edge.port)
        before = edge.resident_bytes
        half_open(edge, stack, said)
        for _ in range(20):
            assert serves(edge.port)
        assert edge.resident_bytes - before < FLAT_BYTES
        assert edge.process.poll() is None


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01\x02\x00\x01\x00"], ids=["silent", "half a hello"])
def test_so_do_a_thousand_that_never_finish_their_handshake(toy: Path, tmp_path: Path, said: bytes) -> None:
    made = self_signed(tmp_path)
    context = ssl.create_default_context(cafile=str(made.cert))
    with running(toy, "--cert", made.cert, "--key", made.key) as edge, ExitStack() as stack:
        before = edge.resident_bytes
        half_open(edge, stack, said)
        for _ in range(5):
            connection = https(edge.port, context)
            assert exchange(connection, "/health").status == 200
            connection.close()
        assert edge.resident_bytes - before < FLAT_BYTES
        assert edge.process.poll() is None
