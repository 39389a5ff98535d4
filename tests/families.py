"""A tiny model for every family with experts that transformers has, made from the family's own default config.

A new family usually needs nothing here; where the caps are not enough it gets a row of `SPECIAL`. What is tested with
the models is in test_families.py.
"""

import re
from importlib import import_module
from typing import Any

import transformers
from transformers import PreTrainedConfig

INTERFACE = [
    "afmoe", "aria", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_ocr2", "deepseek_v2",
    "deepseek_v3", "deepseek_v32", "deepseek_v4", "diffusion_gemma", "dots1", "dots3_note", "ernie4_5_moe",
    "ernie4_5_vl_moe", "exaone_moe", "flex_olmo", "flint", "gemma4", "glm4_moe", "glm4_moe_lite", "glm4v_moe",
    "glm5_next", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared",
    "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling", "inkling2", "jamba", "kimi_linear", "kolibri1", "laguna",
    "lfm2_moe", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl", "mistral4", "mistral_large4",
    "mixtral", "muse_spark", "nemotron_h", "olmoe", "openai_privacy_filter", "phimoe", "qwen2_moe", "qwen3_5_moe",
    "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_vl_moe", "qwen4_exp", "solar_open", "unlimited_ocr", "zaya",
]  # fmt: skip
"""Families whose experts transformers' experts interface runs."""

OUTSIDE = ["dbrx", "jetmoe", "llama4", "longcat_flash", "step3p7", "switch_transformers"]
"""Families with experts of their own making."""

FAMILIES = INTERFACE + OUTSIDE

COMPOSITES = {
    "aria with vision": "AriaForConditionalGeneration",
    "dots3_note with vision": "Dots3NoteForConditionalGeneration",
    "gemma4 with vision": "Gemma4ForConditionalGeneration",
    "inkling with vision": "InklingForConditionalGeneration",
    "inkling2 with vision": "Inkling2ForConditionalGeneration",
    "llama4 with vision": "Llama4ForConditionalGeneration",
    "minimax_m3_vl with vision": "MiniMaxM3SparseForConditionalGeneration",
    "qwen3_5_moe with vision": "Qwen3_5MoeForConditionalGeneration",
    "qwen4_exp with vision": "Qwen4ExpForConditionalGeneration",
}
"""Classes that hubs' checkpoints name where the family has a language model of its own, too."""

LEFT_OUT = {
    "bamba": "dense: its sources mention experts in a loss that was copied with the rest",
    "doge": "its experts are rows of an embedding, of a few kilobytes each",
    "nllb_moe": "refused: transformers 5 runs only its experts 0 and 1",
    "vitpose_backbone": "a vision model whose experts are data sets",
}
"""Families that mention experts and that comoe does not run, with the reason."""

NUM_LAYERS = 4
NUM_EXPERTS = 4
TOP_K = 3

EXPERTS = {
    r"(num|n_routed|num_local|moe_num)_experts": NUM_EXPERTS,
    r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts": TOP_K,
    r"moe_intermediate_size|expert_ffn_hidden_size": 32,
}
"""Sizes that are set wherever a config has the attribute, even as None: by regular expression of its whole name."""

CAPS = {
    r"(unpadded_)?vocab_size(_per_layer_input)?": 128,
    r"(num_(hidden_|decoder_)?|n_|encoder_)layers|moe_layer_end_index": NUM_LAYERS,
    r"depth|n_group|num_expert_group|topk_group": 1,
    r"pad_token_id": 0,
    r"zero_expert_num": 2,
    r"\w*heads(_per_layer)?": 4,
    r"qk_head_dim": 16,
    r"\w*(rank|head_dim|d_head|d_kv|kv_channels|rotary_dim)": 8,
    r"\w*hidden_(size|dim)|\w*put_dim|adapter_\w+|d_model": 32,
    r"\w*intermediate_size(_mlp)?|\w*ffn_dim|d_ff|mlp_dim|share_expert_dim": 32,
}
"""Largest sizes: by regular expression of the attribute's whole name, the first that matches."""

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
LATER_ATTENTION = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]

SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": LATER_ATTENTION},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}},
    "deepseek_ocr2_sam_vision_model": {"output_channels": 8, "downsample_channels": [8, 8]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "diffusion_gemma": {"canvas_length": 8},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"head_dim": 16},
    "ernie4_5_vl_moe_text": {"rope_parameters": MROPE, "moe_intermediate_size": [32, 64]},
    "gemma4_text": {"enable_moe_block": True},
    "glm4v_moe_text": {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
    "granitemoehybrid": {"layer_types": LATER_ATTENTION, "mamba_d_head": 16, "mamba_d_state": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": LATER_ATTENTION},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "mistral4": {"head_dim": 16, "qk_rope_head_dim": 8},
    "muse_spark_audio": {"hidden_sizes": [4, 4, 4, 4], "depths": [1, 1, 1, 1]},
    "nemotron_h": {"n_groups": 2},
    "phimoe": {"num_experts_per_tok": 2},  # its router always chooses two
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 60},
    "step3p5": {"sliding_window": 8},
    "switch_transformers": {"decoder_start_token_id": 0, "expert_capacity": 6},
    "unlimited_ocr_sam_vision_model": {"output_channels": 8, "downsample_channels": [8, 8]},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs beyond the caps, by model type: attributes of its config."""


HEADS = ("ForCausalLM", "ForConditionalGeneration", "ForTokenClassification", "ForBlockDiffusion")
MODEL_CLASSES = COMPOSITES | {
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}


def model_class(family: str) -> Any:
    """The class to test a family by: its language model alone where there is one."""
    if family in MODEL_CLASSES:
        return getattr(transformers, MODEL_CLASSES[family])
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    for head in HEADS:
        found = [name for name in module.__all__ if name.endswith(head)]
        if found:
            return getattr(module, found[0])
    raise LookupError(f"{family}: none of {HEADS} in {module.__all__}")


def tiny(family: str) -> tuple[PreTrainedConfig, Any]:
    """(config, model class) of a small model of `family`."""
    cls = model_class(family)
    return shrunk(cls.config_class()), cls


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config of the same class, with small sizes, the first layers only, and its sub-configs shrunk likewise."""
    values = config.to_dict()
    num_layers = values.get("num_hidden_layers")
    changed = {name: _small(name, value, num_layers) for name, value in values.items()}
    changed = {name: small for name, small in changed.items() if small != values[name]}
    parts = {name: shrunk(getattr(config, name)) for name in config.sub_configs if values.get(name)}
    return type(config)(**changed | parts | SPECIAL.get(config.model_type, {}))


def _small(name: str, value: Any, num_layers: int | None) -> Any:
    if isinstance(value, list):
        kept = value[:NUM_LAYERS] if len(value) == num_layers else value
        return [_small(name, item, None) for item in kept]
    if isinstance(value, dict):
        cut = {key for key in value if name == "per_layer_config" and int(key) >= NUM_LAYERS}
        return {key: _small(str(key), item, None) for key, item in value.items() if key not in cut}
    if (size := _first_match(EXPERTS, name)) is not None:
        return size
    cap = _first_match(CAPS, name)
    return min(value, cap) if cap is not None and type(value) is int else value


def _first_match(table: dict[str, int], name: str) -> int | None:
    return next((size for pattern, size in table.items() if re.fullmatch(pattern, name)), None)
