"""A pack opened for reading: blobs by direct reads from its files and from the checkpoint that it refers to.

Bytes are hashed once, at first use. What a pack says of itself is `store.manifest`; who asks for blobs, and when,
is `memory`.
"""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from comoe.store.blobfile import MAX_HEADER_BYTES, BlobFile, read_header
from comoe.store.directfile import Bounce, DirectFile
from comoe.store.manifest import Manifest, PartEntry, SourceEntry, SourceFile, read_manifest
from comoe.types import BlobId, CorruptBlob, Extent, HostileFile, PackError, SourceChanged, SourceMissing, UsageError

HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Pieces:
    """The bytes of one row: where they lie, one after the other, and their BLAKE3."""

    extents: tuple[Extent, ...]
    digest: str


class Pack:
    """A pack in a local folder, a `Source` that reads from flash; `remote` where bytes may have to come first, of which
    so many `came`.

    `source` overrides the folder of the checkpoint, where it has moved. Several threads may read at once, but none
    while another closes.
    """

    remote = False

    @property
    def came(self) -> int:
        return 0

    def __init__(self, folder: Path, *, source: Path | None = None) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self.checkpoint = source or _source_folder(folder, self.manifest)
        self._headers = self._checked_headers()
        self._check_source()
        self._files: dict[str, DirectFile] = {}
        self._bounce = Bounce()
        self._opening = threading.Lock()
        self._verified: set[BlobId] = set()

    def nbytes(self, blob: BlobId) -> int:
        return self._part(blob).nbytes

    def read(self, blob: BlobId, into: memoryview) -> str:
        pieces = self.pieces(blob)
        at = 0
        try:
            for extent in pieces.extents:
                self._file(extent.file).read(extent.offset, into[at:], extent.length)
                at += extent.length
        except PackError:
            self._check_source()
            raise
        if blob not in self._verified:
            if blake3(into[:at]).hexdigest() != pieces.digest:
                raise CorruptBlob(f"{self._where(blob)} has not the bytes that were packed; {self._remedy(blob)}")
            self._verified.add(blob)
        return "flash"

    def read_bytes(self, blob: BlobId) -> bytes:
        """The bytes of `blob`, in memory of their own."""
        into = bytearray(self.nbytes(blob))
        self.read(blob, memoryview(into))
        return bytes(into)

    def bring(self, blobs: Sequence[BlobId]) -> None:
        """Have blobs near before they are read. Nothing to do: they are."""

    def tier(self, blob: BlobId) -> str:
        """Where `blob` would be read from now."""
        return "flash"

    def link_now(self) -> tuple[float, float]:
        """Bytes per second that blobs come at, and seconds of a round trip: they are here."""
        return float("inf"), 0.0

    def pieces(self, blob: BlobId) -> Pieces:
        """Where the bytes of `blob` lie. Paths are absolute."""
        part = self._part(blob)
        if part.file is not None:
            header = self._headers[part.file]
            extent = Extent(str(header.path), header.offset(blob.row), header.nbytes)
            return Pieces((extent,), header.hashes[blob.row])
        assert self.manifest.source is not None and self.checkpoint is not None
        files = self.manifest.source.files
        extents = tuple(
            Extent(str(self.checkpoint / files[index].name), offset, length)
            for index, offset, length in part.extents[blob.row]
        )
        return Pieces(extents, part.hashes[blob.row])

    def blob_ids(self) -> list[BlobId]:
        """Every blob of the pack."""
        return [
            BlobId(index, name, row)
            for index, layer in enumerate(self.manifest.layers)
            for name, part in layer.parts.items()
            for row in range(part.rows)
        ]

    def broken_files(self) -> list[str]:
        """A sentence for every file beside the blobs that is not as it was packed: weights, config, tokenizer."""
        found = []
        for name, digest in self.manifest.files.items():
            path = self.folder / name
            if not path.is_file() or file_hash(path) != digest:
                found.append(f"{path} has not the bytes that were packed: the file is damaged or missing; pack again.")
        return found

    def check_files(self) -> None:
        """Raise CorruptBlob where a file beside the blobs is not as it was packed."""
        for sentence in self.broken_files():
            raise CorruptBlob(sentence)

    def reading(self) -> tuple[float, float] | None:
        """(bytes per second, seconds of latency) of reads, where that is known better than by probing; else None."""
        return None

    @property
    def own_bytes(self) -> int:
        """Bytes of the pack's folder."""
        return folder_bytes(self.folder)

    @property
    def direct(self) -> bool:
        """Whether every file opened so far is read past the page cache."""
        return all(file.direct for file in self._files.values())

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read_header(self, name: str) -> BlobFile:
        """What the header of the blob file `name` says."""
        return read_header(self.folder / name)

    def head(self, name: str) -> bytes:
        """The bytes of the blob file `name` before its blobs."""
        with (self.folder / name).open("rb") as file:
            return file.read(self._headers[name].data_start)

    def _checked_headers(self) -> dict[str, BlobFile]:
        """Headers of all blob files, compared with the manifest."""
        headers: dict[str, BlobFile] = {}
        for layer in self.manifest.layers:
            for part in layer.parts.values():
                if part.file is None:
                    continue
                header = self.read_header(part.file)
                if (header.rows, header.nbytes) != (part.rows, part.nbytes):
                    raise HostileFile(f"{header.path}: rows or length differ from the manifest's: pack again.")
                headers[part.file] = header
        return headers

    def _part(self, blob: BlobId) -> PartEntry:
        layers = self.manifest.layers
        part = layers[blob.layer].parts.get(blob.part) if 0 <= blob.layer < len(layers) else None
        if part is None or not 0 <= blob.row < part.rows:
            raise KeyError(blob)
        return part

    def _check_source(self) -> None:
        """Raises SourceMissing or SourceChanged where the checkpoint is not as it was packed."""
        if self.checkpoint is not None and self.manifest.source is not None:
            check_source(self.checkpoint, self.manifest.source)

    def _file(self, path: str) -> DirectFile:
        with self._opening:
            if path not in self._files:
                self._files[path] = DirectFile(Path(path), self._bounce)
            return self._files[path]

    def _where(self, blob: BlobId) -> str:
        return f"{self.folder}: layer {blob.layer}, part {blob.part!r}, row {blob.row}"

    def _remedy(self, blob: BlobId) -> str:
        if self._part(blob).file is None:
            return f"the checkpoint in {self.checkpoint} is damaged or was changed: restore it or pack again."
        return "the file is damaged: pack again."


