"""The client of remote runs: experts that an edge node computes, over one connection that stays open. No torch.

Files of packs come another way; when to run remotely is `plan.missrule`'s.
"""

import http.client
import json
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

from comoe.net.breaker import Throttle
from comoe.net.health import MOST_NBYTES, PATH, folder_in, unknown_token
from comoe.net.wire import (
    IDENTITY_BYTES,
    MAX_BYTES,
    RunAnswer,
    RunRequest,
    decode_answer,
    encode_request,
)
from comoe.store.manifest import MANIFEST
from comoe.types import HostileMessage, RemoteUnavailable, UsageError

CONNECT_S = 5.0
HotExpert = tuple[int, int, str]
"""Layer, expert, form."""

STALE = (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError)
"""What a connection that its node closed meanwhile says when it is used again."""


@dataclass(frozen=True, slots=True)
class Node:
    """An edge node as a device knows it: where it is, its token, and certificates to trust beside the system's, PEM."""

    url: str
    token: str | None = None
    ca: bytes | None = None
    timeout_s: float = 2.0

    def __post_init__(self) -> None:
        if not _is_node(urlsplit(self.url)):
            raise UsageError(f"{self.url!r} is no edge node: write for example http://192.168.1.2:8600.")
        object.__setattr__(self, "url", self.url.rstrip("/"))

    def trust(self) -> ssl.SSLContext:
        """Which certificates of https are trusted."""
        context = ssl.create_default_context()
        if self.ca is not None:
            context.load_verify_locations(cadata=self.ca.decode("ascii"))
        return context


class Timed(NamedTuple):
    """An answer, the seconds of its exchange, and the bytes of both messages."""

    answer: RunAnswer
    seconds: float
    nbytes: int


class RemoteRun:
    """Experts of the pack whose manifest has the SHA-256 `manifest_hash`, run by a node. For one thread at a time.

    Every call raises RemoteUnavailable where the node does not answer, is full or stops, or what it says is no answer;
    UsageError where it does not know the token. The connection opens with the first call, and again after a failure.
    No more comes than `throttle` lets through.
    """

    def __init__(
        self, node: Node, manifest_hash: str, clock: Callable[[], float], throttle: Throttle | None = None
    ) -> None:
        self._node, self._hash, self._clock, self._throttle = node, manifest_hash, clock, throttle
        self._parts = urlsplit(node.url)
        self._connection: http.client.HTTPConnection | None = None
        self._found = ""

    @property
    def url(self) -> str:
        return self._node.url

    @property
    def identity(self) -> bytes:
        """What requests name the pack by."""
        return bytes.fromhex(self._hash)[:IDENTITY_BYTES]

    def run(self, request: RunRequest) -> Timed:
        """The outputs of a request's uses, or of its rows."""
        path, body = f"{self._folder()}/run", encode_request(request)
        start_s = self._clock()
        data = self._exchange("POST", path, body, 2 * MAX_BYTES)
        seconds = self._clock() - start_s
        try:
            answer = decode_answer(data)
        except HostileMessage as error:
            raise RemoteUnavailable(f"{self._node.url} gave no answer of experts: {error}") from error
        if answer.y.shape != request.shape or answer.read > len(request.uses):
            raise RemoteUnavailable(f"{self._node.url} answered something else than was asked.")
        return Timed(answer, seconds, len(body) + len(data))

    def announce(self, experts: Sequence[HotExpert]) -> None:
        """Tell the node what will be wanted soon, the likeliest first."""
        self._exchange("POST", f"{self._folder()}/hot", json.dumps({"experts": experts}).encode(), MAX_BYTES)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _folder(self) -> str:
        """Where the node has this pack. Raises RemoteUnavailable where it has another."""
        if not self._found:
            health = self._exchange("GET", PATH, None, MOST_NBYTES)
            self._found = folder_in(health, self._hash, self._node.url)
        return self._found

    def _exchange(self, method: str, path: str, body: bytes | None, most: int) -> bytes:
        """One request; once more on a new connection where the node had closed the old one."""
        reused = self._connection is not None
        try:
            try:
                return self._once(method, path, body, most)
            except STALE:
                self.close()
                if not reused:
                    raise
                return self._once(method, path, body, most)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise RemoteUnavailable(f"{self._node.url} does not answer: {_cause(error)}.") from error

    def _once(self, method: str, path: str, body: bytes | None, most: int) -> bytes:
        connection = self._connection = self._connection or self._connect()
        headers = {"Authorization": f"Bearer {self._node.token}"} if self._node.token else {}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        data = response.read(most + 1)
        if self._throttle is not None:
            self._throttle.take(len(data))
        if response.status in (200, 202) and len(data) <= most:
            return data
        if not response.isclosed():  # more than any answer
            self.close()
        if response.status in (401, 403):
            raise unknown_token(self._node.url)
        raise RemoteUnavailable(f"{self._node.url} refuses ({response.status}): {_sentence(data)}")

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=CONNECT_S, context=self._node.trust()
            )
        else:
            connection = http.client.HTTPConnection(host, port, timeout=CONNECT_S)
        connection.connect()
        connection.sock.settimeout(self._node.timeout_s)
        return connection


def manifest_hash(folder: Path) -> str:
    """What an edge node tells packs apart by."""
    return sha256((folder / MANIFEST).read_bytes()).hexdigest()


def _is_node(parts: SplitResult) -> bool:
    try:
        whole = parts.path.strip("/") == "" and not parts.query
        return whole and parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False


def _cause(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused, {error.verify_message}"
    return str(error) or type(error).__name__


def _sentence(data: bytes) -> str:
    """What a node says of a refusal, in one line."""
    try:
        return str(json.loads(data)["error"])[:200]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "no reason given."
