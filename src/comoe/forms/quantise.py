"""Nested quantisation of a matrix: a 4-bit plane that stands alone, and a second that makes it 8-bit.

The q4 form is w = s * high with high in [-8, 7]; q8 is w = (s / 8) * (8 * high + low) with low in [-8, 7], an exact
integer with the same scale. High nibbles are chosen with error compensation between the floor and the ceiling of the
original w / s, so that low can still reach the original. Where the planes lie in a blob is `store.layout`'s business.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from comoe.forms.compensate import Gram, compensated

STEPS = 7.5
"""The largest weight of a group lies at this many steps: half a step beyond either end of [-8, 7]."""


@dataclass(frozen=True, slots=True)
class Planes:
    """A quantised matrix (rows, cols): float16 `scales` (rows, cols / group), nibbles (rows, cols / 2) as uint8.

    Of two neighbours the first is in a byte's low nibble; a nibble holds value + 8. `low` is None for q4 alone.
    """

    scales: Tensor
    high: Tensor
    low: Tensor | None


def quantise(weight: Tensor, group: int, gram: Gram | None = None) -> Planes:
    """Both planes of `weight` (rows, cols), whose cols `group` divides.

    `gram` is that of the matrix's inputs on calibration text; without it weights are rounded to nearest.
    ValueError where a weight is too large for a float16 scale.
    """
    original = weight.float()
    scales = _scales(original, group)
    steps = original / scales.float().repeat_interleave(group, 1)
    steps = torch.nan_to_num(steps)  # a group of zeros has scale 0
    if gram is None:
        high = steps.round().clamp(-8, 7)
    else:
        high = _compensated(steps, scales.float().repeat_interleave(group, 1), gram)
    low = (8 * (steps - high)).round().clamp(-8, 7)
    return Planes(scales, _pack(high), _pack(low))


def dequantise(planes: Planes, group: int) -> Tensor:
    """The matrix (rows, cols) in float32: q8 where the low plane is there, else q4."""
    levels = _unpack(planes.high)
    scales = planes.scales.float()
    if planes.low is not None:
        levels = 8 * levels + _unpack(planes.low)
        scales = scales / 8
    rows, cols = levels.shape
    return (levels.view(rows, cols // group, group) * scales[..., None]).view(rows, cols)


def _scales(weight: Tensor, group: int) -> Tensor:
    """float16 (rows, cols / group), rounded up so that no weight lies beyond `STEPS` steps."""
    rows, cols = weight.shape
    exact = weight.abs().view(rows, cols // group, group).amax(-1) / STEPS
    scales = exact.half()
    scales = torch.where(scales.float() < exact, torch.nextafter(scales, torch.full_like(scales, torch.inf)), scales)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("a weight is too large for float16 scales")
    return scales


def _compensated(steps: Tensor, scales: Tensor, gram: Gram) -> Tensor:
    """High levels (rows, cols) between floor and ceiling of `steps`, w = steps * scales."""
    floor, ceiling = steps.floor().clamp(-8, 7), steps.ceil().clamp(-8, 7)

    def rounding(column: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = scales[:, column]
        wanted = torch.nan_to_num(weight[:, column] / scale)
        level = torch.clamp(wanted.round(), floor[:, column], ceiling[:, column])
        return level, level * scale

    return compensated(steps * scales, gram, rounding)


def _pack(levels: Tensor) -> Tensor:
    """Levels in [-8, 7] (rows, cols) as nibbles (rows, cols / 2)."""
    nibbles = (levels + 8).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def _unpack(nibbles: Tensor) -> Tensor:
    """Levels (rows, cols) in float32."""
    return torch.stack((nibbles & 15, nibbles >> 4), -1).flatten(1).float() - 8
