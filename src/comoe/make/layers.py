"""One layer of a checkpoint as parts of a pack: what is built from an expert, and how far it is from exact."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from comoe.forms.lowbit import quantise_low
from comoe.forms.merge import HiddenUnits, clusters, merge, output_distances
from comoe.forms.quantise import Planes, quantise
from comoe.make.calibrate import LayerInputs
from comoe.runtime.experts import SiteMath
from comoe.runtime.hook import expert_forward, plain_activation
from comoe.store.blobfile import BlobWriter, read_header
from comoe.store.checkpoint import Checkpoint
from comoe.store.layout import group_size, layout, quantised
from comoe.store.manifest import LayerEntry, LeafEntry, PartEntry
from comoe.types import CheckpointError, Leaf, Site

MIN_TOKENS = 64
"""With fewer calibration tokens an expert's weights are rounded to nearest, not compensated."""

PROBE_TOKENS = 64
ERROR_TOKENS = 128
EXPERTS_PER_CLUSTER = 4

LOW_BITS = {"q2": 2, "q3": 3}
"""Bits of the forms that are not nested."""

Parts = dict[str, PartEntry]


@dataclass(frozen=True, slots=True)
class Layer:
    """Where a layer's experts come from and go to. `inputs` is None without calibration."""

    checkpoint: Checkpoint
    index: int
    module: Any
    inputs: LayerInputs | None
    folder: Path

    @property
    def site(self) -> Site:
        return self.checkpoint.sites[self.index]

    def writer(self, part: str, rows: int) -> BlobWriter:
        return BlobWriter(self.folder, f"{self.index:03}-{part}", layout(self.site, part), rows)

    def entry(self, part: str, path: Path) -> PartEntry:
        header = read_header(path)
        return PartEntry(rows=header.rows, nbytes=header.nbytes, file=path.name)


@torch.no_grad()
def build(layer: Layer, forms: Sequence[str], *, self_contained: bool) -> LayerEntry:
    """Write the blobs of `forms` of one layer, an expert at a time, and say what they are."""
    site = layer.site
    parts: Parts = {"exact": _exact(layer, self_contained)}
    errors: dict[str, list[float]] = defaultdict(list)
    if "q4" in forms or "q8" in forms:
        parts |= _quantised(layer, forms, errors)
    grouped: list[int] = []
    for form in LOW_BITS:
        if form in forms:
            parts[form] = _low_bits(layer, form, errors)
    if "merged" in forms and layer.inputs is not None:
        grouped = _grouping(layer)
        parts["merged"] = _merged(layer, grouped, errors)
    inputs = layer.inputs
    return LayerEntry(
        site=site.name,
        num_experts=site.num_experts,
        leaves=tuple(LeafEntry(leaf.name, leaf.shape, leaf.transposed) for leaf in site.leaves),
        parts=parts,
        clusters=tuple(grouped),
        errors={form: _mean_error(pairs) for form, pairs in errors.items() if pairs},
        frequency=tuple(inputs.frequency(site.num_experts)) if inputs else (),
        mass=tuple(inputs.mass(site.num_experts)) if inputs else (),
    )


def blob_bytes(site: Site, part: str, tensors: dict[tuple[str, str], Tensor]) -> bytes:
    """The bytes of a blob from its fields' tensors by (leaf, plane)."""
    found = layout(site, part)
    data = np.zeros(found.nbytes, np.uint8)
    for field in found.fields:
        tensor = tensors[field.leaf, field.plane].contiguous()
        assert tuple(tensor.shape) == field.shape, (field, tensor.shape)
        data[field.offset : field.offset + field.nbytes] = tensor.view(torch.uint8).numpy().reshape(-1)
    return data.tobytes()


def _exact(layer: Layer, self_contained: bool) -> PartEntry:
    """Extents of the checkpoint where they are the experts' bytes as the runtime wants them, else copies."""
    rows = range(layer.site.num_experts)
    if not self_contained:
        references = [_reference(layer, index) for index in rows]
        found = [reference for reference in references if reference is not None]
        if len(found) == len(references):
            extents, hashes = zip(*found, strict=True)
            nbytes = layout(layer.site, "exact").nbytes
            return PartEntry(rows=len(rows), nbytes=nbytes, extents=extents, hashes=hashes)
    writer = layer.writer("exact", len(rows))
    for index in rows:
        writer.add(_exact_blob(layer, index))
    return layer.entry("exact", writer.commit())


