"""What a process needs beside its experts, reckoned from a manifest before anything is loaded. Pure, on the safe side.

The runtime measures the same by a warm-up once the dense part is there. The constants are measured: see
docs/decisions/009-memory-of-a-run.md.
"""

from dataclasses import dataclass

from comoe.store.layout import PAGE, align
from comoe.store.manifest import Manifest
from comoe.types import DTYPE_BYTES, Site, UsageError

MARGIN_BYTES = 24 << 20
"""Kernel memory that a limit counts and no process sees, but for page tables."""

PAGE_TABLES = 512
"""One byte of page tables for so many bytes of memory, in pages of 4 KiB."""

FIRST_USE_BYTES = 98 << 20
"""What the first model takes beside its tensors: modules and code of torch's and oneDNN's that had not run before."""

FIRST_USE_FILE_BYTES = 38 << 20
"""Of these, pages of files."""

NOISE_BYTES = 16 << 20
"""Two runs of the same program differ by no more: what is asked for beyond what was missing, so that it will do.

Half of it was seen: of a library whose pages are all in the page cache already, a fault maps more of them at once."""

ALLOCATOR_SHARE = 0.05
"""Room for what the C library keeps of freed memory."""

INTERPRETER_BYTES = 420 << 20
"""Python with torch and transformers, where it cannot be measured because they are not installed."""

CHUNK_TOKENS = 512
"""Prefill runs in chunks of so many tokens: each expert is read once per chunk, activations stay bounded."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What memory is sized for: prompt and answer together have at most `context` tokens; `dtype` computes.

    `forms` are those that experts may run in.
    """

    context: int
    dtype: str
    forms: tuple[str, ...] = ("exact",)

    @property
    def itemsize(self) -> int:
        return DTYPE_BYTES[self.dtype]


def dtype_of(manifest: Manifest, dtype: str | None) -> str:
    """The compute dtype: the asked one, else the checkpoint's. Raises UsageError."""
    if dtype is not None and dtype not in DTYPE_BYTES:
        raise UsageError(f"there is no dtype {dtype!r}: choose from {', '.join(DTYPE_BYTES)}.")
    return dtype or manifest.dtype


def beside_experts(manifest: Manifest, work: Workload, interpreter: int) -> int:
    """Bytes of the process without experts; `interpreter` are those before a model is loaded."""
    needed = dense_bytes(manifest, work.dtype) + kv_bytes(manifest, work) + activation_bytes(manifest, work)
    return interpreter + FIRST_USE_BYTES + MARGIN_BYTES + int(needed * (1 + ALLOCATOR_SHARE))


def dense_bytes(manifest: Manifest, dtype: str) -> int:
    """Bytes of the dense part's weights in `dtype`."""
    return manifest.dense_bytes * DTYPE_BYTES[dtype] // DTYPE_BYTES[manifest.dtype]


def advised(needed: int) -> int:
    """The budget to ask for where `needed` bytes were missing: in whole pages, as limits are kept."""
    return align(needed + NOISE_BYTES, PAGE)


def unseen_bytes(file_backed: int, memory: int) -> int:
    """What a process in `memory` bytes needs beside its anonymous memory, with `file_backed` bytes of file pages."""
    return file_backed + MARGIN_BYTES + memory // PAGE_TABLES


def kv_bytes(manifest: Manifest, work: Workload) -> int:
    """Keys and values of `context` tokens, in all attention layers."""
    return manifest.dense.kv * work.context * work.itemsize


def activation_bytes(manifest: Manifest, work: Workload) -> int:
    """The largest intermediate tensors of a prefill of `context` tokens, and of one expert converted for torch."""
    dense = manifest.dense
    site = max((manifest.site(layer) for layer in range(len(manifest.layers))), key=lambda s: s.expert_bytes_bf16)
    widest = max((leaf.rows for leaf in site.leaves if leaf.is_matrix), default=0)
    tokens = work.context * (8 * dense.hidden + 2 * dense.inner)
    scores = 3 * dense.eager_heads * work.context**2
    chunk = min(CHUNK_TOKENS, work.context) * ((manifest.experts_per_token + 3) * dense.hidden + 3 * widest)
    converted = max(conversion_bytes(site, form, work) for form in work.forms)
    return (tokens + scores + chunk) * work.itemsize + converted + 6 * 4 * dense.vocab


def conversion_bytes(site: Site, form: str, work: Workload) -> int:
    """What torch needs to run one expert in `form`: a copy in the compute dtype, and four matrices in float32."""
    if form == "exact" and site.dtype == work.dtype:
        return 0
    copy = sum(leaf.size for leaf in site.leaves) * work.itemsize
    return copy if form == "exact" else copy + 4 * 4 * max(leaf.size for leaf in site.leaves)
