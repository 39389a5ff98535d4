"""Published methods: exact where they keep everything, within their bytes, and scored as transformers scores."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import CALIBRATION
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

from comoe.bench.bank import Approximation, Bank
from comoe.bench.published import (
    METHODS,
    d2_moe,
    gptq,
    hc_smoe,
    m_smoe,
    plain_average,
    reap,
    reap_int4,
    res_moe,
    round_to_nearest,
)
from comoe.make.text import windows
from comoe.runtime.generate import tokenizer_of
from comoe.store.families import experts_modules

SHARES = (0.55, 0.3, 0.16, 0.08)
NUM_EXPERTS = 8
LENGTH = 256
ROUTER_SCALE = 20
"""Makes the tiny checkpoint's routers choose, so that experts differ in how they are used."""


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, its routers and experts scaled up so that they matter."""
    target = tmp_path_factory.mktemp("published") / "qwen3moe"
    model = Qwen3MoeForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight *= ROUTER_SCALE
        for _, module in experts_modules(model):
            module.gate_up_proj *= 8
            module.down_proj *= 8
    model.save_pretrained(target)
    tokenizer_of(tiny_checkpoint).save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def texts(folder: Path) -> list[list[int]]:
    return windows(tokenizer_of(folder), CALIBRATION + Path(__file__).read_text("utf-8"), LENGTH, 40)[::5]


@pytest.fixture(scope="module")
def bank(folder: Path, texts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return Bank(folder, tokenizer_of(folder), [texts[:6]], tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def held_out(texts: list[list[int]]) -> dict[str, list[list[int]]]:
    return {"one": texts[6:7], "two": texts[7:8]}


def made(found: Approximation | None) -> Approximation:
    assert found is not None
    return found


def flat(weights: Sequence[Sequence[Any]]) -> Iterator[Tensor]:
    for layer in weights:
        for expert in layer:
            yield from (expert[name] for name in sorted(expert))


def off(bank: Bank, found: Approximation) -> float:
    """Relative squared error of all weights."""
    pairs = list(zip(flat(found.weights), flat(bank.experts), strict=True))
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


# --- what they make ---


@pytest.mark.parametrize("method", [plain_average, m_smoe, hc_smoe, reap])
def test_with_room_for_every_expert_weights_are_as_they_were(bank: Bank, method: Any) -> None:
    found = made(method(bank, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(flat(found.weights), flat(bank.experts), strict=True))
    assert found.nbytes == bank.nbytes
    assert found.kept is None or found.kept == [list(range(NUM_EXPERTS))] * 2


@pytest.mark.parametrize("method", [d2_moe, res_moe])
def test_a_delta_of_full_rank_gives_the_weights_but_for_float16(bank: Bank, method: Any) -> None:
    """Of ResMoE in the order of the base's hidden units, so that sizes are compared."""
    found = made(method(bank, 2.6))
    if method is d2_moe:
        assert off(bank, found) < 1e-5
    for layer, experts in zip(bank.layers, found.weights, strict=True):
        for index, tensors in enumerate(experts):
            x, _ = bank.inputs(layer.index).of(index)
            wanted = layer.run(x, dict(bank.experts[layer.index][index]))
            assert float((layer.run(x, dict(tensors)) - wanted).norm()) <= 0.01 * float(wanted.norm())


@pytest.mark.parametrize("name", METHODS)
def test_bytes_are_within_the_share_and_fewer_bytes_are_further_off(bank: Bank, name: str) -> None:
    """Pruned experts count as zero: their weights stay, but no router may choose them."""
    errors = []
    for share in SHARES:
        found = METHODS[name](bank, share)
        if found is None:
            continue
        assert 0 < found.nbytes <= share * bank.nbytes
        assert [len(layer) for layer in found.weights] == [NUM_EXPERTS] * 2
        errors.append(loss_of_weights(bank, found))
    assert len(errors) >= 2 and errors == sorted(errors) and errors[0] > 0
    assert len({*errors}) == len(errors)