def _exact_blob(layer: Layer, index: int) -> bytes:
    tensors = layer.checkpoint.expert(layer.index, index)
    return blob_bytes(layer.site, "exact", {(name, "exact"): tensor for name, tensor in tensors.items()})


def _reference(layer: Layer, index: int) -> tuple[tuple[tuple[int, int, int], ...], str] | None:
    """(extents, BLAKE3) of an expert in the checkpoint's files; None where its bytes are not there as they are."""
    extents = layer.checkpoint.extents(layer.index, index)
    if extents is None:
        return None
    blob = _exact_blob(layer, index)
    at = 0
    for extent in extents:
        with (layer.checkpoint.folder / extent.file).open("rb") as file:
            file.seek(extent.offset)
            if file.read(extent.length) != blob[at : at + extent.length]:
                return None
        at += extent.length
    if at != len(blob):
        return None
    files = layer.checkpoint.files
    merged: list[tuple[int, int, int]] = []
    for extent in extents:
        number = files.index(extent.file)
        if merged and merged[-1][0] == number and merged[-1][1] + merged[-1][2] == extent.offset:
            merged[-1] = (number, merged[-1][1], merged[-1][2] + extent.length)
        else:
            merged.append((number, extent.offset, extent.length))
    return tuple(merged), blake3(blob).hexdigest()


def _quantised(layer: Layer, forms: Sequence[str], errors: dict[str, list[float]]) -> Parts:
    site = layer.site
    names = ["high", "low"] if "q8" in forms else ["high"]
    writers = {name: layer.writer(name, site.num_experts) for name in names}
    measured = [form for form in ("q4", "q8") if form in forms]
    for index in range(site.num_experts):
        tensors = layer.checkpoint.expert(layer.index, index)
        planes = _fields(layer, index, tensors, quantise)
        blobs = {name: blob_bytes(site, name, planes) for name in writers}
        for name, writer in writers.items():
            writer.add(blobs[name])
        for form in measured:
            held = [blobs["high"]] if form == "q4" else [blobs["high"], blobs["low"]]
            errors[form] += _error(layer, index, tensors, form, held)
    return {name: layer.entry(name, writer.commit()) for name, writer in writers.items()}


def _low_bits(layer: Layer, form: str, errors: dict[str, list[float]]) -> PartEntry:
    site = layer.site
    writer = layer.writer(form, site.num_experts)
    for index in range(site.num_experts):
        tensors = layer.checkpoint.expert(layer.index, index)
        blob = blob_bytes(site, form, _fields(layer, index, tensors, partial(quantise_low, bits=LOW_BITS[form])))
        writer.add(blob)
        errors[form] += _error(layer, index, tensors, form, [blob])
    return layer.entry(form, writer.commit())


def _fields(
    layer: Layer, index: int, tensors: dict[str, Tensor], how: Callable[..., Planes]
) -> dict[tuple[str, str], Tensor]:
    """The fields of an expert's blobs by (leaf, plane), its matrices quantised by `how`."""
    grams = _grams(layer, index, tensors)
    fields: dict[tuple[str, str], Tensor] = {}
    for leaf in layer.site.leaves:
        if not quantised(leaf):
            fields[leaf.name, "exact"] = tensors[leaf.name]
            continue
        group = group_size(leaf.cols)
        assert group is not None
        try:
            planes = how(oriented(leaf, tensors[leaf.name]), group, gram=grams.get(leaf.name))
        except ValueError as error:
            where = f"{layer.site.name}, expert {index}, {leaf.name}"
            raise CheckpointError(f"{where} cannot be quantised: {error}; pack it with --forms exact.") from error
        fields |= {(leaf.name, "scales"): planes.scales, (leaf.name, "high"): planes.high}
        if planes.low is not None:
            fields[leaf.name, "low"] = planes.low
    return fields


