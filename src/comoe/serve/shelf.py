"""What an edge node serves: packs by name, their files, and the bytes of both.

Only files that a pack's manifest names are there, so no path leads anywhere else. Blobs come through one cache, which
bounds their memory and checks their hashes; other files are read from flash.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import perf_counter

from comoe.memory.arena import held_size
from comoe.memory.cache import BlobCache
from comoe.memory.policy import LFU
from comoe.serve.joined import Joined
from comoe.serve.metrics import Metrics
from comoe.serve.ranges import Span
from comoe.store.blobfile import BlobFile
from comoe.store.manifest import MANIFEST
from comoe.store.pack import Pack
from comoe.types import BlobId, CorruptBlob

IO_THREADS = 4
"""Reads in flight: of an origin's, round trips overlap."""


@dataclass(frozen=True, slots=True)
class ServedFile:
    """A file of a pack: a blob file where it has a `header`, and then the blobs of `part` of `layer`.

    `etag` is the hash that the pack knows it by: the name's for blob files, SHA-256 for the manifest, else BLAKE3.
    `head` is what a blob file has before its blobs.
    """

    path: Path
    nbytes: int
    etag: str
    header: BlobFile | None = None
    head: bytes = b""
    layer: int = 0
    part: str = ""


@dataclass(frozen=True, slots=True)
class Served:
    """A pack on the shelf, at position `at`; `identity` is the SHA-256 of its manifest."""

    at: int
    pack: Pack
    identity: str
    files: dict[str, ServedFile]


class Shelf:
    """The packs of a node. Reads may come from any thread and wait for flash; each holds one pin at a time."""

    def __init__(self, packs: Mapping[str, Pack], metrics: Metrics) -> None:
        self.packs = {name: _served(at, pack) for at, (name, pack) in enumerate(packs.items())}
        opened = [served.pack for served in self.packs.values()]
        self._joined = Joined(opened, [len(pack.manifest.layers) for pack in opened], self._heard)
        self._metrics = metrics
        self._cache: BlobCache | None = None

    @property
    def smallest(self) -> int:
        """The least memory that blobs can be served from: the largest expert in any form, or blob."""
        return max(_largest_group(served.pack) for served in self.packs.values())

    def open(self, capacity: int) -> None:
        """Start the cache with `capacity` bytes. Raises DoesNotFit below `smallest`."""
        cache = BlobCache(self._joined, capacity, largest_group=self.smallest, policy=LFU(), io_threads=IO_THREADS)
        self._cache = cache
        gauge = self._metrics.gauge
        gauge("comoe_resident_bytes", "Memory of resident blobs", lambda: cache.resident_bytes, tier="ram")
        gauge("comoe_budget_bytes", "Memory that blobs may take", lambda: cache.capacity)

    @property
    def cache(self) -> BlobCache:
        assert self._cache is not None, "the shelf is not open"
        return self._cache

    def read(self, served: Served, file: ServedFile, span: Span) -> bytearray:
        """The bytes `span` of a file. Raises CorruptBlob where a blob is not what was packed, RemoteUnavailable."""
        out = bytearray(span.nbytes)
        if file.header is None:
            _read_file(file.path, span.start, memoryview(out))
            return out
        head = file.head[span.start : span.stop]
        out[: len(head)] = head
        if len(head) < span.nbytes:
            self._read_rows(served, file, Span(span.start + len(head), span.stop), memoryview(out)[len(head) :])
        return out

    def resident(self, served: Served, file: ServedFile, span: Span) -> bool:
        """Whether the bytes `span` of a file are all in memory."""
        rows = [] if file.header is None else _rows(file.header, span)
        groups = [self.group(served, (BlobId(file.layer, file.part, row),)) for row in rows]
        return file.header is not None and all(self.cache.residents(groups))

    def fetch(self, groups: Sequence[tuple[BlobId, ...]]) -> None:
        """Wait until each of `groups` has been in memory. Raises CorruptBlob, RemoteUnavailable."""
        start_s = perf_counter()
        for at, _ in self.cache.serve(groups):
            self.count(groups[at], perf_counter() - start_s, hit=False)

    def warm(self, served: Served, groups: Sequence[tuple[BlobId, ...]]) -> None:
        """Read blobs of a pack when nothing else is to be read."""
        self.cache.prefetch([self.group(served, blobs) for blobs in groups])

    def group(self, served: Served, blobs: Sequence[BlobId]) -> tuple[BlobId, ...]:
        """The names in the cache of a pack's blobs."""
        return tuple(self._joined.blob(served.at, blob) for blob in blobs)

    def count(self, group: tuple[BlobId, ...], seconds: float, *, hit: bool) -> None:
        """Count a use of blobs that came after `seconds`, from memory or not."""
        metrics = self._metrics
        metrics.expert_requests.labels("ram", "hit" if hit else "miss").inc()
        if hit:
            metrics.expert_bytes.labels("ram").inc(sum(map(self._joined.nbytes, group)))
            metrics.expert_fetch.labels("ram").observe(seconds)

    @property
    def came(self) -> int:
        """Bytes that came from where packs are published: it grows while somebody waits for them."""
        return sum(served.pack.came for served in self.packs.values())

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()
        for served in self.packs.values():
            served.pack.close()

    def _heard(self, tier: str, nbytes: int, seconds: float) -> None:
        """Count a read of a blob that was not in memory."""
        if tier not in ("flash", "ram"):
            self._metrics.expert_requests.labels("flash", "miss").inc()
        self._metrics.expert_requests.labels(tier, "hit").inc()
        self._metrics.expert_bytes.labels(tier).inc(nbytes)
        self._metrics.expert_fetch.labels(tier).observe(seconds)

    def _read_rows(self, served: Served, file: ServedFile, span: Span, out: memoryview) -> None:
        """Rows of a blob file; what lies between them is zero."""
        header = file.header
        assert header is not None
        for row in _rows(header, span):
            start = header.offset(row)
            wanted = Span(max(span.start, start), min(span.stop, start + header.nbytes))
            if wanted.nbytes > 0:
                into = out[wanted.start - span.start : wanted.stop - span.start]
                self._copy(served, BlobId(file.layer, file.part, row), wanted.start - start, into)

    def _copy(self, served: Served, blob: BlobId, start: int, into: memoryview) -> None:
        group = self.group(served, (blob,))
        began_s, hit = perf_counter(), self.cache.resident(group)
        for _, (buffer,) in self.cache.serve([group]):
            into[:] = buffer[start : start + len(into)].data
        self.count(group, perf_counter() - began_s, hit=hit)


