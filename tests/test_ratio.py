"""The interval of a median."""

import numpy as np

from comoe.bench.ratio import median_interval


def test_the_interval_holds_the_median_and_comes_from_the_sample() -> None:
    low, high = median_interval([5.0, 1.0, 9.0, 3.0, 7.0, 2.0, 8.0, 4.0, 6.0])
    assert (low, high) == (2.0, 8.0)
    assert median_interval([1.0]) == [1.0, 1.0]


def test_the_interval_holds_the_true_median_about_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(0)
    intervals = [median_interval(rng.exponential(size=48).tolist()) for _ in range(1000)]
    held = sum(low <= np.log(2) <= high for low, high in intervals)
    assert 920 <= held <= 985
