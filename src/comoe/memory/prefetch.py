"""What to read ahead, and whether to: predictors are scored on what came, reading ahead on the time that it saves.

Pure; the clock is an argument. The runtime and the simulator drive the same code.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

import numpy as np

from comoe.memory.predict import Predictor, likeliest
from comoe.store.foresight import Floats, Link
from comoe.types import ExpertId

PREFETCHES = ("auto", "on", "off")
"""What the setting may be: while it pays, always, never."""

LEAST_CHANCE = 0.7
"""Experts that are less likely used are not read ahead: of those that are, about nine in ten are used then."""

BLOCK, PAIRS = 8, 6
"""Tokens in a row that are decoded with reading ahead, or without; and how many of both are compared."""

REST, LONGEST_REST = 256, 4096
"""Tokens until it is tried again; twice as many after each time that nothing changed."""

MEMORY = 0.98
"""Of a score, what is left after another one is added: about fifty count."""


class Trial:
    """Whether something saves time: blocks of tokens without it and with it take turns, then what was faster stays.

    It is off unless measured to help: the mean of what the pairs of blocks saved is above its standard error.
    """

    def __init__(self) -> None:
        self.on = False
        self._won: bool | None = None
        self._rest, self._left = REST, 0
        self._block: list[float] = []
        self._medians: list[float] = []

    @property
    def trying(self) -> bool:
        """Whether blocks are compared now."""
        return not self._left

    def token(self, seconds: float) -> None:
        """A token took so long."""
        if self._left:
            self._left -= 1
        else:
            self._block.append(seconds)
            if len(self._block) == BLOCK:
                self._medians.append(median(self._block[1:]))  # the first one finds what the other way left
                self._block.clear()
        if len(self._medians) == 2 * PAIRS:
            self._decide()
        if self.trying:
            self.on = len(self._medians) % 4 in (1, 2)  # which of a pair comes first changes from one to the next

    def _decide(self) -> None:
        pairs = zip(self._medians[::2], self._medians[1::2], strict=True)
        saved = [first - second if at % 2 == 0 else second - first for at, (first, second) in enumerate(pairs)]
        won = fmean(saved) > stdev(saved) / len(saved) ** 0.5
        self._rest = min(2 * self._rest, LONGEST_REST) if won == self._won else REST
        self.on = self._won = won
        self._left = self._rest
        self._medians.clear()


@dataclass(slots=True)
class Recall:
    """Of what layers used lately, the share among as many of the experts that a predictor held likeliest."""

    value: float = 0.0
    weight: float = 0.0

    def add(self, chances: Floats, used: Sequence[int]) -> None:
        likely = np.argpartition(-chances, len(used) - 1)[: len(used)].tolist()
        self.weight = MEMORY * self.weight + 1
        self.value += (len({*likely} & {*used}) / len(used) - self.value) / self.weight


class Prefetcher:
    """Foretells what the next layer uses, while it pays.

    `predictors` by name, the first of which drives until another one's recall is better. `always`: paying or not.
    A prompt is read ahead whatever decoding found: its layers take whole sets of experts, and predictions hardly fail.
    """

    def __init__(self, predictors: Mapping[str, Predictor], links: Iterable[Link], *, always: bool = False) -> None:
        self._predictors, self._links, self._always = predictors, {link.layer: link for link in links}, always
        self.recall = {name: Recall() for name in predictors}
        self.trial = Trial()
        self._told: dict[int, dict[str, Floats]] = {}
        self._layer, self._decoding, self._start_s = -1, False, 0.0

    def step(
        self, layer: int, tokens: int, experts: Sequence[int], see: Callable[[], Floats], now_s: float
    ) -> list[ExpertId]:
        """A chunk of so many tokens uses `experts` of `layer` at `now_s`; what the next layer likely uses.

        `see` answers what the chunk's experts are given (tokens, H).
        """
        decoding = tokens == 1
        self._begin(layer, decoding, now_s)
        if decoding and not (self.active or self.trial.trying):
            return []
        self._score(layer, experts, tokens)
        link = self._links.get(layer)
        if link is None:
            return []
        x = see()
        told = self._tell(link, x[-1:] if link.later else x, scoring=decoding and self.trial.trying)
        if decoding and not self.active:
            return []
        return [ExpertId(link.target, expert) for expert in likeliest(told, LEAST_CHANCE)]

    @property
    def active(self) -> bool:
        """Whether decoding reads ahead now."""
        return self._always or self.trial.on

    @property
    def driver(self) -> str:
        """The predictor whose recall is best."""
        return max(self._predictors, key=lambda name: self.recall[name].value)

    def _begin(self, layer: int, decoding: bool, now_s: float) -> None:
        """Time a pass that decodes, from its first layer to the next pass's."""
        if layer <= self._layer or decoding != self._decoding:
            if decoding and self._decoding:
                self.trial.token(now_s - self._start_s)
            self._decoding, self._start_s = decoding, now_s
        self._layer = layer

    def _tell(self, link: Link, x: Floats, *, scoring: bool) -> Floats:
        asked = self._predictors if scoring else [self.driver]
        told = {name: self._predictors[name].chances(link, x) for name in asked}
        if scoring:
            self._told[link.target] = told
        return told[self.driver]

    def _score(self, layer: int, experts: Sequence[int], tokens: int) -> None:
        told = self._told.pop(layer, {})
        for name, predictor in self._predictors.items():
            if name in told and tokens == 1 and experts:
                self.recall[name].add(told[name], experts)
            predictor.used(layer, experts, tokens)
