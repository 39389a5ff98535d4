"""Checkpoints of random weights in hub layout, of any size, written tensor by tensor: for bytes and times alone.

Every token of their tokenizer is one character of a script that is printed as it comes, so that who reads a run's
output sees each token when it is made. No torch, nothing downloaded.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from comoe.store.densefile import RawTensor, write_dense
from comoe.store.tensorfiles import INDEX

SHARD_BYTES = 1 << 30
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>", "<extra_id_0>")
FIRST_CHARACTER = 0x20000
"""Where the tokenizer's characters begin: CJK ideographs of extension B, 42,720 in a row."""


class Weight(NamedTuple):
    """A tensor to write: normal with deviation `scale`, all ones where that is 0, random signs where it is None."""

    name: str
    shape: tuple[int, ...]
    scale: float | None


class Shape(Protocol):
    """A model's family and sizes. `tensors` are in the order in which hubs store them: by name, within a layer."""

    @property
    def vocab(self) -> int: ...

    def config(self) -> dict[str, Any]:
        """config.json."""
        ...

    def tensors(self) -> Iterator[Weight]:
        """Every stored tensor. Scales keep activations near one, so that tokens differ and routing spreads."""
        ...


@dataclass(frozen=True, slots=True)
class QwenShape:
    """A Qwen3-MoE: `layers` sparse layers of `experts` gated experts of `width`, of which a token uses `active`."""

    hidden: int
    layers: int
    experts: int
    active: int
    width: int
    heads: int
    kv_heads: int
    head: int = 64
    vocab: int = 4096

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "dtype": "bfloat16",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.width,
            "moe_intermediate_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "num_experts": self.experts,
            "num_experts_per_tok": self.active,
            "norm_topk_prob": True,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
        }

    def tensors(self) -> Iterator[Weight]:
        yield _matrix("lm_head.weight", self.vocab, self.hidden)
        yield Weight("model.embed_tokens.weight", (self.vocab, self.hidden), 1.0)
        for at in range(self.layers):
            yield from self._layer(f"model.layers.{at}")
        yield Weight("model.norm.weight", (self.hidden,), 0.0)

    def _layer(self, layer: str) -> Iterator[Weight]:
        yield Weight(f"{layer}.input_layernorm.weight", (self.hidden,), 0.0)
        for expert in range(self.experts):
            yield _matrix(f"{layer}.mlp.experts.{expert}.down_proj.weight", self.hidden, self.width)
            yield _matrix(f"{layer}.mlp.experts.{expert}.gate_proj.weight", self.width, self.hidden)
            yield _matrix(f"{layer}.mlp.experts.{expert}.up_proj.weight", self.width, self.hidden)
        yield _matrix(f"{layer}.mlp.gate.weight", self.experts, self.hidden)
        yield Weight(f"{layer}.post_attention_layernorm.weight", (self.hidden,), 0.0)
        attention = f"{layer}.self_attn"
        yield Weight(f"{attention}.k_norm.weight", (self.head,), 0.0)
        yield _matrix(f"{attention}.k_proj.weight", self.kv_heads * self.head, self.hidden)
        yield _matrix(f"{attention}.o_proj.weight", self.hidden, self.heads * self.head)
        yield Weight(f"{attention}.q_norm.weight", (self.head,), 0.0)
        yield _matrix(f"{attention}.q_proj.weight", self.heads * self.head, self.hidden)
        yield _matrix(f"{attention}.v_proj.weight", self.kv_heads * self.head, self.hidden)


