"""A routing bias: who is chosen, by which gates, at what price, and what it leaves alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Comoe
from families import NUM_EXPERTS, model_class
from models import eager_model, save_random
from packs import edit
from torch import Tensor

from comoe.make.price import preferring
from comoe.plan.ladder import Prices
from comoe.plan.ledger import Ledger
from comoe.runtime.bias import moved, routers
from comoe.runtime.generate import Sampling, generate, tokenizer_of
from comoe.runtime.load import load
from comoe.store.families import experts_modules
from comoe.store.manifest import read_manifest
from comoe.types import HostileFile, UsageError

PROMPT = torch.arange(5, 25)[None]
LOGITS = torch.tensor([[3.0, 2.0, 1.0, 0.5, 0.0]])
RESIDENT = torch.tensor([False, False, False, True, True])
STRONG = 100.0


def answer(logits: Tensor, k: int, *, renormalised: bool) -> tuple[Tensor, Tensor, Tensor]:
    gates, index = logits.softmax(-1).topk(k, -1)
    return logits, gates / gates.sum(-1, keepdim=True) if renormalised else gates, index


@pytest.mark.parametrize("renormalised", [False, True])
def test_a_strong_bias_chooses_only_resident_experts_beside_the_likeliest(renormalised: bool) -> None:
    found = moved(answer(LOGITS, 3, renormalised=renormalised), RESIDENT, STRONG, renormalised=renormalised)
    assert found.experts.tolist() == [[0, 3, 4]]
    shares = LOGITS.softmax(-1)[0]
    wanted = shares[[0, 3, 4]] / (shares[[0, 3, 4]].sum() if renormalised else 1.0)
    torch.testing.assert_close(found.gates[0], wanted)
    assert float(found.share) == pytest.approx(float(1 - shares[[0, 3, 4]].sum() / shares[[0, 1, 2]].sum()))


def test_a_mild_bias_moves_only_what_is_near() -> None:
    found = moved(answer(LOGITS, 3, renormalised=True), RESIDENT, 0.7, renormalised=True)
    assert sorted(found.experts[0].tolist()) == [0, 1, 3]


def test_no_bias_moves_nothing() -> None:
    given = answer(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), 4, renormalised=True)
    found = moved(given, torch.arange(16) % 2 == 0, 0.0, renormalised=True)
    assert torch.equal(found.experts.sort(-1).values, given[2].sort(-1).values) and not found.share.any()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "gpt_oss", "jamba"])
def test_a_routers_own_gates_are_those_that_the_bias_would_give(family: str, tmp_path: Path) -> None:
    save_random(family, tmp_path)
    model = eager_model(family, tmp_path)
    for module, renormalised in routers(model):
        width = next(p for p in module.parameters() if p.dim() == 2).shape[1]
        with torch.no_grad():
            given = module(torch.randn(8, width))
        found = moved(given, torch.zeros(given[0].shape[-1]), 0.0, renormalised=renormalised)
        torch.testing.assert_close(found.gates.sort(-1).values, given[1].sort(-1).values)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "gpt_oss", "jamba"])
def test_experts_get_what_the_bias_chose_and_its_gates(family: str, tmp_path: Path) -> None:
    """Whatever else the block does with its router's logits."""
    save_random(family, tmp_path)
    model = eager_model(family, tmp_path)
    sets = [torch.arange(NUM_EXPERTS) % 2 == 0 for _ in experts_modules(model)]
    given: list[tuple[Tensor, ...]] = []
    known = routers(model)
    with preferring(known, sets, STRONG) as tally, torch.no_grad():
        for module, _ in known:
            module.register_forward_hook(lambda _, __, found: given.append(found[1:]))
        for _, module in experts_modules(model):
            module.register_forward_pre_hook(lambda _, args: given.append((args[2], args[1])))
        model(PROMPT)
    assert len(given) == 2 * len(sets) and 0 < tally.share < tally.tokens == PROMPT.numel() * len(sets)
    for said, got in zip(given[::2], given[1::2], strict=True):
        assert torch.equal(said[0], got[0]) and torch.equal(said[1], got[1])


@pytest.mark.parametrize("family", ["switch_transformers", "deepseek_v3", "llama4", "dbrx"])
def test_routers_of_other_kinds_are_refused(family: str, tmp_path: Path) -> None:
    """One expert a token, sigmoids, gates on inputs, no answer of that form."""
    save_random(family, tmp_path)
    with pytest.raises(UsageError, match=r"in a way that a routing bias cannot move.*\.$"):
        routers(eager_model(family, tmp_path))


def test_a_router_that_scales_its_gates_is_refused(tmp_path: Path) -> None:
    """It would be known by its name."""
    save_random("qwen3_moe", tmp_path)
    model = model_class("qwen3_moe").from_pretrained(tmp_path).eval()
    router = routers(model)[0].module
    router.register_forward_hook(lambda module, args, found: (found[0], 1.5 * found[1], found[2]))
    with pytest.raises(UsageError):
        routers(model)


