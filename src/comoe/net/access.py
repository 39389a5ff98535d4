"""Where a pack is, a folder or an address, and how addresses are reached. Their client is imported when one is."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from comoe.store.manifest import Manifest
from comoe.store.pack import Pack

if TYPE_CHECKING:
    from comoe.net.flash import FlashCache
    from comoe.net.origin import Origin

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

    def origin(self, url: str) -> "Origin":
        """What is at `url`."""
        from comoe.net.origin import Origin

        return Origin(url, token=self.token, ca=self.ca, bps=self.link[0] if self.link else None)

    def reading(self, url: str, manifest: Manifest) -> tuple[float, float]:
        """Bytes per second and seconds of round trip of the link to the pack at `url`: as said, or measured now."""
        files = (part.file for layer in manifest.layers for part in layer.parts.values() if part.file)
        return self.link or self.origin(url).measured(next(files))

    def flash(self) -> "FlashCache":
        """The cache on flash."""
        from comoe.net.flash import FlashCache, default_folder

        return FlashCache(self.cache or default_folder(), self.cache_bytes)


def described(url: str, access: Access) -> Path:
    """A folder with the manifest and the small files of the pack at `url`: what planning and a tokenizer need.

    Without a link it is as it was seen last. Raises RemoteUnavailable, PackError, UsageError.
    """
    from comoe.net.remote import describe

    cache = access.flash()
    try:
        return describe(access.origin(url), cache)
    finally:
        cache.close()


def open_pack(where: str | Path, source: Path | None = None, access: Access | None = None) -> Pack:
    """The pack in a folder or behind a URL. Raises PackError, RemoteUnavailable, UsageError."""
    if not is_url(str(where)):
        return Pack(Path(where), source=source)
    from comoe.net.remote import RemotePack

    access = access or Access()
    return RemotePack(str(where), access, source)
