"""Losses and their intervals: an interval is wide where windows differ, also where every domain has but one."""

import numpy as np

from comoe.make.score import DomainScore, Score, compare


def scores(nats: dict[str, list[float]]) -> Score:
    return Score({name: DomainScore(np.array(found), np.full(len(found), 10)) for name, found in nats.items()})


def test_with_one_window_in_each_domain_the_interval_tells_how_domains_differ() -> None:
    exact = scores({name: [100.0] for name in "abcdef"})
    loss = compare(scores({name: [100.0 + at] for at, name in enumerate("abcdef")}), exact)
    low, high = loss.ci95
    assert low < loss.mean < high
    assert low >= 0.0 and high <= 0.05


def test_with_more_windows_domains_are_not_resampled() -> None:
    exact = scores({name: [100.0, 100.0] for name in "ab"})
    loss = compare(scores({"a": [101.0, 101.0], "b": [103.0, 103.0]}), exact)
    assert np.allclose(loss.ci95, 0.02)


def test_the_worst_domain_comes_with_its_own_interval() -> None:
    exact = scores({"a": [100.0] * 20, "b": [100.0] * 20})
    loss = compare(scores({"a": [100.0] * 20, "b": [104.0, 106.0] * 10}), exact)
    assert (loss.worst_domain, round(loss.worst, 6)) == ("b", 0.05)
    assert 0.045 < loss.worst_ci95[0] < 0.05 < loss.worst_ci95[1] < 0.055
