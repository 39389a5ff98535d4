"""A weight matrix as raw bytes: what the kernel multiplies with, whatever its code."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt


class Code(IntEnum):
    """How a matrix's elements are written; the numbers are those of expert.c."""

    F32 = 0
    BF16 = 1
    F16 = 2
    Q4 = 3
    Q8 = 4
    Q2 = 5
    Q3 = 6


ELEMENT_BITS = {Code.F32: 32, Code.BF16: 16, Code.F16: 16, Code.Q4: 4, Code.Q8: 4, Code.Q2: 2, Code.Q3: 2}
"""Bits of an element in `weight`; Q8 and Q3 have more in `low`."""

LOW_BITS = {Code.Q8: 4, Code.Q3: 1}
GROUP_STEPS = {Code.Q4: 2, Code.Q8: 2, Code.Q2: 4, Code.Q3: 8}
"""A group's length is a multiple of this: it begins and ends with a byte."""


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A matrix (rows, cols), output features first.

    `weight` holds the elements row by row as bytes; of Q4 and Q8 the high nibbles, value + 8, the first of two
    neighbours in a byte's low nibble, with float16 `scales` (rows, cols / group) and, for Q8, a plane `low` like
    `weight`. A Q4 weight is scale * high, a Q8 weight scale / 8 * (8 * high + low). Of Q2 and Q3 `weight` holds two
    bits each, four neighbours in a byte, and `low` the third: in a byte four neighbours of a row's first half, then
    four of its second. A weight is scale * (bits - 2 or 4). ValueError where sizes disagree or an array has gaps: the
    kernel gets nothing but addresses.
    """

    code: Code
    rows: int
    cols: int
    weight: npt.NDArray[np.uint8]
    group: int = 0
    scales: npt.NDArray[np.float16] | None = None
    low: npt.NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        if self.rows <= 0 or self.cols <= 0:
            raise ValueError(f"a matrix cannot be {self.rows, self.cols}")
        arrays = [array for array in (self.weight, self.scales, self.low) if array is not None]
        if not all(array.flags.c_contiguous for array in arrays):
            raise ValueError("the bytes of a matrix must be contiguous")
        if self.weight.nbytes * 8 != self.rows * self.cols * ELEMENT_BITS[self.code]:
            raise ValueError(f"{self.weight.nbytes} bytes are not a {self.code.name} matrix {self.rows, self.cols}")
        if self.code < Code.Q4:
            return
        if self.group <= 0 or self.group % GROUP_STEPS[self.code] or self.cols % self.group:
            raise ValueError(f"groups of {self.group} do not divide {self.cols} columns")
        num_groups = self.rows * self.cols // self.group
        if self.scales is None or self.scales.dtype != np.float16 or self.scales.size != num_groups:
            raise ValueError("not one float16 scale for every group")
        low_bits = LOW_BITS.get(self.code)
        if low_bits and (self.low is None or self.low.nbytes * 8 != self.rows * self.cols * low_bits):
            raise ValueError(f"a {self.code.name} matrix needs its low plane")

    @property
    def nbytes(self) -> int:
        """Of all planes together."""
        return sum(plane.nbytes for plane in (self.weight, self.scales, self.low) if plane is not None)

    def dense(self) -> npt.NDArray[np.float32]:
        """The weights in float32, slowly and obviously."""
        shape = (self.rows, self.cols)
        if self.code is Code.F32:
            return self.weight.view(np.float32).reshape(shape)
        if self.code is Code.F16:
            return self.weight.view(np.float16).astype(np.float32).reshape(shape)
        if self.code is Code.BF16:
            return (self.weight.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
        assert self.scales is not None
        levels, scales = self._levels(), self.scales.astype(np.float32)
        if self.code is Code.Q8:
            scales = scales * np.float32(0.125)
        return (levels.reshape(-1, self.group) * scales.reshape(-1, 1)).astype(np.float32).reshape(shape)

    def _levels(self) -> npt.NDArray[np.float32]:
        """The integers that scales multiply, of a quantised matrix."""
        if self.code is Code.Q4:
            return _unpacked(self.weight, 4) - 8
        if self.code is Code.Q2:
            return _unpacked(self.weight, 2) - 2
        assert self.low is not None
        if self.code is Code.Q8:
            return 8 * (_unpacked(self.weight, 4) - 8) + _unpacked(self.low, 4) - 8
        halves = self.low.reshape(self.rows, -1)
        nibbles = np.concatenate([halves & 15, halves >> 4], 1)
        ones = np.stack([(nibbles >> shift) & 1 for shift in range(4)], -1).astype(np.float32)
        return 2 * _unpacked(self.weight, 2) + ones.reshape(-1) - 4


def _unpacked(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.float32]:
    """Values of `bits` bits, the first in a byte's lowest."""
    mask = (1 << bits) - 1
    parts = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return np.stack(parts, -1).astype(np.float32).reshape(-1)
