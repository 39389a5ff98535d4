"""The sizes of a model's dense part, read from transformers' config once, at packing time."""

from typing import Any

from comoe.store.checkpoint import model_class
from comoe.store.manifest import DenseEntry

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
