"""Error compensation: rounding a matrix column by column, each column's error spread over those to come.

GPTQ (Frantar et al., 2023, section 3) without its order of columns. What a column is rounded to is the caller's choice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

DAMPING = 0.01
BLOCK_COLUMNS = 128

Rounding = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""Told a column's number and the matrix as it is by then; answers its levels (rows,) and what they stand for."""


@dataclass(frozen=True, eq=False)
class Gram:
    """X^T X (cols, cols) of a matrix's inputs on calibration text; what follows from it is reckoned once."""

    matrix: Tensor

    @cached_property
    def inverse_factor(self) -> Tensor:
        """The upper Cholesky factor of the damped inverse, float32 (cols, cols)."""
        return inverse_cholesky(self.matrix)

    @property
    def importance(self) -> Tensor:
        """Mean squared input (cols,), up to a factor."""
        return self.matrix.diagonal().float().clamp(min=1e-12)


def compensated(weight: Tensor, gram: Gram, rounding: Rounding) -> Tensor:
    """Levels (rows, cols) of `weight` (rows, cols), which is used up; `gram` is that of its inputs."""
    inverse = gram.inverse_factor
    levels = torch.empty_like(weight)
    for start in range(0, weight.shape[1], BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, weight.shape[1])
        errors = torch.empty_like(weight[:, start:end])
        for column in range(start, end):
            levels[:, column], value = rounding(column, weight)
            error = (weight[:, column] - value) / inverse[column, column]
            weight[:, column:end] -= error[:, None] * inverse[column, column:end]
            errors[:, column - start] = error
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return levels


def inverse_cholesky(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Gram matrix's inverse, float32 (cols, cols)."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram)))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def damped(gram: Tensor) -> Tensor:
    """The Gram matrix in float64, with enough on its diagonal to be inverted."""
    matrix = gram.double()
    diagonal = matrix.diagonal()
    mean = diagonal.mean().clamp(min=1e-12)
    return matrix + torch.diag(torch.where(diagonal > 0, DAMPING * mean, mean))
