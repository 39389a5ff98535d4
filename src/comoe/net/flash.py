"""Flash as a second cache: blobs that came over the network, by the hash of their bytes, within so many bytes.

A file is there whole or not at all, under its hash: a kill leaves nothing half-written, and packs share what they have
in common. The oldest used goes first, also from one run to the next.
"""

import fcntl
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from comoe.store.directfile import Bounce, DirectFile
from comoe.store.whole import whole
from comoe.types import PackError, UsageError

DEFAULT_BYTES, FREE_SHARE = 8 << 30, 0.5
"""What the cache may take when nobody says: so much, but no more than this share of what is free and its own."""


def default_folder() -> Path:
    """Where caches belong by convention: $XDG_CACHE_HOME/comoe, else ~/.cache/comoe."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "comoe"


class Held(NamedTuple):
    """What a cache holds: mirrored packs by name with their bytes, and blobs."""

    packs: dict[str, int]
    blobs: int
    blob_bytes: int


class FlashCache:
    """The cache in `folder` (None: the usual), of at most `capacity` bytes of blobs (None: a share of what is free).

    Of several processes one writes, the others only read. Several threads may call.
    """

    def __init__(self, folder: Path | None, capacity: int | None = None) -> None:
        folder = folder or default_folder()
        self.folder, self._blobs = folder, folder / "blobs"
        try:
            self._blobs.mkdir(parents=True, exist_ok=True)
            self._lock_file = (folder / "lock").open("w")
        except OSError as error:
            raise UsageError(f"{folder} cannot hold a cache: {error.strerror}; name another by --cache.") from error
        self.writes = _locked(self._lock_file.fileno())
        self._lock, self._bounce = threading.Lock(), Bounce()
        self._sizes = OrderedDict(self._found())
        self._nbytes, self._coming = sum(self._sizes.values()), set[str]()
        free = int(FREE_SHARE * (shutil.disk_usage(folder).free + self._nbytes))
        self.capacity = min(DEFAULT_BYTES, free) if capacity is None else capacity
        self._make_room(0)

    @property
    def nbytes(self) -> int:
        """Bytes of blobs that are there."""
        return self._nbytes

    def holds(self, nbytes: int) -> bool:
        """Whether so many bytes more may be put here, and stay."""
        return self.writes and nbytes <= self.capacity

    def has(self, digest: str) -> bool:
        """Whether the blob of this hash is there."""
        return digest in self._sizes

    def read(self, digest: str, into: memoryview, nbytes: int) -> bool:
        """Fill `into[:nbytes]` with the blob of this hash; False where it is not there. Who reads checks the hash."""
        path = self._path(digest)
        with self._lock:
            if self._sizes.get(digest) != nbytes:
                return False
            self._sizes.move_to_end(digest)
        try:
            file = DirectFile(path, self._bounce)
            try:
                file.read(0, into, nbytes)
            finally:
                file.close()
            os.utime(path)
        except (PackError, OSError):
            self.drop(digest)
            return False
        return True

    def put(self, digest: str, data: memoryview) -> None:
        """Keep a blob, if it fits and nothing stands in the way: a cache that cannot be written to is no error."""
        if not self.writes or len(data) > self.capacity:
            return
        with self._lock:
            if digest in self._sizes or digest in self._coming:
                return
            self._coming.add(digest)
            self._make_room(len(data))
        try:
            _write(self._path(digest), data)
        except OSError:
            written = False
        else:
            written = True
        with self._lock:
            self._coming.discard(digest)
            if written:
                self._sizes[digest] = len(data)
                self._nbytes += len(data)
                self._make_room(0)

    def drop(self, digest: str) -> None:
        """Forget a blob: it is not what its name says, or gone."""
        with self._lock:
            self._nbytes -= self._sizes.pop(digest, 0)
            if self.writes:
                self._path(digest).unlink(missing_ok=True)

    def mirror(self, name: str) -> Path:
        """The folder for the small files of a pack of this name."""
        folder = self.folder / "packs" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextmanager
    def mirroring(self, name: str) -> Iterator[Path]:
        """`mirror`, for one writer at a time: another one, of whatever process, waits."""
        folder = self.mirror(name)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder

    def held(self) -> Held:
        """What is there."""
        packs = self.folder / "packs"
        found = sorted(packs.iterdir()) if packs.is_dir() else []
        sizes = {path.name: sum(file.stat().st_size for file in path.iterdir()) for path in found}
        return Held(sizes, len(self._sizes), self._nbytes)

    def clear(self) -> int:
        """Remove all that is there; the bytes that this freed. UsageError while another process writes."""
        if not self.writes:
            raise UsageError(f"another process uses the cache in {self.folder}: stop it first.")
        held = self.held()
        for folder in (self.folder / "packs", self._blobs):
            shutil.rmtree(folder, ignore_errors=True)
        self._blobs.mkdir()
        self._sizes.clear()
        self._nbytes = 0
        return held.blob_bytes + sum(held.packs.values())

    def close(self) -> None:
        self._lock_file.close()

    def _found(self) -> list[tuple[str, int]]:
        """Names and sizes of whole blobs, the oldest used first. What a kill left of a write goes."""
        found = []
        for entry in os.scandir(self._blobs):
            if "." not in entry.name:
                stat = entry.stat()
                found.append((stat.st_mtime, entry.name, stat.st_size))
            elif self.writes:
                Path(entry.path).unlink()
        return [(name, size) for _, name, size in sorted(found)]

    def _make_room(self, nbytes: int) -> None:
        """Let the oldest used go until so many more bytes fit."""
        while self.writes and self._sizes and self._nbytes + nbytes > self.capacity:
            digest, size = self._sizes.popitem(last=False)
            self._path(digest).unlink(missing_ok=True)
            self._nbytes -= size

    def _path(self, digest: str) -> Path:
        return self._blobs / digest


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _write(path: Path, data: memoryview) -> None:
    """The file, whole and on disk, or not at all; its pages leave the page cache."""
    with whole(path) as file:
        file.write(data)
        file.flush()
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
