"""What a process needs beside its experts, reckoned from a manifest before anything is loaded. Pure, on the safe side.

The runtime measures the same by a warm-up once the dense part is there.
"""

from dataclasses import dataclass

from comoe.store.manifest import Manifest
from comoe.types import DTYPE_BYTES

MARGIN_BYTES = 24 << 20
"""Kernel memory, page tables and the pages of programs that a limit counts and no process sees."""

ALLOCATOR_SHARE = 0.05
"""Room for what the C library keeps of freed memory."""

INTERPRETER_BYTES = 420 << 20
"""Python with torch and transformers, where it cannot be measured because they are not installed."""

CHUNK_TOKENS = 512
"""Prefill runs in chunks of so many tokens: each expert is read once per chunk, activations stay bounded."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What memory is sized for: prompt and answer together have at most `context` tokens; `dtype` computes."""

    context: int
    dtype: str

    @property
    def itemsize(self) -> int:
        return DTYPE_BYTES[self.dtype]


def beside_experts(manifest: Manifest, work: Workload, interpreter: int) -> int:
    """Bytes of the process without experts; `interpreter` are those before a model is loaded."""
    weights = manifest.dense_bytes * work.itemsize // DTYPE_BYTES[manifest.dtype]
    needed = weights + kv_bytes(manifest, work) + activation_bytes(manifest, work)
    return interpreter + MARGIN_BYTES + int(needed * (1 + ALLOCATOR_SHARE))


def kv_bytes(manifest: Manifest, work: Workload) -> int:
    """Keys and values of `context` tokens, in all attention layers."""
    return manifest.dense.kv * work.context * work.itemsize


def activation_bytes(manifest: Manifest, work: Workload) -> int:
    """The largest intermediate tensors of a prefill of `context` tokens, and of one expert converted for torch."""
    dense = manifest.dense
    site = max((manifest.site(layer) for layer in range(len(manifest.layers))), key=lambda s: s.expert_bytes_bf16)
    widest = max((leaf.rows for leaf in site.leaves if leaf.is_matrix), default=0)
    tokens = work.context * (8 * dense.hidden + 2 * dense.inner) * work.itemsize
    chunk = CHUNK_TOKENS * (manifest.experts_per_token * dense.hidden + 3 * widest + 2 * dense.hidden) * 4
    return tokens + chunk + 3 * 4 * site.expert_bytes_bf16 // 2 + 6 * 4 * dense.vocab
