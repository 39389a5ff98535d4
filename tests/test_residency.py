"""The residency core against a dict of what the edge holds, and its promises one by one."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from policies import blob

from comoe.memory.policy import LFU, LRU
from comoe.memory.residency import MOST_HINTS, Phase, Residency, Ticket
from comoe.types import BlobId, DoesNotFit

LARGEST = 9  # three parts of 3
NUM_BLOBS = 10


def size_of(name: BlobId) -> int:
    return 1 + name.row % 3


def make(capacity: int, **settings: int) -> Residency:
    return Residency(capacity, size_of, LRU(), **settings)


def load_all(core: Residency) -> list[BlobId]:
    """Carry out every load that the core asks for; the blobs, in order."""
    order = []
    while (name := core.next_load()) is not None:
        core.take_evictions()
        core.loaded(name)
        order.append(name)
    return order


def group(*rows: int) -> tuple[BlobId, ...]:
    return tuple(blob(row) for row in rows)


groups = st.lists(st.integers(0, NUM_BLOBS - 1), min_size=1, max_size=3, unique=True).map(lambda rows: group(*rows))


class ResidencyMachine(RuleBasedStateMachine):
    """`memory` is the edge's own book: True where a blob's bytes are there, False while they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.core = make(16, largest_group=LARGEST, in_flight=2)
        self.memory: dict[BlobId, bool] = {}
        self.tickets: list[Ticket] = []
        self.held: set[BlobId] = set()
        self.used = 0

    def settle(self) -> None:
        for name in self.core.take_evictions():
            assert name not in self.pinned()
            self.memory.pop(name, None)

    def pinned(self) -> set[BlobId]:
        ready = [ticket for ticket in self.tickets if ticket.phase is Phase.READY]
        return self.held.union(*(ticket.group for ticket in ready))

    def loading(self) -> list[BlobId]:
        return [name for name, there in self.memory.items() if not there]

    @precondition(lambda self: len(self.tickets) < 6)
    @rule(wanted=groups)
    def demand(self, wanted: tuple[BlobId, ...]) -> None:
        self.tickets.append(self.core.demand(wanted))
        self.settle()

    @rule(wanted=groups)
    def prefetch(self, wanted: tuple[BlobId, ...]) -> None:
        self.core.prefetch(wanted)

    @rule(wanted=groups)
    def used_elsewhere(self, wanted: tuple[BlobId, ...]) -> None:
        self.core.used_elsewhere(wanted)

    @rule(wanted=st.lists(groups, max_size=3))
    def foresee(self, wanted: list[tuple[BlobId, ...]]) -> None:
        self.core.foresee(wanted)

    @rule(wanted=groups)
    def aim(self, wanted: tuple[BlobId, ...]) -> None:
        self.core.aim(wanted)

    @rule()
    def begin(self) -> None:
        might = self.core.may_start
        name = self.core.next_load()
        self.settle()
        if name is not None:
            assert might  # else nobody would have been woken to ask
            assert name not in self.memory
            self.memory[name] = False
        assert len(self.loading()) <= 2

    @precondition(lambda self: self.loading())
    @rule(data=st.data(), fails=st.sampled_from([False, False, False, True]))
    def end(self, data: st.DataObject, fails: bool) -> None:
        name = data.draw(st.sampled_from(self.loading()))
        if fails:
            self.core.failed(name, OSError("gone"))
        else:
            self.memory[name] = True
            self.core.loaded(name)
        self.settle()

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        ticket = self.tickets.pop(data.draw(st.integers(0, len(self.tickets) - 1)))
        self.core.release(ticket)
        self.settle()

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        there = sorted(name for name in self.pinned() - self.held if self.memory[name])
        if there:
            name = data.draw(st.sampled_from(there))
            if self.core.smallest + size_of(name) <= self.core.capacity:
                self.core.hold([name])
                self.held.add(name)

    @rule(capacity=st.integers(6, 24))
    def resize(self, capacity: int) -> None:
        if capacity < self.core.smallest:
            with pytest.raises(DoesNotFit):
                self.core.resize(capacity)
        else:
            self.core.resize(capacity)
        self.settle()

    @invariant()
    def the_budget_holds(self) -> None:
        self.core.check()
        assert sum(size_of(name) for name in self.memory) <= self.core.used
        # Beyond the capacity only after a shrink, and then never growing.
        assert self.core.used <= max(self.core.capacity, self.used)
        self.used = self.core.used

    @invariant()
    def what_is_pinned_is_there(self) -> None:
        assert all(self.memory.get(name) for name in self.pinned())

    def teardown(self) -> None:
        """Whatever is demanded is served in the end by a consumer who holds one group at a time."""
        for _ in range(200):
            done = next((t for t in self.tickets if t.phase in (Phase.READY, Phase.FAILED)), None)
            if done is not None:
                self.tickets.remove(done)
                self.core.release(done)
                self.settle()
                continue
            self.begin()
            for name in self.loading()[:1]:
                self.memory[name] = True
                self.core.loaded(name)
                self.settle()
        assert not self.tickets


