"""Which families there are, and which are refused: as a whole, or only to be calibrated. What runs is test_exact's."""

import re
from collections import defaultdict
from pathlib import Path

import pytest
import transformers
from families import INTERFACE, LEFT_OUT, OUTSIDE
from models import save_random
from sweep import TEXT, Subject
from transformers import LlamaConfig, LlamaForCausalLM, NllbMoeConfig, NllbMoeForConditionalGeneration

from comoe.make.pack import pack
from comoe.make.recipe import Recipe
from comoe.plan.ladder import ladder_of
from comoe.store.checkpoint import Checkpoint
from comoe.types import NotAMoE, UnsupportedFamily, UsageError


def test_no_family_of_transformers_is_missing_here() -> None:
    sources: dict[str, str] = defaultdict(str)
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        sources[path.parent.name] += path.read_text(encoding="utf-8")
    run_by_interface = {family for family, source in sources.items() if "@use_experts_implementation" in source}
    assert run_by_interface == set(INTERFACE)
    mention_experts = {family for family, source in sources.items() if re.search(r"\bnum_\w*experts\b", source)}
    assert mention_experts - run_by_interface == set(OUTSIDE) | set(LEFT_OUT)


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


def assert_not_calibrated(checkpoint: Path, reason: str) -> None:
    """Refused with texts before anything is written; packed without."""
    target = checkpoint.with_name("pack")
    with pytest.raises(UsageError, match=f"{reason}.*--calibrate none"):
        pack(checkpoint, target, Recipe(texts=(TEXT,), threads=1), lambda step, done: None)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    forms = pack(checkpoint, target, Recipe(threads=1), lambda step, done: None).forms
    assert forms == ("q2", "q3", "q4", "q8", "exact")


@pytest.mark.parametrize("family", ["diffusion_gemma", "openai_privacy_filter"])
def test_a_family_that_does_not_generate_is_not_calibrated(family: str, tmp_path: Path) -> None:
    save_random(family, tmp_path / "checkpoint")
    assert_not_calibrated(tmp_path / "checkpoint", "does not generate text")


@pytest.mark.parametrize("family", ["qwen3_moe", "switch_transformers", "mixtral"])
def test_a_checkpoint_without_its_tokenizer_is_not_calibrated(family: str, tmp_path: Path) -> None:
    """transformers has another answer for each of these: a tokenizer that knows nothing, almost nothing, an error."""
    save_random(family, tmp_path / "checkpoint")
    assert_not_calibrated(tmp_path / "checkpoint", "holds no tokenizer")


def test_layers_that_calibration_text_never_reaches_count_with_the_mean_error_of_the_others(tmp_path: Path) -> None:
    manifest = Subject("ernie4_5_vl_moe", tmp_path).manifest
    for form in ("merged", "q4", "q8"):
        reached = [sum(layer.errors[form]) for layer in manifest.layers if sum(layer.frequency)]
        assert 0 < len(reached) < len(manifest.layers)
        mean = sum(reached) / len(reached)
        errors = ladder_of(manifest).rung(form).errors
        assert errors == pytest.approx([sum(layer.errors.get(form, (mean,))) for layer in manifest.layers])
        assert all(("vision" in layer.site) == (form not in layer.errors) for layer in manifest.layers)
