"""When memory is given back and taken again: at once, and rarely; never for noise, never past what was promised."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comoe.plan.scheduler import (
    BAND,
    GIVEN_UNDER_PRESSURE,
    HOLD_S,
    MARGIN,
    MOST_HOLD_S,
    PRESSURE_S,
    STALLED,
    Resize,
    Scheduler,
)
from comoe.plan.snapshot import Snapshot

LIMIT, PROMISED, SMALLEST, BESIDE = 10_000, 6_000, 500, 1_000
TICK_S = 0.5
LONG = 4 * int(MOST_HOLD_S / TICK_S)


class Machine:
    """Memory shared by others, the process beside its experts, and a cache that fills what it may."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(PROMISED, SMALLEST)
        self.used, self.now_s = 0, 0.0

    def tick(self, others: int, some: float | None = None, fill: int = 2_000) -> Resize | None:
        self.used = min(self.scheduler.capacity, self.used + fill)
        available = LIMIT - others - BESIDE - self.used
        found = self.scheduler.tick(Snapshot(LIMIT, available, some), self.used, self.now_s)
        self.used = min(self.scheduler.capacity, self.used)
        self.now_s += TICK_S
        return found

    def ticks(self, others: int, number: int, some: float | None = None) -> list[Resize]:
        return [found for _ in range(number) if (found := self.tick(others, some)) is not None]

    def left(self, others: int) -> int:
        return LIMIT - others - BESIDE - self.scheduler.capacity


def test_a_machine_with_room_leaves_the_cache_alone() -> None:
    machine = Machine()
    assert machine.ticks(1_000, LONG) == []
    assert machine.used == PROMISED


def test_it_shrinks_in_the_very_tick_in_which_others_take_memory() -> None:
    machine = Machine()
    machine.ticks(0, 10)
    decision = machine.tick(5_000)
    assert decision is not None and decision.reason == "memory"
    assert machine.left(5_000) == pytest.approx((MARGIN + BAND) * LIMIT)
    assert machine.ticks(5_000, LONG) == []


def test_bytes_that_are_promised_but_not_yet_taken_are_given_up_first() -> None:
    """The cache is nearly empty: what it has stays."""
    machine = Machine()
    decision = machine.tick(5_000, fill=100)
    assert decision is not None and machine.used == 100 < decision.capacity < PROMISED


def test_it_grows_only_when_there_was_room_for_a_while_and_to_no_more_than_was_promised() -> None:
    machine = Machine()
    machine.ticks(0, 10)
    machine.tick(5_000)
    start_s = machine.now_s
    while machine.tick(0) is None:
        assert machine.now_s < start_s + MOST_HOLD_S
    assert machine.now_s - start_s > HOLD_S
    assert machine.scheduler.capacity == PROMISED
    assert machine.ticks(0, LONG) == []


def test_room_that_comes_and_goes_is_not_taken() -> None:
    machine = Machine()
    machine.ticks(0, 10)
    machine.tick(5_000)
    assert [found for _ in range(LONG) for found in (machine.tick(0), machine.tick(5_000))] == [None] * 2 * LONG


def grown_after_s(machine: Machine) -> float:
    start_s = machine.now_s
    while machine.tick(0) is None:
        pass
    return machine.now_s - start_s


def test_every_shrink_doubles_the_wait_up_to_a_limit() -> None:
    machine = Machine()
    machine.ticks(0, 10)
    waits = []
    for _ in range(9):
        assert machine.tick(5_000) is not None
        waits.append(grown_after_s(machine))
    assert all(later > 1.5 * earlier for earlier, later in pairwise(waits[:5]))
    assert waits[-1] == pytest.approx(waits[-2]) == pytest.approx(MOST_HOLD_S, abs=2 * TICK_S)


def test_quiet_halves_the_wait_again() -> None:
    machine = Machine()
    machine.ticks(0, 10)
    waits = []
    for quiet in (0, LONG, 0):
        machine.tick(5_000)
        assert machine.ticks(5_000, quiet) == []
        waits.append(grown_after_s(machine))
    assert waits == pytest.approx([2 * HOLD_S, 4 * HOLD_S, 4 * HOLD_S], abs=2 * TICK_S)


def test_high_pressure_takes_an_eighth_at_a_time_and_no_faster_than_the_kernel_tells() -> None:
    machine = Machine()
    machine.ticks(0, 10)
    decisions = machine.ticks(0, 1 + int(PRESSURE_S / TICK_S), some=2 * STALLED)
    assert [decision.reason for decision in decisions] == ["pressure"] * 2
    assert decisions[0].capacity == PROMISED * (1 - GIVEN_UNDER_PRESSURE)
    assert machine.ticks(0, LONG, some=STALLED / 2)[0].reason == "room"


def test_a_new_promise_holds_at_once() -> None:
    machine = Machine()
    machine.ticks(0, 10)
    machine.scheduler.promise(3_000)
    assert machine.ticks(0, LONG) == []
    assert machine.scheduler.capacity == 3_000


others = st.integers(0, LIMIT)


@given(others, others)
def test_one_step_of_the_machine_causes_at_most_one_switch(before: int, after: int) -> None:
    machine = Machine()
    machine.ticks(before, LONG)
    assert len(machine.ticks(after, LONG)) <= 1


@given(st.lists(others, max_size=60))
def test_whatever_others_do_capacity_keeps_its_ends_and_the_margin_is_back_in_the_tick(levels: Sequence[int]) -> None:
    machine = Machine()
    for level in levels:
        machine.tick(level)
        capacity = machine.scheduler.capacity
        assert SMALLEST <= capacity <= PROMISED
        assert machine.left(level) >= MARGIN * LIMIT or capacity == SMALLEST


@given(st.lists(st.integers(-int(BAND * LIMIT / 2), int(BAND * LIMIT / 2)), min_size=20, max_size=100), others)
def test_noise_within_the_band_does_nothing(noise: Sequence[int], level: int) -> None:
    machine = Machine()
    machine.ticks(level, LONG)
    machine.ticks(level + int(BAND * LIMIT / 2), 1)
    settled = machine.scheduler.capacity
    if settled < PROMISED:
        for moved in noise:
            machine.tick(level + moved)
        assert machine.scheduler.capacity == settled
