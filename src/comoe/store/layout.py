"""Where the tensors of an expert lie inside a blob's bytes.

Pure arithmetic on `Site`: no tensor library, no I/O. Which parts make a form is `store.manifest`'s business.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from comoe.types import DTYPE_BYTES, Leaf, Site

ALIGNMENT = 64
PAGE = 4096
DIRECT_ROW_BYTES = 256 * 1024

ITEM_BYTES = {**DTYPE_BYTES, "uint8": 1}


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor inside a blob: `shape` items of `dtype` from byte `offset`.

    `plane` says which of a leaf's tensors it is: `exact`, or `scales`, `high` and `low` of a quantised matrix.
    """

    leaf: str
    plane: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return ITEM_BYTES[self.dtype] * prod(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """The fields of a part's blobs, in order, and their length together."""

    fields: tuple[Field, ...]
    nbytes: int

    @property
    def stride(self) -> int:
        """Distance between the rows of a blob file: page-aligned from 256 KiB on, so that rows are read directly."""
        return align(self.nbytes, PAGE if self.nbytes >= DIRECT_ROW_BYTES else ALIGNMENT)


def align(nbytes: int, alignment: int) -> int:
    """`nbytes` rounded up to a multiple of `alignment`."""
    return -(-nbytes // alignment) * alignment


def group_size(cols: int) -> int | None:
    """Weights that share one scale: 64 for wide rows, else 32; None where neither divides."""
    if cols % 64 == 0 and cols >= 1024:
        return 64
    return 32 if cols % 32 == 0 else None


def rank(leaf: Leaf) -> int:
    """Of the factors that stand for a matrix: about a twentieth of its bytes."""
    return max(1, min(leaf.rows, leaf.cols) // 32)


def quantised(leaf: Leaf) -> bool:
    """Whether `leaf` has planes: a matrix whose rows divide into groups. Other leaves stay exact."""
    return leaf.is_matrix and group_size(leaf.cols) is not None


def layout(site: Site, part: str) -> Layout:
    """Fields of the blobs of `part`, a key of `PART_PLANES`, at `site`."""
    planes = PART_PLANES[part]
    fields: list[Field] = []
    end = 0
    for leaf in site.leaves:
        for plane, dtype, shape in planes(leaf, site.dtype):
            fields.append(Field(leaf.name, plane, dtype, shape, align(end, ALIGNMENT)))
            end = fields[-1].offset + fields[-1].nbytes
    return Layout(tuple(fields), end)


Planes = list[tuple[str, str, tuple[int, ...]]]


def _exact(leaf: Leaf, dtype: str) -> Planes:
    return [("exact", dtype, leaf.shape)]


def _high(leaf: Leaf, dtype: str) -> Planes:
    """Scales and high nibbles of a matrix, (out, in); anything else unchanged."""
    return _scaled(leaf, dtype, {"high": 2})


def _low(leaf: Leaf, dtype: str) -> Planes:
    return [("low", "uint8", (leaf.rows, leaf.cols // 2))] if quantised(leaf) else []


def _two_bits(leaf: Leaf, dtype: str) -> Planes:
    return _scaled(leaf, dtype, {"high": 4})


def _three_bits(leaf: Leaf, dtype: str) -> Planes:
    """Two bits in one plane, the last in another."""
    return _scaled(leaf, dtype, {"high": 4, "low": 8})


def _factors(leaf: Leaf, dtype: str) -> Planes:
    """Two matrices whose product stands for a third: `out` times `inner`; anything else unchanged."""
    if not quantised(leaf):
        return _exact(leaf, dtype)
    return [("inner", "float16", (rank(leaf), leaf.cols)), ("out", "float16", (leaf.rows, rank(leaf)))]


def _scaled(leaf: Leaf, dtype: str, per_byte: dict[str, int]) -> Planes:
    """Scales of a matrix and its planes, with so many weights in a byte; anything else unchanged."""
    if not quantised(leaf):
        return _exact(leaf, dtype)
    group = group_size(leaf.cols)
    assert group is not None
    planes: Planes = [("scales", "float16", (leaf.rows, leaf.cols // group))]
    return planes + [(plane, "uint8", (leaf.rows, leaf.cols // weights)) for plane, weights in per_byte.items()]


PART_PLANES: dict[str, Callable[[Leaf, str], Planes]] = {
    "base": _high,
    "delta": _two_bits,
    "exact": _exact,
    "factors": _factors,
    "high": _high,
    "merged": _high,
    "low": _low,
    "q2": _two_bits,
    "q3": _three_bits,
}
"""The planes of every part's matrices."""
