"""What experts share, from a real checkpoint: merged experts, their members' deltas, and the steps made of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from commands import CALIBRATION
from conftest import save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ROUTER_STD, answer, eager_model
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from comoe.bench.bank import Bank
from comoe.defaults import FORMS
from comoe.forms.merge import clusters, dendrogram, merge
from comoe.kernels import native
from comoe.make.calibrate import Text
from comoe.make.layers import build
from comoe.make.pack import pack
from comoe.make.recipe import Recipe
from comoe.make.shared import SHARING, Shared, Sharing
from comoe.make.study import Layer, arrays
from comoe.make.text import windows
from comoe.runtime import experts as runtime
from comoe.runtime.experts import KERNEL_TOKENS, SiteMath
from comoe.runtime.generate import tokenizer_of
from comoe.runtime.load import Loader
from comoe.runtime.options import Options
from comoe.store.families import experts_modules
from comoe.store.manifest import FORM_PARTS, LayerEntry
from comoe.store.pack import Pack
from comoe.types import BlobId, ExpertId

NUM_EXPERTS = 4
HIDDEN, INNER = 64, 32
NUM_WINDOWS = 6
PLAIN = Sharing(distil_steps=0)
TAUGHT = Sharing(distil_steps=15)


def save_model(folder: Path) -> None:
    """Two layers of four experts: those of the first are one, its hidden units shuffled; the second's are random."""
    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        moe_intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config)
        for _, module in experts_modules(model):
            nn.init.normal_(module.gate_up_proj, std=0.2)
            nn.init.normal_(module.down_proj, std=0.2)
        for layer in model.model.layers:
            nn.init.normal_(layer.mlp.gate.weight, std=ROUTER_STD)
        first = model.model.layers[0].mlp.experts
        for expert in range(1, NUM_EXPERTS):
            order = torch.randperm(INNER)
            first.gate_up_proj[expert] = first.gate_up_proj[0][torch.cat([order, order + INNER])]
            first.down_proj[expert] = first.down_proj[0][:, order]
        model.save_pretrained(folder)
    save_tokenizer(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared") / "checkpoint"
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def layers(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Layer]:
    """Both layers, with what they saw of a little text."""
    tokenizer = tokenizer_of(checkpoint)
    text = windows(tokenizer, CALIBRATION, 256, NUM_WINDOWS)
    return Bank(checkpoint, tokenizer, [text], tmp_path_factory.mktemp("inputs")).layers


@pytest.fixture(scope="module")
def built(layers: list[Layer], tmp_path_factory: pytest.TempPathFactory) -> list[LayerEntry]:
    """Both layers in every form, shared experts taught."""
    return [build_in(layer, tmp_path_factory.mktemp("built"), TAUGHT) for layer in layers]


def build_in(layer: Layer, folder: Path, how: Sharing) -> LayerEntry:
    return build(replace(layer, folder=folder), tuple(FORM_PARTS), how, self_contained=True)


def error(entry: LayerEntry, form: str) -> float:
    return sum(entry.errors[form])


def tensors(layer: Layer, form: str, blobs: list[bytes]) -> dict[str, Tensor]:
    return SiteMath(layer.module, layer.site, torch.float32).tensors(form, arrays(blobs))


# --- merging ---


def test_shuffled_copies_of_one_expert_merge_to_it(layers: list[Layer]) -> None:
    layer = layers[0]
    copies = [layer.study(index).tensors for index in range(NUM_EXPERTS)]
    masses = layer.inputs.mass(NUM_EXPERTS) if layer.inputs else []
    assert not torch.equal(copies[0]["down_proj"], copies[1]["down_proj"])
    heaviest = copies[max(range(NUM_EXPERTS), key=masses.__getitem__)]
    merged = merge(copies, masses, layer.units)
    for name, tensor in heaviest.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-7)
    x, _ = layer.study(1).seen
    for copy in copies:
        torch.testing.assert_close(layer.run(x, merged), layer.run(x, copy), rtol=1e-4, atol=1e-4)


