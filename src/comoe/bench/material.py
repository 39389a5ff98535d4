"""What the quality benchmark is measured on, and how much of it: texts, tasks, windows, tokens."""

import json
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from comoe.bench.corpus import chunk_items, valid_texts
from comoe.make.calibrate import Text, texts_of
from comoe.make.protocol import ChunkItem
from comoe.make.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Scope:
    """How much is measured. `windows`, `decode_tokens` and `items` are of each domain; None: all there are.

    `decode_tokens` are the least that are decoded where `is_whole`, else about as many as are.
    """

    domains: int | None
    windows: int
    decode_tokens: int
    items: int | None
    calibration_tokens: int
    bounds: tuple[float, ...]
    shares: tuple[float, ...]

    @property
    def is_whole(self) -> bool:
        return self.domains is None


FULL = Scope(None, 48, 512, None, Recipe().num_tokens, (0.0, 0.005, 0.02), (0.5, 0.3, 0.15))
QUICK = Scope(2, 4, 64, 6, 2560, (0.0, 0.02), (0.15,))


@dataclass(frozen=True, slots=True)
class Material:
    """Texts and tasks of the folder `shared`: validation text by domain, calibration text of the same domains."""

    shared: Path
    valid: dict[str, str]
    calibration: tuple[Text, ...]
    items: tuple[ChunkItem, ...]

    @property
    def hash(self) -> str:
        """BLAKE3 of all texts and tasks."""
        texts = [[text.domain, text.text] for text in self.calibration]
        return blake3(json.dumps([self.valid, texts, self.items]).encode()).hexdigest()


def read_material(shared: Path, domains: int | None, items: int | None) -> Material:
    """Texts of so many domains, spread over all, and of each so many tasks; None: all. Raises UsageError."""
    corpus = shared / "data" / "corpus"
    valid = valid_texts(corpus, None)
    if domains is not None:
        valid = dict(list(valid.items())[:: max(1, len(valid) // domains)][:domains])
    tasks = chunk_items(shared)
    by_domain = [[item for item in tasks if item.domain == name][:items] for name in valid]
    calibration = texts_of([corpus / f"{name}.calib.txt" for name in valid])
    return Material(shared, valid, calibration, tuple(item for found in by_domain for item in found))
