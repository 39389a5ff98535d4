"""The cache benchmark's rows on what predictors foretell of the next layer's experts."""

from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comoe.bench.rows import Row
from comoe.bench.turns import Side
from comoe.make.protocol import Evaluation
from comoe.memory.predict import Frequent, Learned, Predictor, Previous
from comoe.runtime.layer import Use, floats
from comoe.store.families import experts_modules
from comoe.store.foresight import Floats, Foresight, Link


def recalled(model: Any, tokenizer: Any, foresight: Foresight, windows: Sequence[Sequence[int]], tokens: int) -> Row:
    """Of the experts that each layer uses while text is decoded, the share that each predictor held likeliest.

    Of as many experts as are used, and of twice as many, by layer: one layer ahead, or from the token before.
    """
    experts = [layer.num_experts for layer in model.comoe.pack.manifest.layers]
    predictors: dict[str, Predictor] = {"learned": Learned(foresight), "previous": Previous(experts)}
    predictors["frequent"] = Frequent([np.array(layer.frequency) for layer in model.comoe.pack.manifest.layers])
    router = next_router(model, foresight)
    if router:
        predictors["next router"] = Learned(router)
    meter = Meter(predictors, foresight)
    side = Side(Evaluation.for_model(model, tokenizer))
    with model.comoe.heeded(meter.add):
        for window in windows:
            side.decode(window, tokens, perf_counter)
    return {"recall": meter.recall()}


class Meter:
    """What predictors said, and what came."""

    def __init__(self, predictors: dict[str, Predictor], links: Iterable[Link]) -> None:
        self._predictors, self._links = predictors, {link.layer: link for link in links}
        self._told: dict[int, dict[str, Floats]] = {}
        self._found: dict[str, dict[int, list[tuple[float, float]]]] = {name: {} for name in predictors}

    def add(self, layer: int, x: Tensor, uses: Sequence[Use]) -> None:
        """A chunk that decodes is scored and told of; others are learnt from alone."""
        used = [use.expert for use in uses]
        for name, chances in self._told.pop(layer, {}).items():
            if len(x) == 1 and used:
                order = np.argsort(-chances, kind="stable").tolist()
                found = [len({*order[: times * len(used)]} & {*used}) / len(used) for times in (1, 2)]
                self._found[name].setdefault(layer, []).append((found[0], found[1]))
        for predictor in self._predictors.values():
            predictor.used(layer, used, len(x))
        link = self._links.get(layer)
        if link is not None and len(x) == 1:
            given = floats(x)
            self._told[link.target] = {name: of.chances(link, given) for name, of in self._predictors.items()}

    def recall(self) -> dict[str, dict[str, list[float]]]:
        """By predictor and layer."""
        return {
            name: {str(layer): np.mean(found, 0).tolist() for layer, found in sorted(layers.items())}
            for name, layers in self._found.items()
        }


def next_router(model: Any, links: Iterable[Link]) -> Foresight:
    """The next layer's own norm and router as a map from what this layer's experts are given; no text is needed.

    What experts get is the residual, normalised and scaled; the next layer would scale it otherwise. Root mean square
    norms alone are known, as Qwen3's and Switch's: nothing for other models.
    """
    parts = [_norm_and_router(model, name) for name, _ in experts_modules(model)]
    found = {}
    for link in links:
        (here, _), (there, router) = parts[link.layer], parts[link.target]
        if here is None or there is None or router is None:
            return {}
        weights = (router * (there / here)).t()
        found[link] = torch.cat([weights, torch.zeros(1, weights.shape[1])]).numpy().astype(np.float32)
    return found


def _norm_and_router(model: Any, experts: str) -> tuple[Tensor | None, Tensor | None]:
    block = model.get_submodule(experts.rpartition(".")[0])
    around = model.get_submodule(experts.rpartition(".")[0].rpartition(".")[0])
    norm = getattr(around, "post_attention_layernorm", getattr(around, "layer_norm", None))
    router = getattr(block, "gate", getattr(getattr(block, "router", None), "classifier", None))
    if norm is None or router is None:
        return None, None
    return norm.weight.detach().float(), router.weight.detach().float()
