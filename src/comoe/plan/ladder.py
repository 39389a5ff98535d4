"""The ladder as the planner sees it: what every rung costs in bytes and in quality, and how experts are used."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from comoe.store.layout import PAGE, align
from comoe.store.manifest import FORM_PARTS, Manifest

Array = npt.NDArray[np.float64]


class Band(NamedTuple):
    """A predicted quantity as an interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Rung:
    """A form for all experts: memory of its parts when all are resident, and its certified loss with its interval.

    `largest` is the memory of the largest blob of every part; `errors[layer]` the relative error of a layer's outputs;
    `loss` is None where the pack has no certificate.
    """

    form: str
    parts: Mapping[str, int]
    largest: Mapping[str, int]
    loss: float | None
    loss_ci95: Band
    errors: tuple[float, ...]

    @property
    def nbytes(self) -> int:
        return sum(self.parts.values())

    def beside(self, floor: "Rung | None") -> int:
        """Bytes of the parts that `floor` does not hold already."""
        return sum(self.parts[part] for part in self._beside(floor))

    def group_beside(self, floor: "Rung | None") -> int:
        """Bytes of one expert's parts that `floor` does not hold: of the largest expert."""
        return sum(self.largest[part] for part in self._beside(floor))

    def _beside(self, floor: "Rung | None") -> list[str]:
        return [part for part in self.parts if floor is None or part not in floor.parts]

    @property
    def price(self) -> float:
        """The loss to reckon with: the upper end of the certified interval. ValueError without a certificate."""
        if self.loss is None:
            raise ValueError(f"{self.form} has no certificate")
        return max(0.0, self.loss_ci95.high)

    @property
    def mean_error(self) -> float | None:
        """Mean over layers of the relative squared error of their outputs; None where nothing was calibrated."""
        if not self.errors:
            return None
        return sum(self.errors) / len(self.errors)

    def loss_rate(self, layer: int) -> float:
        """Price if only uses in `layer` took this form, times the number of layers: their mean is `price`.

        0 where the form has no certificate: only certification itself serves such a form.
        """
        if self.loss is None:
            return 0.0
        mean = sum(self.errors) / len(self.errors) if self.errors else 0.0
        return self.price * (self.errors[layer] / mean if mean else 1.0)


@dataclass(frozen=True, slots=True)
class Ladder:
    """Rungs from coarse to exact, and the profile.

    `use[layer]` (E,) is the expected number of uses of every expert per token; `gate_quantiles` as in the manifest.
    """

    rungs: tuple[Rung, ...]
    use: tuple[Array, ...]
    gate_quantiles: tuple[float, ...]
    expert_bytes_bf16: int

    @property
    def exact(self) -> Rung:
        return self.rungs[-1]

    @property
    def num_experts(self) -> int:
        return sum(len(layer) for layer in self.use)

    @property
    def certified(self) -> tuple[Rung, ...]:
        return tuple(rung for rung in self.rungs if rung.loss is not None)

    def forms(self, max_loss: float) -> tuple[str, ...]:
        """The forms that a plan within `max_loss` may serve."""
        return tuple(rung.form for rung in self.certified) if max_loss > 0 else (self.exact.form,)

    def rung(self, form: str) -> Rung:
        """KeyError where the pack has no such form."""
        return {rung.form: rung for rung in self.rungs}[form]


def ladder_of(manifest: Manifest) -> Ladder:
    """The ladder and profile of a pack."""
    steps = {step.form: step for step in manifest.chain}
    rungs = []
    for form in manifest.forms:
        step = steps.get(form)
        exact = form == "exact"
        loss = 0.0 if exact else step.loss if step else None
        interval = Band(*step.loss_ci95) if step and not exact else Band(0.0, 0.0)
        parts = {part: held_bytes(manifest, part) for part in FORM_PARTS[form]}
        largest = {part: _largest_blob(manifest, part) for part in FORM_PARTS[form]}
        rungs.append(Rung(form, parts, largest, loss, interval, _errors(manifest, form)))
    use = tuple(_use(layer.frequency, layer.num_experts, manifest.experts_per_token) for layer in manifest.layers)
    return Ladder(tuple(rungs), use, manifest.gate_quantiles, manifest.expert_bytes_bf16)


def _errors(manifest: Manifest, form: str) -> tuple[float, ...]:
    """Error of `form` by layer, empty where nothing was measured. A layer that no text reached is taken as the mean."""
    measured = [layer.errors[form] for layer in manifest.layers if form in layer.errors]
    if form == "exact":
        return (0.0,) * len(manifest.layers)
    return tuple(layer.errors.get(form, sum(measured) / len(measured)) for layer in manifest.layers if measured)


def held_bytes(manifest: Manifest, part: str) -> int:
    """Memory that all blobs of `part` take: every blob in pages of its own."""
    entries = [layer.parts[part] for layer in manifest.layers]
    return sum(entry.rows * align(entry.nbytes, PAGE) for entry in entries)


def _largest_blob(manifest: Manifest, part: str) -> int:
    """Memory that one blob of `part` takes, in the layer where it is largest."""
    return max(align(layer.parts[part].nbytes, PAGE) for layer in manifest.layers)


def _use(frequency: tuple[float, ...], num_experts: int, experts_per_token: int) -> Array:
    """Uses per token; uniform where nothing was profiled."""
    shares: Array = np.array(frequency or [1 / num_experts] * num_experts)
    return np.asarray(shares / max(shares.sum(), 1e-12) * experts_per_token)
