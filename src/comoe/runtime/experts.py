"""An expert's outputs from its blobs' bytes: the kernel for a few tokens, torch for many.

Which blobs, and whether they are there, is `runtime.layer`'s business. Both ways are fixed functions of bytes and
inputs, so that outputs do not depend on what was cached.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comoe.forms.lowbit import dequantise_low
from comoe.forms.matrices import FACTORS
from comoe.forms.plain import Bytes, Floats, PlainMath, Term, is_plain, part_layouts, terms_of
from comoe.forms.quantise import Planes, dequantise
from comoe.kernels import native
from comoe.runtime.hook import expert_forward, plain_activation
from comoe.store.layout import group_size, quantised, rank
from comoe.types import Leaf, Site

KERNEL_TOKENS = 8
"""Up to so many tokens an expert runs in the kernel, beyond in torch: where the two cross."""

HEIGHTS = (1, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""In torch an expert's tokens are padded to one of these: oneDNN keeps half a megabyte of code, and takes milliseconds
to write it, for every shape of matrix that it meets."""

LOW_CODES = ("q2", "q3")
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "uint8": torch.uint8}


class SiteMath:
    """Computes the experts of one site.

    `dtype` is the model's; weights are cast to it. `module` is the family's experts module.
    """

    def __init__(self, module: nn.Module, site: Site, dtype: torch.dtype) -> None:
        self._module, self.site, self._dtype = module, site, dtype
        self._layouts = part_layouts(site)

    def run(self, form: str, blobs: Sequence[Bytes], x: Tensor) -> Tensor:
        """Outputs (T, H) of one expert for `x` (T, H); `blobs` are those of the form, in order."""
        if form == "dropped":
            return torch.zeros_like(x)
        if self.plain is not None and native.available() and len(x) <= KERNEL_TOKENS:
            return self._run_kernel(self.plain, form, blobs, x)
        return expert_forward(self._module, _padded(x), self.tensors(form, blobs))[: len(x)]

    def tensors(self, form: str, blobs: Sequence[Bytes]) -> dict[str, Tensor]:
        """The expert's tensors by leaf, in the model's dtype and transformers' layout.

        Views of `blobs` where nothing has to be converted.
        """
        if form == "dropped":
            return {leaf.name: torch.zeros(leaf.shape, dtype=self._dtype) for leaf in self.site.leaves}
        terms = terms_of(self._layouts, form, blobs)
        return {leaf.name: self._sum(leaf, terms).to(self._dtype) for leaf in self.site.leaves}

    @cached_property
    def plain(self) -> PlainMath | None:
        """The arithmetic of a plain expert, which kernels and edge nodes do; None for others."""
        found = plain_activation(self._module)
        if found is None or not is_plain(self.site, gated=found[1]):
            return None
        return PlainMath(self.site, *found, _activated)

    @staticmethod
    def _run_kernel(plain: PlainMath, form: str, blobs: Sequence[Bytes], x: Tensor) -> Tensor:
        return torch.from_numpy(plain.run(form, blobs, x.float().contiguous().numpy())).to(x.dtype)

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


def _activated(hidden: Floats, activation: str, gated: bool) -> Floats:
    found: Floats = activated(torch.from_numpy(hidden), activation, gated).contiguous().numpy()
    return found


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


def _tensor(data: Bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(data).view(TORCH_DTYPES[dtype]).view(shape)
