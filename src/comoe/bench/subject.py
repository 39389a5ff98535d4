"""A model under a benchmark: a checkpoint and packs of it."""

from functools import cached_property
from pathlib import Path
from typing import Any

from blake3 import blake3

from comoe.make.pack import pack
from comoe.make.protocol import Evaluation
from comoe.make.recipe import Recipe
from comoe.runtime.generate import tokenizer_of
from comoe.store.checkpoint import read_config


class Subject:
    """The checkpoint in `folder`; packs of it are made in `packs`, or found there."""

    def __init__(self, folder: Path, packs: Path) -> None:
        self.folder, self._packs = folder, packs

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def hash(self) -> str:
        """BLAKE3 of every file of the checkpoint."""
        files = [path for path in sorted(self.folder.iterdir()) if path.is_file()]
        return blake3(repr([(path.name, blake3(path.read_bytes()).hexdigest()) for path in files]).encode()).hexdigest()

    @cached_property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.folder)

    @cached_property
    def window_length(self) -> int:
        """Tokens of a window of the evaluation protocol."""
        return Evaluation.kind(read_config(self.folder)).window_length

    def pack(self, recipe: Recipe) -> Path:
        """The folder of a recipe's pack, made now or found."""
        made_of = blake3(repr((self.hash, recipe)).encode()).hexdigest()
        target = self._packs / f"{self.name}-{made_of[:16]}"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            pack(self.folder, target, recipe, lambda step, done: None)
        return target
