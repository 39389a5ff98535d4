"""What a pack's picture shows: the frontier, a curve of every layer, its tree; each only where the manifest tells."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from packs import CLUSTERS, edit, write_pack

from comoe.cli.picture import apart, picture_of, spread
from comoe.plan.ladder import ladder_of
from comoe.store.manifest import MANIFEST, Manifest, decode, read_manifest


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("original")
    write_pack(folder / "pack", None)
    return (folder / "pack" / MANIFEST).read_bytes()


@pytest.fixture
def read(original: bytes, tmp_path: Path) -> Callable[..., Manifest]:
    """The manifest of the toy pack, changed before: its steps have experts in several forms."""

    def read_(change: Callable[[Any], object] = lambda document: None) -> Manifest:
        (tmp_path / MANIFEST).write_bytes(original)
        edit(tmp_path, lambda document: document["chain"][0].update(assignment=["0001", "0122"]))
        edit(tmp_path, change)
        return read_manifest(tmp_path)

    return read_


def uncertified(*steps: int) -> Callable[[Any], object]:
    return lambda document: [document["chain"][at].update(certificate=None) for at in steps]


def test_the_frontier_has_every_certified_step_by_its_share_of_the_bf16_bytes(read: Callable[..., Manifest]) -> None:
    manifest = read(uncertified(1))
    frontier = picture_of(manifest).frontier
    assert [point.step for point in frontier] == ["8%", "40%", "exact"]
    assert [point.share * manifest.expert_bytes_bf16 for point in frontier] == pytest.approx([1, 3, 4])
    assert frontier[0].certificate is manifest.chain[0].certificate


def test_exact_loses_nothing_and_ends_the_frontier_without_a_certificate(read: Callable[..., Manifest]) -> None:
    last = picture_of(read(uncertified(3))).frontier[-1]
    assert (last.step, last.certificate.loss, last.certificate.loss_ci95) == ("exact", 0.0, (0.0, 0.0))


def test_exact_alone_is_no_frontier(read: Callable[..., Manifest]) -> None:
    assert picture_of(read(uncertified(0, 1, 2))).frontier == ()


def test_a_step_without_bytes_has_no_place_on_a_logarithmic_axis(read: Callable[..., Manifest]) -> None:
    frontier = picture_of(read(lambda document: document["chain"][0].update(resident_bytes=0))).frontier
    assert [point.step for point in frontier] == ["20%", "40%", "exact"]


def test_bytes_of_all_layers_in_a_step_are_the_steps(read: Callable[..., Manifest]) -> None:
    manifest = read()
    curves = picture_of(manifest).curves
    for at, step in enumerate(manifest.chain):
        found = [curve.steps[at] for curve in curves]
        assert {point.step for point in found} == {step.name}
        assert sum(point.nbytes for point in found) == manifest.form_bytes(step.name)
    assert len({curve.steps[0].nbytes for curve in curves}) == 2  # 0001 and 0122


def test_errors_of_layers_in_a_step_are_those_that_the_planner_goes_by(read: Callable[..., Manifest]) -> None:
    manifest = read()
    ladder, curves = ladder_of(manifest), picture_of(manifest).curves
    for at, step in enumerate(manifest.chain):
        assert [curve.steps[at].error for curve in curves] == pytest.approx(ladder.rung(step.name).errors)
    assert curves[0].steps[0].error == pytest.approx(3 * 0.3 / 4 + 0.02 / 4)  # 0001: merged thrice, then q4


def test_a_layer_that_no_text_reached_has_no_curve(read: Callable[..., Manifest]) -> None:
    found = picture_of(read(lambda document: document["layers"][0].update(errors={}))).curves
    assert [curve.layer for curve in found] == [1]
    assert picture_of(read(lambda document: [layer.update(errors={}) for layer in document["layers"]])).curves == ()


def test_a_step_that_takes_a_form_without_errors_has_no_point(read: Callable[..., Manifest]) -> None:
    found = picture_of(read(lambda document: document["layers"][0]["errors"].pop("merged"))).curves
    assert [point.step for point in found[0].steps] == ["40%", "exact"]
    assert [point.step for point in found[1].steps] == ["8%", "20%", "40%", "exact"]


def test_a_pack_without_a_chain_has_trees_alone(read: Callable[..., Manifest]) -> None:
    found = picture_of(read(lambda document: document.update(chain=[])))
    assert (found.frontier, found.curves, len(found.trees)) == ((), (), 2)


def test_only_layers_that_have_a_tree_show_one(read: Callable[..., Manifest]) -> None:
    found = picture_of(read(lambda document: document["layers"][0].update(tree=[])))
    assert [tree.layer for tree in found.trees] == [1]


def test_a_tree_joins_pairs_at_the_middle_of_what_they_join(read: Callable[..., Manifest]) -> None:
    tree = picture_of(read()).trees[0]  # 0 with 2, 1 with 3, then both pairs; each pair is a cluster
    assert tree.experts == (0, 2, 1, 3)
    assert [joint.places for joint in tree.joints] == [(0, 1), (2, 3), (0.5, 2.5)]
    assert [joint.heights for joint in tree.joints] == [(0, 0), (0, 0), (1, 2)]
    assert [joint.height for joint in tree.joints] == [1, 2, 3]
    assert [joint.cluster for joint in tree.joints] == [CLUSTERS[0], CLUSTERS[1], None]


def test_a_tree_without_clusters_has_joints_of_none(read: Callable[..., Manifest]) -> None:
    manifest = read()
    layers = tuple(replace(layer, clusters=()) for layer in manifest.layers)
    without = picture_of(replace(manifest, layers=layers, chain=())).trees[0]
    assert {joint.cluster for joint in without.joints} == {None}


@st.composite
def trees(draw: st.DrawFn) -> tuple[tuple[int, int], ...]:
    """Of 2 to 40 experts, joined in any order."""
    num_experts = draw(st.integers(2, 40))
    left = list(range(num_experts))
    pairs = []
    for at in range(num_experts - 1):
        a, b = (left.pop(draw(st.integers(0, len(left) - 1))) for _ in range(2))
        pairs.append((a, b))
        left.append(num_experts + at)
    return tuple(pairs)


@settings(deadline=None)
@given(pairs=trees())
def test_a_tree_has_all_experts_as_leaves_and_no_branches_that_cross(
    original: bytes, pairs: tuple[tuple[int, int], ...]
) -> None:
    manifest = decode(original, Manifest, Path(MANIFEST))
    layer = replace(manifest.layers[0], num_experts=len(pairs) + 1, clusters=(), tree=pairs)
    (tree,) = picture_of(replace(manifest, layers=(layer,), chain=())).trees
    assert sorted(tree.experts) == list(range(len(pairs) + 1))
    below: dict[int, set[int]] = {expert: {expert} for expert in tree.experts}
    for at, (pair, joint) in enumerate(zip(pairs, tree.joints, strict=True)):
        sides = sorted(sorted(map(tree.experts.index, below.pop(child))) for child in pair)
        for side, place in zip(sides, joint.places, strict=True):
            assert side == list(range(side[0], side[-1] + 1)), "leaves of a branch stand together"
            assert side[0] <= place <= side[-1]
        assert joint.height == at + 1 > max(joint.heights)
        below[len(pairs) + 1 + at] = {tree.experts[place] for side in sides for place in side}


@settings(deadline=None)
@given(number=st.integers(0, 200), most=st.integers(2, 20))
def test_places_are_spread_evenly_from_the_first_to_the_last(number: int, most: int) -> None:
    places = spread(number, most)
    assert len(places) == min(number, most)
    assert places[:1] == [0][:number] and places[-1:] == [number - 1][:number]
    gaps = np.diff(places).tolist()
    assert min(gaps, default=1) > 0 and max(gaps, default=1) - min(gaps, default=1) <= 1


def test_the_title_says_what_model_it_is(read: Callable[..., Manifest]) -> None:
    assert picture_of(read()).title == "toy: 2 sparse layers of 4 experts, 2 per token"


@settings(deadline=None)
@given(places=st.lists(st.floats(0, 1), max_size=30), least=st.sampled_from([0.0, 0.01, 0.2]))
def test_names_are_set_apart_in_their_order_and_only_where_they_touch(places: list[float], least: float) -> None:
    places = sorted(places)
    moved = apart(places, least)
    assert len(moved) == len(places)
    assert all(b - a >= least - 1e-9 for a, b in pairwise(moved))
    if all(b - a >= least for a, b in pairwise(places)):
        assert moved == pytest.approx(places)
    assert sum(moved) == pytest.approx(sum(places))


def test_names_of_one_place_stand_around_it() -> None:
    assert apart([0.1, 0.5, 0.5, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.4, 0.5, 0.6, 0.9])
