"""What the picture of a pack shows, from its manifest: loss against bytes, error against bytes, clusters. Pure.

How it is drawn is `cli.plot`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from comoe.plan.ladder import layer_error
from comoe.store.manifest import Certificate, LayerEntry, Manifest


class StepLoss(NamedTuple):
    """A certified step, of which `share` of the experts' bytes as bf16 is resident."""

    step: str
    share: float
    certificate: Certificate


class StepError(NamedTuple):
    """A layer in a step: the bytes of its blobs, shared ones once, and the relative squared error of its outputs."""

    step: str
    nbytes: int
    error: float


@dataclass(frozen=True, slots=True)
class LayerCurve:
    """A sparse layer under the steps of the chain."""

    layer: int
    steps: tuple[StepError, ...]


class Joint(NamedTuple):
    """Two branches that become one at `height`, which counts joints: they reach `heights` at `places`, left to right.

    `cluster` is that of all experts below, None where there are several or the pack has none.
    """

    places: tuple[float, float]
    heights: tuple[int, int]
    height: int
    cluster: int | None


@dataclass(frozen=True, slots=True)
class ClusterTree:
    """A layer's dendrogram: `experts` from left to right at places 0, 1, ..., `joints` from the first to the root."""

    layer: int
    experts: tuple[int, ...]
    joints: tuple[Joint, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """All that is drawn; empty is what the manifest has no data for."""

    title: str
    frontier: tuple[StepLoss, ...]
    curves: tuple[LayerCurve, ...]
    trees: tuple[ClusterTree, ...]


NO_LOSS = Certificate(0.0, (0.0, 0.0), 0.0, (0.0, 0.0), "")
"""Of exact experts."""


class _Branch(NamedTuple):
    """A part of a tree while it is put together: where its top is, and the one cluster of its experts, if it is one."""

    place: float
    height: int
    cluster: int | None


def picture_of(manifest: Manifest) -> Picture:
    """What the manifest tells of losses, errors and clusters."""
    layers = manifest.layers
    return Picture(
        title=f"{manifest.model_type}: {len(layers)} sparse layers of {max(layer.num_experts for layer in layers)} "
        f"experts, {manifest.experts_per_token} per token",
        frontier=_frontier(manifest),
        curves=tuple(_curves(manifest)),
        trees=tuple(_tree(at, layer) for at, layer in enumerate(layers) if layer.tree),
    )


def spread(number: int, most: int) -> list[int]:
    """At most `most` of `number` places, evenly spread from the first to the last."""
    if number <= most:
        return list(range(number))
    return [round(at * (number - 1) / (most - 1)) for at in range(most)]


def apart(places: Sequence[float], least: float) -> list[float]:
    """Ascending `places`, moved as little as sets neighbours `least` apart: least squares, by pooling of neighbours."""
    crowds: list[tuple[float, int]] = []  # the middle and the number of those that touch, without what sets them apart
    for at, place in enumerate(places):
        crowd = (place - at * least, 1)
        while crowds and crowds[-1][0] > crowd[0]:
            before, number = crowds.pop()
            crowd = ((before * number + crowd[0] * crowd[1]) / (number + crowd[1]), number + crowd[1])
        crowds.append(crowd)
    found = [start for start, number in crowds for _ in range(number)]
    return [start + at * least for at, start in enumerate(found)]


def _frontier(manifest: Manifest) -> tuple[StepLoss, ...]:
    """Of every certified step that has bytes, and of exact, which needs no certificate; empty where it stands alone."""
    whole = manifest.expert_bytes_bf16
    certified = [(step, NO_LOSS if step.name == "exact" else step.certificate) for step in manifest.chain]
    found = [
        StepLoss(step.name, step.resident_bytes / whole, certificate)
        for step, certificate in certified
        if certificate is not None and step.resident_bytes
    ]
    return tuple(found) if any(point.step != "exact" for point in found) else ()


def _curves(manifest: Manifest) -> list[LayerCurve]:
    """Of every layer, the steps whose error was measured; without layers that have no error but that of exact."""
    points: list[list[StepError]] = [[] for _ in manifest.layers]
    for step in manifest.chain:
        sizes, assignment = manifest.layer_bytes(step.name), manifest.assignment(step.name)
        for layer, forms, nbytes, found in zip(manifest.layers, assignment, sizes, points, strict=True):
            error = layer_error(layer, forms)
            if error is not None:
                found.append(StepError(step.name, nbytes, error))
    drawable = [any(step.nbytes and step.error for step in found) for found in points]
    return [LayerCurve(at, tuple(found)) for at, found in enumerate(points) if drawable[at]]


def _tree(at: int, layer: LayerEntry) -> ClusterTree:
    experts = _left_to_right(layer)
    branches = {
        expert: _Branch(place, 0, layer.clusters[expert] if layer.clusters else None)
        for place, expert in enumerate(experts)
    }
    joints = []
    for height, pair in enumerate(layer.tree, 1):
        left, right = sorted((branches[child] for child in pair), key=lambda branch: branch.place)
        cluster = left.cluster if left.cluster == right.cluster else None
        joints.append(Joint((left.place, right.place), (left.height, right.height), height, cluster))
        branches[layer.num_experts + height - 1] = _Branch((left.place + right.place) / 2, height, cluster)
    return ClusterTree(at, experts, tuple(joints))


def _left_to_right(layer: LayerEntry) -> tuple[int, ...]:
    """The experts in an order in which no branches of the tree cross."""
    order: dict[int, Sequence[int]] = {expert: (expert,) for expert in range(layer.num_experts)}
    for at, (a, b) in enumerate(layer.tree):
        order[layer.num_experts + at] = (*order.pop(a), *order.pop(b))
    (experts,) = order.values()
    return tuple(experts)
