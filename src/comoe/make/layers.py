"""One layer of a checkpoint as parts of a pack: what is built from its experts, and what that costs."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from blake3 import blake3

from comoe.forms.lowbit import quantise_low
from comoe.forms.quantise import quantise
from comoe.make.shared import SHARING, Shared, Sharing
from comoe.make.study import Errors, Layer, Quantiser, Study, blob_bytes
from comoe.store.layout import layout
from comoe.store.manifest import FORM_PARTS, LayerEntry, LeafEntry, PartEntry

OWN_FORMS = ("q4", "q8", "q2", "q3")
"""Forms that an expert takes by itself. Those that are nested share one quantisation."""

QUANTISERS: Mapping[str, Quantiser] = {
    "high": quantise,
    "low": quantise,
    "q2": partial(quantise_low, bits=2),
    "q3": partial(quantise_low, bits=3),
}
"""How the planes of a part are made."""


@torch.no_grad()
def build(layer: Layer, forms: Sequence[str], how: Sharing, *, self_contained: bool) -> LayerEntry:
    """Write the blobs of `forms` of one layer, an expert at a time, and say what they are."""
    site, inputs = layer.site, layer.inputs
    errors = Errors(site.num_experts)
    parts = {"exact": _exact(layer, self_contained), **_own_parts(layer, forms, errors)}
    shared = Shared(layer, how) if inputs is not None and {*forms} & {*SHARING} else None
    if shared is not None:
        parts |= shared.parts(forms, errors)
    return LayerEntry(
        site=site.name,
        num_experts=site.num_experts,
        leaves=tuple(LeafEntry(leaf.name, leaf.shape, leaf.transposed) for leaf in site.leaves),
        parts=parts,
        clusters=shared.clusters if shared else (),
        tree=shared.tree if shared else (),
        errors=errors.added(),
        frequency=tuple(inputs.frequency(site.num_experts)) if inputs else (),
        mass=tuple(inputs.mass(site.num_experts)) if inputs else (),
    )


def _own_parts(layer: Layer, forms: Sequence[str], errors: Errors) -> dict[str, PartEntry]:
    """The parts of forms that need no other expert; every expert is read, and its inputs looked at, once."""
    own = [form for form in OWN_FORMS if form in forms]
    names = list(dict.fromkeys(part for form in own for part in FORM_PARTS[form]))
    writers = {name: layer.writer(name, layer.site.num_experts) for name in names}
    for index in range(layer.site.num_experts if names or "dropped" in forms else 0):
        blobs = own_blobs(layer.study(index), forms, errors)
        for name, writer in writers.items():
            writer.add(blobs[name])
    return {name: layer.entry(name, writer.commit()) for name, writer in writers.items()}


def own_blobs(study: Study, forms: Sequence[str], errors: Errors) -> dict[str, bytes]:
    """An expert's blobs, by part, of those of `forms` that need no other expert; their errors are measured."""
    own = [form for form in OWN_FORMS if form in forms]
    parts = dict.fromkeys(part for form in own for part in FORM_PARTS[form])
    fields = {how: study.fields(how) for how in dict.fromkeys(QUANTISERS[part] for part in parts)}
    blobs = {part: blob_bytes(study.layer.site, part, fields[QUANTISERS[part]]) for part in parts}
    for form in own:
        errors.add(study, form, [blobs[part] for part in FORM_PARTS[form]])
    if "dropped" in forms:
        errors.add(study, "dropped", [])
    return blobs


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
