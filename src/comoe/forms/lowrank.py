"""A matrix as a product of two of low rank, the error of its outputs the least.

The singular values of the matrix times a square root of its inputs' Gram matrix (whitening, as in SVD-LLM, Wang et
al., 2024, section 3.1), not of the matrix alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from comoe.forms.compensate import Gram


@dataclass(frozen=True, slots=True)
class Factors:
    """`out` (rows, r) times `inner` (r, cols), both float16."""

    out: Tensor
    inner: Tensor


def factorise(weight: Tensor, rank: int, gram: Gram | None = None) -> Factors:
    """`weight` (rows, cols) as a product of `rank`; without `gram` the matrix itself is fitted, not its outputs."""
    matrix = weight.double()
    if gram is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        root = torch.linalg.cholesky(gram.damped)
        left, values, right = torch.linalg.svd(matrix @ root, full_matrices=False)
        right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    spread = values[:rank].sqrt()
    return Factors((left[:, :rank] * spread).half().contiguous(), (spread[:, None] * right[:rank]).half().contiguous())
