"""An expert's outputs from its blobs' bytes: the kernel for a few tokens, torch for many.

Which blobs, and whether they are there, is `runtime.layer`'s business. Both ways are fixed functions of bytes and
inputs, so that outputs do not depend on what was cached.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comoe.forms.lowbit import dequantise_low
from comoe.forms.matrices import FACTORS, SUMS, matrices_of, matrix_of
from comoe.forms.quantise import Planes, dequantise
from comoe.kernels import native
from comoe.kernels.matrix import Matrix
from comoe.runtime.hook import expert_forward, plain_activation
from comoe.store.layout import Field, Layout, group_size, layout, quantised, rank
from comoe.store.manifest import FORM_PARTS
from comoe.types import Leaf, Site

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

KERNEL_TOKENS = 8
"""Up to so many tokens an expert runs in the kernel, beyond in torch: where the two cross."""

HEIGHTS = (1, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""In torch an expert's tokens are padded to one of these: oneDNN keeps half a megabyte of code, and takes milliseconds
to write it, for every shape of matrix that it meets."""

LOW_CODES = ("q2", "q3")
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "uint8": torch.uint8}


class Term(NamedTuple):
    """Planes of an expert's leaves, as bytes by (leaf, plane), written as form `code` writes them."""

    code: str
    planes: dict[tuple[str, str], Bytes]

    def of(self, leaf: Leaf) -> dict[str, Bytes]:
        """A leaf's planes by name."""
        return {plane: data for (name, plane), data in self.planes.items() if name == leaf.name}


class SiteMath:
    """Computes the experts of one site.

    `dtype` is the model's; weights are cast to it. `module` is the family's experts module.
    """

    def __init__(self, module: nn.Module, site: Site, dtype: torch.dtype) -> None:
        self._module, self.site, self._dtype = module, site, dtype
        self._layouts = {part: layout(site, part) for parts in FORM_PARTS.values() for part in parts}

    def run(self, form: str, blobs: Sequence[Bytes], x: Tensor) -> Tensor:
        """Outputs (T, H) of one expert for `x` (T, H); `blobs` are those of the form, in order."""
        if form == "dropped":
            return torch.zeros_like(x)
        if self._kernel is not None and len(x) <= KERNEL_TOKENS:
            return self._run_kernel(form, blobs, x)
        return expert_forward(self._module, _padded(x), self.tensors(form, blobs))[: len(x)]

    def tensors(self, form: str, blobs: Sequence[Bytes]) -> dict[str, Tensor]:
        """The expert's tensors by leaf, in the model's dtype and transformers' layout.

        Views of `blobs` where nothing has to be converted.
        """
        if form == "dropped":
            return {leaf.name: torch.zeros(leaf.shape, dtype=self._dtype) for leaf in self.site.leaves}
        terms = self._terms(form, blobs)
        return {leaf.name: self._sum(leaf, terms).to(self._dtype) for leaf in self.site.leaves}

    @cached_property
    def _kernel(self) -> tuple[str, bool, Leaf, Leaf] | None:
        """Activation, gated, up and down for the fused kernel; None where it does not apply."""
        plain = plain_activation(self._module)
        if plain is None or not native.available() or len(self.site.leaves) != 2:
            return None
        return (*plain, *self.site.leaves)

    def _run_kernel(self, form: str, blobs: Sequence[Bytes], x: Tensor) -> Tensor:
        assert self._kernel is not None
        activation, gated, up, down = self._kernel
        terms = self._terms(form, blobs)
        x_f32 = x.float().contiguous().numpy()
        out = np.empty((len(x), down.rows), np.float32)
        if len(terms) == 1:
            native.expert(self._matrix(up, terms[0]), self._matrix(down, terms[0]), activation, gated, x_f32, out)
            return torch.from_numpy(out).to(x.dtype)
        hidden = activated(torch.from_numpy(self._linear(up, terms, x_f32)), activation, gated)
        return torch.from_numpy(self._linear(down, terms, hidden.contiguous().numpy())).to(x.dtype)

    def _linear(self, leaf: Leaf, terms: Sequence[Term], x: Floats) -> Floats:
        """`x` (T, cols) times the sum of `leaf`'s matrices, added up afterwards."""
        total = np.zeros((len(x), leaf.rows), np.float32)
        for term in terms:
            y = x
            for matrix in matrices_of(leaf, term.code, self.site.dtype, term.of(leaf)):
                x_in, y = y, np.empty((len(x), matrix.rows), np.float32)
                native.linear(matrix, x_in, y)
            total += y
        return total

    def _matrix(self, leaf: Leaf, term: Term) -> Matrix:
        return matrix_of(leaf, term.code, self.site.dtype, term.of(leaf))

    def _sum(self, leaf: Leaf, terms: Sequence[Term]) -> Tensor:
        """A matrix is the sum of its terms; what is not quantised is the last one's alone."""
        added = terms if quantised(leaf) else terms[-1:]
        return sum((self._leaf(leaf, term) for term in added[1:]), start=self._leaf(leaf, added[0]))

    def _leaf(self, leaf: Leaf, term: Term) -> Tensor:
        planes = term.of(leaf)
        if "exact" in planes:
            return _tensor(planes["exact"], self.site.dtype, leaf.shape)
        weight = _product(leaf, planes) if term.code == FACTORS else _dequantised(leaf, term.code, planes)
        return weight.t().contiguous() if leaf.transposed else weight

    def _terms(self, form: str, blobs: Sequence[Bytes]) -> list[Term]:
        """What is added up: one term of all the form's parts, or one of each where it is a sum."""
        planes = [
            {(field.leaf, field.plane): _slice(blob, field) for field in self._fields(part)}
            for part, blob in zip(FORM_PARTS[form], blobs, strict=True)
        ]
        if form in SUMS:
            return [Term(code, found) for code, found in zip(SUMS[form], planes, strict=True)]
        return [Term(form, {key: data for found in planes for key, data in found.items()})]

    def _fields(self, part: str) -> tuple[Field, ...]:
        found: Layout = self._layouts[part]
        return found.fields


