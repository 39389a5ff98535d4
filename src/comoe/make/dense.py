"""A model's dense part: written into a pack, and its sizes, read from transformers' config once, at packing time."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import torch

from comoe.store.checkpoint import Checkpoint, model_class
from comoe.store.densefile import RawTensor, write_dense
from comoe.store.manifest import DENSE, DenseEntry

STORED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64", torch.int32: "I32"}

NAMES = {
    "hidden": ("hidden_size", "d_model"),
    "inner": ("intermediate_size", "d_ff", "ffn_dim"),
    "vocab": ("vocab_size",),
    "layers": ("num_hidden_layers", "n_layers", "num_decoder_layers", "num_layers"),
    "heads": ("num_attention_heads", "num_heads", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_attention_heads", "num_heads", "n_heads"),
    "head": ("head_dim", "d_kv", "kv_channels"),
}
"""What families call a size; the first that is there counts."""


def write_dense_part(checkpoint: Checkpoint, folder: Path) -> int:
    """Write the weights outside the experts, the config and the tokenizer to `folder`; returns the weights' bytes."""
    names = checkpoint.dense_names
    nbytes = write_dense(folder / DENSE, names, (_raw(checkpoint, name) for name in names))
    for path in sorted(checkpoint.folder.iterdir()):
        if path.suffix in (".json", ".txt", ".model", ".jinja") and "index" not in path.name:
            shutil.copyfile(path, folder / path.name)
    config = msgspec.json.decode((checkpoint.folder / "config.json").read_bytes())
    config.pop("quantization_config", None)
    (folder / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config)))
    return nbytes


def _raw(checkpoint: Checkpoint, name: str) -> RawTensor:
    tensor = checkpoint.dense_tensor(name)
    data = tensor.reshape(-1).view(torch.uint8).numpy().data
    return RawTensor(name, STORED.get(tensor.dtype, "U8"), tuple(tensor.shape), data)


def dense_entry(config: Any) -> DenseEntry:
    """Sizes of the text model of `config`, with every layer taken to be ordinary attention: an upper bound."""
    text = config.get_text_config(decoder=True)
    found = {size: _first(text, names) for size, names in NAMES.items()}
    head = found["head"] or found["hidden"] // max(found["heads"], 1)
    copies = 2 if config.is_encoder_decoder else 1  # keys of the decoder's own tokens and of the encoder's
    return DenseEntry(
        hidden=found["hidden"],
        inner=found["inner"] or 4 * found["hidden"],
        vocab=found["vocab"],
        kv=2 * copies * found["layers"] * max(found["kv_heads"], 1) * head,
        num_layers=found["layers"],
        eager_heads=0 if is_fused(config) else found["heads"],
    )


def is_fused(config: Any) -> bool:
    """Whether transformers runs attention of this family without keeping its scores (SDPA)."""
    return bool(model_class(config)._supports_sdpa)  # private; what `from_pretrained` decides by


def _first(config: Any, names: tuple[str, ...]) -> int:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)
