"""Two and three bits per weight: signed scales chosen for the least error, then error compensation.

A weight is s * level with level in [-2, 1] or [-4, 3]. So few levels waste half a step at one end: a scale may be
negative, which turns the longer side to where a group's weights are longer. Not nested: at two bits, planes of the
finer forms would have to keep their scales, which fit the largest weight and cost several times the loss.
"""

import numpy as np
import torch
from torch import Tensor

from comoe.forms.compensate import Gram, compensated
from comoe.forms.quantise import Planes
from comoe.kernels import native

NUM_SHARES = 24
LEAST_SHARE = 0.4
"""Scales are tried from the one that reaches the largest weight down to this share of it."""


def quantise_low(weight: Tensor, group: int, bits: int, gram: Gram | None = None) -> Planes:
    """`weight` (rows, cols), whose cols `group` divides, in 2 or 3 bits. ValueError where float16 scales overflow.

    `gram` is that of the matrix's inputs on calibration text; without it weights are rounded to nearest.
    """
    half = 1 << (bits - 1)
    rows, cols = weight.shape
    original = weight.float().clone()
    scales = torch.empty(rows, cols // group)
    steps = torch.empty_like(scales)
    importance = torch.ones(cols) if gram is None else gram.importance

    def scale(column: int, current: Tensor) -> None:
        """Choose for the group that begins at `column`, whose weights are `current` by now: compensation moves them."""
        here, at = slice(column, column + group), column // group
        if float(current[:, here].abs().max()) / (half - 0.5) > torch.finfo(torch.float16).max:
            raise ValueError("a weight is too large for float16 scales")
        scales[:, at] = _best_scales(current[:, here].contiguous(), importance[here], half)
        steps[:, at] = _step(scales[:, at])

    def rounding(column: int, current: Tensor) -> tuple[Tensor, Tensor]:
        if column % group == 0:
            scale(column, current)
        at = column // group
        levels = _levels(current[:, column], steps[:, at], half)
        return levels, levels * scales[:, at]

    if gram is None:
        for column in range(0, cols, group):
            scale(column, original)
        levels = _levels(original, steps.repeat_interleave(group, 1), half)
    else:
        levels = compensated(original, gram, rounding)
    values = (levels + half).to(torch.uint8)
    return Planes(scales.half(), _pack_two(values >> (bits - 2)), _pack_one(values & 1) if bits == 3 else None)


def dequantise_low(planes: Planes, group: int) -> Tensor:
    """The matrix (rows, cols) in float32: three bits where the low plane is there, else two."""
    levels = torch.stack([(planes.high >> shift) & 3 for shift in (0, 2, 4, 6)], -1).flatten(1).float()
    if planes.low is None:
        levels = levels - 2
    else:
        nibbles = torch.cat([planes.low & 15, planes.low >> 4], 1)
        ones = torch.stack([(nibbles >> shift) & 1 for shift in range(4)], -1).flatten(1)
        levels = 2 * levels + ones - 4
    rows, cols = levels.shape
    scales = planes.scales.float()
    return (levels.view(rows, cols // group, group) * scales[..., None]).view(rows, cols)


def _best_scales(weight: Tensor, importance: Tensor, half: int) -> Tensor:
    """Scales (rows,) of one group (rows, group), as float16 holds them, of the least weighted squared error."""
    if native.available():
        shares = np.array(scale_shares(half), np.float32)
        return torch.from_numpy(native.scales(weight.numpy(), importance.contiguous().numpy(), shares, half))
    return searched_scales(weight, importance, half)


def searched_scales(weight: Tensor, importance: Tensor, half: int) -> Tensor:
    """What the kernel does, where there is none."""
    reach = weight.abs().amax(1) / (half - 0.5)
    best = torch.zeros_like(reach)
    least = torch.full_like(reach, torch.inf)
    tried = torch.empty_like(weight)
    for share in scale_shares(half):
        for sign in (1.0, -1.0):
            scale = (sign * share * reach).half().float()
            torch.div(weight, _step(scale)[:, None], out=tried)
            tried.round_().clamp_(-half, half - 1).mul_(scale[:, None]).sub_(weight).square_()
            cost = tried @ importance
            better = cost < least
            best, least = torch.where(better, scale, best), torch.where(better, cost, least)
    return best


def scale_shares(half: int) -> list[float]:
    """Of the reach, what scales are tried; the first puts the largest weight on the outermost level."""
    return [(half - 0.5) / half, *torch.linspace(1.0, LEAST_SHARE, NUM_SHARES).tolist()]


def _step(scale: Tensor) -> Tensor:
    """What weights are divided by: nothing but level 0 for a scale of 0."""
    return torch.where(scale == 0, torch.inf, scale)


def _levels(weight: Tensor, step: Tensor, half: int) -> Tensor:
    """The nearest levels."""
    return (weight / step).round_().clamp_(-half, half - 1)


def _pack_two(values: Tensor) -> Tensor:
    """Values in [0, 3] (rows, cols), four neighbours in a byte, the first in the lowest bits."""
    return values[:, 0::4] | values[:, 1::4] << 2 | values[:, 2::4] << 4 | values[:, 3::4] << 6


def _pack_one(values: Tensor) -> Tensor:
    """Bits (rows, cols), eight in a byte: four neighbours of the row's first half, then four of its second."""
    nibbles = values[:, 0::4] | values[:, 1::4] << 1 | values[:, 2::4] << 2 | values[:, 3::4] << 3
    first, second = nibbles.chunk(2, 1)
    return first | second << 4