TestResidencyMachine = ResidencyMachine.TestCase
TestResidencyMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_what_was_used_elsewhere_is_read_where_there_is_room_or_it_is_worth_more_than_what_would_leave() -> None:
    core = Residency(6, size_of, LFU(half_life=1e9))
    for _ in range(3):
        ticket = core.demand(group(1, 2))  # takes 5
        load_all(core)
        core.release(ticket)
    core.used_elsewhere(group(0))
    assert load_all(core) == [blob(0)]
    core.release(core.demand(group(0)))  # used twice, now
    core.used_elsewhere(group(3))
    assert load_all(core) == []
    for _ in range(20):
        core.used_elsewhere(group(3))
    assert load_all(core) == [blob(3)] and not core.resident(group(0))


def test_hints_that_are_taken_back_are_not_read() -> None:
    core = make(16)
    core.prefetch(group(0, 1))
    core.aim(())
    assert load_all(core) == []
    core.prefetch(group(2))
    assert load_all(core) == [blob(2)] and sorted(core.residents()) == [blob(2)]


def test_parts_of_a_group_load_in_its_order_and_only_then_it_is_ready() -> None:
    core = make(10)
    ticket = core.demand(group(2, 0, 1))
    seen = []
    while (name := core.next_load()) is not None:
        assert ticket.phase is Phase.LOADING
        core.loaded(name)
        seen.append(name)
    assert seen == list(group(2, 0, 1))
    assert ticket.phase is Phase.READY


def test_a_resident_group_is_ready_at_once() -> None:
    core = make(10)
    ticket = core.demand(group(0, 1))
    load_all(core)
    core.release(ticket)
    assert core.demand(group(0, 1)).phase is Phase.READY


def test_a_group_that_can_never_fit_is_refused_with_the_smallest_capacity() -> None:
    with pytest.raises(DoesNotFit) as refusal:
        make(5).demand(group(0, 1, 2))
    assert refusal.value.smallest == 6


def test_a_shrink_below_the_floor_and_one_group_is_refused_and_changes_nothing() -> None:
    core = make(14, largest_group=LARGEST)
    ticket = core.demand(group(2))
    load_all(core)
    core.hold(group(2))
    core.release(ticket)
    with pytest.raises(DoesNotFit) as refusal:
        core.resize(11)
    assert refusal.value.smallest == 12
    assert core.capacity == 14


def test_a_demand_is_read_before_earlier_prefetches() -> None:
    core = make(14)
    core.prefetch(group(0, 1, 2))
    core.demand(group(5))
    assert core.next_load() == blob(5)


def test_what_is_foreseen_is_read_after_demands_and_before_hints_the_likeliest_first() -> None:
    core = make(14)
    core.prefetch(group(9))
    core.foresee([group(6), group(3)])
    core.demand(group(0))
    assert load_all(core) == [blob(0), blob(6), blob(3), blob(9)]


def test_of_hints_without_end_the_last_are_kept() -> None:
    core = make(14)
    for row in range(2 * MOST_HINTS):
        core.prefetch([BlobId(1, "exact", 3 * row)])
    assert core.next_load() == BlobId(1, "exact", 3 * MOST_HINTS)


