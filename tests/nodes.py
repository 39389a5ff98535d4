"""Small HTTP servers that stand for edge nodes, in threads: they answer, go silent, drain, die and come back."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR, socket
from threading import Event, Thread
from time import monotonic, sleep

TIMEOUT_S = 30.0


class Node:
    """A node on a free port of this machine; `status` is what it answers, `answering` cleared makes it silent."""

    def __init__(self, port: int = 0) -> None:
        self.status, self.came, self.answering = 200, 0, Event()
        self.answering.set()
        self.connections: set[socket] = set()
        node = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                node.connections.add(self.request)
                super().setup()

            def do_GET(self) -> None:
                node.answering.wait(TIMEOUT_S)
                with suppress(OSError):  # where nobody waits any more
                    self.send_response(node.status)
                    body = json.dumps({"came": node.came}).encode()
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *words: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Die, with all connections."""
        self._server.shutdown()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(SHUT_RDWR)
        self.answering.set()
        self._server.server_close()


@contextmanager
def nodes(number: int) -> Iterator[list[Node]]:
    """So many nodes, closed afterwards."""
    found = [Node() for _ in range(number)]
    try:
        yield found
    finally:
        for node in found:
            node.close()


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether something comes to hold in generous time."""
    until_s = monotonic() + TIMEOUT_S
    while not holds():
        if monotonic() > until_s:
            return False
        sleep(0.01)
    return True
