"""Error compensation: rounding a matrix column by column, each column's error spread over those to come.

GPTQ (Frantar et al., 2023, section 3) without its order of columns. What a column is rounded to is the caller's choice.
"""

from collections.abc import Callable

import torch
from torch import Tensor

DAMPING = 0.01
BLOCK_COLUMNS = 128

Rounding = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""Told a column's number and the matrix as it is by then; answers its levels (rows,) and what they stand for."""


def compensated(weight: Tensor, gram: Tensor, rounding: Rounding) -> Tensor:
    """Levels (rows, cols) of `weight` (rows, cols), which is used up; `gram` (cols, cols) is X^T X of its inputs."""
    inverse = inverse_cholesky(gram)
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
    matrix = gram.double()
    diagonal = matrix.diagonal()
    mean = diagonal.mean().clamp(min=1e-12)
    damped = matrix + torch.diag(torch.where(diagonal > 0, DAMPING * mean, mean))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
