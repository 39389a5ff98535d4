"""Safetensors files, as the dense part of a pack, written tensor by tensor so that they never are in memory whole."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from comoe.store.layout import PAGE, align
from comoe.store.whole import whole

NAME_BYTES = 160
"""Room that the header keeps for a tensor beyond its name: dtype, shape and two offsets."""


class RawTensor(NamedTuple):
    """A tensor as bytes; `dtype` in safetensors' spelling (`BF16`)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


def write_dense(path: Path, names: Iterable[str], tensors: Iterable[RawTensor]) -> int:
    """`write_tensors`, and beside the file the index that lets transformers load the folder like any checkpoint."""
    names = list(names)
    end = write_tensors(path, names, tensors)
    index = {"metadata": {"total_size": end}, "weight_map": dict.fromkeys(names, path.name)}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return end


def write_tensors(path: Path, names: Iterable[str], tensors: Iterable[RawTensor]) -> int:
    """Write `tensors`, whose names are `names`, to `path`; returns the bytes of the tensors."""
    names = list(names)
    data_start = align(8 + 64 + sum(len(json.dumps(name)) + NAME_BYTES for name in names), PAGE)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    with whole(path) as file:
        file.seek(data_start)
        for tensor in tensors:
            assert tensor.name not in header, tensor.name
            file.write(tensor.data)
            offsets = [end, end + len(tensor.data)]
            header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
            end = offsets[1]
        encoded = json.dumps(header, separators=(",", ":")).encode()
        assert len(encoded) <= data_start - 8 and list(header) == ["__metadata__", *names]
        file.seek(0)
        file.write((data_start - 8).to_bytes(8, "little") + encoded.ljust(data_start - 8))
    return end
