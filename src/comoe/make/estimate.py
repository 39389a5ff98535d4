"""What packing takes: bytes by the parts' layout; seconds by one expert's steps, timed here, times their number."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from comoe.forms.compensate import Gram
from comoe.forms.distil import BATCH_TOKENS
from comoe.forms.lowbit import quantise_low
from comoe.forms.lowrank import factorise
from comoe.make.calibrate import HELD_OUT
from comoe.make.chain import PROBED, SHARES
from comoe.make.layers import own_blobs
from comoe.make.recipe import Recipe
from comoe.make.shared import EXPERTS_PER_CLUSTER, SHARING
from comoe.make.study import Errors, Layer, Study, blob_bytes, oriented
from comoe.runtime.skeleton import strip
from comoe.store.checkpoint import Checkpoint, skeleton_of
from comoe.store.families import experts_modules
from comoe.store.layout import group_size, layout, quantised, rank
from comoe.store.manifest import FORM_PARTS, SHARED_PARTS
from comoe.types import Site


@dataclass(frozen=True, slots=True)
class Left:
    """What a run has still to do: a killed one's steps are not done again.

    `num_experts` are to be built, `dense_bytes` to be copied, of the calibration text `num_batches` batches to be run
    through the checkpoint; they are certified on as many in any case. 0 batches stand for no calibration.
    """

    num_experts: int
    dense_bytes: int
    num_batches: int
    recorded: bool = False


def blank(checkpoint: Checkpoint) -> Any:
    """The checkpoint's model without any weights: there before anything is packed, and enough to time one expert."""
    model = skeleton_of(checkpoint.config)
    strip(model)
    for _, module in experts_modules(model):
        module.to_empty(device="cpu")  # norms, where an expert has some
    return model


@torch.no_grad()
def seconds_to_pack(checkpoint: Checkpoint, model: Any, recipe: Recipe, forms: Sequence[str], left: Left) -> float:
    """Seconds for what is `left` of packing `checkpoint` in `forms` by `recipe`; `model` is its `blank`.

    The steps of one of the largest experts are timed.
    """
    index = max(range(len(checkpoint.sites)), key=lambda at: checkpoint.sites[at].expert_bytes_bf16)
    layer = Layer(checkpoint, index, list(experts_modules(model))[index][1], None, checkpoint.folder)
    site = layer.site
    tensors = checkpoint.expert(index, 0)
    calibrated = left.num_batches > 0
    study = Study(layer, 0, tensors, _grams(site) if calibrated else {})
    read_s = _timed(lambda: checkpoint.expert(index, 1 % site.num_experts))
    hash_s = _timed(lambda: blob_bytes(site, "exact", {(k, "exact"): v for k, v in tensors.items()}))
    quantise_s = _timed(lambda: own_blobs(replace(study), forms, Errors(site.num_experts)))
    x = torch.randn(BATCH_TOKENS, next(leaf.cols for leaf in site.leaves if leaf.is_matrix))
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    run_s = _timed(lambda: layer.run(x, floats))
    num_experts = sum(found.num_experts for found in checkpoint.sites)
    copied_s = 2 * read_s * left.dense_bytes / sum(tensor.nbytes for tensor in tensors.values())
    each = 2 * read_s + 2 * hash_s + quantise_s
    everywhere = 0.0
    if calibrated:
        sharing = bool({*SHARING} & {*forms})
        each += (len(forms) + 2) * run_s + sharing * _sharing_s(layer, floats, recipe, run_s)
        steps = len(SHARES) + 2 * len(PROBED) * sharing if recipe.certified else 0
        everywhere = left.num_batches * (read_s + run_s) * (steps / HELD_OUT + (not left.recorded))
    return copied_s + each * left.num_experts + everywhere * num_experts


def _sharing_s(layer: Layer, floats: dict[str, Tensor], recipe: Recipe, run_s: float) -> float:
    """Seconds for an expert's part in clusters: its deltas, and its share of teaching the cluster's expert."""
    leaf = max((leaf for leaf in layer.site.leaves if quantised(leaf)), key=lambda leaf: leaf.size)
    weight, gram = oriented(leaf, floats[leaf.name]), Gram(torch.eye(leaf.cols))
    factors_s = _timed(lambda: factorise(weight, rank(leaf), gram))
    low_s = _timed(lambda: quantise_low(weight, group_size(leaf.cols) or leaf.cols, 2, gram))
    taught_s = 4 * run_s * recipe.sharing.distil_steps  # backwards takes twice as long as forwards, then Adam
    return 2 * (factors_s + low_s) + taught_s / EXPERTS_PER_CLUSTER


def _grams(site: Site) -> dict[str, Gram]:
    return {leaf.name: Gram(torch.eye(leaf.cols)) for leaf in site.leaves if quantised(leaf)}


def bytes_to_pack(checkpoint: Checkpoint, forms: Sequence[str], *, self_contained: bool) -> int:
    """Bytes that a pack in `forms` will take on disk, but for small files."""
    parts = {part for form in forms for part in FORM_PARTS[form]} - (set() if self_contained else {"exact"})
    rows = {part: 1 / EXPERTS_PER_CLUSTER if part in SHARED_PARTS else 1.0 for part in parts}
    sizes = ((site, part, layout(site, part).stride) for site in checkpoint.sites for part in parts)
    return int(sum(site.num_experts * rows[part] * stride for site, part, stride in sizes)) + bytes_outside_experts(
        checkpoint
    )


def bytes_outside_experts(checkpoint: Checkpoint) -> int:
    """Bytes of the checkpoint's tensors outside its experts."""
    return sum(checkpoint.tensors[name].extent.length for name in checkpoint.dense_names)


def recording_bytes(checkpoint: Checkpoint, num_tokens: int) -> int:
    """Bytes of what layers see of calibration text, on disk until the pack is whole."""
    widths = [next(leaf.cols for leaf in site.leaves if leaf.is_matrix) for site in checkpoint.sites]
    return num_tokens * sum(4 * width + 12 * checkpoint.experts_per_token for width in widths)


def _timed(call: Callable[[], object]) -> float:
    """Seconds of the second of two calls: the first one warms up."""
    call()
    start_s = perf_counter()
    call()
    return perf_counter() - start_s
