"""`model.comoe`: what a program may ask of a served model while it runs."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import greedy

from comoe.make.pack import pack
from comoe.make.recipe import Recipe
from comoe.plan.cost import Costs
from comoe.plan.ladder import Band, ladder_of
from comoe.plan.planner import Plan, Planner, uniform
from comoe.runtime.load import Loader, load
from comoe.runtime.options import Options
from comoe.store.manifest import read_manifest
from comoe.store.pack import Pack
from comoe.types import BlobId, CorruptBlob, DoesNotFit, RemoteUnavailable, UsageError


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("handle") / "tiny.comoe"
    pack(tiny_checkpoint, target, Recipe(), lambda step, done: None)
    return target


@pytest.fixture
def model(plain: Path) -> Iterator[Any]:
    served = load(plain, expert_memory="50%")
    with served.comoe:
        yield served


def test_budgets_that_change_while_it_generates_change_no_token(model: Any) -> None:
    expected = greedy(model, 60)
    stop = threading.Event()
    smallest, largest = model.comoe.cache.smallest, model.comoe.cache.capacity
    sizes: list[int] = []

    def resize_for_ever() -> None:
        while not stop.is_set():
            size = smallest + (len(sizes) * 7919) % (largest - smallest)
            model.comoe.resize(size)
            sizes.append(size)

    thread = threading.Thread(target=resize_for_ever)
    thread.start()
    try:
        got = greedy(model, 60)
    finally:
        stop.set()
        thread.join()
    assert got == expected
    assert len(sizes) > 10
    assert model.comoe.stats()["resident_bytes"] <= sizes[-1]


def test_a_shrink_gives_memory_back_at_once(model: Any) -> None:
    greedy(model, 20)
    assert model.comoe.stats()["resident_bytes"] > model.comoe.cache.smallest
    model.comoe.resize(model.comoe.cache.smallest)
    assert model.comoe.stats()["resident_bytes"] <= model.comoe.cache.smallest


def test_a_budget_that_is_too_small_is_refused_and_changes_nothing(model: Any) -> None:
    before, expected = model.comoe.cache.capacity, greedy(model, 10)
    with pytest.raises(DoesNotFit) as refused:
        model.comoe.resize(1000)
    assert model.comoe.cache.capacity == before
    assert greedy(model, 10) == expected
    model.comoe.resize(refused.value.smallest)
    assert greedy(model, 10) == expected


def test_a_budget_of_the_whole_process_is_refused_in_its_own_terms(plain: Path) -> None:
    model = load(plain, memory="2GiB", context=64)
    with model.comoe:
        with pytest.raises(DoesNotFit, match="the process needs") as refused:
            model.comoe.resize(1 << 20)
        model.comoe.resize(refused.value.smallest)
        assert model.comoe.cache.capacity == model.comoe.cache.smallest


def test_a_request_starts_its_counters_afresh(model: Any) -> None:
    greedy(model, 10)
    used = model.comoe.stats()
    assert used["uses"] > 0 < sum(used["bytes_read"].values())
    model.comoe.begin_request()
    fresh = model.comoe.stats()
    assert fresh["uses"] == 0 == sum(fresh["bytes_read"].values())
    greedy(model, 1)
    assert 0 < model.comoe.stats()["uses"] < used["uses"]


def test_an_exact_run_spends_nothing_of_the_ledger(model: Any) -> None:
    greedy(model, 10)
    assert model.comoe.ledger.loss == 0
    assert model.comoe.ledger.shares() == {"exact": pytest.approx(1)}


def test_a_context_beyond_what_memory_is_for_is_refused(plain: Path) -> None:
    model = load(plain, expert_memory="50%", context=32)
    with model.comoe:
        model.comoe.check_context(32)
        with pytest.raises(UsageError, match="raise --context"):
            model.comoe.check_context(33)


def test_closing_twice_is_fine_and_running_afterwards_says_why_not(plain: Path) -> None:
    model = load(plain, expert_memory="50%")
    model.comoe.close()
    model.comoe.close()
    with pytest.raises(RuntimeError, match="the cache is closed"):
        greedy(model, 1)


def test_a_floor_that_cannot_be_read_leaves_no_thread_behind(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def floored(self: Planner, budget: int, max_loss: float) -> Plan:
        return replace(uniform(self.ladder, "exact"), floor="q4")

    def broken(self: Pack, blob: BlobId, into: memoryview) -> None:
        raise CorruptBlob(f"{blob} is damaged.")

    loader = Loader(Pack(plain), Options())
    monkeypatch.setattr(Loader, "planner", lambda self: Planner(self.ladder, Costs.unknown()))
    monkeypatch.setattr(Planner, "best", floored)
    monkeypatch.setattr(Pack, "read", broken)
    before = set(threading.enumerate())
    with pytest.raises(CorruptBlob):
        loader.within_experts(1 << 30)
    assert set(threading.enumerate()) <= before


def test_load_refuses_what_it_cannot_do(plain: Path) -> None:
    with pytest.raises(UsageError, match="not both"):
        load(plain, memory="1GiB", expert_memory="30%")
    for wrong in ({"max_loss": -1.0}, {"max_loss": float("nan")}, {"context": 0}, {"threads": 0}):
        with pytest.raises(UsageError):
            load(plain, expert_memory="50%", **wrong)  # type: ignore[arg-type]
    with pytest.raises(RemoteUnavailable):
        load(plain, edges=["http://127.0.0.1:1"])
    with pytest.raises(DoesNotFit) as refused:
        load(plain, expert_memory=1)
    load(plain, expert_memory=refused.value.smallest).comoe.close()


def test_within_a_bound_misses_take_a_floor_of_mixed_forms_and_prompts_do_not(
    one_floor: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a slow disk, with room for the floor and few exact experts."""
    folder, step = one_floor
    slow = Costs(read_bps=1e5, read_latency_s=0.0, memory_bps=1e10, framework_ms=Band(1.0, 1.0))
    monkeypatch.setattr("comoe.runtime.load.measured_costs", lambda pack, clock: slow)
    ladder = ladder_of(read_manifest(folder))
    room = ladder.rung(step).nbytes + 3 * ladder.exact.group_beside(None)
    model = load(folder, expert_memory=room, max_loss="3%", context=64, policy="lru")
    with model.comoe as handle:
        assert (handle.plan.floor, handle.plan.target) == (step, "exact")
        assert handle.plan.floor_bytes == ladder.rung(step).nbytes and handle.plan.loss.high <= 0.03
        handle.begin_request()
        handle.ledger.add(0, "exact", 1e6)  # an answer that may lose something
        greedy(model, 1)
        assert (handle.stats()["floor_rate"], handle.ledger.loss) == (0, 0.0)
        handle.begin_request()
        greedy(model, 30)
        assert handle.stats()["floor_rate"] > 0
        assert 0 < handle.ledger.loss <= 0.03
        assert len(handle.ledger.shares()) > 1
        assert {*handle.ledger.shares()} <= {*ladder.rung(step).shares, "exact"}
        assert handle.stats()["resident_bytes"] <= room


@pytest.mark.parametrize("form", ["q2", "q3"])
def test_every_form_gives_the_same_whatever_is_in_memory(tiny_checkpoint: Path, tmp_path: Path, form: str) -> None:
    pack(tiny_checkpoint, tmp_path / "p", Recipe(forms=(form,)), lambda step, done: None)
    loader = Loader(Pack(tmp_path / "p"), Options())
    rung = loader.ladder.rung(form)
    answers = []
    for capacity in (rung.nbytes, rung.group_beside(None)):
        model = loader.streamed(form, capacity)
        with model.comoe:
            answers.append(greedy(model, 20))
    assert answers[0] == answers[1]
