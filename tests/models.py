"""Random models whose experts matter, and what a model answers, so that two answers can be compared to the bit.

Shared by the tests that compare comoe with eager transformers; configs are `families`' business.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import INTERFACE, NUM_EXPERTS, model_class, tiny
from torch import Tensor, nn
from transformers import GenerationMixin

from comoe.store.families import experts_modules

NUM_TOKENS = 20
NUM_NEW_TOKENS = 4
EXPERT_STD = 0.3
ROUTER_STD = 0.5


@dataclass(frozen=True, slots=True)
class Answer:
    """Logits of a prompt; then a greedy answer's tokens and the logits that chose them.

    The latter two are None for a model that does not generate token by token.
    """

    logits: Tensor
    tokens: list[int] | None = None
    steps: Tensor | None = None

    def equals(self, other: "Answer") -> bool:
        """Whether the two are the same to the bit."""
        return (
            torch.equal(self.logits, other.logits)
            and self.tokens == other.tokens
            and (self.steps is other.steps is None or torch.equal(_some(self.steps), _some(other.steps)))
        )

    def distance(self, other: "Answer") -> float:
        """The largest difference of two logits."""
        pairs = [(self.logits, other.logits)]
        if self.tokens == other.tokens and self.steps is not None:
            pairs.append((self.steps, _some(other.steps)))
        return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


def save_random(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Write a model with experts that matter and routers that choose; returns it."""
    config, cls = tiny(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config)
        for name, parameter in model.named_parameters():
            if re.search(r"\b(gate|router)\b", name):
                nn.init.normal_(parameter, std=ROUTER_STD)
        for _, experts in experts_modules(model):
            for parameter in experts.parameters():
                nn.init.normal_(parameter, std=EXPERT_STD)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                buffer.random_(NUM_EXPERTS)  # DeepSeek-V4's table of experts by token
    if dtype is not torch.float32:
        model.to(dtype)
    model.save_pretrained(folder)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def eager_model(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model in `folder` as transformers runs it, expert by expert."""
    eager = {"experts_implementation": "eager"} if family.split()[0] in INTERFACE else {}
    return model_class(family).from_pretrained(folder, dtype=dtype, **eager).eval()


@torch.no_grad()
def answer(model: Any, num_tokens: int = NUM_TOKENS) -> Answer:
    """What `model` says to a prompt of `num_tokens`."""
    inputs = inputs_of(model, num_tokens)
    logits: Tensor = model(**inputs).logits
    if not isinstance(model, GenerationMixin):
        return Answer(logits)
    said = model.generate(
        inputs["input_ids"],
        max_new_tokens=NUM_NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Answer(logits, said.sequences[0].tolist(), torch.cat(said.logits))


PROMPT = torch.arange(5, 25)[None]


def greedy(model: Any, num_tokens: int) -> list[int]:
    """So many tokens that a decoder says to `PROMPT`, whatever ends a text."""
    with torch.inference_mode():
        tokens = model.generate(
            PROMPT,
            attention_mask=torch.ones_like(PROMPT),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
        )
    return list(tokens[0, PROMPT.shape[1] :].tolist())


def inputs_of(model: Any, num_tokens: int = NUM_TOKENS) -> dict[str, Tensor]:
    prompt = (torch.arange(num_tokens) % NUM_TOKENS + 5)[None]
    if model.config.is_encoder_decoder:
        return {"input_ids": prompt, "decoder_input_ids": prompt[:, :7]}
    if canvas := getattr(model.config, "canvas_length", None):
        return {"input_ids": prompt, "decoder_input_ids": prompt[:, :canvas]}
    if model.config.model_type == "ernie4_5_vl_moe":  # every other token goes to the vision experts
        return {"input_ids": prompt, "moe_mm_token_type_ids": prompt % 2}
    return {"input_ids": prompt}


def _some(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
