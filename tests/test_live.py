"""A running model that follows its device and its text: each round by a clock and a device that only tests move."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import greedy

from comoe.plan.planner import Plan
from comoe.plan.scheduler import BAND, MARGIN, MOST_HOLD_S
from comoe.plan.snapshot import Snapshot
from comoe.runtime.layer import Seen
from comoe.runtime.live import SESSION_TOKENS, Live
from comoe.runtime.load import load
from comoe.runtime.seen import copied, mean_tokens, nothing, profile_between, uses_between
from comoe.store.profile import DECODE, PREFILL, Profile
from comoe.types import DoesNotFit

LIMIT = 1_000_000
PLENTY = Snapshot(LIMIT, LIMIT)


@pytest.fixture
def model(packed: Path) -> Iterator[Any]:
    served = load(packed, expert_memory="50%", log=True)
    with served.comoe:
        yield served


class Device:
    """What `Live` looks at; `available` is as tests want it."""

    def __init__(self) -> None:
        self.now = PLENTY

    def __call__(self) -> Snapshot:
        return self.now


def unasked(profile: Profile, budget: int) -> Plan:
    raise AssertionError("an exact plan has nothing to adapt")


def driven(model: Any, device: Device) -> Live:
    """Not started: tests take the steps."""
    handle = model.comoe
    handle.live = Live(handle, handle._serving, handle.pack, device, unasked)
    return handle.live


def short_of(model: Any, nbytes: int) -> Snapshot:
    """So much less than the cache may take and leaves the margin."""
    free = model.comoe.cache.capacity - model.comoe.cache.resident_bytes
    return Snapshot(LIMIT, free + round(MARGIN * LIMIT) - nbytes)


def test_it_gives_memory_back_in_one_step_and_the_answer_stays(model: Any) -> None:
    expected, before = greedy(model, 10), model.comoe.cache.capacity
    device = Device()
    live = driven(model, device)
    live.step(0.0)
    assert model.comoe.cache.capacity == before
    device.now = short_of(model, 1)
    live.step(1.0)
    assert model.comoe.cache.capacity == before - round(BAND * LIMIT) - 1
    assert model.comoe.cache.resident_bytes <= model.comoe.cache.capacity
    assert greedy(model, 10) == expected


def test_what_it_gave_it_keeps_away_from_until_there_is_room_also_in_the_next_request(model: Any) -> None:
    device = Device()
    live = driven(model, device)
    device.now = short_of(model, 1)
    before = model.comoe.cache.capacity
    live.step(0.0)
    after = model.comoe.cache.capacity
    model.comoe.begin_request()
    assert model.comoe.cache.capacity == after < before
    device.now = PLENTY
    live.step(1.0)
    live.step(1.0 + MOST_HOLD_S)
    assert model.comoe.cache.capacity == before


def test_room_is_filled_in_the_background_with_what_the_text_uses_most(model: Any) -> None:
    greedy(model, 40)
    device, handle = Device(), model.comoe
    live = driven(model, device)
    live._domain = nothing(handle._serving.seen)
    handle.cache.resize(handle.cache.smallest)
    live.scheduler.capacity = handle.cache.smallest
    live.step(0.0)
    live.step(MOST_HOLD_S)
    busiest = handle.pack.manifest.expert_ids[int(np.argmax(uses_between(live._domain, handle._serving.seen)))]
    settle(handle)
    assert handle.cache.resident(handle.pack.manifest.blobs(busiest, "exact"))
    assert handle.cache.stats.tally.prefetched > 0
    assert handle.cache.resident_bytes <= handle.cache.capacity


def settle(handle: Any) -> None:
    """Wait until hints are read, or until that will never be."""
    idle = threading.Event()
    for _ in range(1000):
        residency = handle.cache._residency
        if residency.tally.prefetched and not (residency._hints or residency._starting or residency._num_loading):
            return
        idle.wait(0.005)


def test_a_switch_is_in_the_decision_log(model: Any) -> None:
    device = Device()
    live = driven(model, device)
    model.comoe.begin_request("asked")
    device.now = short_of(model, 1)
    live.step(0.0)
    (request,) = model.comoe.choices.decisions().requests
    assert [(switch.reason, switch.capacity) for switch in request.switches] == [("memory", model.comoe.cache.capacity)]


def test_a_budget_that_a_program_sets_is_what_is_promised_from_then_on(model: Any) -> None:
    live = driven(model, Device())
    smaller = model.comoe.cache.smallest + 10_000
    model.comoe.resize(smaller)
    live.step(0.0)
    live.step(MOST_HOLD_S)
    assert model.comoe.cache.capacity == live.scheduler.promised == smaller


def use(live: Live, experts: Sequence[int], tokens: int = 1) -> None:
    """As if `tokens` had used one expert of each layer."""
    for expert, layer in zip(experts, live._serving.seen, strict=True):
        layer[1].uses[expert] += tokens
        layer[1].tokens += tokens


def test_another_domain_is_noticed_and_the_policy_forgets(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    live, aged = driven(model, Device()), []
    monkeypatch.setattr(model.comoe.cache, "age", aged.append)
    rng = np.random.default_rng(0)
    for experts in ([0, 1, 2, 3],) * 8 + ([5, 6, 7],) * 8:
        for _ in range(16):
            use(live, rng.choice(experts, 2).tolist())
        live.step(0.0)
    assert live.shifts == len(aged) == 1


def test_a_plan_with_a_floor_is_made_again_for_the_session_and_for_each_domain(model: Any) -> None:
    handle, asked = model.comoe, []
    handle._serving.plan = replace(handle.plan, floor="q4")

    def replan(profile: Profile, budget: int) -> Plan:
        asked.append((profile, budget))
        return replace(handle.plan, wait_threshold=0.25 * len(asked))

    live = Live(handle, handle._serving, handle.pack, Device(), replan)
    handle.begin_request("asked")
    use(live, (0, 0), SESSION_TOKENS - 1)
    live.step(0.0)
    assert not asked
    use(live, (0, 0))
    for _ in range(3):
        live.step(0.0)
    (profile, budget), *more = asked
    assert (budget, more) == (handle.cache.capacity, [])
    assert profile.uses(phase=DECODE).reshape(2, 8)[:, 0].tolist() == [SESSION_TOKENS] * 2
    assert handle.plan.wait_threshold == 0.25
    assert [switch.reason for switch in handle.choices.decisions().requests[0].switches] == ["domain"]


@pytest.mark.parametrize("other", ["floor", "target", "none"])
def test_a_plan_that_would_need_another_floor_is_not_followed(model: Any, other: str) -> None:
    handle = model.comoe
    handle._serving.plan = before = replace(handle.plan, floor="q4")

    def replan(profile: Profile, budget: int) -> Plan:
        if other == "none":
            raise DoesNotFit("no plan", 1)
        return replace(before, **{other: "q8"})

    live = Live(handle, handle._serving, handle.pack, Device(), replan)
    use(live, (0, 0), SESSION_TOKENS)
    live.step(0.0)
    assert handle.plan is before


def test_it_runs_in_a_thread_of_its_own_that_ends_with_the_model(packed: Path) -> None:
    before = set(threading.enumerate())
    model = load(packed, expert_memory="50%", live=True)
    assert any(thread.name == "comoe-live" for thread in threading.enumerate())
    greedy(model, 10)
    model.comoe.close()
    assert set(threading.enumerate()) <= before


def test_by_default_it_follows_where_nothing_was_promised(packed: Path) -> None:
    for given, follows in (({}, True), ({"expert_memory": "50%"}, False), ({"memory": "2GiB"}, False)):
        model = load(packed, context=64, **given)
        with model.comoe as handle:
            assert (handle.live is not None) is follows


def test_counters_between_two_moments() -> None:
    seen = [(Seen([1, 2], [0.5, 1.0], 3), Seen([0, 0], [0.0, 0.0], 0))]
    before = copied(seen)
    seen[0][0].uses[1] += 4
    seen[0][0].gates[1] += 2.0
    seen[0][0].tokens += 4
    assert uses_between(before, seen).tolist() == [0, 4]
    assert mean_tokens(seen) - mean_tokens(before) == 4
    profile = profile_between(before, seen)
    assert set(profile.routed) == {("session", PREFILL)}
    assert profile.routed["session", PREFILL].gates.tolist() == [0.0, 2.0]
    assert not profile_between(seen, copied(seen)).routed
