"""Whether text is like what a pack was calibrated on, told by the experts that its routers choose. Pure.

Losses are certified on calibration text; other text uses other experts, and those forms were made for few uses of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from comoe.plan.ladder import PRIOR_USES
from comoe.store.manifest import LayerEntry, Manifest

UNLIKE = 1.5
"""Times the calibration's error from which on text is unlike it: see docs/decisions/023."""

LEAST_SHARE = 0.03
"""Of an even share of a layer's gates, what experts are taken to have had that calibration hardly saw."""


class LayerErrors(NamedTuple):
    """The error of a layer's outputs for a gate of 1: of each expert, and of calibration text."""

    experts: tuple[float, ...]
    usual: float


@dataclass(slots=True)
class Errors:
    """Sums over uses: the error that they have, that which calibration text has for such gates, and their number."""

    found: float = 0.0
    usual: float = 0.0
    uses: int = 0

    def excess(self, prior: int) -> float:
        """How much more error than usual, as a fraction, beside `prior` uses that have no more."""
        return (self.found / self.usual - 1) * self.uses / (self.uses + prior) if self.usual else 0.0


@dataclass(slots=True)
class Likeness:
    """Adds up the error of a request's uses, were all of them in one rung, and that of calibration text beside it.

    Calibration text counts as `PRIOR_USES` uses of each expert, since a few say little.
    """

    layers: Sequence[LayerErrors]
    request: Errors = field(default_factory=Errors)
    answer: Errors = field(default_factory=Errors)

    def add(self, layer: int, expert: int, gate: float, tokens: int, *, decode: bool = True) -> None:
        """Record that so many tokens of the answer, or of its prompt, use an expert, with gates that sum to `gate`."""
        errors = self.layers[layer]
        for sums in (self.request, self.answer) if decode else (self.request,):
            sums.found += gate * errors.experts[expert]
            sums.usual += gate * errors.usual
            sums.uses += tokens

    @property
    def distance(self) -> float:
        """How many times the error of calibration text the request has, or its answer alone where that has more."""
        prior = PRIOR_USES * sum(len(layer.experts) for layer in self.layers)
        return 1 + max(self.request.excess(prior), self.answer.excess(prior))

    @property
    def alike(self) -> bool:
        return self.distance < UNLIKE

    @property
    def charge(self) -> float:
        """How many times its certified price a use costs: as measured, the square of the distance of unlike text."""
        distance = self.distance
        return distance**2 if distance >= UNLIKE else 1.0

    def clear(self) -> None:
        """Start a request."""
        self.request, self.answer = Errors(), Errors()


def likeness_of(manifest: Manifest, rung: str) -> Likeness | None:
    """The likeness of text to a pack's calibration, told in a form or a step; None where that has no errors."""
    found = [_errors(layer, forms) for layer, forms in zip(manifest.layers, manifest.assignment(rung), strict=True)]
    return Likeness(found) if any(layer.usual for layer in found) else None


def _errors(layer: LayerEntry, forms: Sequence[str]) -> LayerErrors:
    """Zeros where the layer's errors were not measured, or where no text reached it."""
    if any(form not in layer.errors for form in {*forms} - {"exact"}) or not layer.mass:
        return LayerErrors((0.0,) * layer.num_experts, 0.0)
    added = np.array([layer.errors[form][at] if form != "exact" else 0.0 for at, form in enumerate(forms)])
    shares = np.maximum(layer.mass, LEAST_SHARE / layer.num_experts)
    return LayerErrors(tuple((added / shares).tolist()), float(added.sum()))