@given(masses=st.lists(st.floats(0, 1e6), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS))
@settings(max_examples=30, deadline=None)
def test_whatever_masses_say_identical_experts_merge_to_themselves(masses: list[float]) -> None:
    expert = {"down": torch.randn(5, 7, generator=torch.Generator().manual_seed(1))}
    torch.testing.assert_close(merge([expert] * NUM_EXPERTS, masses, None)["down"], expert["down"])


def test_a_layer_of_copies_loses_no_more_merged_than_four_bits_do(built: list[LayerEntry]) -> None:
    """They are chosen for what all members see, so for each they may be half as far off again."""
    assert 0 < error(built[0], "merged") < 1.6 * error(built[0], "q4")
    assert error(built[1], "merged") > 10 * error(built[1], "q4")


def test_copies_lie_together_in_the_tree_only_if_hidden_units_do_not_matter(layers: list[Layer]) -> None:
    """Outputs are compared, not weights: shuffled copies are no distance apart."""
    outputs = Shared(layers[0], PLAIN)._outputs()
    assert float((outputs - outputs[:1]).abs().max()) < 1e-4 * float(outputs.abs().max())
    others = Shared(layers[1], PLAIN)._outputs()
    assert float((others - others[:1]).abs().max()) > 0.1 * float(others.abs().max())


def test_without_alignment_copies_do_not_merge_to_themselves(layers: list[Layer], tmp_path: Path) -> None:
    plain, unaligned = (
        error(build_in(layers[0], tmp_path, how), "merged") for how in (PLAIN, replace(PLAIN, aligned=False))
    )
    assert unaligned > 10 * plain


# --- teaching ---


def test_without_teaching_a_merged_expert_is_the_plain_average(layers: list[Layer]) -> None:
    """Its four-bit weights lie beside it: no step away from the average."""
    for layer in layers:
        assert layer.inputs is not None
        average = merge(
            [layer.study(index).tensors for index in range(NUM_EXPERTS)], layer.inputs.mass(NUM_EXPERTS), layer.units
        )
        assert steps_off(layer, average, Shared(layer, PLAIN)) <= 1.001
    assert steps_off(layers[1], average, Shared(layers[1], TAUGHT)) > 3


def merged(shared: Shared, cluster: int) -> bytes:
    return shared.cluster_blobs(shared._members(cluster), ["merged"])["merged"]


def steps_off(layer: Layer, average: dict[str, Tensor], shared: Shared) -> float:
    """How many steps of four bits a merged expert's weights are at most away from `average`."""
    found = tensors(layer, "merged", [merged(shared, 0)])
    worst = 0.0
    for name, tensor in average.items():
        groups = tensor.unflatten(1, (-1, 32))
        step = groups.abs().amax(-1, keepdim=True) / 7.5
        worst = max(worst, float(((found[name].view_as(groups) - groups) / step).abs().max()))
    return worst


def test_teaching_loses_less_than_the_plain_average(
    layers: list[Layer], built: list[LayerEntry], tmp_path: Path
) -> None:
    plain = build_in(layers[1], tmp_path, PLAIN)
    assert error(built[1], "merged") < 0.9 * error(plain, "merged")


def test_the_same_layer_is_made_of_the_same_bytes(layers: list[Layer]) -> None:
    first, second = (Shared(layers[1], TAUGHT) for _ in range(2))
    assert merged(first, 0) == merged(second, 0)


def test_a_layer_that_no_text_reached_is_merged_and_measures_nothing(layers: list[Layer], tmp_path: Path) -> None:
    inputs = layers[1].inputs
    assert inputs is not None
    empty = replace(inputs, x=inputs.x[:0], index=inputs.index[:0], gate=inputs.gate[:0])
    entry = build_in(replace(layers[1], inputs=empty), tmp_path, TAUGHT)
    assert (entry.errors, entry.clusters) == ({}, (0,) * NUM_EXPERTS)
    assert entry.parts["merged"].rows == 1 and entry.parts["factors"].rows == NUM_EXPERTS