@dataclass(frozen=True, slots=True)
class SwitchShape:
    """A Switch Transformer: encoder and decoder of `layers` each, every second one sparse with `experts` top-1 experts.

    Switch-Base-128 is `SwitchShape(hidden=768, layers=12, experts=128, width=3072, heads=12)`: 14.8 GB.
    """

    hidden: int
    layers: int
    experts: int
    width: int
    heads: int
    head: int = 64
    vocab: int = 32128

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["SwitchTransformersForConditionalGeneration"],
            "model_type": "switch_transformers",
            "dtype": "bfloat16",
            "is_encoder_decoder": True,
            "vocab_size": self.vocab,
            "d_model": self.hidden,
            "d_kv": self.head,
            "d_ff": self.width,
            "num_layers": self.layers,
            "num_decoder_layers": self.layers,
            "num_sparse_encoder_layers": self.layers // 2,
            "num_sparse_decoder_layers": self.layers // 2,
            "num_heads": self.heads,
            "num_experts": self.experts,
            "expert_capacity": 64,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
            "eos_token_id": 1,
        }

    def tensors(self) -> Iterator[Weight]:
        for half in ("decoder", "encoder"):
            for at in range(self.layers):
                yield from self._block(half, at)
            yield Weight(f"{half}.final_layer_norm.weight", (self.hidden,), None)  # else a tied head repeats the input
        yield Weight("shared.weight", (self.vocab, self.hidden), 1.0)

    def _block(self, half: str, at: int) -> Iterator[Weight]:
        kinds = ["SelfAttention", "EncDecAttention"] if half == "decoder" else ["SelfAttention"]
        for number, kind in enumerate(kinds):
            layer = f"{half}.block.{at}.layer.{number}"
            yield from self._attention(f"{layer}.{kind}")
            if at == 0 and kind == "SelfAttention":
                yield Weight(f"{layer}.{kind}.relative_attention_bias.weight", (32, self.heads), 1.0)
            yield Weight(f"{layer}.layer_norm.weight", (self.hidden,), 0.0)
        layer = f"{half}.block.{at}.layer.{len(kinds)}"
        yield Weight(f"{layer}.layer_norm.weight", (self.hidden,), 0.0)
        sparse = at % 2 == 1
        for expert in range(self.experts if sparse else 1):
            mlp = f"{layer}.mlp.experts.expert_{expert}" if sparse else f"{layer}.mlp"
            yield _matrix(f"{mlp}.wi.weight", self.width, self.hidden)
            yield _matrix(f"{mlp}.wo.weight", self.hidden, self.width)
        if sparse:
            yield _matrix(f"{layer}.mlp.router.classifier.weight", self.experts, self.hidden)

    def _attention(self, name: str) -> Iterator[Weight]:
        inner = self.heads * self.head
        yield _matrix(f"{name}.k.weight", inner, self.hidden)
        yield _matrix(f"{name}.o.weight", self.hidden, inner)
        yield Weight(f"{name}.q.weight", (inner, self.hidden), (self.hidden * self.head) ** -0.5)  # T5 does not scale
        yield _matrix(f"{name}.v.weight", inner, self.hidden)


def write_checkpoint(folder: Path, shape: Shape, *, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> int:
    """Write a bf16 checkpoint of `shape` into the new `folder`; returns its bytes. Holds one tensor at a time."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))
    write_tokenizer(folder, shape.vocab)
    shards = list(_shards(shape, shard_bytes))
    rng = np.random.default_rng(seed)
    total = 0
    files: dict[str, str] = {}
    for at, weights in enumerate(shards, 1):
        name = f"model-{at:05}-of-{len(shards):05}.safetensors"
        names = [weight.name for weight in weights]
        total += write_dense(folder / name, names, (_draw(weight, rng) for weight in weights))
        files |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index))
    return total


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A tokenizer whose token i is one character: see `text`."""
    special = [{"id": at, "content": word, "special": True} for at, word in enumerate(SPECIAL_TOKENS)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = [*SPECIAL_TOKENS, *(chr(FIRST_CHARACTER + at) for at in range(len(SPECIAL_TOKENS), vocab))]
    document = {
        "version": "1.0",
        "added_tokens": [entry | flags for entry in special],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {token: at for at, token in enumerate(tokens)}, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"clean_up_tokenization_spaces": False}))


def text(num_tokens: int, vocab: int, seed: int = 0) -> str:
    """A text of just `num_tokens` random tokens."""
    ids = np.random.default_rng(seed).integers(len(SPECIAL_TOKENS), vocab, num_tokens)
    return "".join(chr(FIRST_CHARACTER + token) for token in ids.tolist())


def _matrix(name: str, rows: int, cols: int) -> Weight:
    return Weight(name, (rows, cols), cols**-0.5)


def _nbytes(weight: Weight) -> int:
    return 2 * int(np.prod(weight.shape))


def _shards(shape: Shape, shard_bytes: int) -> Iterator[list[Weight]]:
    shard: list[Weight] = []
    for weight in shape.tensors():
        if shard and sum(map(_nbytes, shard)) + _nbytes(weight) > shard_bytes:
            yield shard
            shard = []
        shard.append(weight)
    yield shard


def _draw(weight: Weight, rng: np.random.Generator) -> RawTensor:
    values: npt.NDArray[np.float32]
    if weight.scale is None:
        values = rng.choice(np.array([-1, 1], np.float32), weight.shape)
    elif weight.scale == 0.0:
        values = np.ones(weight.shape, np.float32)
    else:
        values = rng.standard_normal(weight.shape, np.float32) * np.float32(weight.scale)
    upper = (values.reshape(-1).view(np.uint32) >> 16).astype(np.uint16)  # bf16 is a float's upper half
    return RawTensor(weight.name, "BF16", weight.shape, upper.data.cast("B"))
