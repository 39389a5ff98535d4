"""Addresses of packs, and how they are reached."""

from pathlib import Path
from typing import NamedTuple

from comoe.types import UsageError

SCHEMES = ("http", "https", "s3")


def is_url(text: str) -> bool:
    """Whether a pack is named by a URL and not by a folder."""
    return "://" in text and text.partition("://")[0] in SCHEMES


def host_port(listen: str) -> tuple[str, int]:
    """The two of `HOST:PORT`, where something is to listen: at port 0 for any free one. Raises UsageError."""
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{listen!r} is no place to listen: write HOST:PORT, for example 127.0.0.1:8600.")
    return host.strip("[]") or "0.0.0.0", int(port)


class Access(NamedTuple):
    """How packs behind URLs are reached: the folder of the cache on flash, and its bytes; a bearer token; certificates
    to trust, in PEM; what the link is taken to carry (bytes per second, seconds of round trip), no more is asked of it.

    None: the usual folder, a share of what is free, no token, the system's certificates, what is measured.
    """

    cache: Path | None = None
    cache_bytes: int | None = None
    token: str | None = None
    ca: bytes | None = None
    link: tuple[float, float] | None = None
