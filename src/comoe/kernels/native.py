"""The C kernel through ctypes. Calls release the interpreter's lock; shapes are checked here, so C cannot overrun."""

import ctypes
from functools import cache
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

from comoe.kernels.matrix import Matrix

Floats = npt.NDArray[np.float32]

ACTIVATIONS = {"relu": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}


class CMatrix(ctypes.Structure):
    """`comoe_matrix` of expert.c."""

    _fields_ = (
        ("code", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
    )


def available() -> bool:
    """Whether the kernel was built for this machine."""
    return _library() is not None


def kernel_name() -> str:
    """The kernel's instruction set, or `none` where it was not built and torch computes everything."""
    library = _library()
    if library is None:
        return "none"
    library.comoe_kernel_isa.restype = ctypes.c_char_p
    return f"native ({library.comoe_kernel_isa().decode()})"


def expert(up: Matrix, down: Matrix, activation: str, gated: bool, x: Floats, out: Floats) -> None:
    """`out` (T, H) = down(act(up(x))) for `x` (T, H), both float32 and contiguous.

    A gated `up` has rows (2I): gates, then values. ValueError where shapes disagree.
    """
    inner = up.rows // 2 if gated else up.rows
    if down.cols != inner or (gated and up.rows % 2):
        raise ValueError(f"up has {up.rows} rows, down {down.cols} columns")
    _check(x, len(x), up.cols)
    _check(out, len(x), down.rows, written=True)
    arguments = (_address(x), _address(out), ctypes.c_int64(len(x)))
    status = _loaded().comoe_expert(
        ctypes.byref(_c(up)), ctypes.byref(_c(down)), ACTIVATIONS[activation], int(gated), *arguments
    )
    if status:
        raise MemoryError("the kernel found no memory for its scratch")


def linear(matrix: Matrix, x: Floats, out: Floats) -> None:
    """`out` (T, rows) = `x` (T, cols) times the matrix's transpose; both float32 and contiguous."""
    _check(x, len(x), matrix.cols)
    _check(out, len(x), matrix.rows, written=True)
    if _loaded().comoe_linear(ctypes.byref(_c(matrix)), _address(x), _address(out), ctypes.c_int64(len(x))):
        raise MemoryError("the kernel found no memory for its scratch")


def scales(weight: Floats, importance: Floats, shares: Floats, half: int) -> Floats:
    """Scales (rows,) of groups `weight` (rows, group), of levels from -half to half - 1; all contiguous float32.

    Of the reach, which puts a group's largest weight half a level beyond the outermost, `shares` are tried with either
    sign; as float16 holds it, the one of least squared error, weighted by `importance` (group,), is taken.
    """
    rows, group = weight.shape
    _check(weight, rows, group)
    _check(importance[None], 1, group)
    _check(shares[None], 1, len(shares))
    found = np.empty(rows, np.float32)
    where = (_address(weight), _address(importance), ctypes.c_int64(rows), group, half)
    _loaded().comoe_scales(*where, _address(shares), len(shares), _address(found))
    return found


@cache
def _library() -> ctypes.CDLL | None:
    spec = find_spec("comoe.kernels._native")
    return ctypes.CDLL(spec.origin) if spec is not None and spec.origin else None


def _loaded() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise RuntimeError("the kernel was not built: install comoe where there is a C compiler")
    return library


def _c(matrix: Matrix) -> CMatrix:
    """The C struct; valid while `matrix` lives."""
    return CMatrix(
        matrix.code,
        matrix.group,
        matrix.rows,
        matrix.cols,
        matrix.weight.ctypes.data,
        None if matrix.scales is None else matrix.scales.ctypes.data,
        None if matrix.low is None else matrix.low.ctypes.data,
    )


def _address(array: Floats) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _check(array: Floats, rows: int, cols: int, *, written: bool = False) -> None:
    if array.shape != (rows, cols) or array.dtype != np.float32 or not array.flags.c_contiguous:
        raise ValueError(f"expected contiguous float32 {(rows, cols)}, got {array.dtype} {array.shape}")
    if written and not array.flags.writeable:
        raise ValueError("the array for results is read-only")
