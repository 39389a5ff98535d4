"""Merging: clusters by output, members aligned before averaging, nothing lost where nothing is to lose."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from comoe.forms.merge import HiddenUnits, Tree, align, clusters, dendrogram, merge, output_distances
from comoe.types import Leaf

HIDDEN, INNER = 12, 20
KINDS = [(gated, transposed) for gated in (False, True) for transposed in (False, True)]

kinds = pytest.mark.parametrize(("gated", "transposed"), KINDS)
Expert = dict[str, Tensor]


def units(gated: bool, transposed: bool) -> HiddenUnits:
    rows = 2 * INNER if gated else INNER
    up, down = (rows, HIDDEN), (HIDDEN, INNER)
    if transposed:
        up, down = up[::-1], down[::-1]
    return HiddenUnits(Leaf("up", up, transposed), Leaf("down", down, transposed), gated)


def random_expert(which: HiddenUnits, seed: int) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    return {leaf.name: torch.randn(leaf.shape, generator=generator) for leaf in (which.up, which.down)}


def shuffled(expert: Expert, which: HiddenUnits, seed: int) -> Expert:
    """The same function with its hidden units in another order."""
    order = torch.randperm(INNER, generator=torch.Generator().manual_seed(seed))
    up, down = (oriented(expert, leaf) for leaf in (which.up, which.down))
    up = torch.cat([block[order] for block in up.split(INNER)])
    down = down[:, order]
    return {
        leaf.name: tensor.T.contiguous() if leaf.transposed else tensor
        for leaf, tensor in ((which.up, up), (which.down, down))
    }


def oriented(expert: Expert, leaf: Leaf) -> Tensor:
    return expert[leaf.name].T if leaf.transposed else expert[leaf.name]


def run(expert: Expert, which: HiddenUnits, x: Tensor) -> Tensor:
    hidden = x @ oriented(expert, which.up).T
    active = F.silu(hidden[:, :INNER]) * hidden[:, INNER:] if which.gated else F.relu(hidden)
    return active @ oriented(expert, which.down).T


def same(a: Expert, b: Expert) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@kinds
def test_an_aligned_member_computes_what_it_did(gated: bool, transposed: bool) -> None:
    which = units(gated, transposed)
    member = random_expert(which, 1)
    aligned = align(random_expert(which, 2), member, which)
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(3))
    assert not same(aligned, member)
    torch.testing.assert_close(run(aligned, which, x), run(member, which, x), rtol=1e-4, atol=1e-4)


@kinds
def test_aligning_a_shuffled_copy_gives_the_original_to_the_bit(gated: bool, transposed: bool) -> None:
    which = units(gated, transposed)
    original = random_expert(which, 4)
    copy = shuffled(original, which, 5)
    assert not same(copy, original)
    assert same(align(original, copy, which), original)


@kinds
def test_a_shuffled_noisy_copy_is_aligned_too(gated: bool, transposed: bool) -> None:
    which = units(gated, transposed)
    original = random_expert(which, 6)
    noisy = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in original.items()}
    assert same(align(original, shuffled(noisy, which, 7), which), noisy)


@pytest.mark.parametrize("telling", ["gates", "values", "down"])
def test_each_of_a_units_weights_can_tell_it_from_others(telling: str) -> None:
    which = units(True, False)
    original = random_expert(which, 21)
    parts = {"gates": original["up"][:INNER], "values": original["up"][INNER:], "down": original["down"]}
    for name in parts.keys() - {telling}:
        parts[name][:] = 1.0
    assert same(align(original, shuffled(original, which, 22), which), original)


def test_aligning_keeps_dtype_and_shape() -> None:
    which = units(True, False)
    member = {name: tensor.bfloat16() for name, tensor in random_expert(which, 8).items()}
    aligned = align({name: tensor.bfloat16() for name, tensor in random_expert(which, 9).items()}, member, which)
    assert all((aligned[name].dtype, aligned[name].shape) == (torch.bfloat16, member[name].shape) for name in member)


@kinds
def test_shuffled_copies_merge_to_the_original(gated: bool, transposed: bool) -> None:
    which = units(gated, transposed)
    original = random_expert(which, 10)
    copies = [original, *(shuffled(original, which, seed) for seed in (11, 12))]
    merged = merge(copies, [0.5, 0.25, 0.25], which)
    assert same(merged, original)  # sums of halves and quarters round nothing


@given(masses=st.lists(st.floats(0, 1e3), min_size=2, max_size=4).filter(lambda masses: sum(masses) > 1e-6))
@settings(max_examples=40, deadline=None)
def test_members_without_units_count_by_their_share_of_the_mass(masses: list[float]) -> None:
    which = units(False, False)
    experts = [random_expert(which, seed) for seed in range(len(masses))]
    merged = merge(experts, masses, None)
    for name in merged:
        wanted = np.average([expert[name].double() for expert in experts], axis=0, weights=masses)
        np.testing.assert_allclose(merged[name], wanted, rtol=1e-5, atol=1e-5)


@given(masses=st.lists(st.floats(0.01, 10), min_size=3, max_size=3), factor=st.sampled_from([2.0**-9, 4.0, 2.0**20]))
@settings(max_examples=20, deadline=None)
def test_only_the_proportions_of_masses_matter(masses: list[float], factor: float) -> None:
    which = units(True, False)
    experts = [random_expert(which, seed) for seed in range(3)]
    assert same(merge(experts, masses, which), merge(experts, [factor * mass for mass in masses], which))


def test_a_constant_over_all_members_is_conserved() -> None:
    """Shares sum to one: what members have in common stays as it is."""
    experts = [{"w": torch.full((3, 4), 7.0)} for _ in range(5)]
    torch.testing.assert_close(merge(experts, [1, 2, 3, 4, 5], None)["w"], torch.full((3, 4), 7.0))


def test_members_that_were_never_used_count_alike() -> None:
    experts = [{"w": torch.tensor([[float(value)]])} for value in (1, 2, 6)]
    assert merge(experts, [0, 0, 0], None)["w"].item() == pytest.approx(3)


def test_a_member_without_mass_does_not_count() -> None:
    which = units(True, False)
    heavy, unused = random_expert(which, 13), random_expert(which, 14)
    assert same(merge([unused, heavy], [0, 1], which), heavy)


def test_members_are_aligned_to_the_heaviest() -> None:
    which = units(False, False)
    light, heavy = random_expert(which, 15), random_expert(which, 16)
    wanted = align(heavy, light, which)
    merged = merge([light, heavy], [0.25, 0.75], which)
    for name in merged:
        torch.testing.assert_close(merged[name], 0.25 * wanted[name] + 0.75 * heavy[name])


def test_a_merged_expert_is_closer_to_its_members_aligned_than_not() -> None:
    which = units(True, False)
    original = random_expert(which, 17)
    noisy = {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in original.items()}
    experts = [original, shuffled(noisy, which, 18)]
    x = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(19))
    aligned, plain = (merge(experts, [1, 1], how) for how in (which, None))
    off = [sum((run(m, which, x) - run(e, which, x)).square().sum() for e in experts) for m in (aligned, plain)]
    assert off[0] < 0.5 * off[1]


def test_merging_is_in_float32_whatever_the_members_are() -> None:
    experts = [{"w": torch.tensor([[value]], dtype=torch.bfloat16)} for value in (1.0, 1.0078125)]
    merged = merge(experts, [1, 1], None)["w"]
    assert merged.dtype == torch.float32 and merged.item() == 1.00390625


def test_one_expert_merges_to_itself() -> None:
    which = units(True, True)
    expert = random_expert(which, 20)
    assert same(merge([expert], [0.3], which), expert)


def spaced(groups: Sequence[Sequence[int]]) -> np.ndarray:
    """Distances of experts where those of one group are near each other and far from all others."""
    place = {expert: 100.0 * number + at for number, group in enumerate(groups) for at, expert in enumerate(group)}
    places = np.array([place[expert] for expert in range(len(place))])
    return np.abs(places[:, None] - places[None])


def random_tree(num_experts: int, seed: int) -> Tree:
    """The dendrogram of experts at random places."""
    points = np.random.default_rng(seed).standard_normal((num_experts, 3))
    return dendrogram(np.linalg.norm(points[:, None] - points[None], axis=-1))


def leaves(tree: Tree, node: int) -> set[int]:
    """The experts below a node: an expert, or from E on a pair."""
    below = node - len(tree) - 1
    return {node} if below < 0 else leaves(tree, tree[below][0]) | leaves(tree, tree[below][1])


@given(st.integers(1, 12), st.integers(0, 3), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_full_granularity_is_the_identity(num_experts: int, beyond: int, seed: int) -> None:
    assert clusters(random_tree(num_experts, seed), num_experts + beyond) == tuple(range(num_experts))


@given(st.integers(1, 12), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_a_dendrogram_joins_every_node_but_the_last_once_and_only_what_is_there(num_experts: int, seed: int) -> None:
    tree = random_tree(num_experts, seed)
    assert len(tree) == num_experts - 1
    assert sorted(child for pair in tree for child in pair) == list(range(2 * num_experts - 2))
    assert all(child < num_experts + at for at, pair in enumerate(tree) for child in pair)


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_a_cut_undoes_the_last_pairs_and_keeps_all_others(num_experts: int, num_clusters: int, seed: int) -> None:
    tree = random_tree(num_experts, seed)
    found = clusters(tree, num_clusters)
    joined = max(0, num_experts - num_clusters)
    for at, pair in enumerate(tree):
        touched = {found[expert] for child in pair for expert in leaves(tree, child)}
        assert (len(touched) == 1) == (at < joined)


def test_experts_that_put_out_alike_share_a_cluster_numbered_by_its_first_member() -> None:
    assert clusters(dendrogram(spaced([[2, 5], [0, 3, 4], [1]])), 3) == (0, 1, 2, 0, 0, 2)


def test_experts_that_put_out_most_alike_are_joined_first() -> None:
    places = np.array([0.0, 10.0, 1.0, 13.0])
    assert [{*pair} for pair in dendrogram(np.abs(places[:, None] - places[None]))] == [{0, 2}, {1, 3}, {4, 5}]


def test_one_cluster_holds_everything() -> None:
    assert clusters(dendrogram(spaced([[0, 1], [2, 3]])), 1) == (0,) * 4


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_clusters_are_as_many_as_asked_and_numbered_in_order_of_appearance(
    num_experts: int, num_clusters: int, seed: int
) -> None:
    found = clusters(random_tree(num_experts, seed), num_clusters)
    assert list(dict.fromkeys(found)) == list(range(min(num_clusters, num_experts)))


def test_coarser_cuts_only_join_clusters_of_finer_ones() -> None:
    tree = random_tree(10, 1)
    for finer in range(2, 11):
        pairs = set(zip(clusters(tree, finer), clusters(tree, finer - 1), strict=True))
        assert len(pairs) == finer


@pytest.mark.parametrize(("pair", "wanted"), [(3.5, (0, 0, 1, 1, 2, 2)), (5.0, (0, 0, 0, 0, 1, 2))])
def test_linkage_is_average_and_neither_single_nor_complete(pair: float, wanted: tuple[int, ...]) -> None:
    """{0, 1} and {2, 3} are 2.1 apart at their nearest, 4.2 on average, 6.3 at most; {4, 5} are `pair` apart."""
    places = np.array([0.0, 2.0, 4.1, 6.3, 20.0, 20.0 + pair])
    assert clusters(dendrogram(np.abs(places[:, None] - places[None])), 3) == wanted


def test_clustering_leaves_its_distances_alone() -> None:
    distances = spaced([[0, 1], [2, 3]]) + 0.5
    before = distances.copy()
    dendrogram(distances)
    assert (distances == before).all()


def test_distances_are_euclidean_over_all_outputs() -> None:
    outputs = torch.zeros(3, 2, 2)
    outputs[1, 0, 0], outputs[1, 1, 1] = 3, 4
    found = output_distances(outputs)
    assert found == pytest.approx(np.array([[0, 5, 0], [5, 0, 5], [0, 5, 0]]))
