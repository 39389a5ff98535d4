"""Times of two sides that took turns: the median of a sample, and the interval that holds it."""

from collections.abc import Sequence


def median_interval(values: Sequence[float]) -> list[float]:
    """The order statistics that hold the median with 95 % probability (normal approximation of the sign test)."""
    ordered, half = sorted(values), 0.98 * len(values) ** 0.5
    low = max(0, int(len(values) / 2 - half))
    return [ordered[low], ordered[len(values) - 1 - low]]
