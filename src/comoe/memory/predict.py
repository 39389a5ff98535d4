"""Which experts the next layer will use: predictors. Pure and on numpy alone."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from comoe.store.foresight import Floats, Link
from comoe.store.trace import Foreseen

LEAST_LOGIT = -30.0
"""What is less likely is no likelier than that: exp would overflow."""

PRIOR_TOKENS = 8
"""Tokens that a profile's shares of use count for beside what a session is seen to use."""


class Predictor(Protocol):
    """Foretells what a layer uses from what the one before it was given."""

    def chances(self, link: Link, x: Floats) -> Floats:
        """How likely each expert (E,) of the target is used after its layer saw `x` (N, H)."""
        ...

    def used(self, layer: int, experts: Sequence[int], tokens: int) -> None:
        """So many tokens used these experts of `layer`."""
        ...


class Learned:
    """Logistic regression on what the experts of the layer before are given: `weights` (H + 1, E), the bias last."""

    def __init__(self, weights: Mapping[Link, Floats]) -> None:
        self._weights = weights

    def chances(self, link: Link, x: Floats) -> Floats:
        weights = self._weights[link]
        logits = np.maximum(x @ weights[:-1] + weights[-1], LEAST_LOGIT)
        return _of_any(1 / (1 + np.exp(-logits)))

    def used(self, layer: int, experts: Sequence[int], tokens: int) -> None:
        return


class Foretold:
    """What a trace's foresight said, chunk by chunk; `experts` are the numbers of each layer's."""

    def __init__(self, ahead: Foreseen, experts: Sequence[int]) -> None:
        self._ahead, self._experts, self._bounds, self._chunk = ahead, experts, ahead.foreseen.tolist(), 0

    def begin(self, chunk: int) -> None:
        """What is asked from now on is of the chunk of this number."""
        self._chunk = chunk

    def chances(self, link: Link, x: Floats) -> Floats:
        found = np.zeros(self._experts[link.target], np.float32)
        of = slice(self._bounds[self._chunk], self._bounds[self._chunk + 1])
        found[self._ahead.candidate[of]] = self._ahead.chance[of]
        return found

    def used(self, layer: int, experts: Sequence[int], tokens: int) -> None:
        return


class Frequent:
    """How often each expert is used: `uses[layer]` (E,) per token to begin with, and what was seen since."""

    def __init__(self, uses: Sequence[npt.NDArray[np.float64]]) -> None:
        self._uses = [PRIOR_TOKENS * layer for layer in uses]
        self._tokens = [PRIOR_TOKENS] * len(uses)

    def chances(self, link: Link, x: Floats) -> Floats:
        share = np.minimum(self._uses[link.target] / self._tokens[link.target], 1.0)
        found: Floats = (1 - (1 - share) ** len(x)).astype(np.float32)
        return found

    def used(self, layer: int, experts: Sequence[int], tokens: int) -> None:
        self._tokens[layer] += tokens
        self._uses[layer][experts] += 1


class Previous:
    """What a layer used last, it uses again."""

    def __init__(self, experts: Sequence[int]) -> None:
        self._last = [np.zeros(number, np.float32) for number in experts]

    def chances(self, link: Link, x: Floats) -> Floats:
        return self._last[link.target]

    def used(self, layer: int, experts: Sequence[int], tokens: int) -> None:
        self._last[layer] = np.zeros_like(self._last[layer])
        self._last[layer][experts] = 1


def likeliest(chances: Floats, least: float) -> list[int]:
    """The experts whose chance is at least `least`, the likeliest first."""
    order: list[int] = np.argsort(-chances, kind="stable").tolist()
    return order[: int((chances >= least).sum())]


def _of_any(chances: Floats) -> Floats:
    """That any of N tokens uses an expert (E,), from the chances of each (N, E)."""
    found: Floats = chances[0] if len(chances) == 1 else 1 - np.prod(1 - chances, axis=0)
    return found
