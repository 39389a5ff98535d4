"""Addresses of packs, and how they are reached."""

from pathlib import Path
from typing import NamedTuple

SCHEMES = ("http", "https", "s3")


def is_url(text: str) -> bool:
    """Whether a pack is named by a URL and not by a folder."""
    return "://" in text and text.partition("://")[0] in SCHEMES


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
