"""What predictors foretell: scored by hand, and the next layer's own router as a map."""

from pathlib import Path

import numpy as np
import pytest
import torch
from models import save_random

from comoe.bench.recall import Meter, next_router
from comoe.memory.predict import Learned
from comoe.runtime.layer import Use
from comoe.store.families import experts_modules
from comoe.store.foresight import Floats, Link

LINK = Link(0, 1)


class Says:
    def chances(self, link: Link, x: Floats) -> Floats:
        return np.array([0.9, 0.8, 0.1, 0.7], np.float32)

    def used(self, layer: int, experts: list[int], tokens: int) -> None:
        return


def uses(*experts: int) -> list[Use]:
    return [Use(expert, torch.zeros(1), torch.zeros(1), 1.0) for expert in experts]


def test_recall_is_among_as_many_as_are_used_and_among_twice_as_many() -> None:
    meter = Meter({"it": Says()}, [LINK])
    token, prompt = torch.zeros(1, 3), torch.zeros(5, 3)
    for used in (0, 3, 1):
        meter.add(0, token, uses(1))
        meter.add(1, token, uses(used))
    meter.add(0, prompt, uses(1))
    meter.add(1, prompt, uses(0, 1))  # what is not decoding is not scored
    assert meter.recall() == {"it": {"1": [pytest.approx(1 / 3), pytest.approx(2 / 3)]}}


@pytest.mark.parametrize("family", ["qwen3_moe", "switch_transformers"])
def test_the_next_router_says_what_norm_and_router_say_of_the_same_residual(family: str, tmp_path: Path) -> None:
    model = save_random(family, tmp_path)
    blocks = [model.get_submodule(name.rpartition(".")[0]) for name, _ in experts_modules(model)]
    around = [model.get_submodule(name.rpartition(".")[0].rpartition(".")[0]) for name, _ in experts_modules(model)]
    norms = [getattr(found, "post_attention_layernorm", None) or found.layer_norm for found in around]
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    residual = torch.randn(7, norms[0].weight.numel())
    router = blocks[1].gate if hasattr(blocks[1], "gate") else blocks[1].router.classifier
    with torch.no_grad():
        wanted = (norms[1](residual) @ router.weight.t()).sigmoid()
        said = [Learned(next_router(model, [LINK])).chances(LINK, row[None].numpy()) for row in norms[0](residual)]
    assert np.stack(said) == pytest.approx(wanted.numpy(), abs=1e-5)
