"""A pack behind a URL: small files are mirrored, blobs read by ranges when they are asked for, and kept on flash."""

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from blake3 import blake3

from comoe.net.address import Access
from comoe.net.coalesce import MOST_NBYTES, Range, coalesced
from comoe.net.flash import FlashCache
from comoe.net.nodes import EdgeNodes
from comoe.net.origin import Origin, throttle_of
from comoe.store.blobfile import BlobFile, header_bytes, parse_header
from comoe.store.manifest import MANIFEST, MAX_MANIFEST_BYTES, Manifest, read_manifest
from comoe.store.pack import Pack, Pieces, file_hash
from comoe.store.whole import whole
from comoe.types import BlobId, CorruptBlob, HostileFile, PackError, RemoteUnavailable

IN_FLIGHT = 8
"""Ranges that are brought at once."""


class RemotePack(Pack):
    """The pack at `url`, a `Source` of tiers `flash` and the origin's. Several threads may read at once.

    Without a link it opens as it was seen last, and reads what flash has. `nodes` are asked before the origin.
    """

    remote = True

    def __init__(self, url: str, access: Access, source: Path | None = None) -> None:
        self._link, self.throttle = access.link, throttle_of(access.link)
        self._origin = Origin(url, access, throttle=self.throttle)
        self.nodes: EdgeNodes | None = None
        self._brought: dict[str, str] = {}
        self._cache = FlashCache(access.cache, access.cache_bytes)
        with self._cache.mirroring(mirror_name(self._origin.url)) as folder:
            self._mirror(folder, source)
            super().__init__(folder, source=source)

    @property
    def came(self) -> int:
        return self._origin.came

    def _mirror(self, folder: Path, source: Path | None) -> None:
        """All files but the blobs'. Raises PackError where the pack is of use on the machine that packed it only."""
        origin = self._origin
        manifest = _newest(origin, folder)
        if manifest.source is not None and source is None:
            raise PackError(
                f"{origin.url} refers to a checkpoint on the machine that packed it: publish a pack made with "
                "--self-contained, or give the checkpoint with --source."
            )
        for name, digest in manifest.files.items():
            fetch_file(origin, folder / name, digest)

    def check_files(self) -> None:
        """Nothing: they were checked as they came."""

    def read(self, blob: BlobId, into: memoryview) -> str:
        if self._part(blob).file is None:
            return super().read(blob, into)
        pieces, nbytes = self.pieces(blob), self.nbytes(blob)
        known = blob in self._verified
        if self._cache.read(pieces.digest, into, nbytes):
            if known or blake3(into[:nbytes]).hexdigest() == pieces.digest:
                self._verified.add(blob)
                return self._brought.pop(pieces.digest, "flash")
            self._cache.drop(pieces.digest)
        tier = self._fetch(blob, pieces, into[:nbytes])
        self._cache.put(pieces.digest, into[:nbytes])
        return tier

    def tier(self, blob: BlobId) -> str:
        if self._part(blob).file is None or self._cache.has(self.pieces(blob).digest):
            return "flash"
        return self._origin.tier if self.nodes is None or self.nodes.serving is None else "edge"

    def bring(self, blobs: Sequence[BlobId]) -> None:
        """Have blobs on flash before they are read, if they fit: those that lie side by side come by one range.

        Raises RemoteUnavailable, PackError, UsageError.
        """
        wanted: dict[str, set[Range]] = defaultdict(set)
        for blob in blobs:
            if self.tier(blob) != "flash":
                pieces = self.pieces(blob)
                (extent,) = pieces.extents
                wanted[Path(extent.file).name].add(Range(extent.offset, self.nbytes(blob), pieces.digest))
        runs = [(name, run) for name, ranges in wanted.items() for run in coalesced(ranges)]
        if self._cache.holds(sum(one.nbytes for _, run in runs for one in run)):
            longest = max((run[-1].stop - run[0].start for _, run in runs), default=1)
            pool = ThreadPoolExecutor(max(1, min(IN_FLIGHT, IN_FLIGHT * MOST_NBYTES // longest)), "comoe-bring")
            try:
                for bringing in [pool.submit(self._bring, name, run) for name, run in runs]:
                    bringing.result()
            except RemoteUnavailable:
                pool.shutdown(cancel_futures=True)  # what is still under way may be asked for again
                raise
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _bring(self, name: str, run: Sequence[Range]) -> None:
        """Keep of one range what is right; what is not will be read as ever."""
        start = run[0].start
        data = memoryview(bytearray(run[-1].stop - start))
        tier = self._fill(name, start, data)
        for one in run:
            part = data[one.start - start : one.stop - start]
            if blake3(part).hexdigest() == one.digest:
                self._brought[one.digest] = tier
                self._cache.put(one.digest, part)

    def _fill(self, name: str, start: int, into: memoryview) -> str:
        """Fill `into` from the edge node that serves, what that does not send from the origin; the last byte's tier."""
        if self.nodes is None:
            self._origin.fetch(name, start, into)
            return self._origin.tier
        at, came, part = 0, 0, into
        while at < len(into):
            with self.nodes.sharing(lambda: self.link_now()[0]) as most:
                part = into[at : len(into) if most is None else at + most]
                came = self.nodes.fetch(name, start + at, part)
            if came < len(part):
                with self.nodes.searching():
                    self._origin.fetch(name, start + at + came, part[came:])
            at += len(part)
        return "edge" if came == len(part) else self._origin.tier

    def _fetch(self, blob: BlobId, pieces: Pieces, into: memoryview) -> str:
        """Bring a blob, from the origin alone where what came was wrong; its tier.

        Raises CorruptBlob where the origin's are other bytes than were packed.
        """
        (extent,) = pieces.extents
        name = Path(extent.file).name
        tier = self._fill(name, extent.offset, into)
        if blake3(into).hexdigest() == pieces.digest:
            return tier
        self._origin.fetch(name, extent.offset, into)
        if blake3(into).hexdigest() == pieces.digest:
            return self._origin.tier
        raise CorruptBlob(f"{self._where(blob)} came with other bytes than were packed; nothing was done with them.")

    def reading(self) -> tuple[float, float]:
        """Bytes per second of the link and seconds of its round trip: as said, or as measured now."""
        if self._link is None:
            self._link = self._origin.measured(self.manifest)
        return self._link

    def link_now(self) -> tuple[float, float]:
        """Bytes per second that may be counted on from who serves now, and seconds of its round trip."""
        if self.nodes is not None and (link := self.nodes.link) is not None:
            return link.rate_bps, link.rtt_s or 0.0
        rate_bps, trip_s = self.reading()
        return self._origin.rate_bps or rate_bps, trip_s

    def close(self) -> None:
        super().close()
        self._cache.close()

    def read_header(self, name: str) -> BlobFile:
        """The header of a blob file, from the mirror where it is there already."""
        path, kept = self.folder / name, self.folder / f"{name}.header"
        if kept.exists():
            with suppress(HostileFile):
                data = kept.read_bytes()
                return parse_header(path, data[8:], int.from_bytes(data[:8], "little"))
        head, size = self._origin.head(name)
        length = 8 + header_bytes(path, head, size)
        if length > len(head):
            head, _ = self._origin.head(name, length)
        with whole(kept) as file:
            file.write(size.to_bytes(8, "little") + head[:length])
        return parse_header(path, head[:length], size)

    def head(self, name: str) -> bytes:
        return (self.folder / f"{name}.header").read_bytes()[8:]

    def _where(self, blob: BlobId) -> str:
        return f"{self._origin.url}: layer {blob.layer}, part {blob.part!r}, row {blob.row}"


def describe(url: str, access: Access) -> Path:
    """The mirror of the pack at `url`, with its manifest and small files, as they are or as they were seen last."""
    origin = Origin(url, access, throttle=throttle_of(access.link))
    cache = FlashCache(access.cache, access.cache_bytes)
    try:
        with cache.mirroring(mirror_name(origin.url)) as folder:
            for name, digest in _newest(origin, folder).files.items():
                if not name.endswith(".safetensors"):
                    fetch_file(origin, folder / name, digest)
            return folder
    finally:
        cache.close()


def _newest(origin: Origin, folder: Path) -> Manifest:
    """The pack's manifest, now in its mirror; without a link the one that is there."""
    try:
        data = origin.read(MANIFEST, MAX_MANIFEST_BYTES)
    except RemoteUnavailable:
        if not (folder / MANIFEST).exists():
            raise
    else:
        _check_then_place(folder, data)
    return read_manifest(folder)


def mirror_name(url: str) -> str:
    """Of a URL: readable, and different for different ones."""
    parts = urlsplit(url)
    readable = "".join(c if c.isalnum() or c in "-_" else "-" for c in f"{parts.netloc}{parts.path}")
    return f"{readable[:80]}-{blake3(url.encode()).hexdigest()[:12]}"


def fetch_file(origin: Origin, path: Path, digest: str) -> None:
    """The file of this hash under `path`: as it is there, or downloaded. Raises CorruptBlob."""
    if path.is_file() and file_hash(path) == digest:
        return
    came = path.with_name(f"{path.name}.{digest[:16]}")
    origin.download(path.name, came)
    if file_hash(came) != digest:
        came.unlink()
        raise CorruptBlob(f"{origin.url}/{path.name} came with other bytes than were packed: publish the pack again.")
    came.replace(path)


def _check_then_place(folder: Path, data: bytes) -> None:
    """A new manifest takes the old one's place only if it can be read; headers of other files go."""
    if (folder / MANIFEST).is_file() and (folder / MANIFEST).read_bytes() == data:
        return
    trial = folder / "new"
    trial.mkdir(exist_ok=True)
    (trial / MANIFEST).write_bytes(data)
    manifest: Manifest = read_manifest(trial)
    (trial / MANIFEST).replace(folder / MANIFEST)
    trial.rmdir()
    files = {part.file for layer in manifest.layers for part in layer.parts.values()}
    for header in folder.glob("*.header"):
        if header.name.removesuffix(".header") not in files:
            header.unlink()
