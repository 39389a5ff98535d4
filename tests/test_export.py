"""Exported checkpoints: transformers loads them without comoe, and they compute what the pack's step computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from comoe.make.export import export
from comoe.runtime.load import Loader
from comoe.runtime.options import Options
from comoe.store.pack import Pack
from comoe.store.profile import PROFILE
from comoe.types import UsageError

IDS = torch.arange(5, 45)[None]


def exported(pack: Path, step: str, target: Path) -> Any:
    opened = Pack(pack)
    export(opened, step, target, lambda what, done: None)
    opened.close()
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()


def test_the_exact_step_is_the_checkpoint_bit_for_bit(packed: Path, tmp_path: Path) -> None:
    found = exported(packed, "exact", tmp_path / "out").state_dict()
    original = AutoModelForCausalLM.from_pretrained(packed.parent / "source", dtype=torch.float32).state_dict()
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], original[name]) for name in original)
    assert (packed / PROFILE).exists() and not (tmp_path / "out" / PROFILE).exists()


def test_a_step_computes_what_the_pack_computes(packed: Path, tmp_path: Path) -> None:
    steps = Pack(packed).manifest.chain
    name = steps[len(steps) // 2].name
    model = Loader(Pack(packed), Options(dtype="bfloat16")).resident(name)
    with torch.inference_mode(), model.comoe:
        wanted = model(IDS).logits.float()
        got = exported(packed, name, tmp_path / "out").to(torch.bfloat16)(IDS).logits.float()
        exact = exported(packed, "exact", tmp_path / "exact").to(torch.bfloat16)(IDS).logits.float()
    assert (got - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert not torch.allclose(exact, wanted)


def test_its_card_says_what_it_costs(packed: Path, tmp_path: Path) -> None:
    step = next(found for found in Pack(packed).manifest.chain if found.certificate and found.name != "exact")
    exported(packed, step.name, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert step.certificate is not None
    assert f"`{step.name}`" in card and f"{step.certificate.loss:.2%}" in card


@pytest.mark.parametrize("step", ["17.3%", "q5", ""])
def test_a_name_that_is_no_step_is_refused_with_those_there_are(packed: Path, tmp_path: Path, step: str) -> None:
    with pytest.raises(UsageError, match=r"has no step .*choose from .*exact"):
        exported(packed, step, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists"):
        exported(packed, "exact", tmp_path / "out")


def test_the_command_says_where_it_is(comoe: Any, packed: Path, tmp_path: Path) -> None:
    done = comoe("export", packed, "-o", tmp_path / "out", "--json")
    assert done.code == 0
    assert json.loads(done.out)["step"] == "exact" and (tmp_path / "out" / "config.json").exists()
