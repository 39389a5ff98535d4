"""Exactness through the whole product, for every family: packed, served from a small cache, compared to the bit.

One sweep for the importer, the pack and the runtime: `sweep` asks, the tests here say what must come out.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import torch
from families import COMPOSITES, FAMILIES
from models import NUM_TOKENS, Answer, answer, eager_model, save_random
from quantised import save_fp8, save_mxfp4, save_plain
from sources import read
from sweep import HEADINGS, TOLERANCE, Subject, differs, finding
from torch import Tensor

from comoe.kernels import native
from comoe.plan.footprint import CHUNK_TOKENS
from comoe.runtime.experts import SiteMath
from comoe.store.families import experts_modules
from comoe.store.layout import quantised
from comoe.store.manifest import FORM_PARTS
from comoe.store.pack import Pack
from comoe.types import ExpertId

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"

HALVES = (torch.bfloat16, torch.float16)
HALF_FAMILIES = ("qwen3_moe", "mixtral", "switch_transformers")
COARSE = ("mixtral", "switch_transformers", "gpt_oss", "aria", "dbrx", "llama4", "nemotron_h", "muse_spark")
"""Families that differ in how an expert computes: gated or not, transposed, with biases, with norms, of three parts."""


@pytest.fixture(scope="module", params=[*FAMILIES, *COMPOSITES])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(request.param, tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module", params=COARSE)
def coarse(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(request.param, tmp_path_factory.mktemp("coarse"), forms=tuple(FORM_PARTS))


def assert_close(found: Answer, expected: Answer, tolerance: float = TOLERANCE) -> None:
    """The same tokens, for the same logits but for rounding."""
    assert bool(expected.logits.isfinite().all())
    torch.testing.assert_close(found.logits, expected.logits, rtol=tolerance, atol=tolerance)
    assert found.tokens == expected.tokens
    torch.testing.assert_close(found.steps, expected.steps, rtol=tolerance, atol=tolerance)


# --- every family ---


def test_logits_and_greedy_tokens_are_those_of_eager_transformers(subject: Subject) -> None:
    assert_close(subject.resident.kernel, subject.eager)
    assert_close(subject.resident.torch, subject.eager)


def test_a_cache_of_an_expert_per_layer_changes_no_bit(subject: Subject) -> None:
    ways, stats = subject.budgeted
    assert ways.equals(subject.resident)
    assert stats["resident_bytes"] <= stats["capacity_bytes"] < subject.expert_bytes * subject.num_experts
    assert stats["bytes_read"]["flash"] >= subject.exact_bytes


def test_a_cache_of_one_expert_changes_no_bit(subject: Subject) -> None:
    assert subject.resized.smallest.equals(subject.resident.kernel)


def test_a_cache_resized_before_every_layer_changes_no_bit(subject: Subject) -> None:
    assert subject.resized.answer.equals(subject.resident.kernel)


def test_experts_from_the_wrong_rows_give_other_logits(subject: Subject) -> None:
    assert differs(subject.shifted, subject.eager)


def test_every_site_is_asked_for_as_many_experts_per_token_as_the_checkpoint_says(subject: Subject) -> None:
    found = subject.resized
    prompts = {NUM_TOKENS // 2} if subject.family == "ernie4_5_vl_moe" else found.prompts
    for uses in found.uses:
        assert sum(index.numel() for index in uses) / subject.manifest.experts_per_token in prompts
        assert len({expert for index in uses for expert in index.flatten().tolist()}) > 1


def test_finer_forms_are_nearer_to_exact_on_calibration_text(subject: Subject) -> None:
    if subject.eager.tokens is None:
        assert subject.manifest.forms == ("q4", "q8", "exact")
        return
    measured = [layer.errors for layer in subject.manifest.layers if layer.errors]
    assert measured
    for errors in measured:
        q8, q4, merged = (sum(errors[form]) for form in ("q8", "q4", "merged"))
        assert 0 < q8 < 1e-3 < q4 < min(0.05, merged)


def test_the_familys_row_of_the_page_is_what_the_sweep_finds(subject: Subject) -> None:
    found, row = finding(subject), written_rows()[subject.family]
    if not native.available():  # torch runs what the kernel would
        found = replace(found, runs=row.split(" | ")[HEADINGS.index("runs")])
    assert found.row() == row


# --- other precisions, longer prompts, batches ---


@pytest.fixture(scope="module", params=product(HALF_FAMILIES, HALVES), ids=str)
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    family, dtype = request.param
    return Subject(family, tmp_path_factory.mktemp("half"), dtype)


def test_in_half_precision_no_cache_changes_a_bit(half: Subject) -> None:
    assert half.budgeted[0].equals(half.resident)
    assert half.resized.smallest.equals(half.resident.kernel)
    assert half.resized.answer.equals(half.resident.kernel)
    assert differs(half.shifted, half.resident.kernel)


def test_in_half_precision_rounding_is_no_worse_than_that_of_eager_transformers(half: Subject) -> None:
    true = answer(eager_model(half.family, half.checkpoint, torch.float32)).logits
    for found in half.resident[:2]:
        assert error(found, true) <= 1.5 * error(half.eager, true)


def error(found: Answer, true: Tensor) -> float:
    """Root of the mean squared difference of logits."""
    return float((found.logits.float() - true).square().mean().sqrt())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_experts_compute_in_float32_as_eager_transformers(dtype: torch.dtype, tmp_path: Path) -> None:
    save_random("qwen3_moe", tmp_path / "half", dtype)
    subject = Subject("qwen3_moe", tmp_path, checkpoint=tmp_path / "half")
    assert_close(subject.resident.kernel, subject.eager)
    assert subject.budgeted[0].equals(subject.resident)


@pytest.mark.parametrize("family", HALF_FAMILIES)
def test_a_prompt_of_several_chunks_is_exact(family: str, tmp_path: Path) -> None:
    subject, length = Subject(family, tmp_path), 2 * CHUNK_TOKENS + 1
    expected = answer(eager_model(family, subject.checkpoint), length)
    with subject.served() as model:
        resident = answer(model, length)
    with subject.served(capacity=subject.expert_bytes) as model:
        streamed = answer(model, length)
    assert_close(resident, expected)
    assert streamed.equals(resident)


# --- forms that are not exact ---


def test_coarse_forms_are_the_same_from_any_cache_and_from_the_kernel_as_from_torch(coarse: Subject) -> None:
    assert coarse.manifest.forms == tuple(FORM_PARTS)
    for form in coarse.manifest.forms[:-1]:
        assert_coarse(coarse, form)


def test_what_has_no_levels_is_every_experts_own_in_all_forms_but_the_merged(coarse: Subject) -> None:
    """Biases and norms: sums of a cluster's expert and a delta leave them as they are."""
    forms = [form for form in coarse.manifest.forms if form not in ("dropped", "merged", "exact")]
    with coarse.served() as model:
        for layer, (_, module) in enumerate(experts_modules(model)):
            maths = SiteMath(module, coarse.manifest.site(layer), torch.float32)
            own = [leaf.name for leaf in maths.site.leaves if not quantised(leaf)]
            expert = ExpertId(layer, maths.site.num_experts - 1)
            wanted = maths.tensors("exact", blobs_of(model.comoe.pack, expert, "exact"))
            for form in forms:
                found = maths.tensors(form, blobs_of(model.comoe.pack, expert, form))
                assert all(torch.equal(found[name], wanted[name]) for name in own)


