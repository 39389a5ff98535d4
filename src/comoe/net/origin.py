"""The files of a pack behind a URL: any static web server, bucket or edge node, read by ranges.

A read that breaks goes on where it broke; a node that does not answer is left alone for a while.
"""

import os
import random
from collections.abc import Generator
from contextlib import closing
from datetime import timedelta
from math import inf
from pathlib import Path
from threading import Lock
from time import monotonic, sleep
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import obstore
from obstore import exceptions as errors
from obstore.store import from_url

from comoe.net.address import Access, is_url
from comoe.net.breaker import FAILURES, Breaker, Throttle
from comoe.net.links import Link
from comoe.net.meter import Meter
from comoe.store.manifest import Manifest
from comoe.types import PackError, RemoteUnavailable, UsageError

BACKOFF_S = 0.2
"""Before a request that is tried again a random wait of up to so long, twice as long each time."""

BUSY = "429 Too Many Requests"
"""What a node says that is busy, which is no failure of its."""

CHUNK_BYTES, LEAST_CHUNK = 16 * 1024, 1024
"""A range is taken in pieces of so many bytes at least, an eighth of it: what comes after the first tells the rate."""

HEAD_BYTES = 32 * 1024
MEASURED_BYTES, MEASURED_S = 256 * 1024, 0.5
"""A link is measured by so many bytes, or by as many as come in so long: a slow one has better to do."""


class Leash(NamedTuple):
    """How long a node may take to be reached, to send a byte more (None: any time) and to answer a request in full; and
    how many requests in a row may bring nothing, or be refused since it is busy."""

    connect_s: float = 3.0
    silent_s: float | None = None
    whole_s: float = 20.0
    attempts: int = FAILURES
    busy_attempts: int = 8


ONLY = Leash()
"""Of a node beside which there is no other."""