def test_the_ledger_stops_a_bias_at_the_bound() -> None:
    """What the target itself will cost is left room for."""
    ledger = Ledger(Prices((0.01,), (0.01,)), 0.03, 0.4)
    assert not ledger.move(0, 1.0, 0.055)
    assert ledger.move(0, 1.0, 0.04)
    assert not ledger.move(0, 1.0, 0.04)
    ledger.add(0, "q4", 1.0)
    assert ledger.loss == pytest.approx(0.01 + 0.4 * 0.04) and ledger.moved == pytest.approx(0.04)
    assert not ledger.move(0, 1.0, 0.1) and ledger.move(0, 1.0, 0.05)
    ledger.clear()
    assert (ledger.loss, ledger.moved) == (0.0, 0.0)


def test_without_a_price_nothing_moves() -> None:
    assert not Ledger(Prices((0.0,), (0.0,)), 1.0).move(0, 1.0, 0.01)


@contextmanager
def chosen(model: Any) -> Iterator[list[Tensor]]:
    """The experts that are asked for, call by call."""
    found: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: found.append(args[1])) for _, module in experts_modules(model)
    ]
    yield found
    for hook in hooks:
        hook.remove()


def ran(folder: Path, **options: Any) -> tuple[tuple[int, ...], list[Tensor], dict[str, Any]]:
    """With room for a quarter of the exact experts."""
    room = read_manifest(folder).form_bytes("exact") // 4
    given = {"max_loss": 0.5, "context": 64, "policy": "lru"} | options
    model = load(folder, expert_memory=room, **given)
    with model.comoe as handle, chosen(model) as found:
        said = generate(model, tokenizer_of(folder), PROMPT, Sampling(24, ignore_eos=True))
        return said.token_ids, found, handle.stats()


@pytest.fixture
def exact_alone(copied: Path) -> Path:
    """A pack without a lossy plan, so that a bias alone may spend; at an invented price."""
    edit(copied, lambda document: [step.update(certificate=None) for step in document["chain"]])
    edit(copied, lambda document: document.update(routing_price=0.4))
    return copied


def test_a_price_is_measured_where_there_is_a_certificate(packed: Path) -> None:
    price = read_manifest(packed).routing_price
    assert price is not None and isfinite(price) and price >= 0


def test_decoding_prefers_what_is_resident_and_prompts_do_not(exact_alone: Path) -> None:
    ids, plain, without = ran(exact_alone)
    _, biased, stats = ran(exact_alone, routing_bias=STRONG)
    prompt = [at for at, found in enumerate(plain) if len(found) > 1]
    assert prompt and all(torch.equal(plain[at], biased[at]) for at in prompt)
    assert stats["hit_rate"] > without["hit_rate"] and 0 < stats["moved_share"] < 1
    assert stats["loss_ledger"] == pytest.approx(0.4 * stats["moved_share"])
    assert without["moved_share"] == without["loss_ledger"] == 0
    again, same, _ = ran(exact_alone, routing_bias=0.0, max_loss=0.0)
    assert again == ids and all(map(torch.equal, same, plain))


def test_the_bound_holds_and_a_tiny_one_changes_nothing(exact_alone: Path) -> None:
    _, plain, _ = ran(exact_alone)
    _, _, stats = ran(exact_alone, routing_bias=STRONG, max_loss=0.004)
    assert 0 < stats["loss_ledger"] <= 0.004
    _, barred, nothing = ran(exact_alone, routing_bias=STRONG, max_loss=1e-9)
    assert nothing["moved_share"] == 0 and all(map(torch.equal, barred, plain))


def test_a_pack_without_a_price_refuses_a_bias(exact_alone: Path) -> None:
    edit(exact_alone, lambda document: document.pop("routing_price"))
    with pytest.raises(UsageError, match=r"no price of a routing bias.*\.$"):
        ran(exact_alone, routing_bias=1.0)


@pytest.mark.parametrize("price", [-0.1, 1e400])
def test_a_price_that_is_none_is_hostile(exact_alone: Path, price: float) -> None:
    edit(exact_alone, lambda document: document.update(routing_price=price))
    with pytest.raises(HostileFile):
        read_manifest(exact_alone)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "bound it by --max-loss"),
        (("--max-loss", "3%", "--deterministic"), "follows what is cached"),
        (("--max-loss", "3%", "--decisions", "log"), "follows what is cached"),
    ],
)
def test_what_cannot_be_together_is_said(comoe: Comoe, packed: Path, words: tuple[str, ...], told: str) -> None:
    found = comoe("run", packed, "--prompt", "fox", "--routing-bias", "1", *words)
    assert found.code == 2 and told in found.err and found.err.count("\n") == 1
