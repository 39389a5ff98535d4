"""The ladder of a pack: its forms and the steps of its chain as blobs in whole pages, prices from certificates, use per
token from the profile.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ladders import ladder
from msgspec.structs import replace
from packs import FORMS, SITE, edit, write_pack

from comoe.plan.ladder import Band, Ladder, Rung, ladder_of
from comoe.store.layout import PAGE, layout
from comoe.store.manifest import MANIFEST, read_manifest
from comoe.store.profile import PHASES, Profile, Routed
from comoe.types import UsageError

EVERY = {"merged": 4096, "high": 8192, "low": 4096, "exact": 16384}
PAGES = {part: -(-layout(SITE, part).nbytes // PAGE) * PAGE for part in EVERY}
"""Memory of a blob of the toy pack."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("original")
    write_pack(folder / "pack", None)
    return (folder / "pack" / MANIFEST).read_bytes()


@pytest.fixture
def read(original: bytes, tmp_path: Path) -> Callable[..., Ladder]:
    """The ladder of the toy pack, its manifest changed before."""

    def read_(change: Callable[[Any], object] = lambda document: None, profile: Profile | None = None) -> Ladder:
        (tmp_path / MANIFEST).write_bytes(original)
        edit(tmp_path, change)
        return ladder_of(read_manifest(tmp_path), profile)

    return read_


def each_layer(**entries: object) -> Callable[[Any], object]:
    return lambda document: [layer.update(entries) for layer in document["layers"]]


def rung(name: str, loss: float | None, interval: tuple[float, float], errors: tuple[float, ...] = ()) -> Rung:
    """One of a single expert, for what follows from the certificate and the errors alone."""
    one = np.zeros(1, np.int64)
    return Rung(name, ("q4",), one, one[:, None], np.array([4096, 0]), np.ones(1), loss, Band(*interval), errors)


def test_rungs_are_the_packs_forms_then_the_steps_of_its_chain_and_exact_once_at_the_end(
    read: Callable[..., Ladder],
) -> None:
    found = read()
    assert tuple(rung.name for rung in found.rungs) == (*FORMS[:-1], "8%", "20%", "40%", "exact")
    assert found.exact is found.rungs[-1] and found.rung("q4") is found.rungs[1]
    for change in (lambda document: document.update(chain=[]), lambda document: document["chain"].pop()):
        assert [rung.name for rung in read(change).rungs][-1] == "exact"


def test_a_form_or_step_that_is_not_there_is_a_key_error(read: Callable[..., Ladder]) -> None:
    for name in ("q2", "12%"):
        with pytest.raises(KeyError):
            read().rung(name)


def test_a_rungs_memory_is_that_of_all_its_blobs_in_pages_of_their_own(read: Callable[..., Ladder]) -> None:
    found = read()
    assert found.rung("merged").nbytes == 2 * 2 * PAGES["merged"]
    assert found.rung("q4").nbytes == 2 * 4 * PAGES["high"]
    assert found.rung("q8").nbytes == 2 * 4 * (PAGES["high"] + PAGES["low"])
    assert found.exact.nbytes == 2 * 4 * PAGES["exact"]
    assert found.exact.group_beside(None) == PAGES["exact"]


def test_a_steps_memory_is_that_of_the_blobs_of_its_assignment_shared_ones_once(read: Callable[..., Ladder]) -> None:
    found = read(lambda document: document["chain"][0].update(assignment=["0001", "0123"]))
    assert found.rung("8%").nbytes == 3 * PAGES["merged"] + 3 * PAGES["high"] + PAGES["low"] + PAGES["exact"]
    assert found.rung("20%").nbytes == 2 * (PAGES["merged"] + 3 * PAGES["high"])
    assert found.rung("40%").nbytes == 2 * (4 * PAGES["high"] + 2 * PAGES["low"])


