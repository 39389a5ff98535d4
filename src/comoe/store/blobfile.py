"""One file of blobs: a safetensors file that holds one U8 tensor `blobs` of shape (rows, stride).

Writing streams row by row, so that a layer never has to be in memory; reading a header trusts nothing. The page
is docs/format.md.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from comoe.store.layout import PAGE, Layout, align
from comoe.store.untrusted import parse_json
from comoe.types import HostileFile, PackError

TENSOR = "blobs"
MAX_HEADER_BYTES = 100 * 1024 * 1024
HASH_CHARS = 64


@dataclass(frozen=True, slots=True)
class BlobFile:
    """What the header says: row r lies at `data_start + r * stride` and its `nbytes` have the BLAKE3 `hashes[r]`."""

    path: Path
    rows: int
    stride: int
    nbytes: int
    data_start: int
    hashes: tuple[str, ...]

    def offset(self, row: int) -> int:
        return self.data_start + row * self.stride


class BlobWriter:
    """Writes `rows` blobs of `layout`, one `add` each, to `folder/STEM-HASH.safetensors`.

    HASH is the BLAKE3 of the row hashes. The file appears under its name, complete and on disk, at `commit`.
    """

    def __init__(self, folder: Path, stem: str, layout: Layout, rows: int) -> None:
        self._folder, self._stem, self._layout, self._rows = folder, stem, layout, rows
        self._hashes: list[str] = []
        self._data_start = align(8 + len(_header(rows, layout, ["0" * HASH_CHARS] * rows)), PAGE)
        self._path = folder / f"{stem}.unfinished"
        self._file = self._path.open("wb")
        self._file.seek(self._data_start)

    def add(self, blob: bytes | memoryview) -> None:
        assert len(blob) == self._layout.nbytes, (len(blob), self._layout.nbytes)
        self._hashes.append(blake3(blob).hexdigest())
        self._file.write(blob)
        self._file.write(bytes(self._layout.stride - self._layout.nbytes))

    def commit(self) -> Path:
        assert len(self._hashes) == self._rows, (len(self._hashes), self._rows)
        header = _header(self._rows, self._layout, self._hashes).ljust(self._data_start - 8)
        self._file.seek(0)
        self._file.write(len(header).to_bytes(8, "little") + header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._path.replace(self._folder / f"{self._stem}-{name_hash(self._hashes)}.safetensors")


def name_hash(hashes: Iterable[str]) -> str:
    """The hash in a blob file's name: half a BLAKE3 of its row hashes."""
    return blake3("".join(hashes).encode()).hexdigest()[: HASH_CHARS // 2]


def read_header(path: Path) -> BlobFile:
    """The header of a blob file. Raises HostileFile where it breaks the format, PackError where it cannot be read."""
    try:
        if not path.is_file():
            raise PackError(f"{path} is missing: the pack is incomplete; pack again.")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            return parse_header(path, prefix + file.read(header_bytes(path, prefix, size)), size)
    except OSError as error:
        raise PackError(f"{path} cannot be read: {error.strerror}.") from error


def header_bytes(path: Path, prefix: bytes, size: int) -> int:
    """Bytes of the header after the 8 of its length, of a file of `size` bytes. Raises HostileFile."""
    length = int.from_bytes(prefix[:8], "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise HostileFile(f"{path}: a header of {length} bytes in a file of {size}: pack again.")
    return length


def parse_header(path: Path, head: bytes, size: int) -> BlobFile:
    """What the first bytes of a blob file of `size` bytes say: its length field and its header. Raises HostileFile."""
    try:
        document = parse_json(head[8:])
    except ValueError as error:
        raise HostileFile(f"{path}: the header is not JSON: {error}.") from error
    try:
        return _parse(path, document, len(head), size)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise HostileFile(f"{path}: not a blob file ({error}); pack again.") from error


def _header(rows: int, layout: Layout, hashes: list[str]) -> bytes:
    return json.dumps(
        {
            "__metadata__": {"nbytes": str(layout.nbytes), "hashes": "".join(hashes)},
            TENSOR: {
                "dtype": "U8",
                "shape": [rows, layout.stride],
                "data_offsets": [0, rows * layout.stride],
            },
        },
        separators=(",", ":"),
    ).encode()


def _parse(path: Path, document: Any, data_start: int, size: int) -> BlobFile:
    tensor, metadata = document[TENSOR], document["__metadata__"]
    keys = (document.keys(), tensor.keys(), metadata.keys())
    if keys != ({"__metadata__", TENSOR}, {"dtype", "shape", "data_offsets"}, {"nbytes", "hashes"}):
        raise ValueError("it must hold one tensor, blobs, and nothing else")
    rows, stride = tensor["shape"]
    nbytes, text = _number(metadata["nbytes"]), metadata["hashes"]
    if tensor["dtype"] != "U8" or type(rows) is not int or type(stride) is not int:
        raise ValueError("blobs must be U8 of shape (rows, stride)")
    if not (rows > 0 and 0 < nbytes <= stride and tensor["data_offsets"] == [0, rows * stride]):
        raise ValueError("rows, stride and offsets disagree")
    if data_start + rows * stride != size:
        raise ValueError(f"{data_start + rows * stride} bytes announced, {size} there")
    if len(text) != rows * HASH_CHARS or not set(text) <= set("0123456789abcdef"):
        raise ValueError("not one BLAKE3 per row")
    hashes = tuple(text[i : i + HASH_CHARS] for i in range(0, len(text), HASH_CHARS))
    if not path.stem.endswith(f"-{name_hash(hashes)}"):
        raise ValueError("the name is not the hash of its rows")
    return BlobFile(path, rows, stride, nbytes, data_start, hashes)


def _number(text: str) -> int:
    """The number that `str` writes as `text`."""
    number = int(text)
    if str(number) != text:
        raise ValueError(f"{text!r} is not a number")
    return number
