"""Plain experts, two linears around an activation, on a few rows from their blobs' bytes. No torch.

What a device computes in its kernel and what an edge node computes for it is this: the same kernel gives the same
bits. Without the kernel numpy computes, within rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from math import erf
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from comoe.forms.matrices import SUMS, matrices_of, matrix_of
from comoe.kernels import native
from comoe.kernels.matrix import Matrix
from comoe.store.layout import Layout, layout
from comoe.store.manifest import FORM_PARTS
from comoe.types import Leaf, Site

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Activated = Callable[[Floats, str, bool], Floats]
"""What is between the two linears: (T, 2I), gates then values, or (T, I) to (T, I)."""


class Term(NamedTuple):
    """Planes of an expert's leaves, as bytes by (leaf, plane), written as form `code` writes them."""

    code: str
    planes: dict[tuple[str, str], Bytes]

    def of(self, leaf: Leaf) -> dict[str, Bytes]:
        """A leaf's planes by name."""
        return {plane: data for (name, plane), data in self.planes.items() if name == leaf.name}


def part_layouts(site: Site) -> dict[str, Layout]:
    """The layout of every part of every form at `site`."""
    return {part: layout(site, part) for parts in FORM_PARTS.values() for part in parts}


def terms_of(layouts: Mapping[str, Layout], form: str, blobs: Sequence[Bytes]) -> list[Term]:
    """What is added up: one term of all the form's parts, or one of each where it is a sum."""
    planes = [
        {(field.leaf, field.plane): blob[field.offset : field.offset + field.nbytes] for field in layouts[part].fields}
        for part, blob in zip(FORM_PARTS[form], blobs, strict=True)
    ]
    if form in SUMS:
        return [Term(code, found) for code, found in zip(SUMS[form], planes, strict=True)]
    return [Term(form, {key: data for found in planes for key, data in found.items()})]


class PlainMath:
    """Computes the experts of one site: `activation` is the kernel's name of it, `activated` computes it for sums."""

    def __init__(self, site: Site, activation: str, gated: bool, activated: Activated | None = None) -> None:
        if not is_plain(site, gated):
            raise ValueError(f"experts of {site.name} are not two linears around an activation")
        self.site, self.activation, self.gated = site, activation, gated
        self._activated = activated or numpy_activated
        self._layouts = part_layouts(site)

    def run(self, form: str, blobs: Sequence[Bytes], x: Floats) -> Floats:
        """Outputs (T, H) of one expert for `x` (T, H), contiguous; a row's depend on that row alone."""
        up, down = self.site.leaves
        if form == "dropped":
            return np.zeros((len(x), down.rows), np.float32)
        terms = terms_of(self._layouts, form, blobs)
        if len(terms) == 1 and native.available():
            out = np.empty((len(x), down.rows), np.float32)
            planes = (self._matrix(up, terms[0]), self._matrix(down, terms[0]))
            native.expert(*planes, self.activation, self.gated, x, out)
            return out
        hidden = self._activated(self._linear(up, terms, x), self.activation, self.gated)
        return self._linear(down, terms, np.ascontiguousarray(hidden))

    def _linear(self, leaf: Leaf, terms: Sequence[Term], x: Floats) -> Floats:
        """`x` (T, cols) times the sum of `leaf`'s matrices, added up afterwards."""
        total = np.zeros((len(x), leaf.rows), np.float32)
        for term in terms:
            y = x
            for matrix in matrices_of(leaf, term.code, self.site.dtype, term.of(leaf)):
                y = _product(matrix, y)
            total += y
        return total

    def _matrix(self, leaf: Leaf, term: Term) -> Matrix:
        return matrix_of(leaf, term.code, self.site.dtype, term.of(leaf))


def is_plain(site: Site, gated: bool) -> bool:
    """Whether the shapes of a site's experts are those of two linears with an activation between them."""
    if len(site.leaves) != 2 or not all(leaf.is_matrix for leaf in site.leaves):
        return False
    up, down = site.leaves
    return up.rows == (2 if gated else 1) * down.cols and up.cols == down.rows


def numpy_activated(hidden: Floats, activation: str, gated: bool) -> Floats:
    """What the kernel does between its two linears."""
    act = NUMPY_ACTIVATIONS[activation]
    if not gated:
        return act(hidden)
    inner = hidden.shape[1] // 2
    return act(hidden[:, :inner]) * hidden[:, inner:]


def _product(matrix: Matrix, x: Floats) -> Floats:
    if not native.available():
        return x @ matrix.dense().T
    y = np.empty((len(x), matrix.rows), np.float32)
    native.linear(matrix, x, y)
    return y


def _relu(x: Floats) -> Floats:
    return np.maximum(x, np.float32(0))


def _silu(x: Floats) -> Floats:
    with np.errstate(over="ignore"):
        found: Floats = x / (1 + np.exp(-x))
    return found


def _gelu(x: Floats) -> Floats:
    erfs = np.array([erf(value) for value in (x * np.float32(0.70710678)).ravel().tolist()], np.float32)
    return np.float32(0.5) * x * (1 + erfs.reshape(x.shape))


def _gelu_tanh(x: Floats) -> Floats:
    found: Floats = 0.5 * x * (1 + np.tanh(0.79788456 * (x + 0.044715 * x * x * x)))
    return found.astype(np.float32)


NUMPY_ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "relu": _relu,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}
