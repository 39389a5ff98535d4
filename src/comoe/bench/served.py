"""A model as comoe serves it, and the exact model that it is compared with."""

from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from comoe.bench.material import Material, Scope
from comoe.bench.subject import Subject
from comoe.make.protocol import Evaluation
from comoe.make.recipe import Recipe
from comoe.runtime.load import Loader
from comoe.runtime.options import Options
from comoe.store.pack import Pack

CONTEXT = 512
"""Tokens that memory is sized for: more than any window holds."""


class Served(Subject):
    """The checkpoint in `folder`, served from a pack; `material` is what it is measured on, `scope` how much of it.

    A context manager: leaving it closes the exact model.
    """

    def __init__(self, folder: Path, material: Material, scope: Scope, packs: Path) -> None:
        super().__init__(folder, packs)
        self.material, self.scope = material, scope

    def evaluation(self, model: Any) -> Evaluation:
        return Evaluation.for_model(model, self.tokenizer)

    def loader(self, *, max_loss: float = 0.0, dtype: str | None = None) -> Loader:
        """The pack, on its way to being served."""
        recipe = Recipe(texts=self.material.calibration, num_tokens=self.scope.calibration_tokens, pruned=False)
        return Loader(Pack(self.pack(recipe)), Options(max_loss=max_loss, context=CONTEXT, dtype=dtype))

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

    def __enter__(self) -> "Served":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        exact = self.__dict__.pop("exact", None)
        if exact is not None:
            exact.comoe.close()
