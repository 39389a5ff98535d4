"""A relay on real sockets: bytes come as they were sent, a round trip later, and ends are passed on."""

import asyncio
import io
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from time import perf_counter

from webs import free_port

from comoe.testbed.relay import Way, follow, relay

RTT_S = 0.1


@contextmanager
def echo() -> Iterator[int]:
    """A server that sends back what it gets, until it gets no more."""
    server = socket.create_server(("127.0.0.1", 0))

    def answer(one: socket.socket) -> None:
        with one:
            while piece := one.recv(65536):
                one.sendall(piece)

    def accept() -> None:
        while True:
            try:
                one, _ = server.accept()
            except OSError:
                return
            Thread(target=answer, args=(one,), daemon=True).start()

    Thread(target=accept, daemon=True).start()
    try:
        yield server.getsockname()[1]
    finally:
        server.close()


@contextmanager
def relayed(way: Way) -> Iterator[int]:
    """The port of a relay in a thread."""
    port, ready, loop = free_port(), Event(), asyncio.new_event_loop()

    async def serve() -> None:
        async with await relay(port, way) as server:
            ready.set()
            await server.serve_forever()

    def run() -> None:
        task = loop.create_task(serve())
        tasks.append(task)
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    tasks: list[asyncio.Task[None]] = []
    thread = Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(tasks[0].cancel)
        thread.join(30)


def exchange(port: int, data: bytes) -> tuple[bytes, float]:
    """What comes back of `data`, and how long the first byte took."""
    with socket.create_connection(("127.0.0.1", port), 30) as one:
        one.settimeout(30)
        start_s = perf_counter()

        def send() -> None:
            with suppress(OSError):  # where the other side has gone
                one.sendall(data)
                one.shutdown(socket.SHUT_WR)

        sender = Thread(target=send)
        sender.start()
        found, first_s = b"", None
        while piece := one.recv(65536):
            first_s = first_s or perf_counter() - start_s
            found += piece
        sender.join()
        return found, first_s or 0.0


def test_bytes_come_as_they_were_sent_a_round_trip_later() -> None:
    data = bytes(range(256)) * 4096
    with echo() as port, relayed(Way("127.0.0.1", port, RTT_S, 0.0)) as through:
        found, first_s = exchange(through, data)
    assert found == data and first_s >= RTT_S


def test_losses_delay_bytes_and_lose_none() -> None:
    data = bytes(range(256)) * 1024
    with echo() as port, relayed(Way("127.0.0.1", port, 0.02, 0.2)) as through:
        assert exchange(through, data)[0] == data


def test_a_server_that_is_not_there_ends_the_connection() -> None:
    with relayed(Way("127.0.0.1", free_port(), 0.01, 0.0)) as through:
        assert exchange(through, b"x")[0] == b""


def test_a_way_changes_while_connections_are_open() -> None:
    with echo() as port:
        way = Way("127.0.0.1", port, 0.0, 0.0)
        with relayed(way) as through, socket.create_connection(("127.0.0.1", through), 30) as one:

            def takes_s() -> float:
                start_s = perf_counter()
                one.sendall(b"x")
                assert one.recv(1) == b"x"
                return perf_counter() - start_s

            takes_s()
            follow(way, io.StringIO("200 0\n"))
            assert takes_s() >= 0.2
            follow(way, io.StringIO("200 0\n0 0\n"))
            assert takes_s() < 0.2
            one.shutdown(socket.SHUT_WR)
            assert one.recv(1) == b""
