"""What a served model needs beside its experts, measured: a worst-case warm-up of the loaded dense part."""

import inspect
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch

from comoe.device import process
from comoe.plan.footprint import Workload
from comoe.store.manifest import Manifest
from comoe.types import DTYPE_BYTES, UsageError


def dtype_of(manifest: Manifest, dtype: str | None) -> str:
    """The compute dtype: the asked one, else the checkpoint's. Raises UsageError."""
    if dtype is not None and dtype not in DTYPE_BYTES:
        raise UsageError(f"there is no dtype {dtype!r}: choose from {', '.join(DTYPE_BYTES)}.")
    return dtype or manifest.dtype


class WarmUp(NamedTuple):
    """Highest resident bytes of the process, and fastest and slowest milliseconds of a decode step without experts."""

    peak_bytes: int
    low_ms: float
    high_ms: float


@torch.no_grad()
def warm_up(model: Any, work: Workload) -> WarmUp:
    """Run the largest prefill, then a decode step, with `model`'s experts as they are attached."""
    process.reset_peak()
    ids = torch.full((1, max(work.context - 1, 1)), 1)
    step: dict[str, Any] = {"use_cache": True}
    if model.config.is_encoder_decoder:  # as `generate` does: the encoder takes no `use_cache`
        step |= {"encoder_outputs": model.get_encoder()(input_ids=ids), "decoder_input_ids": ids[:, :1]}
        output = model(**step)
    else:
        step["input_ids"] = ids[:, :1]
        output = model(input_ids=ids, use_cache=True, **_last_logits(model))
    if (past := getattr(output, "past_key_values", None)) is not None:  # a model that labels tokens has none
        step["past_key_values"] = past
    del output, past
    seconds = [_timed(partial(model, **step)) for _ in range(3)]
    step.clear()
    peak = process.peak_bytes()
    process.trim_malloc()
    return WarmUp(peak, 1e3 * min(seconds), 1e3 * max(seconds[1:]))


def _timed(call: Callable[[], object]) -> float:
    start_s = perf_counter()
    call()
    return perf_counter() - start_s


def _last_logits(model: Any) -> dict[str, int]:
    """What `generate` passes too, where the model can: logits of the last position only."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