def blobs_of(pack: Pack, expert: ExpertId, form: str) -> list[np.ndarray]:
    blobs = pack.manifest.blobs(expert, form)
    return [np.frombuffer(bytearray(read(pack, blob)), np.uint8) for blob in blobs]


def test_steps_of_mixed_forms_are_the_same_from_any_cache_and_from_the_kernel_as_from_torch(coarse: Subject) -> None:
    steps = coarse.manifest.chain[:-1]
    forms = {step.name: {*"".join(step.assignment)} for step in steps}
    most_mixed = max(forms, key=lambda name: len(forms[name]))
    assert len(forms[most_mixed]) > 1
    for name in {steps[0].name, most_mixed, steps[-1].name}:
        assert_coarse(coarse, name)


def assert_coarse(subject: Subject, rung: str) -> None:
    resident, streamed = subject.coarse(rung)
    assert streamed.equals(resident)
    assert_close(resident.kernel, resident.torch)
    assert bool(resident.calls) == (bool(subject.resident.calls) and rung != "dropped")
    assert not resident.kernel.equals(subject.resident.kernel)


# --- quantised checkpoints ---


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_an_fp8_checkpoint_is_served_as_the_plain_one_it_stands_for(family: str, tmp_path: Path) -> None:
    plain, _ = save_fp8(family, tmp_path / "fp8")
    save_plain(plain, tmp_path / "fp8", tmp_path / "plain")
    assert_served_as(tmp_path / "plain", Subject(family, tmp_path, checkpoint=tmp_path / "fp8"))


def test_an_mxfp4_checkpoint_is_served_as_the_plain_one_it_stands_for(tmp_path: Path) -> None:
    plain = save_mxfp4("gpt_oss", tmp_path / "mxfp4")
    save_plain(plain, tmp_path / "mxfp4", tmp_path / "plain")
    assert_served_as(tmp_path / "plain", Subject("gpt_oss", tmp_path, checkpoint=tmp_path / "mxfp4"))


def assert_served_as(plain: Path, subject: Subject) -> None:
    assert_close(subject.resident.kernel, answer(eager_model(subject.family, plain)))
    assert subject.budgeted[0].equals(subject.resident)
    assert differs(subject.shifted, subject.resident.kernel)


# --- the page ---


def written_rows() -> dict[str, str]:
    """Rows of docs/families.md by family."""
    table = PAGE.read_text(encoding="utf-8").partition("\n\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines[1:]}


def test_the_page_lists_the_families_that_are_swept_and_no_others() -> None:
    assert list(written_rows()) == [*FAMILIES, *COMPOSITES]


def test_the_pages_text_and_its_list_of_refused_families_are_what_make_docs_writes() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert written == str(run_path(str(PAGE.with_name("build_families.py")))["page"](written_rows().values()))
