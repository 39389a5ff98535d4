"""The safetensors files of a checkpoint folder: which tensor lies where, trusting nothing that a header says."""

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from comoe.store.untrusted import is_plain_name, parse_json
from comoe.types import CheckpointError, Extent, HostileFile, MissingShard, TruncatedShard, UsageError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
"""Of a hub repository, the files that packing reads."""

MAX_HEADER_BYTES = 100 * 1024 * 1024
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "U32": 32, "U64": 64, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: `dtype` in safetensors' spelling, and its bytes' extent."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    extent: Extent


def find_folder(path: str | Path) -> Path:
    """The folder `path`, or that of the hub repository `owner/name[@revision]` in the hub library's cache.

    Raises UsageError or CheckpointError.
    """
    folder = Path(path)
    if (folder / "comoe.json").is_file():
        raise UsageError(f"{path} is a pack already: give the checkpoint that it was made of.")
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1:
        raise UsageError(f"{path} is not a folder: give a checkpoint's folder or a hub id (owner/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = str(path).partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is neither a folder nor a repository that the hub library finds.") from error


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the checkpoint in `folder`, by hub name.

    Raises MissingShard, TruncatedShard, HostileFile, or CheckpointError where there are no safetensors files.
    """
    index = folder / INDEX
    if not index.exists():
        return read_file_header(folder, _single_file(folder))
    mapping = _weight_map(index)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(mapping.values())):
        tensors |= read_file_header(folder, file)
    lacking = sorted(set(mapping) - set(tensors))
    if lacking:
        raise MissingShard(f"{folder}: the index names {lacking[0]}, which no file holds: download it again.")
    return tensors


def read_file_header(folder: Path, file: str) -> dict[str, StoredTensor]:
    """The tensors of one file, from its header alone."""
    path = folder / file
    try:
        if not path.is_file():
            raise MissingShard(f"{path} is missing: download the checkpoint again.")
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > MAX_HEADER_BYTES:
                raise HostileFile(f"{path}: not a safetensors file (a header of {length} bytes): download it again.")
            if length > size - 8:
                raise TruncatedShard(f"{path} ends inside its header: download it again.")
            header = parse_json(handle.read(length))
    except OSError as error:
        raise MissingShard(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise HostileFile(f"{path}: the header is not JSON ({error}): download it again.") from error
    tensors = _parse(path, file, header, 8 + length)
    end = max((tensor.extent.offset + tensor.extent.length for tensor in tensors.values()), default=8 + length)
    if end > size:
        raise TruncatedShard(f"{path} has {size} bytes, its header announces {end}: download it again.")
    if end < size:
        raise HostileFile(f"{path}: {size - end} bytes after the last tensor belong to none.")
    return tensors


def _single_file(folder: Path) -> str:
    if (folder / SINGLE).exists():
        return SINGLE
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise CheckpointError(f"{folder} holds pickled weights only: convert them to safetensors first.")
    raise MissingShard(f"{folder} holds neither {SINGLE} nor {INDEX}: download the checkpoint again.")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        mapping = parse_json(index.read_bytes())["weight_map"]
        sound = all(type(file) is str and is_plain_name(file) for file in mapping.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HostileFile(f"{index} is not an index of weights: download it again.") from error
    if not sound or not mapping:
        raise HostileFile(f"{index} names files outside its folder, or none.")
    return dict(mapping)


def _parse(path: Path, file: str, header: Any, data_start: int) -> dict[str, StoredTensor]:
    try:
        tensors = {
            name: _tensor(name, entry, file, data_start) for name, entry in header.items() if name != "__metadata__"
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise HostileFile(f"{path}: the header breaks the safetensors format ({error}).") from error
    end = data_start
    for extent in sorted(tensor.extent for tensor in tensors.values()):
        if extent.offset != end:
            raise HostileFile(f"{path}: tensors {'overlap' if extent.offset < end else 'leave a gap'}.")
        end = extent.offset + extent.length
    return tensors


def _tensor(name: str, entry: Any, file: str, data_start: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name}: sizes must be whole numbers")
    if (end - begin) * 8 != prod(shape) * BITS[entry["dtype"]]:
        raise ValueError(f"{name}: shape and bytes disagree")
    return StoredTensor(name, entry["dtype"], shape, Extent(file, data_start + begin, end - begin))
