"""Error compensation: rounding a matrix column by column, each column's error spread over those to come.

GPTQ (Frantar et al., 2023, section 3) without its order of columns. What a column is rounded to is the caller's choice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import inf

import torch
from torch import Tensor

DAMPING = 0.01
"""Of a Gram matrix's mean diagonal, what is added to all of it: GPTQ's."""

SHRINKAGE = 0.3
"""The same for a matrix of as many columns as tokens were seen: more with fewer. A Gram matrix of few tokens says much
of them and little of others; without this, fewer than half as many tokens as columns made two bits worse than rounding.
"""

BLOCK_COLUMNS = 128

Rounding = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""Told a column's number and the matrix as it is by then; answers its levels (rows,) and what they stand for."""


@dataclass(frozen=True, eq=False)
class Gram:
    """X^T X (cols, cols) of a matrix's inputs on `num_tokens` of calibration text; what follows is reckoned once."""

    matrix: Tensor
    num_tokens: float = inf

    @cached_property
    def inverse_factor(self) -> Tensor:
        """The upper Cholesky factor of the damped inverse, float32 (cols, cols)."""
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.damped))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
        return factor.float()

    @property
    def damped(self) -> Tensor:
        """The matrix in float64, with enough on its diagonal to be inverted, and to be trusted."""
        matrix = self.matrix.double()
        diagonal = matrix.diagonal()
        mean = diagonal.mean().clamp(min=1e-12)
        share = DAMPING + SHRINKAGE * len(matrix) / self.num_tokens
        return matrix + torch.diag(torch.where(diagonal > 0, share * mean, mean))

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