def loss_of_weights(bank: Bank, found: Approximation) -> float:
    """Relative squared error of experts' outputs on what they see."""
    missed = total = 0.0
    for at, layer in enumerate(bank.layers):
        for index, tensors in enumerate(found.weights[at]):
            x, _ = bank.inputs(at).of(index)
            wanted = layer.run(x, dict(bank.experts[at][index]))
            pruned = found.kept is not None and index not in found.kept[at]
            got = torch.zeros_like(wanted) if pruned else layer.run(x, dict(tensors))
            missed += float((got - wanted).square().sum())
            total += float(wanted.square().sum())
    return missed / total


@pytest.mark.parametrize("name", METHODS)
def test_a_share_that_a_method_cannot_reach_gives_nothing(bank: Bank, name: str) -> None:
    assert METHODS[name](bank, 0.01) is None


def test_int4_after_pruning_is_nothing_of_its_own_where_every_expert_fits(bank: Bank) -> None:
    assert reap_int4(bank, 0.3) is None
    found = made(reap_int4(bank, 0.16))
    assert found.kept is not None and {len(kept) for kept in found.kept} == {4}
    quantised = made(gptq(bank, 0.3))
    assert all(torch.equal(a, b) for a, b in zip(flat(found.weights), flat(quantised.weights), strict=True))


@pytest.mark.parametrize(("share", "bits"), [(0.55, 8), (0.3, 4), (0.22, 3), (0.16, 2)])
def test_rounding_to_nearest_is_that_of_a_slow_reference(bank: Bank, share: float, bits: int) -> None:
    found = made(round_to_nearest(bank, share))
    assert found.nbytes == bank.nbytes * (bits + 0.5) / 16
    half = 2 ** (bits - 1)
    for name in ("gate_up_proj", "down_proj"):
        weight = bank.experts[1][3][name].numpy()
        slow = np.empty_like(weight)
        for row in range(0, len(weight), 7):
            for start in range(0, weight.shape[1], 32):
                group = weight[row, start : start + 32]
                scale = np.float32(np.float16(max(abs(value) for value in group) / (half - 0.5)))
                for at, value in enumerate(group):
                    level = min(max(int(np.rint(value / scale)), -half), half - 1)
                    slow[row, start + at] = level * scale
        np.testing.assert_allclose(found.weights[1][3][name][::7], slow[::7], rtol=1e-6)


def test_gptq_is_nearer_in_outputs_on_the_same_grid(bank: Bank) -> None:
    for share in (0.3, 0.16):
        plain, compensated = made(round_to_nearest(bank, share)), made(gptq(bank, share))
        assert plain.nbytes == compensated.nbytes
        assert loss_of_weights(bank, compensated) < 0.9 * loss_of_weights(bank, plain)


def test_plain_average_is_of_neighbours_by_how_often_they_are_used(bank: Bank) -> None:
    found = made(plain_average(bank, 0.5))
    for at, experts in enumerate(bank.experts):
        frequency = bank.inputs(at).frequency(NUM_EXPERTS)
        for first in range(0, NUM_EXPERTS, 2):
            shares = np.array(frequency[first : first + 2]) / sum(frequency[first : first + 2])
            wanted = sum(float(share) * experts[first + k]["down_proj"] for k, share in enumerate(shares))
            for index in (first, first + 1):
                torch.testing.assert_close(found.weights[at][index]["down_proj"], wanted)


def test_m_smoe_keeps_the_busiest_experts_of_all_layers_as_groups(bank: Bank) -> None:
    """As many groups as fit, each layer's busiest expert in one of its own."""
    found = made(m_smoe(bank, 0.5))
    groups = [len({expert["down_proj"].sum().item() for expert in layer}) for layer in found.weights]
    assert sum(groups) == NUM_EXPERTS and min(groups) >= 1


