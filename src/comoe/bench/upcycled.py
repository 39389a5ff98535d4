"""A model whose experts share structure: a dense network trained, copied into experts, each given a low-rank delta.

Sparse upcycling (Komatsuzaki et al., 2023) with adapters for experts: what merging and decomposition were invented
for. Everything but its feed-forward networks comes from a trained mixture of experts; it has half as many experts,
twice as wide, so that its bytes are the same.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, AutoTokenizer

from comoe.make.protocol import DecoderEvaluation
from comoe.make.text import windows
from comoe.types import Progress

NAME = "upcycled-mini"
RANK = 8
EXPERTS_PER_TOKEN = 2
DENSE_STEPS, SPARSE_STEPS = 240, 480
BATCH_WINDOWS = 16
WARM_UP_STEPS = 20
DENSE_RATE, DELTA_RATE, OTHER_RATE = 3e-3, 2e-2, 3e-4
BALANCE = 0.002
ROUTER_SCALE = 1.0
"""Routers begin decided, so that experts see texts of their own from the first step on."""


def make_upcycled(source: Path, texts: Sequence[Path], folder: Path, progress: Progress) -> None:
    """Train the model on `texts`, from the checkpoint `source` (Qwen3-MoE), and save it in `folder`. Minutes."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    cut = [windows(tokenizer, path.read_text("utf-8"), DecoderEvaluation.window_length, 10**6) for path in texts]
    batches = torch.tensor([window for found in cut for window in found])
    teacher = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    dense = _like(teacher, 1, 1)
    _copy(teacher, dense)
    for done in _train(dense, batches, DENSE_STEPS, DENSE_RATE, seed=0):
        progress("the dense network", 0.3 * done)
    sparse = _like(teacher, teacher.config.num_experts // 2, EXPERTS_PER_TOKEN)
    _copy(dense, sparse)
    _give_deltas(dense, sparse)
    for done in _train(sparse, batches, SPARSE_STEPS, DELTA_RATE, seed=1):
        progress("its experts", 0.3 + 0.7 * done)
    for experts in _experts(sparse):
        for name in ("gate_up_proj", "down_proj"):
            parametrize.remove_parametrizations(experts, name)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    sparse.to(torch.bfloat16).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.replace(folder)


class LowRank(nn.Module):
    """A weight (E, out, in) that is the same for every expert, but for `out @ in` of rank `RANK` of its own."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        experts, rows, cols = shape
        self.out = nn.Parameter(torch.randn(experts, rows, RANK) * 0.02)
        self.inner = nn.Parameter(torch.randn(experts, RANK, cols) * 0.02)

    def forward(self, shared: Tensor) -> Tensor:
        return shared[:1] + self.out @ self.inner


def _like(teacher: Any, num_experts: int, experts_per_token: int) -> Any:
    """An untrained model of `teacher`'s shape with other experts, twice as wide."""
    config = copy.deepcopy(teacher.config)
    config.num_experts = config.num_local_experts = num_experts
    config.num_experts_per_tok = experts_per_token
    config.moe_intermediate_size *= 2
    config.router_aux_loss_coef = BALANCE
    model = type(teacher)(config)
    model.set_experts_implementation("grouped_mm")
    return model


def _copy(source: Any, target: Any) -> None:
    """Everything but feed-forward networks."""
    state = {name: tensor for name, tensor in source.state_dict().items() if ".mlp." not in name}
    target.load_state_dict(state, strict=False)


def _experts(model: Any) -> Iterator[Any]:
    return (layer.mlp.experts for layer in model.model.layers)


@torch.no_grad()
def _give_deltas(dense: Any, sparse: Any) -> None:
    for one, experts in zip(_experts(dense), _experts(sparse), strict=True):
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, name)
            weight.copy_(getattr(one, name).expand_as(weight))
            weight.requires_grad_(False)
            parametrize.register_parametrization(experts, name, LowRank(tuple(weight.shape)), unsafe=True)
    for layer in sparse.model.layers:
        layer.mlp.gate.weight.normal_(0.0, ROUTER_SCALE)


def _train(model: Any, batches: Tensor, num_steps: int, expert_rate: float, seed: int) -> Iterator[float]:
    """AdamW with a cosine schedule on random windows; yields the fraction done."""
    generator = torch.Generator().manual_seed(seed)
    named = list(model.named_parameters())
    groups = [
        {"params": [tensor for name, tensor in named if (".mlp." in name) is inside], "lr": rate}
        for inside, rate in ((True, expert_rate), (False, OTHER_RATE))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, num_steps))
    model.train()
    for step in range(num_steps):
        ids = batches[torch.randint(len(batches), (BATCH_WINDOWS,), generator=generator)]
        loss = model(input_ids=ids, labels=ids, output_router_logits=model.config.num_experts > 1).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield (step + 1) / num_steps
    model.eval()


def _rate(step: int, num_steps: int) -> float:
    """Of the highest rate. It falls to nothing: else the noise of the last steps stays, and averaging experts gains."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
