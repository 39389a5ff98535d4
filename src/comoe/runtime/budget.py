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
    key = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    given = {key: ids} if key == "input_ids" else {"input_ids": ids, key: ids[:, :1]}
    output = model(**given, use_cache=True, **_last_logits(model))
    step = {key: ids[:, :1], "past_key_values": output.past_key_values, "use_cache": True}
    if model.config.is_encoder_decoder:
        step["encoder_outputs"] = (output.encoder_last_hidden_state,)
    del output
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
