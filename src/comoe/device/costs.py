"""The planner's rates, measured on this device with a pack's own blobs."""

from comoe.device.probe import Clock, memory_bps, read_rate
from comoe.plan.cost import Costs
from comoe.plan.ladder import Band
from comoe.store.manifest import Manifest
from comoe.store.pack import Pack

NUM_PROBES = 8
LAYER_MS = (0.3, 1.5)
"""Time of one layer's operations beside its bytes: the band to expect before a model has run here."""


def measured_costs(pack: Pack, clock: Clock, framework_ms: Band | None = None) -> Costs:
    """Rates of memory and of reading experts; `framework_ms` where a warm-up measured it, else a wide band."""
    manifest = pack.manifest
    ids = manifest.expert_ids[:: max(1, len(manifest.expert_ids) // NUM_PROBES)]
    blobs = [blob for expert in ids for blob in manifest.blobs(expert, "exact")]
    rate, latency = read_rate(pack, blobs, clock)
    memory = memory_bps(clock)
    return Costs(rate, latency, memory, framework_ms or expected_framework_ms(manifest, memory))


def expected_framework_ms(manifest: Manifest, bandwidth_bps: float) -> Band:
    """A token outside its experts: reading the dense weights once, and the operations of every layer."""
    bytes_ms = 1e3 * manifest.dense_bytes / bandwidth_bps
    low, high = LAYER_MS
    return Band(bytes_ms + low * manifest.dense.num_layers, 2 * bytes_ms + high * manifest.dense.num_layers)
