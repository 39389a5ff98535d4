"""Coarse experts as functions of their scales: the runtime's weights, and gradients against autograd's own."""

from pathlib import Path

import pytest
import torch
from commands import calibration_text
from models import save_random

from comoe.make.calibrate import texts_of
from comoe.make.export import expert_weights
from comoe.make.pack import pack
from comoe.make.pupil import HEALED, Grid, PackedExperts, PupilLayer, heals
from comoe.make.recipe import Recipe
from comoe.runtime.experts import SiteMath
from comoe.runtime.skeleton import load_skeleton
from comoe.store.checkpoint import Checkpoint
from comoe.store.families import experts_modules
from comoe.store.manifest import FORM_PARTS
from comoe.store.pack import Pack
from comoe.types import ExpertId

ALL = tuple(form for form in FORM_PARTS if form != "exact")


@pytest.fixture(scope="module")
def every_form(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pack in every form there is, and its checkpoint."""
    folder = tmp_path_factory.mktemp("every")
    recipe = Recipe(
        forms=ALL, pruned=False, certified=False, texts=texts_of([calibration_text(folder)]), num_tokens=4096
    )
    pack(tiny_checkpoint, folder / "p", recipe, lambda step, done: None)
    return folder / "p", tiny_checkpoint


def same_weights(folder: Path, source: Path, forms: tuple[str, ...]) -> None:
    opened, checkpoint = Pack(folder), Checkpoint.open(source)
    modules = [module for _, module in experts_modules(load_skeleton(folder, torch.float32))]
    for at, module in enumerate(modules):
        maths = SiteMath(module, opened.manifest.site(at), torch.float32)
        found = PackedExperts(opened, checkpoint, at)
        for form in forms:
            wanted, got = expert_weights(opened, maths, ExpertId(at, 1), form), found(1, form)
            assert got is not None and got.keys() == wanted.keys()
            for name, tensor in wanted.items():
                torch.testing.assert_close(got[name], tensor, rtol=0, atol=0)
    opened.close()


def test_weights_are_those_of_the_runtime_in_every_form(every_form: tuple[Path, Path]) -> None:
    same_weights(*every_form, tuple(form for form in FORM_PARTS if form != "dropped"))


@pytest.mark.parametrize("family", ["switch_transformers", "gpt_oss", "dbrx"])
def test_weights_are_those_of_the_runtime_in_families_that_lay_them_out_otherwise(family: str, tmp_path: Path) -> None:
    save_random(family, tmp_path / "source")
    pack(tmp_path / "source", tmp_path / "p", Recipe(), lambda step, done: None)
    same_weights(tmp_path / "p", tmp_path / "source", ("q2", "q3", "q4", "q8", "exact"))


def test_a_dropped_expert_has_no_weights(every_form: tuple[Path, Path]) -> None:
    opened = Pack(every_form[0])
    assert PackedExperts(opened, Checkpoint.open(every_form[1]), 0)(0, "dropped") is None


def test_only_parts_that_serve_nothing_finer_are_trained(every_form: tuple[Path, Path]) -> None:
    opened = Pack(every_form[0])
    found = PackedExperts(opened, Checkpoint.open(every_form[1]), 0)
    trained = {form: {blob.part for blob in found.grids(2, form)} for form in FORM_PARTS}
    assert trained == {form: {*parts} & {*HEALED} for form, parts in FORM_PARTS.items()}
    assert not any(heals(form) or trained[form] for form in ("dropped", "q4", "q8", "exact"))
    assert all(heals(form) for form in ("merged", "lowrank", "residual", "q2", "q3"))


def test_experts_that_share_a_blob_share_its_factors(every_form: tuple[Path, Path]) -> None:
    opened = Pack(every_form[0])
    found = PackedExperts(opened, Checkpoint.open(every_form[1]), 0)
    first, second = found.grids(0, "merged"), found.grids(1, "merged")
    assert opened.manifest.layers[0].clusters[0] == opened.manifest.layers[0].clusters[1]
    assert first.keys() == second.keys()
    for blob, grids in first.items():
        assert all(grids[leaf].factor is second[blob][leaf].factor for leaf in grids)


def test_gradients_of_factors_are_those_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(-2, 2, (6, 3, 32), generator=generator, dtype=torch.int8)
    scales = torch.randn(6, 3, generator=generator)
    asked = torch.randn(6, 96, generator=generator)
    grid = Grid(levels, scales)
    (grid.weight * asked).sum().backward()
    factor = torch.ones(6, 3, requires_grad=True)
    weight = (levels.float() * (scales * factor)[..., None]).reshape(6, 96)
    (weight * asked).sum().backward()
    torch.testing.assert_close(grid.weight, weight)
    torch.testing.assert_close(grid.factor.grad, factor.grad)


def test_a_layer_adds_up_its_experts_by_gate_and_skips_what_is_no_expert(tiny_checkpoint: Path) -> None:
    _, module = next(iter(experts_modules(load_skeleton(tiny_checkpoint, torch.float32))))
    generator = torch.Generator().manual_seed(0)
    tensors = [
        {
            "gate_up_proj": torch.randn(64, 64, generator=generator),
            "down_proj": torch.randn(64, 32, generator=generator),
        }
        for _ in range(3)
    ]
    layer = PupilLayer(lambda expert, form: None if form == "dropped" else tensors[expert], 3)
    layer.forms = ("q2", "dropped", "q3")
    x = torch.randn(2, 64, generator=generator)
    index, weight = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    out = layer.forward(module, x, index, weight)

    def expert(at: int, row: int) -> torch.Tensor:
        gate, up = (x[row] @ tensors[at]["gate_up_proj"].t()).chunk(2)
        return (torch.nn.functional.silu(gate) * up) @ tensors[at]["down_proj"].t()

    torch.testing.assert_close(out, torch.stack([0.5 * expert(0, 0), 0.25 * expert(2, 1)]))
