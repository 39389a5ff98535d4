"""The budget promise: measured beforehand, kept under a hard limit, refused where it cannot be kept."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import greedy
from torch import Tensor

from comoe.device import process
from comoe.device.process import Resident
from comoe.make.pack import pack
from comoe.make.recipe import Recipe
from comoe.plan.footprint import NOISE_BYTES, Workload, beside_experts
from comoe.runtime import experts, load
from comoe.runtime.experts import HEIGHTS, SiteMath
from comoe.runtime.skeleton import load_skeleton
from comoe.store.families import experts_modules
from comoe.store.layout import layout
from comoe.store.manifest import read_manifest
from comoe.testbed.cgroup import MemoryGroup, drop_caches, writable
from comoe.testbed.checkpoints import QwenShape, Shape, SwitchShape, text, write_checkpoint
from comoe.testbed.libraries import own_copy
from comoe.types import UsageError

MIB = 1 << 20
TINY = {
    "qwen": QwenShape(hidden=64, layers=2, experts=4, active=2, width=32, heads=2, kv_heads=1, head=32, vocab=300),
    "switch": SwitchShape(hidden=64, layers=2, experts=4, width=96, heads=2, head=32, vocab=300),
}
LARGE = QwenShape(hidden=768, layers=4, experts=32, active=4, width=512, heads=12, kv_heads=4)
"""300 MB of experts."""

PROMPT_TOKENS, NEW_TOKENS = 64, 24
TIMEOUT_S = 240
AMPLE = 4096 * MIB


def packed(shape: Shape, folder: Path) -> Path:
    write_checkpoint(folder / "checkpoint", shape)
    pack(folder / "checkpoint", folder / "pack", Recipe(forms=()), lambda step, done: None)
    return folder / "pack"


# What is measured while a model loads


@pytest.fixture(scope="module", params=sorted(TINY))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(TINY[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture
def served(tiny: Path) -> Iterator[Any]:
    """A model with a budget for the whole process that leaves room for all experts."""
    model = load.load(tiny, process.resident_bytes() + 512 * MIB, context=64)
    with model.comoe:
        yield model


def test_the_estimate_is_above_what_is_measured_and_not_far(tiny: Path) -> None:
    before = process.resident_bytes()
    with load.load(tiny, before + 512 * MIB, context=64).comoe as handle:
        measured = handle.stats()["beside_experts_bytes"]
    estimate = beside_experts(read_manifest(tiny), Workload(64, "bfloat16"), before)
    assert measured - before < estimate - before < 200 * MIB


def test_a_budget_of_the_process_leaves_the_experts_what_is_not_needed_beside_them(served: Any) -> None:
    stats = served.comoe.stats()
    assert stats["capacity_bytes"] + stats["beside_experts_bytes"] == served.comoe._promise.memory
    assert stats["peak_bytes"] >= process.resident_bytes() - NOISE_BYTES


def test_the_cache_yields_where_the_process_grows_and_gets_it_back_for_the_next_request(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, handle = greedy(served, 12), served.comoe
    capacity = handle.stats()["capacity_bytes"]
    grown = Resident(handle._promise.memory - handle._promise.unseen + 20 * MIB, 0)
    with monkeypatch.context() as patch:
        patch.setattr(process, "resident", lambda: grown)
        assert greedy(served, 12) == expected
        assert handle.stats()["yielded_bytes"] >= 20 * MIB
        assert handle.cache.capacity >= handle.cache.smallest
    handle.begin_request()
    assert (handle.stats()["yielded_bytes"], handle.stats()["capacity_bytes"]) == (0, capacity)


def test_a_little_more_than_was_measured_costs_the_cache_nothing(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    promise = served.comoe._promise
    monkeypatch.setattr(process, "resident", lambda: Resident(promise.memory - promise.unseen + MIB, 0))
    greedy(served, 12)
    assert served.comoe.stats()["yielded_bytes"] == 0


def test_dense_weights_are_no_pages_of_a_file(tiny: Path) -> None:
    model = load_skeleton(tiny, torch.bfloat16)
    assert process.mappings(tiny) == []
    stored = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    assert stored
    assert all(bool(torch.isfinite(tensor).all()) and bool(tensor.any()) for tensor in stored.values())


def test_torch_meets_few_heights_of_an_experts_batch(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heights: set[int] = set()
    real = experts.expert_forward

    def noting(module: Any, x: Tensor, tensors: Any) -> Tensor:
        heights.add(len(x))
        return real(module, x, tensors)

    monkeypatch.setattr(experts, "expert_forward", noting)
    site = read_manifest(tiny).site(0)
    model = load_skeleton(tiny, torch.bfloat16)
    maths = SiteMath(next(module for _, module in experts_modules(model)), site, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    blob = torch.randn(layout(site, "exact").nbytes // 2, generator=generator).bfloat16().view(torch.uint8).numpy()
    x = torch.randn(500, 64, generator=generator).bfloat16()
    whole = maths.run("exact", [blob], x)
    for tokens in range(9, 500, 7):
        part = maths.run("exact", [blob], x[:tokens])
        assert part.shape == (tokens, 64)
        torch.testing.assert_close(part, whole[:tokens], rtol=0.02, atol=0.05 * float(whole.abs().max()))
    assert heights <= set(HEIGHTS)
    assert len(heights) > 5


def test_a_budget_beyond_what_the_machine_has_is_refused_with_what_it_has(tiny: Path) -> None:
    with pytest.raises(UsageError, match=r"more than .* allows: give at most \d+"):
        load.load(tiny, "900TiB")


# What a run does under a hard limit of just its budget


@dataclass(frozen=True, slots=True)
class Run:
    """How a command in a group ended."""

    code: int
    out: str
    err: str
    oom_kills: int

    @property
    def document(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)

    @property
    def smallest(self) -> int:
        """What a refusal says would do."""
        assert self.code == 3, self.err
        match = re.search(r"at least --memory (\d+) ", self.err)
        assert match, self.err
        return int(match.group(1))


@dataclass(frozen=True, slots=True)
class Bed:
    """A pack of 300 MB of experts, and libraries whose pages nobody else has in memory."""

    pack: Path
    environment: dict[str, str]
    prompt: str

    def run(self, memory: int, limit: int | None = None) -> Run:
        """`comoe run` with a budget, in a group with the same limit or another."""
        words = ["--prompt", self.prompt, "-n", NEW_TOKENS, "--ignore-eos", "--threads", 1]
        return self.comoe(limit or memory, "run", self.pack, "--memory", memory, *words)

    def comoe(self, limit: int, *words: object) -> Run:
        """A command in a group; where that is tight, with nothing in memory that it would not pay for."""
        command = [sys.executable, "-m", "comoe", *map(str, words), "--json"]
        if limit < AMPLE:
            drop_caches()
        with MemoryGroup(limit) as group:
            done = group.run(command, TIMEOUT_S, env=self.environment, stdin=subprocess.DEVNULL)
            return Run(done.returncode, done.stdout, done.stderr, group.oom_kills)


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    folder = tmp_path_factory.mktemp("bed")
    environment = own_copy(("torch", "numpy", "tokenizers", "safetensors"), folder / "site")
    return Bed(packed(LARGE, folder), environment, text(PROMPT_TOKENS, LARGE.vocab))


@pytest.fixture(scope="module")
def smallest(bed: Bed) -> int:
    """The smallest budget, as the refusal of a smaller one tells it."""
    return bed.run(100 * MIB, limit=AMPLE).smallest


@pytest.fixture(scope="module")
def barely(bed: Bed, smallest: int) -> Run:
    """A run in the smallest budget."""
    return bed.run(smallest)


@pytest.mark.cgroup
@pytest.mark.slow
@pytest.mark.skipif(not writable(), reason="needs a writable memory cgroup")
class TestHardLimits:
    def test_from_barely_fits_to_all_resident_nothing_is_killed_and_no_token_changes(
        self, bed: Bed, smallest: int, barely: Run
    ) -> None:
        experts = read_manifest(bed.pack).form_bytes("exact")
        half, twice = smallest + experts // 2, smallest + 2 * experts
        runs = {smallest: barely, half: bed.run(half), twice: bed.run(twice)}
        documents = [run.document for run in runs.values()]
        assert [run.oom_kills for run in runs.values()] == [0, 0, 0]
        assert all(got["peak_bytes"] <= memory for memory, got in zip(runs, documents, strict=True))
        assert len({got["text"] for got in documents}) == 1
        assert len(documents[0]["text"]) == NEW_TOKENS
        rates = [got["hit_rate"] for got in documents]
        assert rates[0] < rates[1] < rates[2]
        assert documents[2]["bytes_read"]["flash"] <= experts  # each at most once
        assert max(got["yielded_bytes"] for got in documents) == 0

    def test_prefill_reads_each_expert_once_however_little_fits(self, bed: Bed, barely: Run) -> None:
        manifest = read_manifest(bed.pack)
        per_token = manifest.experts_per_token * manifest.site(0).expert_bytes_bf16 * len(manifest.layers)
        most = manifest.form_bytes("exact") + NEW_TOKENS * per_token
        assert barely.document["bytes_read"]["flash"] <= most

    def test_a_little_less_than_the_smallest_is_refused_and_told_the_same_again(self, bed: Bed, smallest: int) -> None:
        refused = bed.run(smallest - 2 * NOISE_BYTES)
        assert abs(refused.smallest - smallest) < NOISE_BYTES
        assert refused.err.count("\n") == 1

    def test_what_plan_calls_the_smallest_is_enough_for_a_run(self, bed: Bed, smallest: int, barely: Run) -> None:
        context = PROMPT_TOKENS + NEW_TOKENS + 1
        planned = bed.comoe(AMPLE, "plan", bed.pack, "--memory", "1MiB", "--context", context)
        assert planned.code == 3
        document = json.loads(planned.out)
        assert abs(document["smallest_memory"] - smallest) < NOISE_BYTES
        measured = barely.document["beside_experts_bytes"]
        assert 0.85 * document["beside_experts_bytes"] < measured < document["beside_experts_bytes"] + NOISE_BYTES

    def test_a_budget_above_the_groups_limit_is_not_believed(self, bed: Bed, smallest: int) -> None:
        refused = bed.run(smallest + 64 * MIB, limit=smallest)
        assert refused.code == 2
        assert f"allows: give at most {smallest}" in refused.err
        assert re.search(r"memory\.(limit_in_bytes|max)", refused.err)
