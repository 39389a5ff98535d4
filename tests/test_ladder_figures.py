"""The ladder benchmark beside its methods: figures and page, the gate, what ablations leave out."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from packs import write_pack

from comoe.bench.gate import layer_mean, shuffled
from comoe.bench.ladder import ABLATIONS
from comoe.bench.ladder_figures import TARGETS, figures, page
from comoe.make.recipe import Recipe
from comoe.store.manifest import read_manifest

NUM_WINDOWS = 6


def scores(loss: float, *, worst: float | None = None, spread: float = 0.0) -> dict[str, Any]:
    """Windows of two domains that lose `loss` against `exact_row`, the second `worst`; alternately more and less."""
    raw = {}
    for name, lost in (("prose", loss), ("code", loss if worst is None else worst)):
        signs = np.where(np.arange(NUM_WINDOWS) % 2, 1, -1)
        raw[name] = {"nats": (200 * (1 + lost + spread * signs)).tolist(), "tokens": [100] * NUM_WINDOWS}
    return {"windows": raw, "nats": 2 * (1 + loss)}


def row(kind: str, method: str, share: float, loss: float, **how: Any) -> dict[str, Any]:
    return {"kind": kind, "model": "toy", "method": method, "share": share, "reaches": True, "bytes": 7,
            **scores(loss, **how)}  # fmt: skip


def exact_row() -> dict[str, Any]:
    return {"kind": "exact", "model": "toy", "bytes": 100, **scores(0.0)}


def test_the_worst_excess_is_the_largest_loss_above_its_target_of_comoes_rows_alone() -> None:
    ours = [row("comoe", "comoe", share, target + over) for (share, target), over in
            zip(TARGETS.items(), (-0.0005, 0.03, 0.01), strict=True)]  # fmt: skip
    others = [row("published", "gptq", 0.3, 0.5), row("ablation", "no", 0.3, 0.9), row("comoe", "comoe", 0.55, 0.7)]
    found = figures([exact_row(), *ours, *others])
    assert found["worst_excess_over_target"] == pytest.approx(0.03)
    assert [cell["share"] for cell in found["over_target"]] == [0.16, 0.08]


def test_below_every_target_the_excess_is_negative_and_without_targets_there_is_none() -> None:
    below = figures([exact_row(), *(row("comoe", "comoe", share, target / 2) for share, target in TARGETS.items())])
    assert below["worst_excess_over_target"] == pytest.approx(-0.0005)
    assert below["over_target"] == []
    assert figures([exact_row(), row("comoe", "comoe", 0.55, 0.1)])["worst_excess_over_target"] is None


def test_beaten_by_are_published_rows_that_surely_lose_less_at_the_same_share() -> None:
    rows = [
        exact_row(),
        row("comoe", "comoe", 0.3, 0.02),
        row("published", "better", 0.3, 0.01),
        row("published", "worse", 0.3, 0.03),
        row("published", "perhaps better", 0.3, 0.015, spread=0.05),
        {"kind": "published", "model": "toy", "method": "far", "share": 0.3, "reaches": False},
        row("comoe", "comoe", 0.16, 0.02),
        row("published", "better at 0.3", 0.16, 0.025),
        row("ablation", "better still", 0.16, 0.001),
    ]
    found = figures(rows)
    assert [(beaten["method"], beaten["share"]) for beaten in found["beaten_by"]] == [("better", 0.3)]
    assert found["beaten_by"][0]["comoe_over_it"] == pytest.approx(1.02 / 1.01 - 1)
    shown = {shown["method"]: shown for shown in found["rows"] if shown.get("method") != "comoe" and "method" in shown}
    assert shown["worse"]["comoe_over_it"] == pytest.approx(1.02 / 1.03 - 1)
    low, high = shown["perhaps better"]["comoe_over_it_ci95"]
    assert low < 0 < high


def test_shown_rows_have_losses_and_no_raw_columns() -> None:
    found = figures([exact_row(), row("comoe", "comoe", 0.16, 0.01, worst=0.05)])["rows"]
    assert all("windows" not in shown for shown in found) and "loss" not in found[0]
    assert found[1]["loss"] == pytest.approx(0.03)
    assert (found[1]["worst_domain"], found[1]["loss_worst_domain"]) == ("code", pytest.approx(0.05))


@pytest.mark.parametrize(("loss", "worst", "uneven"), [(0.02, 0.021, False), (-0.01, 0.1, True), (-0.01, 9e-4, False)])
def test_a_domain_that_loses_more_than_twice_the_mean_is_told(loss: float, worst: float, uneven: bool) -> None:
    """Of two domains none can lose more than twice their mean unless the other gains; a trifle is none of it."""
    found = figures([exact_row(), row("comoe", "comoe", 0.16, loss, worst=worst)])
    assert [cell["worst_domain"] for cell in found["worst_domain_over_twice_mean"]] == (["code"] if uneven else [])


def test_the_page_shows_every_method_by_share_and_a_dash_where_it_does_not_reach() -> None:
    rows = [
        exact_row(),
        row("comoe", "comoe", 0.3, 0.02),
        row("comoe", "comoe", 0.16, 0.05),
        row("published", "far", 0.3, 0.04),
        {"kind": "published", "model": "toy", "method": "far", "share": 0.16, "reaches": False},
        row("ablation", "without", 0.16, 0.07),
    ]
    settings = {"comoe": "1", "windows_per_domain": 6, "domains": ["prose", "code"], "calibration_tokens": 9}
    machine = {"cores": 2, "cpu": "abacus", "torch": "2"}
    written = page({"machine": machine, "settings": settings, "models": {"toy": "0"}, **figures(rows)})
    assert "| | 30% of bytes | 16% of bytes |" in written and "## toy: ablations" in written
    assert "| comoe | 2.00% (2.00% to 2.00%) | 5.00% (5.00% to 5.00%) |" in written
    assert "| far | 4.00% (4.00% to 4.00%) | - |" in written
    assert "| without | 7.00% (7.00% to 7.00%) |" in written


# --- the gate ---


def test_shuffled_experts_are_all_in_the_place_of_another() -> None:
    experts = [{"w": torch.full((2, 2), float(at))} for at in range(7)]
    got = [int(found["w"][0, 0]) for found in shuffled(experts)]
    assert sorted(got) == list(range(7)) and all(at != found for at, found in enumerate(got))


def test_the_layer_mean_is_everyones() -> None:
    experts = [{"w": torch.full((2, 2), float(at))} for at in (1, 2, 6)]
    assert [found["w"].tolist() for found in layer_mean(experts)] == [[[3.0, 3.0], [3.0, 3.0]]] * 3


@pytest.mark.parametrize(("cost", "passes"), [(0.4, False), (0.6, True)])
def test_a_model_whose_experts_can_be_exchanged_is_said_to_prove_nothing(cost: float, passes: bool) -> None:
    gate = {"kind": "gate", "model": "toy", "change": "shuffled", **scores(cost / 2)}  # of 2 nats per token
    document = figures([exact_row(), gate])
    assert [found["passes"] for found in document["gates"]] == [passes]
    assert document["gates"][0]["cost"] == pytest.approx(cost)
    settings = {"comoe": "1", "windows_per_domain": 6, "domains": ["prose", "code"], "calibration_tokens": 9}
    machine = {"cores": 2, "cpu": "abacus", "torch": "2"}
    written = page({"machine": machine, "settings": settings, "models": {"toy": "0"}, **document})
    assert ("proves nothing" in written) == (not passes)


# --- ablations ---


@pytest.mark.parametrize("name", ["all forms", "all but merged", "own forms"])
def test_an_ablated_chain_has_the_forms_that_are_left_alone(name: str, tmp_path: Path) -> None:
    ablation = ABLATIONS[name]
    write_pack(tmp_path / "toy", None)
    manifest = read_manifest(tmp_path / "toy")
    errors = {"merged": (0.01,) * 4, "q4": (0.005,) * 4, "q8": (0.001,) * 4}
    layers = tuple(msgspec.structs.replace(layer, errors=errors) for layer in manifest.layers)
    manifest = msgspec.structs.replace(manifest, layers=layers)
    found = ablation.chained(manifest)
    assert found.forms == tuple(form for form in manifest.forms if form in (*ablation.forms, "exact"))
    used = {form for step in found.chain for layer in found.assignment(step.name) for form in layer}
    assert ("merged" in used) == (name == "all forms") and "exact" in used


def test_ablations_change_one_thing_of_the_recipe_and_keep_every_form() -> None:
    whole = Recipe(num_tokens=7)
    recipes = {name: ablation.recipe(whole) for name, ablation in ABLATIONS.items()}
    assert all(recipe.num_tokens == 7 and not recipe.pruned and not recipe.certified for recipe in recipes.values())
    plain = recipes["all forms"]
    assert recipes["own forms"] == recipes["all but merged"] == plain
    assert not recipes["own forms, no error compensation"].compensated
    assert recipes["all, no distillation"].sharing.distil_steps == 0 and plain.sharing.distil_steps > 0
    assert not recipes["all, no alignment"].sharing.aligned and plain.sharing.aligned
