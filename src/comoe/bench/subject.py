"""A model under a benchmark: its checkpoint, its pack, and the exact model that others are compared with."""

from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from blake3 import blake3

from comoe.bench.material import Material, Scope
from comoe.make.pack import pack
from comoe.make.protocol import Evaluation
from comoe.make.recipe import Recipe
from comoe.runtime.generate import tokenizer_of
from comoe.runtime.load import Loader, Options
from comoe.store.pack import Pack

CONTEXT = 512
"""Tokens that memory is sized for: more than any window holds."""


class Subject:
    """The checkpoint in `folder` and what it is measured on; its pack is made in `packs`, or found there.

    A context manager: leaving it closes the exact model.
    """

    def __init__(self, folder: Path, material: Material, scope: Scope, packs: Path) -> None:
        self.folder, self.material, self.scope, self._packs = folder, material, scope, packs

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

    def evaluation(self, model: Any) -> Evaluation:
        return Evaluation.for_model(model, self.tokenizer)

    def loader(self, *, max_loss: float = 0.0, dtype: str | None = None) -> Loader:
        """The pack, on its way to being served."""
        return Loader(Pack(self._pack), Options(max_loss=max_loss, context=CONTEXT, dtype=dtype))

    def resident(self, form: str, dtype: str | None = None) -> Any:
        """The model with every expert in `form` in memory, read beforehand."""
        model = self.loader(dtype=dtype).resident(form)
        manifest = model.comoe.pack.manifest
        for _ in model.comoe.cache.serve([manifest.blobs(expert, form) for expert in manifest.expert_ids]):
            pass
        return model

    @cached_property
    def exact(self) -> Any:
        """The exact model with everything in memory, in the checkpoint's dtype."""
        return self.resident("exact")

    @cached_property
    def _pack(self) -> Path:
        recipe = Recipe(texts=self.material.calibration, num_tokens=self.scope.calibration_tokens, pruned=False)
        made_of = blake3(repr((self.hash, recipe)).encode()).hexdigest()
        target = self._packs / f"{self.name}-{made_of[:16]}"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            pack(self.folder, target, recipe, lambda step, done: None)
        return target

    def __enter__(self) -> "Subject":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        exact = self.__dict__.pop("exact", None)
        if exact is not None:
            exact.comoe.close()