def _rows(header: BlobFile, span: Span) -> range:
    """The rows of a blob file that `span` touches, or their padding."""
    first = max(0, (span.start - header.data_start) // header.stride)
    last = (span.stop - 1 - header.data_start) // header.stride
    return range(first, min(last + 1, header.rows))


def _served(at: int, pack: Pack) -> Served:
    """A pack with all its files, checked. Raises CorruptBlob where one is not what was packed."""
    pack.check_files()
    manifest = (pack.folder / MANIFEST).read_bytes()
    identity = sha256(manifest).hexdigest()
    files = {MANIFEST: ServedFile(pack.folder / MANIFEST, len(manifest), identity)}
    for name, digest in pack.manifest.files.items():
        path = pack.folder / name
        files[name] = ServedFile(path, path.stat().st_size, digest)
    for layer, entry in enumerate(pack.manifest.layers):
        for part, found in entry.parts.items():
            if found.file is not None:
                header = pack.read_header(found.file)
                size = header.data_start + header.rows * header.stride
                etag = header.path.stem.rpartition("-")[2]
                files[found.file] = ServedFile(header.path, size, etag, header, pack.head(found.file), layer, part)
    return Served(at, pack, identity, files)


def _largest_group(pack: Pack) -> int:
    manifest = pack.manifest
    return max(
        sum(held_size(pack.nbytes(blob)) for blob in manifest.blobs(expert, form))
        for expert in manifest.expert_ids
        for form in manifest.forms
    )


def _read_file(path: Path, start: int, into: memoryview) -> None:
    done = 0
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while done < len(into):
            count = os.preadv(file, [into[done:]], start + done)
            if not count:
                raise CorruptBlob(f"{path} is shorter than it was: restore the file or pack again.")
            done += count
    finally:
        os.close(file)
