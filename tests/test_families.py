"""Every family of experts that transformers has: read one expert at a time, attached, compared with eager transformers.

Ours runs here with all experts resident; that caches change nothing is tested with the runtime.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import COMPOSITES, FAMILIES, INTERFACE, LEFT_OUT, NUM_EXPERTS, OUTSIDE, tiny
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, NllbMoeConfig, NllbMoeForConditionalGeneration

from comoe.runtime.hook import attach, expert_forward
from comoe.runtime.skeleton import load_skeleton
from comoe.store.checkpoint import Checkpoint
from comoe.store.families import experts_modules
from comoe.types import NotAMoE, UnsupportedFamily

NUM_TOKENS = 20
NUM_NEW_TOKENS = 4
TOLERANCE = 1e-5
EXPERT_STD = 0.3
ROUTER_STD = 0.5


class ResidentLayer:
    """All experts of a site in memory, run in ascending order over rows in eager's order.

    Expert e computes with the tensors of expert (e + `shift`) mod E. `uses` is what routers asked for: (N, K) each.
    """

    def __init__(self, checkpoint: Checkpoint, layer: int, shift: int) -> None:
        num_experts = checkpoint.sites[layer].num_experts
        self.experts = [checkpoint.expert(layer, (expert + shift) % num_experts) for expert in range(num_experts)]
        self.uses: list[Tensor] = []

    def forward(self, module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        self.uses.append(index)
        out = torch.zeros_like(x)
        for expert, tensors in enumerate(self.experts):
            positions, tokens = torch.where(index.t() == expert)
            if len(tokens):
                y = expert_forward(module, x[tokens], tensors) * weight[tokens, positions, None]
                out.index_add_(0, tokens, y.to(out.dtype))
        return out


def load_resident(checkpoint: Checkpoint, shift: int = 0) -> tuple[Any, list[ResidentLayer]]:
    """The model with its experts attached, and the layers that run them."""
    model = load_skeleton(checkpoint.folder, torch.float32)
    layers = [ResidentLayer(checkpoint, layer, shift) for layer in range(len(checkpoint.sites))]
    attach(model, layers)
    return model, layers


@dataclass(frozen=True, slots=True)
class Original:
    """A tiny checkpoint of a family, and what eager transformers computes from it."""

    family: str
    checkpoint: Checkpoint
    inputs: dict[str, Tensor]
    logits: Tensor
    tokens: list[list[int]] | None


@pytest.fixture(scope="module", params=[*FAMILIES, *COMPOSITES])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    family: str = request.param
    folder = tmp_path_factory.mktemp("family")
    save_random(family, folder)
    _, model_class = tiny(family)
    eager = {"experts_implementation": "eager"} if family.split()[0] in INTERFACE else {}
    model = model_class.from_pretrained(folder, dtype=torch.float32, **eager).eval()
    inputs = inputs_of(model)
    return Original(family, Checkpoint.open(folder), inputs, logits_of(model, inputs), greedy_tokens(model))


def save_random(family: str, folder: Path) -> None:
    """A model with experts that matter and routers that choose."""
    config, model_class = tiny(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if re.search(r"\b(gate|router)\b", name):
                nn.init.normal_(parameter, std=ROUTER_STD)
        for _, experts in experts_modules(model):
            for parameter in experts.parameters():
                nn.init.normal_(parameter, std=EXPERT_STD)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                buffer.random_(NUM_EXPERTS)  # DeepSeek-V4's table of experts by token
    model.save_pretrained(folder)


def inputs_of(model: Any) -> dict[str, Tensor]:
    prompt = torch.arange(5, 5 + NUM_TOKENS)[None]
    if model.config.is_encoder_decoder:
        return {"input_ids": prompt, "decoder_input_ids": prompt[:, :7]}
    if canvas := getattr(model.config, "canvas_length", None):
        return {"input_ids": prompt, "decoder_input_ids": prompt[:, :canvas]}
    if model.config.model_type == "ernie4_5_vl_moe":  # every other token goes to the vision experts
        return {"input_ids": prompt, "moe_mm_token_type_ids": prompt % 2}
    return {"input_ids": prompt}


@torch.no_grad()
def logits_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**inputs).logits
    return logits


def greedy_tokens(model: Any) -> list[list[int]] | None:
    """The first tokens that the model generates, None where it generates none one by one."""
    if not model.can_generate() or hasattr(model.config, "canvas_length"):
        return None
    prompt = inputs_of(model)["input_ids"]
    tokens: list[list[int]] = model.generate(prompt, max_new_tokens=NUM_NEW_TOKENS, do_sample=False).tolist()
    return tokens


def test_logits_and_greedy_tokens_are_those_of_eager_transformers(original: Original) -> None:
    model, _ = load_resident(original.checkpoint)
    logits = logits_of(model, original.inputs)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert bool(original.logits.isfinite().all())
    torch.testing.assert_close(logits, original.logits, rtol=TOLERANCE, atol=TOLERANCE)
    assert greedy_tokens(model) == original.tokens


def test_every_site_is_asked_for_as_many_experts_per_token_as_the_checkpoint_says(original: Original) -> None:
    model, layers = load_resident(original.checkpoint)
    logits_of(model, original.inputs)
    num_tokens = {ids.numel() for ids in original.inputs.values()}
    if original.family == "ernie4_5_vl_moe":
        num_tokens = {NUM_TOKENS // 2}
    for layer in layers:
        assert sum(index.numel() for index in layer.uses) / original.checkpoint.experts_per_token in num_tokens
        assert len({expert for index in layer.uses for expert in index.flatten().tolist()}) > 1


def test_experts_of_another_index_give_other_logits(original: Original) -> None:
    model, _ = load_resident(original.checkpoint, shift=1)
    change = (logits_of(model, original.inputs) - original.logits).abs().max()
    assert change > 100 * TOLERANCE
    assert change > 0.1 * original.logits.std()


def test_nllb_is_refused_because_it_is_broken_upstream(tmp_path: Path) -> None:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "d_model": 16}
    config = NllbMoeConfig(vocab_size=16, num_experts=2, encoder_sparse_step=1, decoder_sparse_step=1, **sizes)
    NllbMoeForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedFamily, match="nllb-moe is not supported"):
        Checkpoint.open(tmp_path)


def test_a_dense_model_is_named_as_such(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(NotAMoE, match="llama"):
        Checkpoint.open(tmp_path)


def test_no_family_of_transformers_is_missing_here() -> None:
    sources: dict[str, str] = defaultdict(str)
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        sources[path.parent.name] += path.read_text(encoding="utf-8")
    run_by_interface = {family for family, source in sources.items() if "@use_experts_implementation" in source}
    assert run_by_interface == set(INTERFACE)
    mention_experts = {family for family, source in sources.items() if re.search(r"\bnum_\w*experts\b", source)}
    assert mention_experts - run_by_interface == set(OUTSIDE) | set(LEFT_OUT)
