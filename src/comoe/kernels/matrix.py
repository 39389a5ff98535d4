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


ELEMENT_BITS = {Code.F32: 32, Code.BF16: 16, Code.F16: 16, Code.Q4: 4, Code.Q8: 4}


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A matrix (rows, cols), output features first.

    `weight` holds the elements row by row as bytes; of Q4 and Q8 the high nibbles, value + 8, the first of two
    neighbours in a byte's low nibble, with float16 `scales` (rows, cols / group) and, for Q8, a plane `low` like
    `weight`. A Q4 weight is scale * high, a Q8 weight scale / 8 * (8 * high + low). ValueError where sizes disagree
    or an array has gaps: the kernel gets nothing but addresses.
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
        if self.group <= 0 or self.group % 2 or self.cols % self.group:
            raise ValueError(f"groups of {self.group} do not divide {self.cols} columns")
        num_groups = self.rows * self.cols // self.group
        if self.scales is None or self.scales.dtype != np.float16 or self.scales.size != num_groups:
            raise ValueError("not one float16 scale for every group")
        if self.code is Code.Q8 and (self.low is None or self.low.nbytes != self.weight.nbytes):
            raise ValueError("a Q8 matrix needs its low plane")

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
        levels = _nibbles(self.weight)
        scales = self.scales.astype(np.float32)
        if self.low is not None and self.code is Code.Q8:
            levels, scales = 8 * levels + _nibbles(self.low), scales * np.float32(0.125)
        return (levels.reshape(-1, self.group) * scales.reshape(-1, 1)).astype(np.float32).reshape(shape)


def _nibbles(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return np.stack((packed & 15, packed >> 4), -1).astype(np.float32).reshape(-1) - 8
