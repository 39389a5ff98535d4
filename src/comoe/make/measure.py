"""A served model at work on text that nothing was fitted to: nats, milliseconds, hits and bytes, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comoe.make.protocol import Decoded, Evaluation, decode
from comoe.make.text import windows


@dataclass(frozen=True, slots=True)
class Measured:
    """Teacher-forced decoding with the live cache. `ms_per_token` is the median; the first window warms up."""

    decoded: Decoded
    ms_per_token: float
    hit_rate: float
    floor_rate: float
    bytes_read: dict[str, int]
    resident_bytes: int

    @property
    def bytes_per_token(self) -> float:
        return sum(self.bytes_read.values()) / len(self.decoded.nats)

    def loss(self, exact: "Measured") -> float:
        """Relative increase of nats against `exact`, which decoded the same tokens."""
        return float(self.decoded.nats.sum() / exact.decoded.nats.sum() - 1)


def measure(model: Any, tokenizer: Any, text_windows: Sequence[list[int]], num_tokens: int) -> Measured:
    """Decode `num_tokens` tokens of `text_windows`, after some that fill the cache and are not counted."""
    decode(model, tokenizer, text_windows[-1:], num_tokens // 4)
    model.comoe.begin_request()
    decoded = decode(model, tokenizer, text_windows, num_tokens)
    stats = model.comoe.stats()
    return Measured(
        decoded,
        float(np.median(decoded.ms)),
        stats["hit_rate"],
        stats["floor_rate"],
        stats["bytes_read"],
        stats["resident_bytes"],
    )


def sample_windows(model: Any, tokenizer: Any, files: Sequence[Path], per_file: int) -> list[list[int]]:
    """The first `per_file` windows of every file, the files taking turns."""
    length = Evaluation.for_model(model, tokenizer).window_length
    cut = [windows(tokenizer, file.read_text("utf-8"), length, per_file) for file in files]
    return [found[at] for at in range(per_file) for found in cut if at < len(found)]