def test_reap_keeps_the_experts_of_the_largest_gated_outputs(bank: Bank) -> None:
    found = made(reap(bank, 0.5))
    assert found.kept is not None
    for at, kept in enumerate(found.kept):
        scores = []
        for index in range(NUM_EXPERTS):
            x, gate = bank.inputs(at).of(index)
            y = bank.layers[at].run(x, dict(bank.experts[at][index]))
            scores.append(sum(float(g) * float(row.norm()) for g, row in zip(gate, y, strict=True)) / max(len(x), 1))
        assert sorted(kept) == sorted(sorted(range(NUM_EXPERTS), key=scores.__getitem__)[-4:])


# --- what they are worth ---


def nats_of(model: Any, tokens: list[int]) -> float:
    """Nats of a window's tokens but the first."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
    chances = torch.log_softmax(logits.double(), -1)
    return -sum(float(chances[at, tokens[at + 1]]) for at in range(len(tokens) - 1))


@pytest.fixture(scope="module")
def eager(folder: Path) -> Any:
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def test_nats_without_an_approximation_are_those_of_transformers(
    bank: Bank, held_out: dict[str, list[list[int]]], eager: Any
) -> None:
    found = bank.nats(None, held_out)
    for name, (window,) in held_out.items():
        assert found.domains[name].nats[0] == pytest.approx(nats_of(eager, window), rel=1e-5)
        assert found.domains[name].tokens[0] == LENGTH - 1


def test_what_was_scored_before_leaves_no_trace(bank: Bank, held_out: dict[str, list[list[int]]]) -> None:
    exact = bank.nats(None, held_out).mean
    coarse = bank.nats(made(round_to_nearest(bank, 0.16)), held_out).mean
    pruned = bank.nats(made(reap(bank, 0.3)), held_out).mean
    assert abs(coarse - exact) > 1e-4 and abs(pruned - exact) > 1e-4
    assert bank.nats(None, held_out).mean == exact
    assert bank.nats(Approximation(bank.experts, bank.nbytes), held_out).mean == exact


def test_routers_that_may_choose_every_expert_choose_as_ever(bank: Bank, held_out: dict[str, list[list[int]]]) -> None:
    everything = Approximation(bank.experts, bank.nbytes, [list(range(NUM_EXPERTS))] * 2)
    assert bank.nats(everything, held_out).mean == pytest.approx(bank.nats(None, held_out).mean, rel=1e-6)


@pytest.mark.parametrize("share", [0.5, 0.3, 0.125])
def test_routers_never_choose_a_pruned_expert(bank: Bank, held_out: dict[str, list[list[int]]], share: float) -> None:
    """Were they chosen, their weights, which are no numbers here, would spoil everything: even down to one expert."""
    found = made(reap(bank, share))
    assert found.kept is not None
    spoilt = [
        [
            tensors if index in kept else {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
            for index, tensors in enumerate(layer)
        ]
        for layer, kept in zip(found.weights, found.kept, strict=True)
    ]
    plain = bank.nats(found, held_out)
    assert bank.nats(Approximation(spoilt, found.nbytes, found.kept), held_out).mean == plain.mean
    assert not np.isfinite(bank.nats(Approximation(spoilt, found.nbytes), held_out).mean)


def test_routers_share_their_gates_among_those_left(
    bank: Bank, held_out: dict[str, list[list[int]]], eager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = made(reap(bank, 0.5))
    assert found.kept is not None
    for layer, kept in zip(eager.model.layers, found.kept, strict=True):
        monkeypatch.setattr(layer.mlp.gate, "forward", router_among(kept, layer.mlp.gate))
    scored = bank.nats(found, held_out)
    for name, (window,) in held_out.items():
        assert scored.domains[name].nats[0] == pytest.approx(nats_of(eager, window), rel=1e-5)


def router_among(kept: Sequence[int], router: Any) -> Any:
    """What Qwen3's router answers, by hand: softmax over the experts kept, of which the two largest."""

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.reshape(-1, hidden.shape[-1]) @ router.weight[list(kept)].t()
        gates, places = torch.softmax(logits, -1).sort(-1, descending=True)
        gates, index = gates[:, :2], torch.tensor(kept)[places[:, :2]]
        return logits, gates / gates.sum(-1, keepdim=True) if router.norm_topk_prob else gates, index

    return forward
