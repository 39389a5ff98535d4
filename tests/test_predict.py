"""Predictors by hand, and what is recorded of them."""

import numpy as np
import pytest

from comoe.memory.predict import PRIOR_TOKENS, Foretold, Frequent, Learned, Previous, likeliest
from comoe.store.foresight import Floats, Link
from comoe.store.trace import Foreseen

LINK = Link(0, 1)


def inputs(*rows: float) -> Floats:
    return np.array(rows, np.float32)[:, None]


def test_learned_chances_are_logistic_and_of_any_of_the_tokens() -> None:
    weights = np.array([[1.0, 0.0], [0.0, np.log(3.0)]], np.float32)
    learned = Learned({LINK: weights})
    assert learned.chances(LINK, inputs(0.0)) == pytest.approx([0.5, 0.75])
    assert learned.chances(LINK, inputs(0.0, 0.0)) == pytest.approx([0.75, 1 - 1 / 16])


def test_frequent_begins_with_the_plan_and_follows_what_is_seen() -> None:
    frequent = Frequent([np.array([1.0]), np.array([0.75, 0.25])])
    assert frequent.chances(LINK, inputs(0.0)) == pytest.approx([0.75, 0.25])
    assert frequent.chances(LINK, inputs(0.0, 0.0)) == pytest.approx([1 - 1 / 16, 1 - 9 / 16])
    for _ in range(PRIOR_TOKENS):
        frequent.used(1, [1], 1)
    assert frequent.chances(LINK, inputs(0.0)) == pytest.approx([0.375, 0.625])


def test_previous_says_what_the_layer_used_last() -> None:
    previous = Previous([1, 3])
    assert previous.chances(LINK, inputs(0.0)).tolist() == [0, 0, 0]
    previous.used(1, [0, 2], 1)
    previous.used(0, [0], 1)
    assert previous.chances(LINK, inputs(0.0)).tolist() == [1, 0, 1]
    previous.used(1, [1], 1)
    assert previous.chances(LINK, inputs(0.0)).tolist() == [0, 1, 0]


def test_foretold_says_what_was_recorded_of_the_chunk() -> None:
    ahead = Foreseen(np.array([0, 2, 2, 3]), np.array([2, 0, 1], np.int32), np.array([0.9, 0.5, 0.25], np.float32))
    foretold = Foretold(ahead, [3, 3])
    said = []
    for chunk in range(3):
        foretold.begin(chunk)
        said.append(foretold.chances(LINK, inputs(0.0)).tolist())
    assert said == [[0.5, 0, pytest.approx(0.9)], [0, 0, 0], [0, 0.25, 0]]


def test_the_likeliest_come_first_and_none_below_the_least() -> None:
    assert likeliest(np.array([0.6, 0.9, 0.7, 0.9], np.float32), 0.7) == [1, 3, 2]