def test_what_was_foreseen_before_is_read_no_more() -> None:
    core = make(14)
    core.foresee([group(0, 3)])
    assert core.next_load() == blob(0)
    core.foresee([group(6)])
    core.loaded(blob(0))
    assert load_all(core) == [blob(6)]


def test_what_is_foreseen_leaves_last_and_not_for_what_else_is_read_ahead() -> None:
    core = make(3)
    for row in (0, 3, 6):
        ticket = core.demand(group(row))
        load_all(core)
        core.release(ticket)
    core.foresee([group(0, 3, 6), group(9)])
    core.prefetch(group(9))
    assert load_all(core) == []
    core.foresee([group(0, 3)])
    core.demand(group(9))
    load_all(core)
    assert core.resident(group(0, 3)) and not core.resident(group(6))
    core.demand(group(6))
    load_all(core)
    assert core.resident(group(6)) and not core.resident(group(0))


def test_what_is_aimed_at_does_not_push_itself_out_and_leaves_for_a_demand() -> None:
    """0 is used; 3 and 6 are read ahead of any use, which LFU would let go first."""
    core = Residency(3, size_of, LFU())
    ticket = core.demand(group(0))
    load_all(core)
    core.release(ticket)
    core.aim(group(3, 6, 9))
    core.prefetch(group(3, 6, 9))
    assert load_all(core) == [blob(3), blob(6), blob(9)]
    core.prefetch(group(0))
    assert not core.may_start and core.resident(group(3, 6, 9))
    core.foresee([group(0)])
    assert load_all(core) == [] and core.resident(group(3, 6, 9))
    core.foresee([])
    core.demand(group(0))
    load_all(core)
    assert core.resident(group(0, 6, 9)) and not core.resident(group(3))


def test_a_blob_that_is_being_prefetched_is_not_read_twice_when_demanded() -> None:
    core = make(14, in_flight=2)
    core.prefetch(group(0))
    assert core.next_load() == blob(0)
    ticket = core.demand(group(0))
    assert core.next_load() is None
    core.loaded(blob(0))
    assert ticket.phase is Phase.READY
    assert core.tally.prefetch_used == 1


def test_what_is_read_for_a_demand_counts_as_used_once_what_is_read_ahead_when_it_is() -> None:
    policy = LFU()
    core = Residency(16, size_of, policy)
    core.prefetch(group(0))
    load_all(core)
    for rows in (group(1), group(1), group(0), group(2)):
        ticket = core.demand(rows)
        load_all(core)
        core.release(ticket)
    assert [name.row for name in policy.victims()] == [0, 2, 1]


def test_a_prefetch_never_evicts_what_is_pinned() -> None:
    core = make(3)
    ticket = core.demand(group(2))
    load_all(core)
    core.prefetch(group(1))
    assert core.next_load() is None
    assert core.resident(ticket.group)


def test_nothing_is_prefetched_while_a_demand_waits_for_room() -> None:
    core = make(5)
    in_hand = core.demand(group(2))
    load_all(core)
    core.demand(group(5))
    core.prefetch(group(0))
    assert core.next_load() is None
    core.release(in_hand)
    assert core.next_load() == blob(5)


def test_a_failed_blob_fails_every_ticket_that_waits_for_it_and_can_be_asked_again() -> None:
    core = make(14, in_flight=2)
    first, second, other = core.demand(group(0, 1)), core.demand(group(0, 2)), core.demand(group(5))
    assert core.next_load() == blob(0)
    error = OSError("gone")
    core.failed(blob(0), error)
    assert (first.phase, second.phase, first.error, second.error) == (
        Phase.FAILED,
        Phase.FAILED,
        error,
        error,
    )
    load_all(core)
    assert other.phase is Phase.READY
    again = core.demand(group(0))
    load_all(core)
    assert again.phase is Phase.READY


def test_a_wrong_prefetch_is_counted_as_wasted_when_it_is_evicted() -> None:
    core = make(3)
    core.prefetch(group(1))
    load_all(core)
    core.demand(group(2))
    load_all(core)
    assert (core.tally.prefetched, core.tally.prefetch_used, core.tally.prefetch_wasted) == (
        size_of(blob(1)),
        0,
        size_of(blob(1)),
    )
