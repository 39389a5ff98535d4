"""What packing takes: bytes by the parts' layout; seconds by one expert's steps, timed here, times their number."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from comoe.forms.compensate import Gram
from comoe.forms.quantise import quantise
from comoe.make.shared import EXPERTS_PER_CLUSTER
from comoe.make.study import ERROR_TOKENS, blob_bytes, oriented
from comoe.runtime.hook import expert_forward
from comoe.runtime.skeleton import strip
from comoe.store.checkpoint import Checkpoint, skeleton_of
from comoe.store.families import experts_modules
from comoe.store.layout import group_size, layout, quantised
from comoe.store.manifest import FORM_PARTS
from comoe.types import Site

FORM_PASSES = {"merged": 2, "q2": 1, "residual": 2, "lowrank": 2, "q3": 1, "q4": 1, "q8": 1}
"""How often a form reads an expert again and measures its error on calibration tokens."""


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
def seconds_to_pack(checkpoint: Checkpoint, model: Any, forms: Sequence[str], left: Left) -> float:
    """Seconds for what is `left` of packing `checkpoint` in `forms`; `model` is its `blank`.

    The steps of one of the largest experts are timed.
    """
    index = max(range(len(checkpoint.sites)), key=lambda at: checkpoint.sites[at].expert_bytes_bf16)
    module, site = list(experts_modules(model))[index][1], checkpoint.sites[index]
    tensors = checkpoint.expert(index, 0)
    read_s = _timed(lambda: checkpoint.expert(index, 1 % site.num_experts))
    hash_s = _timed(lambda: blob_bytes(site, "exact", {(k, "exact"): v for k, v in tensors.items()}))
    quantise_s = _timed(lambda: _quantise(site, tensors, compensated=left.num_batches > 0))
    x = torch.randn(ERROR_TOKENS, next(leaf.cols for leaf in site.leaves if leaf.is_matrix))
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    run_s = _timed(lambda: expert_forward(module, x, floats))
    each = 2 * read_s + 2 * hash_s
    copied_s = 2 * read_s * left.dense_bytes / sum(tensor.nbytes for tensor in tensors.values())
    quantised_forms = len({"q2", "q3"} & {*forms}) + bool({"q4", "q8"} & {*forms})
    each += quantised_forms * (read_s + quantise_s)
    if left.num_batches:
        each += sum(FORM_PASSES.get(form, 0) for form in forms) * (read_s + 2 * run_s)
    passes = left.num_batches * (len(forms) / 3 + (not left.recorded))
    everywhere = passes * (read_s + run_s) * sum(site.num_experts for site in checkpoint.sites)
    return copied_s + each * left.num_experts + everywhere


def bytes_to_pack(checkpoint: Checkpoint, forms: Sequence[str], *, self_contained: bool) -> int:
    """Bytes that a pack in `forms` will take on disk, but for small files."""
    parts = {part for form in forms for part in FORM_PARTS[form]} - (set() if self_contained else {"exact"})
    rows = {part: 1 / EXPERTS_PER_CLUSTER if part == "merged" else 1.0 for part in parts}
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


def _quantise(site: Site, tensors: dict[str, Tensor], *, compensated: bool) -> None:
    for leaf in site.leaves:
        group = group_size(leaf.cols) if quantised(leaf) else None
        if group is not None:
            gram = Gram(torch.eye(leaf.cols)) if compensated else None
            quantise(oriented(leaf, tensors[leaf.name]), group, gram)


def _timed(call: Callable[[], object]) -> float:
    """Seconds of the second of two calls: the first one warms up."""
    call()
    start_s = perf_counter()
    call()
    return perf_counter() - start_s