# --- deltas ---


def test_members_that_keep_a_delta_of_their_own_lose_less_than_merged(layers: list[Layer], tmp_path: Path) -> None:
    entry = build_in(layers[1], tmp_path, PLAIN)
    assert error(entry, "residual") < error(entry, "lowrank") < error(entry, "merged")
    for form in ("lowrank", "residual"):
        assert all(own < shared for own, shared in zip(entry.errors[form], entry.errors["merged"], strict=True))


def test_members_that_keep_a_delta_lose_less_than_merged_ones_that_were_taught(built: list[LayerEntry]) -> None:
    assert error(built[1], "residual") < error(built[1], "merged")


def test_a_residual_loses_less_than_two_bits_where_experts_are_alike(built: list[LayerEntry]) -> None:
    assert error(built[0], "residual") < 0.5 * error(built[0], "q2")


def test_dropping_loses_each_experts_share_of_all_outputs(built: list[LayerEntry]) -> None:
    for entry in built:
        assert error(entry, "dropped") == pytest.approx(1.0)
        assert all(entry.errors["dropped"][at] > entry.errors["q8"][at] for at in range(NUM_EXPERTS))


# --- clusters ---


@given(num_experts=st.integers(2, 12), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_cuts_of_one_tree_are_nested_from_every_expert_apart_to_all_together(num_experts: int, seed: int) -> None:
    points = torch.randn(num_experts, 3, generator=torch.Generator().manual_seed(seed)).double()
    tree = dendrogram(torch.cdist(points, points).numpy())
    assert clusters(tree, num_experts) == tuple(range(num_experts))
    assert clusters(tree, 1) == (0,) * num_experts
    for count in range(2, num_experts + 1):
        pairs = set(zip(clusters(tree, count), clusters(tree, count - 1), strict=True))
        assert len(pairs) == count


def test_a_layers_clusters_are_a_cut_of_its_tree(built: list[LayerEntry]) -> None:
    for entry in built:
        assert entry.clusters == clusters(entry.tree, max(entry.clusters) + 1)
        assert clusters(entry.tree, NUM_EXPERTS) == tuple(range(NUM_EXPERTS))


def test_members_share_their_own_clusters_expert(layers: list[Layer], tmp_path: Path) -> None:
    """Two clusters of two: each is the average of its members, weighted by how they are used."""
    with mock.patch("comoe.make.shared.EXPERTS_PER_CLUSTER", 2):
        shared = Shared(layers[1], PLAIN)
    assert max(shared.clusters) == 1
    masses = layers[1].inputs.mass(NUM_EXPERTS) if layers[1].inputs else []
    for cluster in (0, 1):
        members = [index for index, found in enumerate(shared.clusters) if found == cluster]
        average = merge(
            [layers[1].study(index).tensors for index in members], [masses[index] for index in members], layers[1].units
        )
        found = tensors(layers[1], "merged", [merged(shared, cluster)])
        for name, tensor in average.items():
            assert float((found[name] - tensor).norm()) < 0.2 * float(tensor.norm())


# --- served ---


@pytest.fixture(scope="module")
def packed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated pack in every form whose chain shares blobs."""
    target = tmp_path_factory.mktemp("packed") / "pack"
    texts = (Text("fox", CALIBRATION),)
    recipe = Recipe(tuple(FORM_PARTS), texts, 1536, sharing=TAUGHT, shared=True, certified=False)
    assert recipe.forms != FORMS  # so that forms of no step are kept
    pack(checkpoint, target, recipe, lambda step, done: None)
    return target


@pytest.fixture(scope="module")
def loader(packed: Path) -> Loader:
    return Loader(Pack(packed), Options(context=64, dtype="float32", threads=1))


def blobs_of(loader: Loader, layer: int, expert: int, form: str) -> list[Any]:
    return arrays([read(loader.pack, blob) for blob in loader.pack.manifest.blobs(ExpertId(layer, expert), form)])


def read(opened: Pack, blob: BlobId) -> bytes:
    into = bytearray(opened.nbytes(blob))
    opened.read(blob, memoryview(into))
    return bytes(into)


def test_every_step_of_the_chain_is_served_with_the_weights_that_it_names(loader: Loader, checkpoint: Path) -> None:
    """As eager transformers with those weights put in its experts' place."""
    manifest = loader.pack.manifest
    assert len(manifest.chain) > 8
    used = {form for step in manifest.chain for layer in manifest.assignment(step.name) for form in layer}
    assert used & {*SHARING} and "dropped" in used
    for step in manifest.chain:
        model = loader.resident(step.name)
        with model.comoe:
            found = answer(model).logits
        eager = eager_model("qwen3_moe", checkpoint)
        put(eager, loader, manifest.assignment(step.name))
        torch.testing.assert_close(found, answer(eager).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def put(model: Any, loader: Loader, assignment: tuple[tuple[str, ...], ...]) -> None:
    """Give a transformers model the weights of an assignment; those of dropped experts are zero."""
    for at, (_, module) in enumerate(experts_modules(model)):
        maths = SiteMath(module, loader.pack.manifest.site(at), torch.float32)
        for index, form in enumerate(assignment[at]):
            names = ("gate_up_proj", "down_proj")
            found = {} if form == "dropped" else maths.tensors(form, blobs_of(loader, at, index, form))
            for name in names:
                getattr(module, name)[index] = found.get(name, torch.zeros(()))


def test_a_dropped_expert_adds_zero(loader: Loader, layers: list[Layer]) -> None:
    maths = SiteMath(layers[0].module, layers[0].site, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
        out = maths.run("dropped", [], x)
        assert out.shape == x.shape and out.dtype is dtype and not out.any()
    model = loader.resident("dropped")
    with model.comoe:
        out = model.model.layers[0].mlp(torch.randn(1, 5, HIDDEN))
    assert not out.any()


@pytest.mark.skipif(not native.available(), reason="the kernel was not built")
@pytest.mark.parametrize("form", SHARING)
def test_in_the_kernel_a_shared_form_is_what_torch_makes_of_it(form: str, loader: Loader, layers: list[Layer]) -> None:
    maths = SiteMath(layers[1].module, layers[1].site, torch.float32)
    blobs = blobs_of(loader, 1, 2, form)
    for tokens in range(1, KERNEL_TOKENS + 2):
        x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
        with mock.patch.object(maths, "_run_kernel", wraps=maths._run_kernel) as kernel:
            found = maths.run(form, blobs, x)
            assert kernel.call_count == (tokens <= KERNEL_TOKENS)
            with mock.patch.object(runtime, "KERNEL_TOKENS", 0):
                wanted = maths.run(form, blobs, x)
            assert kernel.call_count == (tokens <= KERNEL_TOKENS)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert float(wanted.abs().max()) > 0.1
        torch.testing.assert_close(wanted, layers[1].run(x, maths.tensors(form, blobs)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["lowrank", "residual"])
def test_a_members_weights_are_its_clusters_and_a_delta(form: str, loader: Loader, layers: list[Layer]) -> None:
    """The sum of what its two blobs hold, each by itself."""
    maths = SiteMath(layers[1].module, layers[1].site, torch.float32)
    base, delta = blobs_of(loader, 1, 3, form)
    shared = maths.tensors("merged", [base])
    nothing = maths.tensors(form, [base * 0, delta])
    for name, tensor in maths.tensors(form, [base, delta]).items():
        torch.testing.assert_close(tensor, shared[name] + nothing[name], rtol=1e-5, atol=1e-6)
        assert nothing[name].any()
