"""What a plan costs in time. Pure; every rate comes from a measurement."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from comoe.plan.ladder import Band


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
