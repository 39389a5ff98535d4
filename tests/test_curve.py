"""The cache model against caches that really evict, and its tables against what they stand for."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comoe.plan.curve import curves, hit_rate

uses = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=40).map(np.array)
shares = st.floats(0, 1)
NUM_REQUESTS = 60_000


def simulated(use: np.ndarray, num_cached: int) -> float:
    """Hit rate of an LRU cache on requests drawn independently in proportion to `use`, once it is warm."""
    rng = np.random.default_rng(0)
    requests = rng.choice(len(use), NUM_REQUESTS, p=use / use.sum()).tolist()
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for at, expert in enumerate(requests):
        hits += expert in cache and at >= NUM_REQUESTS // 3
        cache[expert] = None
        cache.move_to_end(expert)
        if len(cache) > num_cached:
            cache.popitem(last=False)
    return hits / (NUM_REQUESTS - NUM_REQUESTS // 3)


PROFILES = {
    "uniform": np.ones(64),
    "linear": np.arange(1, 65) / 64,
    "Zipf": 1 / np.arange(1, 65),
    "steep": 0.8 ** np.arange(40),
    "two kinds": np.array([1.0] * 8 + [0.02] * 100),
}


@pytest.mark.parametrize("num_cached", [2, 8, 24])
@pytest.mark.parametrize("profile", PROFILES)
def test_the_cache_model_predicts_a_simulated_lru(profile: str, num_cached: int) -> None:
    use = PROFILES[profile]
    assert hit_rate(use, num_cached, "lru") == pytest.approx(simulated(use, num_cached), abs=0.02)


@given(uses, shares)
def test_a_hit_rate_lies_between_a_blind_cache_and_an_all_knowing_one(use: np.ndarray, share: float) -> None:
    """No cache of that size beats keeping the most used experts; LRU is no worse than keeping any."""
    num_cached = share * len(use)
    order = np.sort(use)[::-1]
    best = np.interp(num_cached, np.arange(len(use) + 1), np.concatenate([[0], np.cumsum(order)])) / use.sum()
    assert num_cached / len(use) - 1e-6 <= hit_rate(use, num_cached, "lru") <= best + 1e-6


@given(uses, shares, shares)
def test_a_larger_cache_never_hits_less(use: np.ndarray, one: float, other: float) -> None:
    small, large = sorted((one * len(use), other * len(use)))
    assert hit_rate(use, small, "lru") <= hit_rate(use, large, "lru") + 1e-9


@given(uses, shares, st.floats(1e-9, 1e9))
def test_only_proportions_of_use_matter(use: np.ndarray, share: float, factor: float) -> None:
    num_cached = share * len(use)
    assert hit_rate(factor * use, num_cached, "lru") == pytest.approx(hit_rate(use, num_cached, "lru"), abs=1e-6)


@given(st.integers(1, 200), shares)
def test_under_uniform_use_the_hit_rate_is_the_share_that_is_cached(num_experts: int, share: float) -> None:
    assert hit_rate(np.full(num_experts, 0.3), share * num_experts, "lru") == pytest.approx(share, abs=1e-6)


@given(uses, shares, st.integers(1, 20))
def test_experts_that_nobody_uses_take_no_room(use: np.ndarray, share: float, idle: int) -> None:
    padded = np.concatenate([np.zeros(idle), use])
    assert hit_rate(padded, share * len(use), "lru") == pytest.approx(hit_rate(use, share * len(use), "lru"))


def test_a_cache_for_all_always_hits_and_none_never() -> None:
    use = np.array([0.5, 0.3, 0.0])
    assert [hit_rate(use, cached, "lru") for cached in (-1, 0, 2, 3, 99)] == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert hit_rate(np.zeros(4), 0, "lru") == 1.0  # no use, no miss


@pytest.mark.parametrize("use", [np.array([1.0, 1e-300]), np.array([1.0, 5e-324]), np.array([1e-200] * 3 + [1.0])])
@settings(deadline=None)
@given(share=shares)
def test_use_that_hardly_happens_ends_the_search_too(use: np.ndarray, share: float) -> None:
    assert 0 <= hit_rate(use, share * len(use), "lru") <= 1


def che(use: np.ndarray, num_cached: float) -> float:
    """Che's approximation by bisection: sum(1 - exp(-use * t)) = num_cached."""
    low, high = 0.0, 1e9 / use.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if -np.expm1(-use * middle).sum() < num_cached else (low, middle)
    return float((use * -np.expm1(-use * high)).sum() / use.sum())


@given(uses, st.floats(0, 0.99))
def test_between_two_tabulated_times_hits_are_those_of_the_characteristic_time(use: np.ndarray, share: float) -> None:
    assert hit_rate(use, share * len(use), "lru") == pytest.approx(che(use, share * len(use)), abs=2e-5)


@given(uses, shares)
def test_lfu_keeps_the_most_used(use: np.ndarray, share: float) -> None:
    order = np.concatenate([[0], np.cumsum(np.sort(use)[::-1])]) / use.sum()
    assert hit_rate(use, share * len(use), "lfu") == pytest.approx(
        np.interp(share * len(use), range(len(order)), order)
    )


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@given(data=st.data())
def test_every_set_of_experts_has_the_curve_that_it_has_alone(policy: str, data: st.DataObject) -> None:
    use = data.draw(uses)
    members = np.array(data.draw(st.lists(st.lists(st.booleans(), min_size=len(use), max_size=len(use)), min_size=1)))
    of = np.arange(len(members))
    held = data.draw(shares) * members.sum(1)
    together = curves(use, members, policy).hits(of, held)
    alone = [hit_rate(use[flags], cached, policy) for flags, cached in zip(members, held.tolist(), strict=True)]
    assert together == pytest.approx(alone, abs=2e-5)


def test_most_policies_are_taken_to_hit_as_lru_does() -> None:
    use = PROFILES["Zipf"]
    assert hit_rate(use, 8, "gdsf") == hit_rate(use, 8, "lru") < hit_rate(use, 8, "lfu") - 0.05