def test_the_largest_group_is_that_of_the_layer_where_experts_are_largest(original: bytes, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(original)
    manifest = read_manifest(tmp_path)
    part = replace(manifest.layers[0].parts["high"], nbytes=5 * PAGE + 1)
    layers = tuple(replace(layer, parts={**layer.parts, "high": part}) for layer in manifest.layers[:1])
    for order in (layers + manifest.layers[1:], manifest.layers[1:] + layers):
        q4 = ladder_of(replace(manifest, layers=order)).rung("q4")
        assert q4.group_beside(None) == 6 * PAGE
        assert q4.nbytes == 4 * 6 * PAGE + 4 * PAGES["high"]


def test_beside_a_floor_only_the_parts_that_it_lacks_count() -> None:
    found = ladder(EVERY, {}, [[1.0] * 3], clusters=1)
    q4, q8, merged = found.rung("q4"), found.rung("q8"), found.rung("merged")
    assert (q8.beside(q4), q8.group_beside(q4)) == (3 * 4096, 4096)
    assert (q8.beside(None), q8.group_beside(None)) == (3 * 12288, 12288)
    assert (q8.beside(merged), q8.beside(q8)) == (3 * 12288, 0)
    assert (merged.beside(None), merged.group_beside(None)) == (4096, 4096)  # one blob, of which no expert has a part


def test_beside_a_mixed_floor_every_expert_lacks_blobs_of_its_own(read: Callable[..., Ladder]) -> None:
    floor, target = read().rung("20%"), read().rung("40%")  # 0111 and 1122
    assert target.groups_beside(floor).tolist() == [PAGES["high"], 0, PAGES["low"], PAGES["low"]] * 2
    assert target.beside(floor) == 2 * (PAGES["high"] + 2 * PAGES["low"])
    assert floor.groups_beside(target).tolist() == [PAGES["merged"], 0, 0, 0] * 2
    assert floor.beside(target) == 2 * PAGES["merged"]
    assert target.group_beside(target) == 0


def test_shares_and_touched_bytes_are_by_form_and_weighted_by_use(read: Callable[..., Ladder]) -> None:
    found = read().rung("40%")  # 1122, used 0.4, 0.3, 0.2, 0.1, twice per token and layer
    assert found.shares == pytest.approx({"q4": 0.7, "q8": 0.3})
    fine = PAGES["high"] + PAGES["low"]
    assert found.touched == pytest.approx({"q4": 2 * 1.4 * PAGES["high"], "q8": 2 * 0.6 * fine})
    assert read().rung("merged").shares == {"merged": 1.0}


def test_a_price_is_the_upper_end_of_the_certified_interval_and_never_negative() -> None:
    assert rung("q4", 0.04, (0.03, 0.05)).price == 0.05
    assert rung("q8", -0.002, (-0.003, -0.001)).price == 0.0


def test_a_step_without_certificate_has_no_price_and_is_not_offered(read: Callable[..., Ladder]) -> None:
    found = read(lambda document: document["chain"][1].update(certificate=None))
    assert [rung.name for rung in found.certified] == ["8%", "40%", "exact"]
    for name in ("20%", "q4"):  # a form alone never has one
        with pytest.raises(ValueError, match=name):
            _ = found.rung(name).price
        assert found.rung(name).loss_rate(0) == 0.0


def test_forms_to_be_served_are_those_of_certified_steps_and_exact_alone_where_nothing_may_be_lost(
    read: Callable[..., Ladder],
) -> None:
    assert read().forms(0.0) == ("exact",)
    assert read().forms(0.02) == FORMS
    uncertified = read(lambda document: [step.update(certificate=None) for step in document["chain"][:2]])
    assert uncertified.forms(0.02) == ("q4", "q8", "exact")


def test_certificates_are_those_of_their_steps_whatever_their_order(read: Callable[..., Ladder]) -> None:
    for change in (lambda document: None, lambda document: document["chain"].insert(0, document["chain"].pop(2))):
        found = read(change)
        assert [(name, found.rung(name).loss, found.rung(name).loss_ci95) for name in ("8%", "20%", "40%")] == [
            ("8%", 0.15, Band(0.9 * 0.15, 1.1 * 0.15)),
            ("20%", 0.04, Band(0.9 * 0.04, 1.1 * 0.04)),
            ("40%", 0.003, Band(0.9 * 0.003, 1.1 * 0.003)),
        ]


def test_the_exact_form_costs_no_quality_whatever_its_certificate_says(read: Callable[..., Ladder]) -> None:
    worse = {"loss": 0.5, "loss_ci95": [0.4, 0.6], "loss_worst_domain": 0.6, "loss_worst_domain_ci95": [0.5, 0.7]}
    for change in (
        lambda document: None,
        lambda document: document["chain"][-1]["certificate"].update(worse),
        lambda document: document["chain"][-1].update(certificate=None),
    ):
        exact = read(change).exact
        assert (exact.price, exact.loss, exact.loss_ci95, exact.loss_rate(1)) == (0.0, 0.0, Band(0.0, 0.0), 0.0)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6), st.floats(0, 0.5))
def test_loss_rates_are_split_by_error_and_their_mean_is_the_price(errors: list[float], loss: float) -> None:
    found = rung("q4", loss, (loss, loss), tuple(errors))
    rates = [found.loss_rate(layer) for layer in range(len(errors))]
    assert np.mean(rates) == pytest.approx(loss)
    assert all(a <= b or x >= y for a, x in zip(rates, errors, strict=True) for b, y in zip(rates, errors, strict=True))


def test_without_errors_every_layer_costs_the_same() -> None:
    found = rung("q4", 0.1, (0.1, 0.2))
    assert [found.loss_rate(layer) for layer in range(3)] == [0.2] * 3 and found.mean_error is None


