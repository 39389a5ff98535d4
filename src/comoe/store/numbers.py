"""Arrays of numbers in a safetensors file, each checked as it is read: what profiles and traces are kept in."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from comoe.store.densefile import RawTensor, write_tensors
from comoe.store.tensorfiles import StoredTensor

Array = npt.NDArray[Any]

NUMPY = {"I32": "<i4", "I64": "<i8", "F32": "<f4", "F64": "<f8"}
SAFETENSORS = {np.dtype(dtype): name for name, dtype in NUMPY.items()}

MOST = 1 << 48
"""No number is larger: a sum of thousands of counts still is a number of 64 bits."""


def write_numbers(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write `arrays`, of dtypes in `NUMPY`, to the file `path`, which is whole or as it was. OSError.

    ValueError for what could not be read again, such as the gates of a model that has lost its way.
    """
    for name, array in arrays.items():
        _check(name, array)
    write_tensors(path, arrays, (_raw(name, array) for name, array in arrays.items()))


def read_numbers(file: Path, tensor: StoredTensor, dtype: str, length: int | None = None) -> Array:
    """The numbers (length,) of a tensor, by default all there are: some, and none below 0. ValueError for others."""
    length = length if length is not None else prod(tensor.shape)
    if (tensor.dtype, tensor.shape) != (dtype, (length,)):
        raise ValueError(f"{tensor.name} is {tensor.dtype} of {tensor.shape}")
    array = np.fromfile(file, NUMPY[dtype], length, offset=tensor.extent.offset)
    if len(array) != length or not length:
        raise ValueError(f"{tensor.name} is cut short")
    _check(tensor.name, array)
    return array


def _check(name: str, array: Array) -> None:
    if not ((array >= 0) & (array <= MOST)).all():
        raise ValueError(f"{name} holds what is no count")


def _raw(name: str, array: Array) -> RawTensor:
    dtype = SAFETENSORS[array.dtype]
    return RawTensor(name, dtype, array.shape, array.astype(NUMPY[dtype]).tobytes())
