"""Whether text is like what a pack was calibrated on, told by the experts that its routers choose. Pure.

Losses are certified on calibration text, and steps of the chain are coarse where that hurts little there. Other text
uses just those experts more: how much more error it would have is its distance.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from comoe.plan.ladder import Array, layer_error
from comoe.store.manifest import LayerEntry, Manifest

UNLIKE = 1.4
"""The distance from which on text is unlike the calibration: see docs/decisions/023."""

PRIOR_USES = 4
"""Of each expert, on average, as many uses as calibration text counts for beside a request's: a few say little."""

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
    """Adds up the error of a request's uses, and of its answer's alone, beside that of calibration text.

    It is that of all steps of the chain on average, so that it tells of a text whatever the plan is.
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
        """How many times its certified price a use costs: of unlike text, the square of its distance, as measured."""
        distance = self.distance
        return distance**2 if distance >= UNLIKE else 1.0

    def clear(self) -> None:
        """Start a request."""
        self.request, self.answer = Errors(), Errors()


def likeness_of(manifest: Manifest) -> Likeness | None:
    """What holds text against a pack's calibration; None where no step of its chain has a certificate and errors."""
    steps = [step.name for step in manifest.chain if step.certificate is not None and step.name != "exact"]
    found = [errors for errors in (_errors(manifest, step) for step in steps) if errors[1].any()]
    if not found:
        return None
    experts, usual = (np.mean([errors[at] / errors[1].sum() for errors in found], 0) for at in (0, 1))
    ends = np.cumsum([layer.num_experts for layer in manifest.layers])[:-1]
    layers = zip(np.split(experts, ends), usual.tolist(), strict=True)
    return Likeness([LayerErrors(tuple(of_layer.tolist()), of_text) for of_layer, of_text in layers])


def _errors(manifest: Manifest, step: str) -> tuple[Array, Array]:
    """Errors for a gate of 1, of all experts (N,) and of calibration text by layer (L,)."""
    found = [_of_layer(layer, forms) for layer, forms in zip(manifest.layers, manifest.assignment(step), strict=True)]
    added = [errors / np.maximum(shares, LEAST_SHARE / len(shares)) for errors, shares in found]
    return np.concatenate(added), np.array([errors.sum() for errors, _ in found])


def _of_layer(layer: LayerEntry, forms: Sequence[str]) -> tuple[Array, Array]:
    """What each expert (E,) adds to a layer's error, and its share of the gates (E,); nothing where no text came by."""
    shares = np.array(layer.mass or [0.0] * layer.num_experts)
    if layer_error(layer, forms) is None or not shares.any():
        return np.zeros(layer.num_experts), shares
    return np.array([layer.errors[form][at] if form != "exact" else 0.0 for at, form in enumerate(forms)]), shares
