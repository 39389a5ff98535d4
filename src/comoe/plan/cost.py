"""What a plan costs in time: a cache model and a cost model. Pure; every rate comes from a measurement."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from comoe.plan.ladder import Array, Band


@dataclass(frozen=True, slots=True)
class Costs:
    """Rates of this device, measured.

    `framework_ms` is the time of a token outside its experts; `read_latency_s` the fixed cost of one read;
    `compute_bps` the weights per second of one token's experts by form, where it was measured.
    """

    read_bps: float
    read_latency_s: float
    memory_bps: float
    framework_ms: Band
    compute_bps: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def unknown() -> "Costs":
        """For questions of bytes alone."""
        return Costs(1.0, 0.0, 1.0, Band(0.0, 0.0))

    def expert_ms(self, nbytes: float, form: str) -> float:
        """Computing with `nbytes` of resident expert weights in `form`: no faster than memory, but for small caches."""
        return 1e3 * nbytes / self.compute_bps.get(form, self.memory_bps)

    def read_ms(self, nbytes: float, reads: float) -> float:
        return 1e3 * (nbytes / self.read_bps + reads * self.read_latency_s)


def hit_rate(use: Array, num_cached: float) -> float:
    """Share of uses that find their expert in an LRU cache of `num_cached` experts of equal size.

    Che's approximation (Che, Tung and Wang, 2002): an expert stays for one characteristic time t, which solves
    sum(1 - exp(-use * t)) = num_cached. `use` (N,) are uses per token of all layers' experts.
    """
    total = float(use.sum())
    used = use[use > 0]
    if num_cached >= len(used) or not total:
        return 1.0
    if num_cached <= 0:
        return 0.0
    low, high = 0.0, 1.0
    while _occupied(used, high) < num_cached:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _occupied(used, middle) < num_cached else (low, middle)
    return float((used * -np.expm1(-used * high)).sum() / total)


def _occupied(use: Array, tokens: float) -> float:
    return float(-np.expm1(-use * tokens).sum())