class Origin:
    """The folder of files at `url`, from which `came` bytes did so far. Several threads may read at once.

    No more comes than `throttle` lets through; `leash` is for nodes that may not answer.
    """

    def __init__(self, url: str, access: Access, leash: Leash = ONLY, throttle: Throttle | None = None) -> None:
        if not is_url(url) or not urlsplit(url).netloc:
            raise UsageError(
                f"{url!r} is no address of a pack: give one such as https://host/pack or s3://bucket/pack."
            )
        self.url, self.tier = url.rstrip("/"), "origin"
        self._store, self._leash = _store(self.url, access, leash), leash
        self._breaker, self._why = Breaker(monotonic), ""
        self._meter, self._lock = Meter(Link()), Lock()
        self.came = 0
        self._throttle = throttle

    @property
    def rate_bps(self) -> float | None:
        """Bytes per second that may be counted on, by what was fetched; None before anything was."""
        with self._lock:
            link = self._meter.link
            self._meter.flush(monotonic())
            return None if link.rated_s == -inf else link.rate_bps

    def fetch(self, name: str, start: int, into: memoryview) -> None:
        """Fill `into` from byte `start` of the file `name`. Raises RemoteUnavailable, PackError, UsageError."""
        at, failed = 0, True
        with self._lock:
            request = self._meter.begin(monotonic())
        try:
            for chunk in self.stream(name, start, start + len(into)):
                into[at : at + len(chunk)] = chunk
                at += len(chunk)
                with self._lock:
                    self._meter.came(request, len(chunk), monotonic())
            failed = False
        finally:
            with self._lock:
                self._meter.end(request, monotonic(), failed=failed)

    def read(self, name: str, most: int) -> bytes:
        """A whole file of at most so many bytes. PackError where it is not there or larger."""
        head, size = self.head(name, most)
        if size > most:
            raise PackError(f"{self.url}/{name} has {size} bytes, more than such a file may have.")
        return head

    def head(self, name: str, nbytes: int = HEAD_BYTES) -> tuple[bytes, int]:
        """The first bytes of a file, and how many it has."""
        found, size = bytearray(), [0]
        for chunk in self.stream(name, 0, nbytes, size):
            found += chunk
        return bytes(found), size[0]

    def measured(self, manifest: Manifest) -> tuple[float, float]:
        """Bytes per second and seconds of a round trip, by a small and a larger range of one of the pack's files."""
        name = next(part.file for layer in manifest.layers for part in layer.parts.values() if part.file)
        self.head(name, 1)  # connects
        start_s = monotonic()
        self.head(name, 1)
        trip_s = monotonic() - start_s
        start_s, came = monotonic(), 0
        with closing(self.stream(name, 0, MEASURED_BYTES)) as chunks:
            for chunk in chunks:
                came += len(chunk)
                if monotonic() - start_s > MEASURED_S:
                    break
        took_s = monotonic() - start_s
        return came / max(took_s - trip_s, took_s / 4, 1e-4), trip_s

    def download(self, name: str, to: Path) -> None:
        """A whole file, to a path that appears when it is complete. What came before a kill is not asked for again."""
        part = to.with_name(f"{to.name}.part")
        _, size = self.head(name, 1)
        with part.open("ab") as file:
            if file.tell() > size:
                file.truncate(0)
            for chunk in self.stream(name, file.tell(), size):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        part.replace(to)

    def stream(self, name: str, start: int, end: int | None, size: list[int] | None = None) -> Generator[memoryview]:
        """The bytes from `start` to `end`, or to the file's end where it comes first; `size` gets the file's size.

        Raises RemoteUnavailable, PackError, UsageError.
        """
        at, attempts = start, 0
        while end is None or at < end:
            self._refuse_while_open()
            begun = at
            try:
                result = obstore.get(self._store, name, options={"range": {"offset": at} if end is None else (at, end)})
                whole = result.meta["size"]
                end = whole if end is None else min(end, whole)
                if size is not None:
                    size[0] = whole
                for chunk in result.stream(min_chunk_size=min(CHUNK_BYTES, max(LEAST_CHUNK, (end - at) // 8))):
                    view = memoryview(chunk).cast("B")
                    at, attempts = at + len(view), 0
                    self.came += len(view)
                    self._breaker.succeeded()
                    if self._throttle is not None:
                        self._throttle.take(len(view))
                    yield view
            except (errors.BaseError, OSError) as error:
                busy = self._judge(name, error, brought=at > begun)
                attempts += 1
                if attempts == (self._leash.busy_attempts if busy else self._leash.attempts):
                    raise RemoteUnavailable(f"{self.url} does not answer: {_reason(error)}.") from error
                sleep(random.uniform(0, BACKOFF_S * 2**attempts))

    def _refuse_while_open(self) -> None:
        if not self._breaker.admits():
            raise RemoteUnavailable(f"{self.url} did not answer ({self._why}) and is not asked again yet.")

    def _judge(self, name: str, error: Exception, *, brought: bool) -> bool:
        """Raise what asking again would not mend; note what it might, unless the request has `brought` bytes: a slow
        link lets many end so at once. Whether the node is but busy."""
        if isinstance(error, (FileNotFoundError, errors.NotFoundError)):
            self._breaker.succeeded()
            raise PackError(f"{self.url} has no file {name}: check the address, or publish the pack again.") from error
        if isinstance(error, (errors.PermissionDeniedError, errors.UnauthenticatedError)):
            self._breaker.succeeded()
            raise UsageError(f"{self.url} refuses access: give its token by COMOE_TOKEN or --token-file.") from error
        if BUSY in str(error):
            self._breaker.succeeded()
            return True
        if not brought:
            self._why = _reason(error)
            self._breaker.failed()
        return False


def throttle_of(link: tuple[float, float] | None) -> Throttle | None:
    """What holds all that comes over a link to its bytes per second; None where nothing is said of it."""
    return Throttle(link[0], monotonic, sleep) if link is not None else None


def _store(url: str, access: Access, leash: Leash) -> Any:
    """obstore's client of the folder at `url`; for a bucket keys and endpoint come from AWS_* as for its own tools."""
    headers = {"Authorization": f"Bearer {access.token}"} if access.token else {}
    whole = timedelta(seconds=leash.whole_s)
    client: dict[str, Any] = {"connect_timeout": timedelta(seconds=leash.connect_s), "timeout": whole}
    if leash.silent_s is not None:
        client["read_timeout"] = timedelta(seconds=leash.silent_s)
    client |= {"allow_http": True, "default_headers": headers, "user_agent": "comoe"}
    if access.ca is not None:
        client["root_certificate"] = access.ca
    retries: Any = {"max_retries": 0, "retry_timeout": whole}  # `Origin` tries again itself
    try:
        return from_url(url, client_options=client, retry_config=retries)  # type: ignore[call-overload]
    except (errors.BaseError, ValueError) as error:
        raise UsageError(f"{url!r} cannot be used: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    """The first line of what a client says, in short."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(".")
