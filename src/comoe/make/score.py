"""Scores of a model window by window, and the loss of one against another with its interval. No models here."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DomainScore:
    """`nats` and `tokens`, each (windows,): the sum over a window's predicted tokens, and their number."""

    nats: Floats
    tokens: NDArray[np.int64]

    @property
    def nats_per_token(self) -> float:
        return float(self.nats.sum() / self.tokens.sum())


@dataclass(frozen=True, slots=True)
class Score:
    """One model's nats, window by window, per domain."""

    domains: Mapping[str, DomainScore]

    @property
    def nats_per_token(self) -> dict[str, float]:
        return {name: domain.nats_per_token for name, domain in self.domains.items()}

    @property
    def mean(self) -> float:
        """Nats per token, domains weighing the same."""
        return float(np.mean(list(self.nats_per_token.values())))


@dataclass(frozen=True, slots=True)
class Loss:
    """Relative increase of nats over the exact model's (0.02 = 2 %): mean over domains, and the worst."""

    mean: float
    ci95: tuple[float, float]
    worst_domain: str
    worst: float
    worst_ci95: tuple[float, float]
    per_domain: Mapping[str, float]


def compare(score: Score, exact: Score, *, num_resamples: int = 10_000, seed: int = 0) -> Loss:
    """The loss of `score` against `exact`, paired window by window.

    A domain's loss is the mean over its windows of (nats - exact nats) / exact nats. The interval of the mean
    over domains is the percentile bootstrap (Efron 1979) over windows, resampled in each domain; over domains where one
    has a single window, which says nothing of how windows differ.
    ValueError where the two did not score the same windows.
    """
    increases = {name: _increase(score.domains.get(name), domain) for name, domain in exact.domains.items()}
    if not increases or score.domains.keys() != exact.domains.keys():
        raise ValueError("Only scores of the same domains can be compared, and of at least one.")
    rng = np.random.default_rng(seed)
    resampled = {name: x[rng.integers(len(x), size=(num_resamples, len(x)))].mean(1) for name, x in increases.items()}
    per_domain = {name: float(x.mean()) for name, x in increases.items()}
    worst = max(per_domain, key=per_domain.__getitem__)
    mean = float(np.mean(list(per_domain.values())))
    means = np.mean(list(resampled.values()), axis=0)
    if len(increases) > 1 and min(map(len, increases.values())) == 1:
        domains = rng.integers(len(increases), size=(num_resamples, len(increases)))
        means = np.array(list(per_domain.values()))[domains].mean(1)
    interval = _interval(means)
    return Loss(mean, interval, worst, per_domain[worst], _interval(resampled[worst]), per_domain)


def _interval(resampled: Floats) -> tuple[float, float]:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def _increase(domain: DomainScore | None, exact: DomainScore) -> Floats:
    """Relative increase (windows,) of a domain's nats."""
    if domain is None or not np.array_equal(domain.tokens, exact.tokens) or not len(exact.nats):
        raise ValueError("Only scores of the same windows can be compared.")
    return domain.nats / exact.nats - 1.0
