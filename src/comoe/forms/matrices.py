"""A leaf's planes as the kernel's matrix: which code a form's weights are written in. No torch."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from comoe.kernels.matrix import Code, Matrix
from comoe.store.layout import group_size, rank
from comoe.types import Leaf

EXACT_CODES = {"float32": Code.F32, "bfloat16": Code.BF16, "float16": Code.F16}
FORM_CODES = {"base": Code.Q4, "merged": Code.Q4, "q2": Code.Q2, "q3": Code.Q3, "q4": Code.Q4, "q8": Code.Q8}

FACTORS = "factors"
"""How a matrix is written that is a product of two."""

SUMS = {"lowrank": ("base", FACTORS), "residual": ("base", "q2")}
"""Forms whose matrices are sums: how each of their parts is written."""


def matrices_of(leaf: Leaf, form: str, dtype: str, planes: Mapping[str, npt.NDArray[np.uint8]]) -> tuple[Matrix, ...]:
    """The matrices whose product `leaf` is in `form`, the first to be applied first."""
    if form == FACTORS:
        inner = Matrix(Code.F16, rank(leaf), leaf.cols, planes["inner"])
        return inner, Matrix(Code.F16, leaf.rows, rank(leaf), planes["out"])
    return (matrix_of(leaf, form, dtype, planes),)


def matrix_of(leaf: Leaf, form: str, dtype: str, planes: Mapping[str, npt.NDArray[np.uint8]]) -> Matrix:
    """`leaf` in `form`, from its planes' bytes by name; exact weights are of `dtype`."""
    if "exact" in planes:
        return Matrix(EXACT_CODES[dtype], leaf.rows, leaf.cols, planes["exact"])
    return Matrix(
        FORM_CODES[form],
        leaf.rows,
        leaf.cols,
        planes["high"],
        group=group_size(leaf.cols) or 0,
        scales=planes["scales"].view(np.float16),
        low=planes.get("low"),
    )
