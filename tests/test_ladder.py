"""The ladder of a pack: memory in whole pages, prices from certificates, use per token from the profile."""

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

EVERY = {"merged": 4096, "high": 8192, "low": 4096, "exact": 16384}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("original")
    write_pack(folder / "pack", None)
    return (folder / "pack" / MANIFEST).read_bytes()


@pytest.fixture
def read(original: bytes, tmp_path: Path) -> Callable[..., Ladder]:
    """The ladder of the toy pack, its manifest changed before."""

    def read_(change: Callable[[Any], object] = lambda document: None) -> Ladder:
        (tmp_path / MANIFEST).write_bytes(original)
        edit(tmp_path, change)
        return ladder_of(read_manifest(tmp_path))

    return read_


def each_layer(**entries: object) -> Callable[[Any], object]:
    return lambda document: [layer.update(entries) for layer in document["layers"]]


def test_rungs_are_the_packs_forms_from_coarse_to_exact(read: Callable[..., Ladder]) -> None:
    found = read()
    assert tuple(rung.form for rung in found.rungs) == FORMS
    assert found.exact is found.rungs[-1] and found.rung("q4") is found.rungs[1]


def test_a_form_that_is_not_there_is_a_key_error(read: Callable[..., Ladder]) -> None:
    with pytest.raises(KeyError):
        read().rung("q2")


def test_a_rungs_memory_is_that_of_all_its_blobs_in_pages_of_their_own(read: Callable[..., Ladder]) -> None:
    found = read()
    pages = {part: -(-layout(SITE, part).nbytes // PAGE) * PAGE for part in EVERY}
    assert found.rung("merged").nbytes == 2 * 2 * pages["merged"]
    assert found.rung("q4").nbytes == 2 * 4 * pages["high"]
    assert found.rung("q8").nbytes == 2 * 4 * (pages["high"] + pages["low"])
    assert found.exact.largest == {"exact": pages["exact"]}


def test_the_largest_blob_is_that_of_the_layer_where_experts_are_largest(original: bytes, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(original)
    manifest = read_manifest(tmp_path)
    part = replace(manifest.layers[0].parts["high"], nbytes=5 * PAGE + 1)
    layers = tuple(replace(layer, parts={**layer.parts, "high": part}) for layer in manifest.layers[:1])
    for order in (layers + manifest.layers[1:], manifest.layers[1:] + layers):
        assert ladder_of(replace(manifest, layers=order)).rung("q4").largest == {"high": 6 * PAGE}


def test_beside_a_floor_only_the_parts_that_it_lacks_count() -> None:
    found = ladder(EVERY, {}, [[1.0] * 3], clusters=1)
    q4, q8, merged = found.rung("q4"), found.rung("q8"), found.rung("merged")
    assert (q8.beside(q4), q8.group_beside(q4)) == (3 * 4096, 4096)
    assert (q8.beside(None), q8.group_beside(None)) == (3 * 12288, 12288)
    assert (q8.beside(merged), q8.beside(q8)) == (3 * 12288, 0)
    assert (merged.beside(None), merged.group_beside(None)) == (4096, 4096)  # one blob, of which no expert has a part


def test_a_price_is_the_upper_end_of_the_certified_interval_and_never_negative() -> None:
    assert Rung("q4", {}, {}, 0.04, Band(0.03, 0.05), ()).price == 0.05
    assert Rung("q8", {}, {}, -0.002, Band(-0.003, -0.001), ()).price == 0.0


def test_a_form_without_certificate_has_no_price_and_is_not_offered(read: Callable[..., Ladder]) -> None:
    found = read(lambda document: document["chain"].pop(1))
    assert [rung.form for rung in found.certified] == ["merged", "q8", "exact"]
    with pytest.raises(ValueError, match="q4"):
        _ = found.rung("q4").price
    assert found.rung("q4").loss_rate(0) == 0.0


def test_certificates_are_read_for_their_forms_whatever_their_order(read: Callable[..., Ladder]) -> None:
    found = read(lambda document: document["chain"].reverse())
    assert [(rung.form, rung.loss, rung.loss_ci95) for rung in found.rungs[:3]] == [
        ("merged", 0.15, Band(0.13, 0.17)),
        ("q4", 0.04, Band(0.03, 0.05)),
        ("q8", 0.003, Band(0.002, 0.004)),
    ]


def test_the_exact_form_costs_no_quality_whatever_its_certificate_says(read: Callable[..., Ladder]) -> None:
    step = {"form": "exact", "resident_bytes": 1, "loss": 0.5, "loss_ci95": [0.4, 0.6]}
    step |= {"loss_worst_domain": 0.6, "worst_domain": "poems"}
    for change in (lambda document: None, lambda document: document["chain"].append(step)):
        exact = read(change).exact
        assert (exact.price, exact.loss_ci95, exact.loss_rate(1)) == (0.0, Band(0.0, 0.0), 0.0)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6), st.floats(0, 0.5))
def test_loss_rates_are_split_by_error_and_their_mean_is_the_price(errors: list[float], loss: float) -> None:
    rung = Rung("q4", {}, {}, loss, Band(loss, loss), tuple(errors))
    rates = [rung.loss_rate(layer) for layer in range(len(errors))]
    assert np.mean(rates) == pytest.approx(loss)
    assert all(a <= b or x >= y for a, x in zip(rates, errors, strict=True) for b, y in zip(rates, errors, strict=True))


def test_without_errors_every_layer_costs_the_same() -> None:
    rung = Rung("q4", {}, {}, 0.1, Band(0.1, 0.2), ())
    assert [rung.loss_rate(layer) for layer in range(3)] == [0.2] * 3 and rung.mean_error is None


def test_errors_are_read_by_layer_and_a_layer_that_no_text_reached_counts_as_the_mean(
    read: Callable[..., Ladder],
) -> None:
    assert read().rung("merged").errors == (0.3, 0.4)
    assert read(lambda document: document["layers"][0]["errors"].pop("q4")).rung("q4").errors == (0.02, 0.02)
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


def test_the_profile_of_gates_is_the_manifests(read: Callable[..., Ladder], original: bytes) -> None:
    assert list(read().gate_quantiles) == json.loads(original)["gate_quantiles"]


def test_percentages_are_of_the_experts_in_bf16(read: Callable[..., Ladder]) -> None:
    assert read().expert_bytes_bf16 == 2 * 4 * 2 * sum(leaf.size for leaf in SITE.leaves)
