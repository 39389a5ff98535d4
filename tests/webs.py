"""A web server of a folder for tests: ranges, a token, and faults that it is told to make."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


class Web(ThreadingHTTPServer):
    """Serves `folder`; `asked` has every (path, range).

    It answers so often with half a body (`cut`), with 503 (`fail`), with 429 (`busy`); after so many requests
    (`leave_after`) not at all.
    """

    daemon_threads = True

    def __init__(self, folder: Path, token: str | None = None) -> None:
        self.folder, self.token = folder, token
        self.asked: list[tuple[str, str | None]] = []
        self.cut = self.fail = self.busy = 0
        self.sent = 0
        self.leave_after: int | None = None
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Web
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        web = self.server
        web.asked.append((self.path, self.headers.get("Range")))
        if web.leave_after is not None and len(web.asked) > web.leave_after:
            self.close_connection = True
            return None
        if web.token and self.path != "/health" and self.headers.get("Authorization") != f"Bearer {web.token}":
            return self._status(401)
        if web.fail:
            web.fail -= 1
            return self._status(503)
        if web.busy:
            web.busy -= 1
            return self._status(429)
        path = web.folder / self.path.lstrip("/")
        if not path.is_file():
            return self._status(404)
        data = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end = 0, len(data)
        if found:
            start, end = int(found.group(1)), min(int(found.group(2) or len(data) - 1) + 1, len(data))
        if start >= len(data) > 0:
            return self._status(416)
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", f'"{len(data)}"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        if found:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.end_headers()
        if not body:
            return None
        if web.cut and end - start > 1:
            web.cut -= 1
            end = (start + end) // 2
            self.close_connection = True
        web.sent += end - start
        self.wfile.write(data[start:end])
        return None

    def _status(self, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Nothing: tests look at `asked`."""


@contextmanager
def serving(folder: Path, token: str | None = None) -> Iterator[Web]:
    """A server of `folder` while the block runs."""
    web = Web(folder, token)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    try:
        yield web
    finally:
        web.shutdown()
        web.server_close()
