"""What a running model chooses, written down and taken again: the same output to the bit, whatever is cached."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from commands import Comoe, document

from comoe.plan.cost import Costs
from comoe.plan.ladder import Band, ladder_of
from comoe.plan.planner import uniform
from comoe.runtime.choices import Choices
from comoe.runtime.generate import Sampling, generate, tokenizer_of
from comoe.runtime.load import load
from comoe.store.decisions import Conditions, Decisions, read_decisions, write_decisions
from comoe.store.manifest import read_manifest
from comoe.types import UsageError

CONDITIONS = Conditions("pack", "20%", "exact", 0.03, "bfloat16", 2, "none")
PROMPT = torch.arange(5, 25)[None]
SAMPLING = Sampling(24, temperature=1.0, ignore_eos=True)


def taken(choices: Choices, wanted: list[bool]) -> list[bool]:
    return [choices.settle(coarse) for coarse in wanted]


def recorded(*requests: list[bool]) -> Decisions:
    choices = Choices(CONDITIONS)
    for at, wanted in enumerate(requests):
        choices.begin(f"prompt {at}")
        assert taken(choices, wanted) == wanted
    return choices.decisions()


def test_what_a_log_says_is_chosen_whatever_would_be() -> None:
    logged = recorded([True, False, False], [True])
    choices = Choices(CONDITIONS, logged)
    for at, (wanted, said) in enumerate([([False] * 3, [True, False, False]), ([False], [True])]):
        choices.begin(f"prompt {at}")
        assert taken(choices, wanted) == said
    assert choices.decisions() == logged


def test_a_switch_is_logged_with_its_place() -> None:
    choices = Choices(CONDITIONS)
    choices.begin("prompt")
    plan = replace(any_plan(), wait_threshold=float("inf"))
    taken(choices, [True, True])
    choices.switched("memory", 1000, plan)
    (switch,) = choices.decisions().requests[0].switches
    assert (switch.choice, switch.reason, switch.capacity, switch.wait_threshold) == (2, "memory", 1000, None)


def any_plan() -> Any:
    from ladders import ladder

    return uniform(ladder({"exact": 10}, {}, [[1.0]]), "exact")


def test_a_log_of_another_answer_is_refused() -> None:
    logged = recorded([True])
    with pytest.raises(UsageError, match="another prompt"):
        Choices(CONDITIONS, logged).begin("another")
    choices = Choices(CONDITIONS, logged)
    choices.begin("prompt 0")
    choices.settle(True)
    with pytest.raises(UsageError, match="ends before"):
        choices.settle(True)
    with pytest.raises(UsageError, match="one more"):
        choices.begin("prompt 1")


@pytest.mark.parametrize(("name", "value"), [("pack", "other"), ("threads", 1), ("kernel", "native"), ("floor", None)])
def test_a_log_of_other_conditions_is_refused(name: str, value: object) -> None:
    now = Conditions(**{field: getattr(CONDITIONS, field) for field in Conditions.__struct_fields__} | {name: value})
    with pytest.raises(UsageError, match=f"another {name}"):
        Choices(now, recorded([True]))


class Ran(NamedTuple):
    """What a run put out, and what it took."""

    ids: tuple[int, ...]
    logits: list[bytes]
    stats: dict[str, Any]
    decisions: Decisions | None


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """So slow that plans have floors."""
    slow = Costs(read_bps=1e5, read_latency_s=0.0, memory_bps=1e10, framework_ms=Band(1.0, 1.0))
    monkeypatch.setattr("comoe.runtime.load.measured_costs", lambda pack, clock: slow)


def run(folder: Path, expert_memory: int, **options: Any) -> Ran:
    model = load(folder, expert_memory=expert_memory, max_loss="3%", context=64, policy="lru", **options)
    with model.comoe as handle, watched(model) as logits:
        answer = generate(model, tokenizer_of(folder), PROMPT, SAMPLING)
        kept = handle.choices.decisions() if handle.choices else None
        return Ran(answer.token_ids, logits, handle.stats(), kept)


@contextmanager
def watched(model: Any) -> Iterator[list[bytes]]:
    """The logits of every call of the model."""
    found: list[bytes] = []
    hook = model.register_forward_hook(lambda _, __, output: found.append(output.logits.float().numpy().tobytes()))
    with torch.inference_mode():
        yield found
    hook.remove()


@pytest.fixture
def budgets(one_floor: tuple[Path, str]) -> tuple[Path, int, int]:
    """A pack, and room for its floor with few exact experts, and with all of them."""
    folder, step = one_floor
    ladder = ladder_of(read_manifest(folder))
    floor = ladder.rung(step).nbytes
    return folder, floor + 3 * ladder.exact.group_beside(None), floor + ladder.exact.nbytes


@pytest.mark.usefixtures("slow_disk")
def test_a_replay_is_the_same_to_the_bit_whatever_is_cached(budgets: tuple[Path, int, int], tmp_path: Path) -> None:
    folder, little, much = budgets
    first = run(folder, little, log=True)
    assert first.decisions is not None and 0 < first.stats["floor_rate"] < 1
    write_decisions(tmp_path / "log", first.decisions)
    for room in (little, much):
        again = run(folder, room, replay=tmp_path / "log")
        assert (again.ids, again.logits, again.decisions) == (first.ids, first.logits, first.decisions)
        assert again.stats["floor_rate"] == first.stats["floor_rate"]
        assert again.stats["loss_ledger"] == first.stats["loss_ledger"]


@pytest.mark.usefixtures("slow_disk")
def test_without_the_log_another_budget_chooses_otherwise(budgets: tuple[Path, int, int]) -> None:
    """Or the test above would show nothing."""
    folder, little, much = budgets
    assert run(folder, little).logits != run(folder, much).logits


@pytest.mark.usefixtures("slow_disk")
def test_deterministic_outputs_depend_on_no_budget(budgets: tuple[Path, int, int]) -> None:
    folder, little, much = budgets
    first, second = (run(folder, room, deterministic=True) for room in (little, much))
    assert first.logits == second.logits
    assert first.stats["bytes_read"] != second.stats["bytes_read"]
    assert first.stats["floor_rate"] == 0


def test_a_log_is_replayed_as_it_was_written_or_not_at_all(packed: Path, copied: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    write_decisions(log, recorded([True]))
    with pytest.raises(UsageError, match="another pack"):
        load(packed, expert_memory="50%", replay=log)
    with pytest.raises(UsageError, match="deterministic"):
        load(packed, expert_memory="50%", replay=log, deterministic=True)


def test_the_command_line_writes_a_log_and_replays_it(comoe: Comoe, packed: Path, tmp_path: Path) -> None:
    words = ("run", packed, "--prompt", "a fox", "-n", "5", "--expert-memory", "50%", "--threads", "1", "--json")
    first = document(comoe(*words, "--decisions", tmp_path / "log"))
    assert [request.switches for request in read_decisions(tmp_path / "log").requests] == [()]
    again = document(comoe(*words, "--replay", tmp_path / "log", "--decisions", tmp_path / "second"))
    assert again["text"] == first["text"]
    assert json.loads((tmp_path / "second").read_bytes()) == json.loads((tmp_path / "log").read_bytes())
    other = [word if word != "a fox" else "a dog" for word in words]
    refused = comoe(*other, "--replay", tmp_path / "log")
    assert refused.code == 2 and "another prompt" in refused.sentence
