"""What a served model needs beside its experts, measured: a worst-case warm-up of the loaded dense part."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comoe.device import process
from comoe.plan.footprint import CHUNK_TOKENS, Workload
from comoe.runtime.experts import HEIGHTS, TORCH_DTYPES, SiteMath
from comoe.runtime.hook import attach
from comoe.runtime.layer import DECODE_TOKENS
from comoe.store.layout import layout
from comoe.store.manifest import FORM_PARTS

FIRST_TOKENS = 16
"""A prefill so long brings in whatever code the first one ever needs, before anything is measured."""

KERNEL_SIZE = 256
"""Rows and columns of a matrix that is multiplied only to have code made for it: about as much as for any other."""


class WarmUp(NamedTuple):
    """What the process took: most bytes that no file backs, and the pages of programs and files that it touches.

    `earlier_peak` is the highest resident memory before the warm-up; `low_ms` and `high_ms` are the fastest and the
    slowest decode step without experts.
    """

    anonymous: int
    file_backed: int
    earlier_peak: int
    low_ms: float
    high_ms: float


@torch.no_grad()
def warm_up(model: Any, maths: Sequence[SiteMath], work: Workload) -> WarmUp:
    """Run the largest prefill, then decode steps, with one layer's worth of experts that are all zero."""
    sizes = [math.site.expert_bytes_bf16 for math in maths]
    largest = maths[int(np.argmax(sizes))]
    attach(model, [WarmLayer(largest if math is largest else None, work.forms) for math in maths])
    _fill_kernel_caches(TORCH_DTYPES[work.dtype])
    _prefill(model, min(FIRST_TOKENS, work.context))
    earlier = process.reset_peak()
    before = process.resident()
    step = _prefill(model, max(work.context - 1, 1))
    seconds = [_timed(partial(model, **step)) for _ in range(3)]
    step.clear()
    peak, after = process.peak_bytes(), process.resident()
    process.trim_malloc()
    anonymous = peak - min(before.file_backed, after.file_backed)
    return WarmUp(anonymous, after.file_backed, earlier, 1e3 * min(seconds), 1e3 * max(seconds[1:]))


class WarmLayer:
    """Stands for a layer's experts while memory is measured: what it gives is zero, what it takes is the most.

    With `maths` it also computes one expert, in each of `forms` and for each number of tokens that torch ever gets.
    One layer's is enough, since layers run one after the other.
    """

    def __init__(self, maths: SiteMath | None, forms: Sequence[str]) -> None:
        self._maths, self._forms = maths, forms

    def forward(self, module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        if len(x) <= DECODE_TOKENS:
            return torch.zeros_like(x)
        outputs = [self._chunk(chunk, index.shape[1]) for chunk in torch.split(x, CHUNK_TOKENS)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _chunk(self, x: Tensor, top_k: int) -> Tensor:
        out = _zeros((len(x), x.shape[1]), x.dtype)
        waiting = _zeros((len(x) * top_k, x.shape[1]), x.dtype)
        if self._maths is not None:
            for form in self._forms:
                blobs = [np.zeros(layout(self._maths.site, part).nbytes, np.uint8) for part in FORM_PARTS[form]]
                for height in (height for height in HEIGHTS if height <= len(x)):
                    self._maths.run(form, blobs, x[:height])
        del waiting
        return out


def _fill_kernel_caches(dtype: torch.dtype) -> None:
    """Meet as many shapes as oneDNN keeps code for: attention to ever more keys will, after a while."""
    weight = torch.zeros(KERNEL_SIZE, KERNEL_SIZE, dtype=dtype)
    for rows in range(process.KEPT_KERNELS):
        F.linear(torch.zeros(KERNEL_SIZE + rows, KERNEL_SIZE, dtype=dtype), weight)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that really take memory; torch.zeros of some size are pages that the kernel has not given yet."""
    return torch.empty(shape, dtype=dtype).fill_(0)


def _prefill(model: Any, tokens: int) -> dict[str, Any]:
    """Run a prompt of `tokens`, as `generate` does; returns the arguments of a decode step after it."""
    ids = torch.full((1, tokens), 1)
    given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "use_cache": True}
    if model.config.is_encoder_decoder:
        given["encoder_outputs"] = model.get_encoder()(input_ids=ids, attention_mask=given["attention_mask"])
        output = model(**given, decoder_input_ids=ids[:, :1])
        return given | {"decoder_input_ids": ids[:, :1], "past_key_values": output.past_key_values}
    output = model(**given, input_ids=ids, **_last_logits(model))
    step = {"input_ids": ids[:, :1], "use_cache": True}
    past = getattr(output, "past_key_values", None)  # a model that labels tokens keeps none
    return step if past is None else step | {"past_key_values": past}


def _timed(call: Callable[[], object]) -> float:
    start_s = perf_counter()
    call()
    return perf_counter() - start_s


def _last_logits(model: Any) -> dict[str, int]:
    """What `generate` passes too, where the model can: logits of the last position only."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
