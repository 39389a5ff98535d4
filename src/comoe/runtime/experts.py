"""An expert's outputs from its blobs' bytes: the kernel for a few tokens, torch for many.

Which blobs, and whether they are there, is `runtime.layer`'s business. Both ways are fixed functions of bytes and
inputs, so that outputs do not depend on what was cached.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comoe.forms.lowbit import dequantise_low
from comoe.forms.matrices import matrix_of
from comoe.forms.quantise import Planes, dequantise
from comoe.kernels import native
from comoe.kernels.matrix import Matrix
from comoe.runtime.hook import expert_forward, plain_activation
from comoe.store.layout import Field, Layout, group_size, layout
from comoe.store.manifest import FORM_PARTS
from comoe.types import Leaf, Site

Bytes = npt.NDArray[np.uint8]

KERNEL_TOKENS = 8
"""Up to so many tokens an expert runs in the kernel, beyond in torch: where the two cross."""

HEIGHTS = (1, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""In torch an expert's tokens are padded to one of these: oneDNN keeps half a megabyte of code, and takes milliseconds
to write it, for every shape of matrix that it meets."""

LOW_FORMS = ("q2", "q3")
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "uint8": torch.uint8}


class SiteMath:
    """Computes the experts of one site.

    `dtype` is the model's; weights are cast to it. `module` is the family's experts module.
    """

    def __init__(self, module: nn.Module, site: Site, dtype: torch.dtype) -> None:
        self._module, self.site, self._dtype = module, site, dtype
        self._layouts = {part: layout(site, part) for parts in FORM_PARTS.values() for part in parts}

    def run(self, form: str, blobs: Sequence[Bytes], x: Tensor) -> Tensor:
        """Outputs (T, H) of one expert for `x` (T, H); `blobs` are those of the form, in order."""
        if self._kernel is not None and len(x) <= KERNEL_TOKENS:
            return self._run_kernel(form, blobs, x)
        return expert_forward(self._module, _padded(x), self.tensors(form, blobs))[: len(x)]

    def tensors(self, form: str, blobs: Sequence[Bytes]) -> dict[str, Tensor]:
        """The expert's tensors by leaf, in the model's dtype and transformers' layout.

        Views of `blobs` where nothing has to be converted.
        """
        planes = self._planes(form, blobs)
        return {leaf.name: self._leaf(leaf, form, planes) for leaf in self.site.leaves}

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
        planes = self._planes(form, blobs)
        out = np.empty((len(x), down.rows), np.float32)
        native.expert(
            self._matrix(up, form, planes),
            self._matrix(down, form, planes),
            activation,
            gated,
            x.float().contiguous().numpy(),
            out,
        )
        return torch.from_numpy(out).to(x.dtype)

    def _matrix(self, leaf: Leaf, form: str, planes: dict[tuple[str, str], Bytes]) -> Matrix:
        own = {plane: data for (name, plane), data in planes.items() if name == leaf.name}
        return matrix_of(leaf, form, self.site.dtype, own)

    def _leaf(self, leaf: Leaf, form: str, planes: dict[tuple[str, str], Bytes]) -> Tensor:
        exact = planes.get((leaf.name, "exact"))
        if exact is not None:
            return _tensor(exact, self.site.dtype, leaf.shape).to(self._dtype)
        group = group_size(leaf.cols)
        assert group is not None
        low = planes.get((leaf.name, "low"))
        found = Planes(
            scales=_tensor(planes[leaf.name, "scales"], "float16", (leaf.rows, leaf.cols // group)),
            high=_tensor(planes[leaf.name, "high"], "uint8", (leaf.rows, -1)),
            low=None if low is None else _tensor(low, "uint8", (leaf.rows, -1)),
        )
        weight = (dequantise_low if form in LOW_FORMS else dequantise)(found, group).to(self._dtype)
        return weight.t().contiguous() if leaf.transposed else weight

    def _planes(self, form: str, blobs: Sequence[Bytes]) -> dict[tuple[str, str], Bytes]:
        """Bytes by (leaf, plane)."""
        return {
            (field.leaf, field.plane): _slice(blob, field)
            for part, blob in zip(FORM_PARTS[form], blobs, strict=True)
            for field in self._fields(part)
        }

    def _fields(self, part: str) -> tuple[Field, ...]:
        found: Layout = self._layouts[part]
        return found.fields


def _padded(x: Tensor) -> Tensor:
    """`x` (T, H) with rows of zeros to the next height; beyond the last one as it is."""
    height = next((height for height in HEIGHTS if height >= len(x)), len(x))
    return F.pad(x, (0, 0, 0, height - len(x)))


def _slice(blob: Bytes, field: Field) -> Bytes:
    return blob[field.offset : field.offset + field.nbytes]


def _tensor(data: Bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(data).view(TORCH_DTYPES[dtype]).view(shape)
