"""How long packing will take: the steps of one expert, timed here, times how often they will run."""

from collections.abc import Callable, Sequence
from time import perf_counter

import torch
from torch import Tensor

from comoe.forms.compensate import Gram
from comoe.forms.quantise import quantise
from comoe.make.study import ERROR_TOKENS, Layer, blob_bytes, oriented
from comoe.runtime.hook import expert_forward
from comoe.store.layout import group_size, quantised
from comoe.types import Site

FORM_PASSES = {"merged": 2, "q2": 1, "residual": 2, "lowrank": 2, "q3": 1, "q4": 1, "q8": 1}
"""How often a form reads an expert again and measures its error on calibration tokens."""


@torch.no_grad()
def seconds_to_pack(layer: Layer, forms: Sequence[str], num_batches: int) -> float:
    """Seconds for every expert of the checkpoint in `forms`, with `num_batches` batches of calibration windows.

    `layer` is the one with the largest experts; 0 batches stand for no calibration.
    """
    tensors = layer.checkpoint.expert(layer.index, 0)
    read_s = _timed(lambda: layer.checkpoint.expert(layer.index, 1 % layer.site.num_experts))
    hash_s = _timed(lambda: blob_bytes(layer.site, "exact", {(k, "exact"): v for k, v in tensors.items()}))
    quantise_s = _timed(lambda: _quantise(layer.site, tensors, compensated=num_batches > 0))
    x = torch.randn(ERROR_TOKENS, next(leaf.cols for leaf in layer.site.leaves if leaf.is_matrix))
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    run_s = _timed(lambda: expert_forward(layer.module, x, floats))
    each = 2 * read_s + 2 * hash_s
    quantised_forms = len({"q2", "q3"} & {*forms}) + bool({"q4", "q8"} & {*forms})
    each += quantised_forms * (read_s + quantise_s)
    if num_batches:
        passes = sum(FORM_PASSES.get(form, 0) for form in forms)
        each += passes * (read_s + 2 * run_s) + num_batches * (read_s + run_s) * (1 + len(forms) / 3)
    return each * sum(site.num_experts for site in layer.checkpoint.sites)


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
