"""What a served model needs beside its experts: estimated before it loads, measured by a worst-case warm-up."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch

from comoe.device import process
from comoe.runtime.experts import TORCH_DTYPES
from comoe.runtime.layer import CHUNK_TOKENS
from comoe.store.manifest import Manifest

MARGIN_BYTES = 24 << 20
"""Kernel memory, page tables and the pages of programs that a limit counts and no process sees."""

ALLOCATOR_SHARE = 0.05
"""Room for what the C library keeps of freed memory."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What the memory is sized for: prompt and answer together have at most `context` tokens."""

    context: int
    dtype: torch.dtype


def dtype_of(manifest: Manifest, dtype: str | None) -> torch.dtype:
    """The compute dtype: the asked one, else the checkpoint's."""
    return TORCH_DTYPES[dtype or manifest.dtype]


def estimate(manifest: Manifest, config: Any, work: Workload) -> int:
    """Bytes of the process without experts, before anything is loaded; on the safe side."""
    dense = manifest.dense_bytes * work.dtype.itemsize // TORCH_DTYPES[manifest.dtype].itemsize
    needed = dense + kv_bytes(config, work) + activation_bytes(manifest, config, work)
    return process.resident_bytes() + MARGIN_BYTES + int(needed * (1 + ALLOCATOR_SHARE))


def kv_bytes(config: Any, work: Workload) -> int:
    """Keys and values of `context` tokens, in all attention layers."""
    text = config.get_text_config(decoder=True)
    layers = _first(text, "num_hidden_layers", "n_layers", "num_decoder_layers", "num_layers") or 0
    heads = _first(text, "num_key_value_heads", "num_attention_heads", "num_heads", "n_heads") or 1
    hidden = _first(text, "hidden_size", "d_model") or 0
    head = _first(text, "head_dim", "d_kv", "kv_channels") or hidden // max(_first(text, "num_attention_heads") or 1, 1)
    copies = 2 if config.is_encoder_decoder else 1  # keys of the decoder's own tokens and of the encoder's
    return 2 * copies * layers * heads * head * work.context * work.dtype.itemsize


def activation_bytes(manifest: Manifest, config: Any, work: Workload) -> int:
    """The largest intermediate tensors of a prefill of `context` tokens, and of one expert converted for torch."""
    text = config.get_text_config(decoder=True)
    hidden = _first(text, "hidden_size", "d_model") or 0
    inner = _first(text, "intermediate_size", "d_ff") or 4 * hidden
    vocab = _first(text, "vocab_size") or 0
    site = max((manifest.site(layer) for layer in range(len(manifest.layers))), key=lambda s: s.expert_bytes_bf16)
    expert_elements = site.expert_bytes_bf16 // 2
    widest = max((leaf.rows for leaf in site.leaves if leaf.is_matrix), default=0)
    tokens = work.context * (8 * hidden + 2 * inner) * work.dtype.itemsize
    chunk = CHUNK_TOKENS * (manifest.experts_per_token * hidden + 3 * widest + 2 * hidden) * 4
    return tokens + chunk + 3 * 4 * expert_elements + 6 * 4 * vocab


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


def _first(config: Any, *names: str) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
