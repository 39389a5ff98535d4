"""The planner's rates, measured on this device with a pack's own blobs."""

import numpy as np

from comoe.device.probe import Clock, kernel_bps, memory_bps, read_rate
from comoe.forms.matrices import SUMS, matrices_of
from comoe.kernels import native
from comoe.plan.cost import Costs
from comoe.plan.footprint import dense_bytes, dtype_of
from comoe.plan.ladder import Band
from comoe.store.layout import layout
from comoe.store.manifest import FORM_PARTS, Manifest
from comoe.store.pack import Pack
from comoe.types import BlobId

NUM_PROBES = 8
LAYER_MS = (0.3, 1.5)
"""Time of one layer's operations beside its bytes: the band to expect before a model has run here."""


def measured_costs(pack: Pack, clock: Clock, *, threads: int = 1, dtype: str | None = None) -> Costs:
    """`device_costs`, with experts read from where they are."""
    reading = pack.reading() or read_rate(pack, _probes(pack.manifest), clock)
    return device_costs(pack.manifest, reading, clock, threads=threads, dtype=dtype)


def device_costs(
    manifest: Manifest, reading: tuple[float, float], clock: Clock, *, threads: int = 1, dtype: str | None = None
) -> Costs:
    """Rates of memory and of computing with every form of experts, measured in a fraction of a second.

    `reading` is what reads have: bytes per second, and seconds of latency. No file of a pack is needed. What a token
    costs outside its experts is a wide band: for the dense part in `dtype`, by default the checkpoint's, and at most
    `threads` threads.
    """
    computed = [form for form in manifest.forms if FORM_PARTS[form]]
    memory = memory_bps(clock)
    together = max(memory, memory_bps(clock, threads=threads)) if threads > 1 else memory
    dense = dense_bytes(manifest, dtype_of(manifest, dtype))
    framework_ms = expected_framework_ms(dense, manifest.dense.num_layers, memory, together)
    forms = {form: _compute_bps(manifest, form, clock) for form in computed} if native.available() else {}
    return Costs(*reading, memory, framework_ms, forms)


def _probes(manifest: Manifest) -> list[BlobId]:
    """Blobs of every part of a few experts all over the model."""
    ids = manifest.expert_ids[:: max(1, len(manifest.expert_ids) // NUM_PROBES)]
    blobs = (blob for expert in ids for form in manifest.forms for blob in manifest.blobs(expert, form))
    return list(dict.fromkeys(blob for blob in blobs if manifest.layers[blob.layer].parts[blob.part].nbytes))


def _compute_bps(manifest: Manifest, form: str, clock: Clock) -> float:
    """Of the largest matrix of the first layer's experts, filled with zeros; of a sum, of all its terms in turn."""
    site = manifest.site(0)
    leaf = max((leaf for leaf in site.leaves if leaf.is_matrix), key=lambda leaf: leaf.size)
    nbytes = seconds = 0.0
    for code, parts in _terms(form):
        fields = [field for part in parts for field in layout(site, part).fields if field.leaf == leaf.name]
        planes = {field.plane: np.zeros(field.nbytes, np.uint8) for field in fields}
        size = sum(field.nbytes for field in fields)
        nbytes += size
        for matrix in matrices_of(leaf, code, site.dtype, planes):
            seconds += matrix.nbytes / kernel_bps(matrix, clock)
    return nbytes / seconds


def _terms(form: str) -> list[tuple[str, tuple[str, ...]]]:
    """Codes and the parts that are written in them."""
    if form in SUMS:
        return [(code, (part,)) for code, part in zip(SUMS[form], FORM_PARTS[form], strict=True)]
    return [(form, FORM_PARTS[form])]


def expected_framework_ms(nbytes: int, num_layers: int, one_bps: float, all_bps: float) -> Band:
    """A token outside its experts: reading the `nbytes` of dense weights, and the operations of every layer.

    At best all threads read together, at worst one does all the work and takes twice the time of reading.
    """
    low, high = LAYER_MS
    return Band(1e3 * nbytes / all_bps + low * num_layers, 2e3 * nbytes / one_bps + high * num_layers)