def test_a_layers_error_is_the_sum_of_its_experts_each_in_its_own_form(read: Callable[..., Ladder]) -> None:
    uneven = {"merged": [0.01, 0.02, 0.04, 0.08], "q4": [0.001, 0.002, 0.004, 0.008], "q8": [0.0] * 4}
    found = read(lambda document: document["layers"][1].update(errors=uneven))
    assert found.rung("merged").errors == pytest.approx((0.3, 0.15))
    assert found.rung("20%").errors == pytest.approx((0.3 / 4 + 3 * 0.02 / 4, 0.01 + 0.014))
    assert found.rung("40%").errors == pytest.approx((2 * 0.02 / 4 + 2 * 0.0001 / 4, 0.003))
    assert found.rung("40%").mean_error == pytest.approx(np.mean(found.rung("40%").errors))


def test_a_layer_that_no_text_reached_counts_as_the_mean_of_the_others(read: Callable[..., Ladder]) -> None:
    found = read(lambda document: document["layers"][0]["errors"].pop("q4"))
    assert found.rung("q4").errors == pytest.approx((0.02, 0.02))
    unreached = read(lambda document: document["layers"][0].update(errors={}))
    assert unreached.rung("20%").errors == pytest.approx((0.4 / 4 + 3 * 0.02 / 4,) * 2)
    assert read(each_layer(errors={})).rung("q4").errors == ()
    assert read().exact.errors == (0.0, 0.0) and read().exact.mean_error == 0.0


def test_use_is_the_frequency_scaled_to_the_experts_of_a_token(read: Callable[..., Ladder]) -> None:
    for scale in (1, 7):  # frequencies need not sum to one
        found = read(each_layer(frequency=[0.4 * scale, 0.3 * scale, 0.2 * scale, 0.1 * scale]))
        np.testing.assert_allclose(found.use, [[0.8, 0.6, 0.4, 0.2]] * 2)


def test_use_is_uniform_where_nothing_was_profiled(read: Callable[..., Ladder]) -> None:
    found = read(each_layer(frequency=[]))
    np.testing.assert_allclose(found.use, [[0.5] * 4] * 2)
    assert found.num_experts == 8


def test_a_layer_that_was_never_used_has_no_use(read: Callable[..., Ladder]) -> None:
    assert read(each_layer(frequency=[0, 0, 0, 0])).use[0].tolist() == [0] * 4


def seen(*uses: list[int]) -> Profile:
    """In domains of their own, by turns in prefill and decode: uses of the first layer's experts."""
    zeros = np.zeros(4, np.int64)
    routed = {
        (f"domain {at}", PHASES[at % 2]): Routed(zeros[:2], np.concatenate([found, zeros]), np.zeros(8))
        for at, found in enumerate(uses)
    }
    return Profile((4, 4), routed)


def test_a_profile_moves_use_as_much_as_it_saw_beside_two_uses_of_each_expert_on_average(
    read: Callable[..., Ladder],
) -> None:
    found = read(profile=seen([0, 0, 0, 5], [0, 0, 1, 2]))
    expected = np.array([8 * 0.4, 8 * 0.3, 8 * 0.2 + 1, 8 * 0.1 + 7]) / 16 * 2
    np.testing.assert_allclose(found.use, [expected, [0.8, 0.6, 0.4, 0.2]])
    assert found.exact.use.tolist() == np.concatenate(found.use).tolist()
    np.testing.assert_allclose(read(profile=seen([0, 0, 0, 10**9])).use[0], [0, 0, 0, 2], atol=1e-6)


def test_a_profile_that_saw_nothing_changes_nothing(read: Callable[..., Ladder]) -> None:
    plain, found = read(), read(profile=seen())
    for ours, theirs in ((plain.use, found.use), (plain.calibrated, found.use), (plain.calibrated, plain.use)):
        assert [layer.tolist() for layer in ours] == [layer.tolist() for layer in theirs]


def test_a_profile_changes_no_price(read: Callable[..., Ladder]) -> None:
    plain, found = read(), read(profile=seen([1000, 0, 0, 0]))
    assert found.prices("40%", "20%") == plain.prices("40%", "20%")
    assert found.exposure(found.rung("40%"), found.rung("20%")) > 1  # the first expert is in that floor coarsely
    assert plain.exposure(plain.rung("40%"), plain.rung("20%")) == 1


def test_the_profile_of_another_model_is_refused(read: Callable[..., Ladder]) -> None:
    with pytest.raises(UsageError, match="of 8 experts in 1 layers, not of 8 in 2"):
        read(profile=Profile((8,)))


def test_the_profile_of_gates_is_the_manifests(read: Callable[..., Ladder], original: bytes) -> None:
    assert list(read().gate_quantiles) == json.loads(original)["gate_quantiles"]


def test_percentages_are_of_the_experts_in_bf16(read: Callable[..., Ladder]) -> None:
    assert read().expert_bytes_bf16 == 2 * 4 * 2 * sum(leaf.size for leaf in SITE.leaves)
