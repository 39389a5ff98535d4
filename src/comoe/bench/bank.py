"""All experts of a model in memory, with what they saw of calibration text: what methods of aggregation are given.

A method answers with weights for every expert; `nats` says what the model is worth with them. The model is
transformers' own, in float32, so that nothing of comoe's runtime favours comoe.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comoe.make.calibrate import LayerInputs, record, recorded
from comoe.make.protocol import Evaluation
from comoe.make.score import Score
from comoe.make.study import Layer
from comoe.make.verify import reference_model
from comoe.runtime.skeleton import load_skeleton
from comoe.store.checkpoint import Checkpoint
from comoe.store.families import experts_modules, is_decorated

Weights = Mapping[str, Tensor]
Windows = Mapping[str, Sequence[list[int]]]

BATCH_WINDOWS = 16


@dataclass(frozen=True, slots=True)
class Approximation:
    """What a method makes of a model: `weights[layer][expert]` by leaf, and the bytes of all of them.

    `kept[layer]` are the experts that the router may still choose; None: all.
    """

    weights: Sequence[Sequence[Weights]]
    nbytes: int
    kept: Sequence[Sequence[int]] | None = None


class Bank:
    """The checkpoint in `folder`; `batches` of calibration windows are recorded in `work`."""

    def __init__(self, folder: Path, tokenizer: Any, batches: Sequence[list[list[int]]], work: Path) -> None:
        self.checkpoint = Checkpoint.open(folder)
        self._folder, self._tokenizer, self._batches, self._work = folder, tokenizer, batches, work

    @cached_property
    def layers(self) -> list[Layer]:
        """Every sparse layer, its inputs recorded."""
        skeleton = load_skeleton(self._folder, torch.float32)
        evaluation = Evaluation.for_model(skeleton, self._tokenizer)
        for _ in record(skeleton, self.checkpoint, self._batches, evaluation, self._work):
            pass
        modules = [module for _, module in experts_modules(skeleton)]
        return [
            Layer(self.checkpoint, at, module, recorded(self._work, at), self._work)
            for at, module in enumerate(modules)
        ]

    @property
    def fitted(self) -> list[list[int]]:
        """The windows of calibration text."""
        return [window for batch in self._batches for window in batch]

    @cached_property
    def experts(self) -> list[list[dict[str, Tensor]]]:
        """Every expert's tensors in float32, in transformers' layout."""
        return [
            [{k: v.float() for k, v in self.checkpoint.expert(at, index).items()} for index in range(site.num_experts)]
            for at, site in enumerate(self.checkpoint.sites)
        ]

    @cached_property
    def routers(self) -> list[Tensor]:
        """The router (E, H) of every layer."""
        found = []
        for at, (name, _) in enumerate(experts_modules(self.model)):
            block = self.model.get_submodule(name.rpartition(".")[0])
            width = self.inputs(at).x.shape[1]
            shape = (self.checkpoint.sites[at].num_experts, width)
            found.append(next(p.detach() for p in block.parameters() if tuple(p.shape) == shape))
        return found

    def inputs(self, layer: int) -> LayerInputs:
        """What a layer's experts saw."""
        inputs = self.layers[layer].inputs
        assert inputs is not None
        return inputs

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert as bf16."""
        return self.checkpoint.sites[0].expert_bytes_bf16

    @property
    def nbytes(self) -> int:
        """Bytes of all experts as bf16."""
        return sum(site.num_experts * site.expert_bytes_bf16 for site in self.checkpoint.sites)

    def nats(self, approximation: Approximation | None, windows: Windows) -> Score:
        """The nats of every window with a method's experts in the model, or with its own."""
        weights = self.experts if approximation is None else approximation.weights
        for (_, module), layer in zip(experts_modules(self.model), weights, strict=True):
            put(module, layer)
        kept = None if approximation is None else approximation.kept
        with _choosing(self.model, kept):
            evaluation = Evaluation.for_model(self.model, self._tokenizer, batch=BATCH_WINDOWS)
            return Score({name: evaluation.nats(found) for name, found in windows.items()})

    @cached_property
    def model(self) -> Any:
        """Transformers' own, with the experts that were scored last."""
        model = reference_model(self._folder)
        if any(is_decorated(module) for _, module in experts_modules(model)):
            model.set_experts_implementation("grouped_mm")
        return model


@torch.no_grad()
def put(module: Any, experts: Sequence[Weights]) -> None:
    """Give a transformers module its experts' weights."""
    for index, tensors in enumerate(experts):
        for name, tensor in tensors.items():
            if is_decorated(module):
                getattr(module, name)[index].copy_(tensor)
            else:
                module[f"expert_{index}"].get_parameter(name).copy_(tensor)


@contextmanager
def _choosing(model: Any, kept: Sequence[Sequence[int]] | None) -> Iterator[None]:
    """Let the routers choose among the `kept` experts of each layer alone."""
    hooks = []
    for at, (name, _) in enumerate(experts_modules(model) if kept is not None else ()):
        assert kept is not None
        block = model.get_submodule(name.rpartition(".")[0])
        barred = torch.ones(block.experts.num_experts if hasattr(block.experts, "num_experts") else len(block.experts))
        barred[list(kept[at])] = 0
        if hasattr(block, "gate"):
            hooks.append(block.gate.register_forward_hook(_TopK(barred.bool(), len(kept[at]))))
        else:
            hooks.append(block.router.classifier.register_forward_hook(_Masked(barred.bool())))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Masked:
    """A router's logits with those of barred experts at minus infinity."""

    def __init__(self, barred: Tensor) -> None:
        self._barred = barred

    def __call__(self, module: Any, args: Any, logits: Tensor) -> Tensor:
        return logits.masked_fill(self._barred, -torch.inf)


class _TopK:
    """A top-k router's whole answer, again, without barred experts: no more than are left."""

    def __init__(self, barred: Tensor, left: int) -> None:
        self._barred, self._left = barred, left

    def __call__(self, module: Any, args: Any, answer: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits = answer[0].masked_fill(self._barred, -torch.inf)
        gates, index = torch.softmax(logits.float(), -1).topk(min(module.top_k, self._left), -1)
        if module.norm_topk_prob:
            gates = gates / gates.sum(-1, keepdim=True)
        return logits, gates.to(logits.dtype), index