TORCH_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def activated(hidden: Tensor, activation: str, gated: bool) -> Tensor:
    """What the kernel does between its two linears: `hidden` (T, 2I), gates then values, or (T, I) to (T, I)."""
    act = TORCH_ACTIVATIONS[activation]
    if not gated:
        return act(hidden)
    gates, values = hidden.chunk(2, -1)
    return act(gates) * values


def _product(leaf: Leaf, planes: Mapping[str, Bytes]) -> Tensor:
    """A matrix (out, in) from its factors."""
    inner = _tensor(planes["inner"], "float16", (rank(leaf), leaf.cols)).float()
    return _tensor(planes["out"], "float16", (leaf.rows, rank(leaf))).float() @ inner


def _dequantised(leaf: Leaf, code: str, planes: Mapping[str, Bytes]) -> Tensor:
    """A matrix (out, in) from its scales and levels."""
    group = group_size(leaf.cols)
    assert group is not None
    low = planes.get("low")
    found = Planes(
        scales=_tensor(planes["scales"], "float16", (leaf.rows, leaf.cols // group)),
        high=_tensor(planes["high"], "uint8", (leaf.rows, -1)),
        low=None if low is None else _tensor(low, "uint8", (leaf.rows, -1)),
    )
    return (dequantise_low if code in LOW_CODES else dequantise)(found, group)


def _padded(x: Tensor) -> Tensor:
    """`x` (T, H) with rows of zeros to the next height; beyond the last one as it is."""
    height = next((height for height in HEIGHTS if height >= len(x)), len(x))
    return F.pad(x, (0, 0, 0, height - len(x)))


def _slice(blob: Bytes, field: Field) -> Bytes:
    return blob[field.offset : field.offset + field.nbytes]


def _tensor(data: Bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(data).view(TORCH_DTYPES[dtype]).view(shape)
