"""Likeness: text that uses experts as the calibration did is alike, and other text by the error that it would have."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from packs import edit, write_pack

from comoe.plan.likeness import LEAST_SHARE, PRIOR_USES, LayerErrors, Likeness, likeness_of
from comoe.store.manifest import Manifest, read_manifest

CALIBRATED = ((0.5, 0.3, 0.2), (0.2, 0.2, 0.6))
"""Shares of the gates of two layers' experts in calibration text."""

ERRORS = ((0.1, 0.2, 0.1), (0.0, 0.1, 0.3))
"""What each expert adds to the error of its layer there."""


def likeness() -> Likeness:
    layers = zip(ERRORS, CALIBRATED, strict=True)
    per_gate = [(tuple(e / m for e, m in zip(*layer, strict=True)), sum(layer[0])) for layer in layers]
    return Likeness([LayerErrors(*layer) for layer in per_gate])


def used(found: Likeness, shares: tuple[tuple[float, ...], ...], tokens: int, *, decode: bool = True) -> None:
    """Add so many tokens that use experts in such shares."""
    for layer, of_layer in enumerate(shares):
        for expert, share in enumerate(of_layer):
            found.add(layer, expert, share * tokens, tokens, decode=decode)


DEAR = ((0.0, 1.0, 0.0), (0.0, 1.0, 0.0))
"""Of text that uses the experts alone whose gates have the most error: 2/3 and 1/2 each, over 0.4 and 0.4."""


def test_nothing_that_was_seen_is_unlike_anything() -> None:
    found = likeness()
    assert (found.distance, found.alike, found.charge) == (1.0, True, 1.0)


@given(st.integers(1, 500), st.booleans())
def test_text_that_uses_experts_as_calibration_did_is_alike(tokens: int, decode: bool) -> None:
    found = likeness()
    used(found, CALIBRATED, tokens, decode=decode)
    assert found.distance == pytest.approx(1.0) and found.charge == 1.0


def test_the_distance_is_the_error_of_the_uses_over_that_of_the_calibration() -> None:
    found = likeness()
    used(found, DEAR, 100_000)
    assert found.distance == pytest.approx((0.2 / 0.3 + 0.1 / 0.2) / 0.8, rel=1e-2)


def test_text_of_less_error_is_alike() -> None:
    found = likeness()
    used(found, ((1.0, 0.0, 0.0), (1.0, 0.0, 0.0)), 1000)
    assert found.distance < 1 and found.alike and found.charge == 1.0


def test_unlike_text_is_charged_by_the_square_of_its_distance() -> None:
    found = Likeness([LayerErrors((0.0, 4.0), 1.0)])
    found.add(0, 1, 4.0, 4)
    assert found.distance == pytest.approx(1 + 3 * 4 / (4 + PRIOR_USES * 2)) and not found.alike
    assert found.charge == found.distance**2


@given(st.integers(1, 300), st.integers(1, 300))
def test_the_more_there_is_of_a_text_the_more_it_says(some: int, more: int) -> None:
    less, found = likeness(), likeness()
    used(less, DEAR, some)
    used(found, DEAR, some + more)
    assert 1 < less.distance < found.distance


def test_an_answer_may_leave_what_its_prompt_was_like() -> None:
    found = Likeness([LayerErrors((0.0, 4.0), 1.0)])
    found.add(0, 0, 1000.0, 1000, decode=False)
    assert found.alike
    for _ in range(20):
        found.add(0, 1, 1.0, 1)
    assert not found.alike and found.distance < 4


def test_a_prompt_tells_what_its_answer_will_be_like() -> None:
    found = Likeness([LayerErrors((0.0, 4.0), 1.0)])
    found.add(0, 1, 20.0, 20, decode=False)
    assert not found.alike


def test_a_request_starts_from_nothing() -> None:
    found = likeness()
    used(found, DEAR, 1000)
    found.clear()
    assert found.distance == 1.0


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Manifest]:
    """The manifest of the toy pack, what its first layer says changed before."""
    write_pack(tmp_path / "pack", None)

    def read_(**changed: object) -> Manifest:
        edit(tmp_path / "pack", lambda document: document["layers"][0].update(changed))
        return read_manifest(tmp_path / "pack")

    return read_


RARE = {"errors": {"q4": (0.1, 0.1, 0.2, 0.2)}, "mass": (0.75, 0.25, 0.0, 0.0)}


def test_errors_are_for_a_gate_of_1_and_finite_where_calibration_saw_nothing(read: Callable[..., Manifest]) -> None:
    manifest = read(**RARE)
    digit = str(manifest.forms.index("q4"))
    certified = next(step for step in manifest.chain if step.certificate is not None)
    step = replace(certified, assignment=(digit * 4, digit * 4))
    found = likeness_of(replace(manifest, chain=(step,)))
    assert found is not None
    usual = 0.6 + sum(manifest.layers[1].errors["q4"])
    assert found.layers[0].usual == pytest.approx(0.6 / usual)
    rare = 0.2 * 4 / LEAST_SHARE
    expected = [error / usual for error in (0.1 / 0.75, 0.1 / 0.25, rare, rare)]
    assert found.layers[0].experts == pytest.approx(expected)


def test_steps_count_alike_whatever_their_errors_are(read: Callable[..., Manifest]) -> None:
    manifest = read()
    steps = [step for step in manifest.chain if step.certificate is not None and step.name != "exact"]
    each = [likeness_of(replace(manifest, chain=(step,))) for step in steps]
    found = likeness_of(manifest)
    assert found is not None and len(steps) > 1
    for at, layer in enumerate(found.layers):
        alone = [one.layers[at] for one in each if one is not None]
        assert layer.usual == pytest.approx(sum(one.usual for one in alone) / len(alone))
        assert layer.experts == pytest.approx(np.mean([one.experts for one in alone], 0))
    assert sum(layer.usual for layer in found.layers) == pytest.approx(1.0)


def test_nothing_is_held_against_a_calibration_that_certified_nothing(read: Callable[..., Manifest]) -> None:
    manifest = read()
    for steps in ((), tuple(replace(step, certificate=None) for step in manifest.chain), manifest.chain[-1:]):
        assert likeness_of(replace(manifest, chain=steps)) is None
    assert likeness_of(replace(manifest, layers=tuple(replace(layer, errors={}) for layer in manifest.layers))) is None


@pytest.mark.parametrize("unknown", [{"errors": {}}, {"mass": ()}, {"mass": (0.0,) * 4}])
def test_layers_that_no_text_reached_say_nothing(read: Callable[..., Manifest], unknown: dict[str, object]) -> None:
    found = likeness_of(read(**unknown))
    assert found is not None
    found.add(0, 0, 5.0, 5)
    assert found.distance == 1.0
