"""Whether a session turned to another domain: told soon, and hardly ever for nothing."""

import numpy as np
import pytest

from comoe.plan.shift import LEAST, WINDOW_TOKENS, Counts, ShiftDetector, distance

EXPERTS, LAYERS, TOP_K = 32, 6, 4
STARTS = [EXPERTS * layer for layer in range(LAYERS)]


def domain(rng: np.random.Generator) -> Counts:
    """How likely each expert is, by layer: skewed, as trained routers are in a domain."""
    return rng.dirichlet(np.full(EXPERTS, 0.3), LAYERS)


def window(rng: np.random.Generator, likely: Counts) -> Counts:
    return np.concatenate([rng.multinomial(WINDOW_TOKENS * TOP_K, layer) for layer in likely]).astype(np.float64)


def test_samples_of_one_distribution_are_about_one_apart_whatever_their_sizes() -> None:
    rng = np.random.default_rng(0)
    flat = np.full((LAYERS, EXPERTS), 1 / EXPERTS)
    for times in (1, 10):
        far = [
            distance(window(rng, flat), sum(window(rng, flat) for _ in range(times)), STARTS).far  # type: ignore[arg-type]
            for _ in range(200)
        ]
        assert np.mean(far) == pytest.approx(1, abs=0.1)


def test_layers_that_saw_nothing_count_nothing() -> None:
    rng = np.random.default_rng(0)
    first, second = (window(rng, domain(rng)) for _ in range(2))
    half = np.concatenate([first[: STARTS[3]], np.zeros(EXPERTS * 3)])
    assert distance(half, second, STARTS) == pytest.approx(
        distance(first[: STARTS[3]], second[: STARTS[3]], STARTS[:3])
    )
    assert distance(np.zeros_like(first), second, STARTS) == (0, 0)


def test_another_domain_is_noticed_in_its_first_window() -> None:
    rng = np.random.default_rng(0)
    noticed = 0
    for _ in range(50):
        detector, old, new = ShiftDetector(STARTS), domain(rng), domain(rng)
        for _ in range(LEAST + 2):
            detector.add(window(rng, old))
        noticed += detector.add(window(rng, new))
    assert noticed == 50


def test_one_domain_is_hardly_ever_taken_for_two() -> None:
    rng = np.random.default_rng(0)
    detector, likely = ShiftDetector(STARTS), domain(rng)
    assert sum(detector.add(window(rng, likely)) for _ in range(2_000)) <= 2


def test_bursts_are_no_shift_since_they_are_usual_here() -> None:
    """Each window has 16 tokens, but only two kinds of them: it varies far more than its number of uses says."""
    rng = np.random.default_rng(0)
    detector, kinds = ShiftDetector(STARTS), [domain(rng) for _ in range(12)]
    bursts = [np.mean([kinds[at] for at in rng.integers(len(kinds), size=4)], axis=0) for _ in range(300)]
    assert np.mean([detector.add(window(rng, burst)) for burst in bursts]) < 0.05


def test_a_domain_is_forgotten_when_it_ends() -> None:
    rng = np.random.default_rng(0)
    detector, old, new = ShiftDetector(STARTS), domain(rng), domain(rng)
    for likely, is_another in ((old, False), (new, True), (old, True)):
        found = [detector.add(window(rng, likely)) for _ in range(LEAST + 4)]
        assert found == [is_another, *[False] * (LEAST + 3)]
