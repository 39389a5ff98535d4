"""Merged experts: one expert that stands for a cluster.

Clusters by average linkage on what experts put out, never on router logits; hidden units matched before weights are
averaged by gate mass (the matching of Git Re-Basin, Ainsworth et al., 2023, section 3.2; clusters as in HC-SMoE,
Chen et al., 2024). Pure functions of tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.cluster.hierarchy import linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform
from torch import Tensor

from comoe.types import Leaf

Expert = Mapping[str, Tensor]
Tree = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class HiddenUnits:
    """Which leaves have the expert's hidden units along their output (`up`) and along their input (`down`).

    `gated`: the rows of `up` are gates, then values: two blocks that move together.
    """

    up: Leaf
    down: Leaf
    gated: bool


def output_distances(outputs: Tensor) -> npt.NDArray[np.float64]:
    """Distances (E, E) of experts' outputs (E, S, H) on the same S inputs: Euclidean over all of them."""
    flat = outputs.flatten(1).double()
    return np.asarray(torch.cdist(flat, flat).numpy())


def dendrogram(distances: npt.NDArray[np.float64]) -> Tree:
    """Which experts average linkage joins, in order: pairs of experts and, from E on, of earlier pairs."""
    if len(distances) < 2:
        return ()
    symmetric = (distances + distances.T) / 2
    np.fill_diagonal(symmetric, 0.0)
    joined = linkage(squareform(symmetric, checks=False), "average")[:, :2].astype(int)
    return tuple((int(a), int(b)) for a, b in joined)


def clusters(tree: Tree, num_clusters: int) -> tuple[int, ...]:
    """The cluster of every expert: the dendrogram cut at `num_clusters`, numbered by their first member."""
    num_experts = len(tree) + 1
    members = {expert: [expert] for expert in range(num_experts)}
    for at, (a, b) in enumerate(tree[: max(0, num_experts - num_clusters)]):
        members[num_experts + at] = members.pop(a) + members.pop(b)
    ordered = sorted(members.values(), key=min)
    number = {expert: at for at, cluster in enumerate(ordered) for expert in cluster}
    return tuple(number[expert] for expert in range(num_experts))


def merge(experts: Sequence[Expert], masses: Sequence[float], units: HiddenUnits | None) -> dict[str, Tensor]:
    """The average of `experts`, weighted by `masses`, in float32; members are aligned to the heaviest.

    Without `units` (an expert that is more than two linears) weights are averaged as they stand.
    """
    shares = np.array(masses, np.float64)
    shares = shares / shares.sum() if shares.sum() > 0 else np.full(len(experts), 1 / len(experts))
    reference = experts[int(shares.argmax())]
    aligned = [
        expert if units is None or expert is reference else align(reference, expert, units) for expert in experts
    ]
    return {
        name: sum(
            (float(share) * expert[name].float() for share, expert in zip(shares, aligned, strict=True)),
            start=torch.zeros(()),
        )
        for name in reference
    }


def align(reference: Expert, member: Expert, units: HiddenUnits) -> dict[str, Tensor]:
    """`member` with its hidden units in the order that matches `reference`'s best; it computes the same."""
    similarity = _features(reference, units) @ _features(member, units).T
    _, order = linear_sum_assignment(similarity.numpy(), maximize=True)
    index = torch.from_numpy(order)
    return {
        **member,
        units.up.name: _permute_up(member, units, index),
        units.down.name: _permute_down(member, units, index),
    }


def _features(expert: Expert, units: HiddenUnits) -> Tensor:
    """All weights of every hidden unit: (I, ...) float32."""
    up, down = _oriented(expert, units.up), _oriented(expert, units.down)
    blocks = up.chunk(2) if units.gated else (up,)
    return torch.cat([*blocks, down.t()], 1)


def _oriented(expert: Expert, leaf: Leaf) -> Tensor:
    """A matrix as (out, in) in float32."""
    tensor = expert[leaf.name].float()
    return tensor.t() if leaf.transposed else tensor


def _permute_up(expert: Expert, units: HiddenUnits, index: Tensor) -> Tensor:
    rows = torch.cat([index, index + len(index)]) if units.gated else index
    return expert[units.up.name].index_select(1 if units.up.transposed else 0, rows)


def _permute_down(expert: Expert, units: HiddenUnits, index: Tensor) -> Tensor:
    return expert[units.down.name].index_select(0 if units.down.transposed else 1, index)
