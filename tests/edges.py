"""`comoe edge` as a process of its own, and how tests talk to it: real sockets, nothing between."""

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any

SRC = Path(__file__).resolve().parents[1] / "src"
START_S = 60
STOP_S = 60


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: status, headers by their names in lower case, and the body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    @property
    def sentence(self) -> str:
        """Of a refusal."""
        found: str = self.document["error"]
        return found


@dataclass(frozen=True, slots=True)
class Edge:
    """A node that runs."""

    process: "subprocess.Popen[str]"
    url: str
    port: int

    def ask(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Answer:
        """One request on a connection of its own; `if_none_match` is the header if-none-match."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            return exchange(connection, path, method, body, **headers)
        finally:
            connection.close()

    def file(self, pack: str, name: str, **headers: str) -> Answer:
        return self.ask(f"/packs/{pack}/{name}", **headers)

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric now; 0 where it was not counted yet."""
        wanted = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        series = re.escape(f"{name}{{{wanted}}}" if wanted else name)
        found = re.search(rf"^{series} (\S+)$", self.ask("/metrics").body.decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    @property
    def resident_bytes(self) -> int:
        """Memory of the process now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) * 1024

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def end(self) -> tuple[int, str]:
        """Exit code and what it said after it was ready, once it has ended."""
        _, said = self.process.communicate(timeout=STOP_S)
        return self.process.returncode, said


def exchange(
    connection: HTTPConnection, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    response: HTTPResponse = connection.getresponse()
    found = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, found, response.read())


@contextmanager
def running(*words: object) -> Iterator[Edge]:
    """`comoe edge WORDS...` on a free port of this machine; killed at the end if it still runs."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("COMOE_")} | {"PYTHONPATH": str(SRC)}
    command = [sys.executable, "-m", "comoe", "edge", *map(str, words), "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"Serving .* on (https?://127\.0\.0\.1:(\d+))$", line.strip())
        assert found, line + process.stderr.read()
        yield Edge(process, found[1], int(found[2]))
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=STOP_S)


def https(port: int, context: ssl.SSLContext) -> HTTPSConnection:
    return HTTPSConnection("127.0.0.1", port, timeout=30, context=context)


def until(true: Any, seconds: float = START_S) -> None:
    """Wait until `true()` is."""
    end_s = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end_s, "it did not come about"
        time.sleep(0.02)