def is_downloaded(folder: Path) -> bool:
    """Whether the pack in `folder` has more than its manifest and other small files: any weights at all."""
    return any(folder.glob("*.safetensors"))


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in `folder`."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def source_problem(folder: Path, manifest: Manifest, source: Path | None = None) -> str | None:
    """Why the pack in `folder` could not read its checkpoint, recorded or in `source`; None where it could."""
    checkpoint = source or _source_folder(folder, manifest)
    if checkpoint is None or manifest.source is None:
        return None
    try:
        check_source(checkpoint, manifest.source)
    except PackError as error:
        return str(error)
    return None


def refuse_idle_source(source: Path | None, folder: Path, manifest: Manifest) -> None:
    """Raise UsageError where a `source` is given for the pack in `folder`, which reads nothing from it."""
    if source is not None and manifest.source is None:
        raise UsageError(f"{folder} is self-contained and reads no checkpoint: leave out --source (or COMOE_SOURCE).")


def check_source(folder: Path, source: SourceEntry) -> None:
    """Compare the checkpoint in `folder` with what was packed, by sizes and headers.

    Raises SourceMissing or SourceChanged. What changed inside a tensor shows when its blob is first read.
    """
    for entry in source.files:
        path = folder / entry.name
        try:
            if not path.is_file():
                raise SourceMissing(
                    f"the pack refers to {path}, which is not there: give its new place with --source, or pack again "
                    "with --self-contained."
                )
            same = path.stat().st_size == entry.size and header_hash(path) == entry.header
        except OSError as error:
            raise SourceMissing(f"the pack refers to {path}, which cannot be read: {error.strerror}.") from error
        if not same:
            raise SourceChanged(f"{path} is not the file that was packed: restore it or pack again.")


def source_entry(folder: Path, names: Sequence[str]) -> SourceEntry:
    """The checkpoint in `folder` as `check_source` will know it again: its weight files' sizes and headers."""
    files = [SourceFile(name=n, size=(folder / n).stat().st_size, header=header_hash(folder / n)) for n in names]
    return SourceEntry(folder=str(folder), files=tuple(files))


def file_hash(path: Path) -> str:
    """BLAKE3 of a whole file, which then leaves the page cache."""
    hasher = blake3()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            hasher.update(block)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return hasher.hexdigest()


def header_hash(path: Path) -> str:
    """BLAKE3 of a safetensors file's length field and header."""
    with path.open("rb") as file:
        prefix = file.read(8)
        return blake3(prefix + file.read(min(int.from_bytes(prefix, "little"), MAX_HEADER_BYTES))).hexdigest()


def _source_folder(folder: Path, manifest: Manifest) -> Path | None:
    """The checkpoint's folder as recorded, relative to the pack where it is not absolute."""
    return folder / manifest.source.folder if manifest.source else None