def _grams(layer: Layer, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """X^T X of each matrix's inputs on calibration text; none where the expert saw too little of it."""
    if layer.inputs is None:
        return {}
    x, _ = layer.inputs.of(index)
    if len(x) < MIN_TOKENS:
        return {}
    grams = {}
    for leaf in layer.site.leaves:
        if quantised(leaf):
            inputs = x if leaf.cols == x.shape[1] and leaf.name not in DOWN else _hidden(layer, x, tensors, leaf)
            if inputs is not None:
                grams[leaf.name] = inputs.t() @ inputs
    return grams


DOWN = ("down_proj", "wo.weight", "mlp.w2", "output_linear.weight")
"""The leaf of every family that takes an expert's hidden units to its output."""


def _hidden(layer: Layer, x: Tensor, tensors: dict[str, Tensor], down: Leaf) -> Tensor | None:
    """Inputs of the down projection: what the expert puts out with an identity in its place."""
    if down.name not in DOWN or getattr(layer.module, "has_post_expert_norm", False):
        return None
    probe = {name: tensor.float() for name, tensor in tensors.items()} | {down.name: torch.eye(down.cols)}
    if f"{down.name}_bias" in probe:
        probe[f"{down.name}_bias"] = torch.zeros(down.cols)
    return expert_forward(layer.module, x, probe)


def _grouping(layer: Layer) -> list[int]:
    """Clusters of a layer's experts by their outputs on the same few inputs."""
    assert layer.inputs is not None
    probe = _probe(layer, layer.inputs.x)
    outputs = [_run_exact(layer, probe, layer.checkpoint.expert(layer.index, e)) for e in range(layer.site.num_experts)]
    return clusters(output_distances(torch.stack(outputs)), max(1, layer.site.num_experts // EXPERTS_PER_CLUSTER))


def _probe(layer: Layer, seen: Tensor) -> Tensor:
    """Inputs to compare experts on: some of those that they saw, noise where they saw none."""
    if len(seen):
        return seen[:: max(1, len(seen) // PROBE_TOKENS)][:PROBE_TOKENS]
    width = next(leaf.cols for leaf in layer.site.leaves if leaf.is_matrix)
    return torch.randn(PROBE_TOKENS, width, generator=torch.Generator().manual_seed(0))


def _merged(layer: Layer, grouped: Sequence[int], errors: dict[str, list[float]]) -> PartEntry:
    assert layer.inputs is not None
    site = layer.site
    masses = layer.inputs.mass(site.num_experts)
    writer = layer.writer("merged", max(grouped) + 1)
    for cluster in range(max(grouped) + 1):
        members = [e for e, found in enumerate(grouped) if found == cluster]
        experts = [layer.checkpoint.expert(layer.index, e) for e in members]
        merged = merge(experts, [masses[e] for e in members], hidden_units(layer.module, site))
        stored = {name: tensor.to(experts[0][name].dtype) for name, tensor in merged.items()}
        blob = blob_bytes(site, "merged", _fields(layer, -1, stored, quantise))
        writer.add(blob)
        for expert, tensors in zip(members, experts, strict=True):
            errors["merged"] += _error(layer, expert, tensors, "merged", [blob])
    return layer.entry("merged", writer.commit())


def hidden_units(module: Any, site: Site) -> HiddenUnits | None:
    """How a site's hidden units lie, where its experts are two plain linears around an activation."""
    plain = plain_activation(module)
    return HiddenUnits(*site.leaves, plain[1]) if plain is not None and len(site.leaves) == 2 else None


def _error(layer: Layer, index: int, exact: dict[str, Tensor], form: str, blobs: Sequence[bytes]) -> list[float]:
    """[squared error, squared output] of a form on the expert's calibration tokens, weighted by squared gates."""
    if layer.inputs is None:
        return []
    x, gate = (tensor[:ERROR_TOKENS] for tensor in layer.inputs.of(index))
    if not len(x):
        return []
    arrays = [np.frombuffer(bytearray(blob), np.uint8) for blob in blobs]
    maths = SiteMath(layer.module, layer.site, torch.float32)
    y = _run_exact(layer, x, exact)
    approximate = expert_forward(layer.module, x, maths.tensors(form, arrays))
    weight = gate[:, None] ** 2
    return [float((weight * (approximate - y) ** 2).sum()), float((weight * y**2).sum())]


def _run_exact(layer: Layer, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    return expert_forward(layer.module, x, {name: tensor.float() for name, tensor in tensors.items()})


def _mean_error(pairs: Sequence[float]) -> float:
    """Squared errors over squared outputs, of alternating pairs."""
    return sum(pairs[0::2]) / max(sum(pairs[1::2]), 1e-30)


def oriented(leaf: Leaf, tensor: Tensor) -> Tensor:
    """A matrix as (out, in)."""
    return tensor.t() if leaf.transposed else tensor
