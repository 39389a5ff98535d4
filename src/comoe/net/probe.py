"""A light question to a node over HTTP: is it there, and how long is the round trip. One connection, kept open."""

import ssl
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from time import perf_counter
from urllib.parse import urlsplit

from comoe.net.health import MOST_NBYTES, PATH, came_in, folder_in, unknown_token
from comoe.store.manifest import MANIFEST
from comoe.types import RemoteUnavailable, UsageError


class Probe:
    """Asks the node at `url`, `http(s)://host[:port]`, for its health. UsageError for anything else.

    `identity` is the SHA-256 of the manifest of a pack that it must serve, None for any; `folder` is then where. As it
    said last, `came` bytes did from where its packs are published.
    `context` says which certificates of https are trusted; None: those that the system trusts.
    `token` must be the node's, if it has one.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float,
        identity: str | None = None,
        context: ssl.SSLContext | None = None,
        token: str | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url!r} is no edge node: name it as http://host:port or https://host:port.")
        self.url, self._timeout_s, self._identity, self._context = url, timeout_s, identity, context
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.folder, self.came = "", 0
        self._doubted = False
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._connection: HTTPConnection | None = None

    def ask(self) -> float:
        """The round trip in seconds, of a connection that was open already.

        A node that drains answers 503 and counts as gone; one that was not asked before is asked twice, and whether it
        knows the token. Raises RemoteUnavailable; UsageError where it does not.
        """
        if self._doubted:
            self.close()
            self._doubted = False
        try:
            if self._connection is None:
                self._connection = self._connect()
                self._asked()
                self._admitted()
            return self._asked()
        except (RemoteUnavailable, UsageError):
            self.close()
            raise
        except (OSError, HTTPException, ValueError) as error:
            self.close()
            raise RemoteUnavailable(f"{self.url} does not answer: is the edge node running?") from error

    def doubt(self) -> None:
        """The token was refused elsewhere: ask again, soon, whether the node knows it. Any thread calls."""
        self._doubted = True

    def close(self) -> None:
        """Drop the connection; the next question makes one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> HTTPConnection:
        if self._secure:
            return HTTPSConnection(self._host, self._port, timeout=self._timeout_s, context=self._context)
        return HTTPConnection(self._host, self._port, timeout=self._timeout_s)

    def _admitted(self) -> None:
        """Health is told to everybody, a pack to those who know the token."""
        assert self._connection is not None
        if self.folder:
            self._connection.request("HEAD", f"{self.folder}/{MANIFEST}", headers=self._headers)
            answer = self._connection.getresponse()
            answer.read()
            if answer.status == 401:
                raise unknown_token(self.url)

    def _asked(self) -> float:
        assert self._connection is not None
        start_s = perf_counter()
        self._connection.request("GET", PATH)
        answer = self._connection.getresponse()
        took_s = perf_counter() - start_s
        data = answer.read(MOST_NBYTES)
        if answer.status != 200 or not answer.isclosed():
            raise HTTPException(f"status {answer.status}, or an answer without an end")
        if self._identity is not None:
            self.folder = folder_in(data, self._identity, self.url)
        self.came = came_in(data)
        return took_s
