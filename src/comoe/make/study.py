"""One expert of a layer under study: its tensors, what it saw of the calibration text, how far a form is from exact."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from comoe.forms.compensate import Gram
from comoe.forms.merge import HiddenUnits
from comoe.forms.quantise import Planes
from comoe.make.calibrate import LayerInputs
from comoe.runtime.experts import TORCH_DTYPES, SiteMath
from comoe.runtime.hook import expert_forward, plain_activation
from comoe.store.blobfile import BlobWriter, read_header
from comoe.store.checkpoint import Checkpoint
from comoe.store.layout import group_size, layout, quantised
from comoe.store.manifest import PartEntry
from comoe.types import CheckpointError, Leaf, Site

MIN_TOKENS = 16
MIN_TOKENS_SHARE = 1 / 16
"""With fewer calibration tokens, also by column, a matrix is rounded to nearest: compensating gains a tenth at most."""

ERROR_TOKENS = 256
"""Of an expert's calibration tokens, how many its errors are measured on."""

DOWN = ("down_proj", "wo.weight", "mlp.w2", "output_linear.weight")
"""The leaf of every family that takes an expert's hidden units to its output."""

Quantiser = Callable[..., Planes]


@dataclass(frozen=True, slots=True)
class Layer:
    """Where a layer's experts come from and go to.

    `inputs` are what it saw of the text that forms are fitted to, `judged` of text that none is: both None without
    calibration. Without `compensated` weights are rounded to nearest all the same. `only` so many experts are looked
    at, the first ones; None: all.
    """

    checkpoint: Checkpoint
    index: int
    module: Any
    inputs: LayerInputs | None
    folder: Path
    judged: LayerInputs | None = None
    compensated: bool = True
    only: int | None = None

    @property
    def site(self) -> Site:
        site = self.checkpoint.sites[self.index]
        return site if self.only is None else replace(site, num_experts=self.only)

    @property
    def units(self) -> HiddenUnits | None:
        """How its hidden units lie, where its experts are two plain linears around an activation."""
        plain = plain_activation(self.module)
        leaves = self.site.leaves
        return HiddenUnits(leaves[0], leaves[1], plain[1]) if plain is not None and len(leaves) == 2 else None

    def study(self, index: int) -> "Study":
        """An expert's weights as they are, and what it saw."""
        return Study(self, index, self.checkpoint.expert(self.index, index))

    def writer(self, part: str, rows: int) -> BlobWriter:
        return BlobWriter(self.folder, f"{self.index:03}-{part}", layout(self.site, part), rows)

    def entry(self, part: str, path: Path) -> PartEntry:
        header = read_header(path)
        return PartEntry(rows=header.rows, nbytes=header.nbytes, file=path.name)

    def run(self, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """Outputs (T, H) of an expert with `tensors`, in float32."""
        return expert_forward(self.module, x, {name: tensor.float() for name, tensor in tensors.items()})


@dataclass(frozen=True, eq=False)
class Study:
    """Expert `index` of a layer with `tensors`, in transformers' layout.

    `given` are Gram matrices to go by, where they are not those of what the expert sees itself.
    """

    layer: Layer
    index: int
    tensors: dict[str, Tensor]
    given: dict[str, Gram] | None = None

    @cached_property
    def seen(self) -> tuple[Tensor, Tensor]:
        """(inputs (T, H), gates (T,)) on calibration text; none without it."""
        inputs = self.layer.inputs
        if inputs is None:
            return torch.empty(0, 0), torch.empty(0)
        return inputs.of(self.index)

    @cached_property
    def judged(self) -> tuple[Tensor, Tensor]:
        """(inputs (T, H), gates (T,)) that errors are measured on: of text that nothing was fitted to, if any."""
        judged = self.layer.judged
        x, gate = judged.of(self.index) if judged is not None else self.seen
        x, gate = (x, gate) if len(x) else self.seen
        keep = max(1, len(x) // ERROR_TOKENS)  # spread over all domains, which follow each other
        return x[::keep][:ERROR_TOKENS], gate[::keep][:ERROR_TOKENS]

    @cached_property
    def outputs(self) -> Tensor:
        """What it puts out (T, H) on those tokens."""
        return self.layer.run(self.judged[0], self.tensors)

    @cached_property
    def grams(self) -> dict[str, Gram]:
        """X^T X of each matrix's inputs on calibration text; none where the expert saw too little of it."""
        if self.given is not None:
            return self.given
        x, _ = self.seen
        return grams(self.layer, x, self.tensors) if self.layer.compensated else {}

    @property
    def energy(self) -> float | None:
        """Squared outputs on all that it saw, weighted by squared gates, told from some; None where it saw nothing."""
        judged = self.judged[1].double() ** 2
        if not len(judged):
            return None
        mean = (judged * self.outputs.double().square().sum(1)).sum() / judged.sum().clamp(min=1e-30)
        used = self.seen[1] if len(self.seen[1]) else self.judged[1]
        return float(mean * (used.double() ** 2).sum())

    def error(self, form: str, blobs: Sequence[bytes]) -> float | None:
        """Squared error of a form over squared outputs, weighted by squared gates; None where it saw nothing."""
        x, gate = self.judged
        if not len(x):
            return None
        maths = SiteMath(self.layer.module, self.layer.site, torch.float32)
        missed = self.layer.run(x, maths.tensors(form, arrays(blobs))) - self.outputs
        weight = gate[:, None] ** 2
        return float((weight * missed**2).sum() / (weight * self.outputs**2).sum().clamp(min=1e-30))

    def fields(self, how: Quantiser) -> dict[tuple[str, str], Tensor]:
        """The fields of its blobs by (leaf, plane), its matrices quantised by `how`."""
        fields: dict[tuple[str, str], Tensor] = {}
        for leaf in self.layer.site.leaves:
            if not quantised(leaf):
                fields[leaf.name, "exact"] = self.tensors[leaf.name]
                continue
            group = group_size(leaf.cols)
            assert group is not None
            try:
                planes = how(oriented(leaf, self.tensors[leaf.name]), group, gram=self.grams.get(leaf.name))
            except ValueError as error:
                where = f"{self.layer.site.name}, expert {self.index}, {leaf.name}"
                raise CheckpointError(f"{where} cannot be quantised: {error}; pack it with --forms exact.") from error
            fields |= {(leaf.name, "scales"): planes.scales, (leaf.name, "high"): planes.high}
            if planes.low is not None:
                fields[leaf.name, "low"] = planes.low
        return fields

    def blob(self, part: str, how: Quantiser) -> bytes:
        return blob_bytes(self.layer.site, part, self.fields(how))


def grams(layer: Layer, x: Tensor, tensors: dict[str, Tensor], weight: Tensor | None = None) -> dict[str, Gram]:
    """X^T X of each matrix's inputs for `x` (T, H), tokens weighted by `weight` (T,) where it is given.

    None for a matrix that saw too few.
    """
    found = {}
    for leaf in layer.site.leaves:
        if quantised(leaf) and len(x) >= max(MIN_TOKENS, MIN_TOKENS_SHARE * leaf.cols):
            inputs = x if leaf.cols == x.shape[1] and leaf.name not in DOWN else hidden(layer, x, tensors, leaf)
            if inputs is not None:
                weighted = inputs if weight is None else inputs * weight[:, None]
                found[leaf.name] = Gram(weighted.t() @ weighted, len(x))
    return found


def hidden(layer: Layer, x: Tensor, tensors: dict[str, Tensor], down: Leaf) -> Tensor | None:
    """Inputs of the down projection: what the expert puts out with an identity in its place."""
    if down.name not in DOWN or getattr(layer.module, "has_post_expert_norm", False):
        return None
    probe = {name: tensor.float() for name, tensor in tensors.items()} | {down.name: torch.eye(down.cols)}
    if f"{down.name}_bias" in probe:
        probe[f"{down.name}_bias"] = torch.zeros(down.cols)
    return expert_forward(layer.module, x, probe)


def arrays(blobs: Sequence[bytes]) -> list[npt.NDArray[np.uint8]]:
    """Blobs as the runtime wants them."""
    return [np.frombuffer(bytearray(blob), np.uint8) for blob in blobs]


def blob_bytes(site: Site, part: str, tensors: dict[tuple[str, str], Tensor]) -> bytes:
    """The bytes of a blob from its fields' tensors by (leaf, plane)."""
    found = layout(site, part)
    data = np.zeros(found.nbytes, np.uint8)
    for field in found.fields:
        tensor = tensors[field.leaf, field.plane]
        assert tuple(tensor.shape) == field.shape, (field, tensor.shape)
        data[field.offset : field.offset + field.nbytes] = tensor.reshape(-1).view(torch.uint8).numpy()
    return data.tobytes()


def blob_fields(site: Site, part: str, blob: bytes) -> dict[tuple[str, str], Tensor]:
    """The tensors of a blob's fields by (leaf, plane): what `blob_bytes` made it of."""
    data = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    return {
        (field.leaf, field.plane): data[field.offset : field.offset + field.nbytes]
        .view(TORCH_DTYPES[field.dtype])
        .view(field.shape)
        for field in layout(site, part).fields
    }


def oriented(leaf: Leaf, tensor: Tensor) -> Tensor:
    """A matrix as (out, in)."""
    return tensor.t() if leaf.transposed else tensor


class Errors:
    """What every expert of a layer adds to its error, form by form."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._energy: list[float | None] = [None] * num_experts
        self._relative: dict[str, list[float | None]] = {}

    def add(self, study: Study, form: str, blobs: Sequence[bytes]) -> None:
        """Measure `form`, whose `blobs` of the expert are these."""
        self._energy[study.index] = self._energy[study.index] or study.energy
        found = self._relative.setdefault(form, [None] * self._num_experts)
        found[study.index] = 1.0 if form == "dropped" and study.energy is not None else study.error(form, blobs)

    def added(self) -> dict[str, tuple[float, ...]]:
        """Error that each expert in a form adds to the layer's; empty where no expert saw anything.

        One that no text reached counts as much as the least used, with the mean relative error: other text may want it.
        """
        known = [energy for energy in self._energy if energy is not None]
        if not known or not sum(known):
            return {}
        least = min(energy for energy in known if energy > 0)
        energies = [least if energy is None else energy for energy in self._energy]
        total = sum(energies)
        tables = {}
        for form, relative in self._relative.items():
            measured = [error for error in relative if error is not None]
            mean = sum(measured) / len(measured)
            errors = [mean if error is None else error for error in relative]
            tables[form] = tuple(e * share / total for e, share in zip(errors, energies, strict=True))
        return tables
