"""Replays: the live cache reads and evicts just so, the clock by hand, and Belady against brute force."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import CALIBRATION, Comoe, document
from hypothesis import given, settings
from hypothesis import strategies as st
from ladders import ladder
from policies import PolicyContract, blob
from test_trace import trace_of

from comoe.defaults import POLICY
from comoe.make.trace import record
from comoe.memory.arena import held_size
from comoe.memory.policy import LRU, POLICIES, Policy
from comoe.memory.predict import Foretold
from comoe.memory.prefetch import Prefetcher
from comoe.memory.residency import Group
from comoe.plan.ladder import Prices
from comoe.plan.ledger import Ledger
from comoe.plan.missrule import MissRule
from comoe.plan.planner import uniform
from comoe.runtime.generate import tokenizer_of
from comoe.runtime.load import Loader, load
from comoe.runtime.options import Options
from comoe.sim.belady import Belady, belady
from comoe.sim.reader import Times
from comoe.sim.replay import Cell, Replayed, replay
from comoe.store.foresight import Link
from comoe.store.layout import PAGE
from comoe.store.pack import Pack
from comoe.store.trace import Chunk, Foreseen, Trace
from comoe.types import BlobId, DoesNotFit, ExpertId


class Watched:
    """A policy; the blobs that came in order, and those that left."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self.came, self.gone = policy, list[BlobId](), list[BlobId]()
        self.touched, self.victims = policy.touched, policy.victims

    def inserted(self, blob: BlobId, nbytes: int) -> None:
        self.came.append(blob)
        self._policy.inserted(blob, nbytes)

    def removed(self, blob: BlobId) -> None:
        self.gone.append(blob)
        self._policy.removed(blob)


# The live cache


@pytest.fixture(scope="module")
def trace(packed: Path) -> Trace:
    """Of the tiny pack: a prompt and an answer, of two texts."""
    model = Loader(Pack(packed), Options(context=256)).resident("exact")
    with model.comoe:
        return record(model, tokenizer_of(packed), [CALIBRATION, "314159 " * 30], 40)


def live(
    packed: Path, rung: str, capacity: int, policy: Watched, monkeypatch: pytest.MonkeyPatch
) -> tuple[Trace, list[BlobId], dict[str, Any]]:
    """What was used, what was read in order, and the counters, of the tiny pack with so much memory for experts."""
    reads: list[BlobId] = []
    plain = Pack.read

    def read(self: Pack, blob: BlobId, into: memoryview) -> str:
        reads.append(blob)
        return plain(self, blob, into)

    with monkeypatch.context() as patch:
        patch.setattr(Pack, "read", read)
        patch.setattr("comoe.runtime.load.POLICIES", {POLICY: lambda: policy})
        model = Loader(Pack(packed), Options(context=256)).streamed(rung, capacity)
        with model.comoe:
            seen = record(model, tokenizer_of(packed), [CALIBRATION, "314159 " * 30], 40)
            return seen, reads, model.comoe.stats()


def blobs_in(pack: Pack, rung: str) -> Callable[[ExpertId], Group]:
    """What an expert needs in a form or a step of the chain."""
    forms = pack.manifest.assignment(rung)
    return lambda expert: pack.manifest.blobs(expert, forms[expert.layer][expert.expert])


CASES = [(rung, "lru", groups) for rung in ("exact", "q8", "mixed") for groups in (1, 2, 5, 9, 100)]
CASES += [("q8", name, groups) for name in ("lfu", "gdsf") for groups in (9, 12)]
"""Where a chunk does not fit, those two may depend on whether a read ends before a use does: see decisions/013."""


@pytest.mark.parametrize(("rung", "name", "groups"), CASES)
def test_the_live_cache_reads_and_evicts_what_its_replay_does(
    packed: Path, rung: str, name: str, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = Pack(packed)
    if rung == "mixed":
        steps = [step.name for step in pack.manifest.chain]
        rung = max(steps, key=lambda step: len({form for layer in pack.manifest.assignment(step) for form in layer}))
    groups_of = [blobs_in(pack, rung)(expert) for expert in pack.manifest.expert_ids]
    largest = max(sum(held_size(pack.nbytes(blob)) for blob in group) for group in groups_of)
    policy = Watched(POLICIES[name]())
    seen, reads, stats = live(packed, rung, groups * largest, policy, monkeypatch)
    again = Watched(POLICIES[name]())
    found = replay(seen, Cell(groups * largest, again), blobs_in(pack, rung), pack.nbytes, Times(lambda n: 1e-3, 2e-4))
    assert policy.came == reads
    assert (again.came, again.gone) == (policy.came, policy.gone)
    assert len(reads) >= len(set(reads)) > 10 and (policy.gone or groups > 8)
    assert (found.uses.sum(), found.hit_rate) == (stats["uses"], stats["hit_rate"])
    assert found.bytes_read.sum() == stats["bytes_read"]["flash"]


def test_a_trace_of_one_rung_and_budget_foretells_another(
    packed: Path, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, policy = Pack(packed), Watched(LRU())
    capacity = 5 * held_size(pack.nbytes(BlobId(0, "exact", 0)))
    live(packed, "exact", capacity, policy, monkeypatch)
    foretold = Watched(LRU())
    replay(trace, Cell(capacity, foretold), blobs_in(pack, "exact"), pack.nbytes)
    assert (foretold.came, foretold.gone) == (policy.came, policy.gone)


# The clock and the counts. Experts are blobs of one page; layer 1 has its own.

NUM_EXPERTS = 5


def alone(expert: ExpertId) -> Group:
    return (blob(10 * expert.layer + expert.expert),)


def of_chunks(*chunks: list[int], passes: list[int] | None = None, tokens: int = 1) -> Trace:
    """Chunks of these experts in layer 0, of passes of so many chunks, by default one each."""
    made = [Chunk(0, 0, experts, [tokens] * len(experts), [1.0] * len(experts)) for experts in chunks]
    lengths = iter(passes or [1] * len(made))
    rest = iter(made)
    trace = trace_of([[next(rest) for _ in range(length)] for length in lengths], (NUM_EXPERTS, NUM_EXPERTS))
    return replace(trace, tokens=np.full(len(trace.tokens), tokens))


def replayed(trace: Trace, pages: int, times: Times | None = None, policy: Policy | None = None) -> Replayed:
    return replay(trace, Cell(pages * PAGE, policy or LRU()), alone, lambda blob: PAGE, times)


READ_S = lambda nbytes: nbytes / PAGE  # noqa: E731


@pytest.mark.parametrize(
    ("pages", "times", "seconds"),
    [
        (4, Times(READ_S, 0.5), [1 + 1 + 0.5, 2 * 0.5, 0.5 + 1 - 0.5 + 0.5]),  # computing hides behind reads
        (4, Times(READ_S, 3.0), [1 + 3 + 3, 2 * 3, 3 + 3]),  # reads hide behind computing
        (1, Times(READ_S, 0.5), [2 * 1.5, 0.5 + 1.5, 2 * 1.5]),  # no room to read ahead
        (4, Times(READ_S, 0.5, 10.0), [10 + 2.5, 10 + 1, 10 + 1.5]),
        (4, Times(), [0.0, 0.0, 0.0]),
        (4, Times(READ_S, 0.5, wake_s=0.25), [1.25 + 1.25 + 0.5, 2 * 0.5, 0.5 + 1.25 - 0.5 + 0.5]),
    ],
)
def test_reads_and_computing_overlap_where_memory_allows(pages: int, times: Times, seconds: list[float]) -> None:
    found = replayed(of_chunks([0, 1], [0, 1], [1, 2]), pages, times)
    assert found.ms.tolist() == pytest.approx([1e3 * second for second in seconds])


def test_what_a_token_takes_beside_experts_is_counted_once_a_pass_and_for_each_token() -> None:
    found = replayed(of_chunks([0, 1], [0, 1], [0], passes=[2, 1], tokens=2), 4, Times(token_s=1.0))
    assert found.ms.tolist() == pytest.approx([2e3, 2e3])


def test_uses_hits_and_bytes_are_counted_by_pass() -> None:
    found = replayed(of_chunks([0, 1], [1, 2], [2], [], passes=[2, 1, 1]), 2)
    assert (found.uses.tolist(), found.hits.tolist()) == ([4, 1, 0], [1, 1, 0])
    pages = [(column // PAGE).tolist() for column in (found.bytes_used, found.bytes_hit, found.bytes_read)]
    assert pages == [[4, 1, 0], [1, 1, 0], [3, 0, 0]]
    assert found.hit_rate == found.byte_hit_rate == pytest.approx(2 / 5)


def test_a_use_hits_with_all_of_its_blobs_and_bytes_with_each() -> None:
    sizes = {blob(0): 100, blob(1): 5000, blob(2): 300}
    groups = {0: (blob(0), blob(1)), 1: (blob(0), blob(2))}
    cell = Cell(10 * PAGE, LRU())
    found = replay(of_chunks([0], [1], [0]), cell, lambda e: groups.get(e.expert, ()), sizes.__getitem__)
    assert (found.hits.tolist(), found.bytes_hit.tolist()) == ([0, 0, 1], [0, 100, 5100])
    assert found.bytes_read.tolist() == [5100, 300, 0]


def test_memory_is_counted_in_pages_and_less_than_a_group_is_refused() -> None:
    trace = of_chunks([0], [1], [0])
    for capacity, hits in ((2 * PAGE, 1), (2 * PAGE - 1, 0)):
        found = replay(trace, Cell(capacity, LRU()), alone, lambda blob: 100)
        assert found.hits.sum() == hits
    with pytest.raises(DoesNotFit) as refusal:
        replay(trace, Cell(PAGE - 1, LRU()), alone, lambda blob: 100)
    assert refusal.value.smallest == PAGE


# Floors and reading ahead


def rule(threshold: float, bound: float) -> MissRule:
    plan = replace(uniform(ladder({"exact": 1}, {}, [[1.0]]), "exact"), floor="coarse", wait_threshold=threshold)
    return MissRule(plan, Ledger(Prices((0.0, 0.0), (0.1, 0.1)), bound))


def floor_of(expert: ExpertId) -> Group:
    return (blob(100 + expert.expert),)


@pytest.mark.parametrize(
    ("threshold", "bound", "floor_uses"),
    [(2.0, 1.0, [1, 0, 2]), (1.0, 1.0, [0, 0, 0]), (2.0, 0.01, [0, 0, 0]), (2.0, 0.034, [0, 0, 1])],
)
def test_a_miss_takes_the_floor_where_its_gate_is_small_and_the_ledger_allows_it(
    threshold: float, bound: float, floor_uses: list[int]
) -> None:
    """Gates are all 1; what takes the floor is read behind it, so that it hits next time."""
    missing = rule(threshold, bound)
    cell = Cell((NUM_EXPERTS + 4) * PAGE, LRU(), miss=missing, floor_of=floor_of)
    found = replay(of_chunks([0], [0], [1, 2]), cell, alone, lambda blob: PAGE, Times(READ_S, 2.0))
    assert found.floor_uses.tolist() == floor_uses
    assert found.hits.tolist() == [0, 1, 0]
    waits = [1 - floor_uses[0], 0, 2 - floor_uses[2]]
    took = [(1 if waits[0] else 0) + 2, 2, (1 if waits[2] == 2 else 0) + 4]
    assert found.ms.tolist() == pytest.approx([1e3 * seconds for seconds in took])
    assert missing.ledger.loss == pytest.approx(0.1 * sum(floor_uses) / 4)


def test_a_prompt_never_takes_the_floor() -> None:
    cell = Cell((NUM_EXPERTS + 4) * PAGE, LRU(), miss=rule(2.0, 1.0), floor_of=floor_of)
    found = replay(of_chunks([0], [1], tokens=3), cell, alone, lambda blob: PAGE, Times(READ_S))
    assert found.floor_uses.sum() == 0


def test_what_is_foretold_is_read_while_the_layer_before_computes() -> None:
    """Experts 0 of layer 0 and then 1 of layer 1, token after token, in room for both; another one first."""
    trace = trace_of([[Chunk(0, 0, [0], [1], [1.0]), Chunk(0, 1, [1], [1], [1.0])]] * 2, (NUM_EXPERTS,) * 2)
    sure = np.array([1], np.int32), np.array([1.0], np.float32)
    ahead = Foreseen(np.array([0, 1, 1, 2, 2]), np.repeat(sure[0], 2), np.repeat(sure[1], 2))
    foretold = Foretold(ahead, [NUM_EXPERTS] * 2)
    prefetcher = Prefetcher({"told": foretold}, [Link(0, 1)], always=True)
    for reads_ahead, ms in ((True, [0.25 + 1 + 2 + 2, 0.25 + 4]), (False, [1 + 2 + 1 + 2, 4])):
        cell = Cell(4 * PAGE, LRU())
        if reads_ahead:
            cell = cell._replace(before_chunk=foretold.begin, prefetcher=prefetcher)
        found = replay(trace, cell, alone, lambda blob: PAGE, Times(READ_S, 2.0, ahead_s=0.25))
        assert found.ms.tolist() == pytest.approx([1e3 * seconds for seconds in ms])
        assert found.hits.tolist() == [int(reads_ahead), 2]
        assert (found.tally.prefetched, found.tally.prefetch_wasted) == (PAGE * reads_ahead, 0)


# Belady


class TestBelady(PolicyContract):
    def make(self) -> Policy:
        return Belady(of_chunks([0, 1]), alone)

    def test_the_farthest_use_goes_first_and_before_it_what_is_never_used_again(self) -> None:
        policy = Belady(of_chunks([0, 1, 2, 3], [1], [0], [2], [1]), alone)
        for chunk, used in ((0, [0, 1, 2, 3]), (1, [1])):
            policy.begin(chunk)
            for row in used:
                policy.touched(blob(row)) if chunk else policy.inserted(blob(row), PAGE)
        assert [name.row for name in policy.victims()] == [3, 1, 2, 0]

    @pytest.mark.parametrize(("passes", "order"), [(0, [2, 3, 0, 1]), (1, [2, 3, 1, 0]), (2, [3, 1, 2, 0])])
    def test_what_is_not_seen_of_the_future_goes_first_least_used_first(self, passes: int, order: list[int]) -> None:
        policy = Belady(of_chunks([0, 1, 2, 3], [1, 0], [0], [2], [1]), alone, passes)
        policy.begin(0)
        for row in (0, 1, 2, 3):
            policy.inserted(blob(row), PAGE)
        policy.begin(1)
        for row in (0, 1):
            policy.touched(blob(row))
        assert [name.row for name in policy.victims()] == order


def least_reads(wanted: list[frozenset[BlobId]], room: int) -> int:
    """The fewest reads of anybody who has room for so many blobs: by trying everything."""
    reads: dict[frozenset[BlobId], int] = {frozenset(): 0}
    for chunk in wanted:
        after: dict[frozenset[BlobId], int] = {}
        for held, count in reads.items():
            others = held - chunk
            for kept in combinations(sorted(others), min(len(others), room - len(chunk))):
                state = chunk | frozenset(kept)
                total = count + len(chunk - held)
                after[state] = min(total, after.get(state, total))
        reads = after
    return min(reads.values())


GROUPS: dict[int, Group] = {
    0: (blob(0),), 1: (blob(1), blob(2)), 2: (blob(2), blob(3)), 3: (blob(4),), 4: (blob(0), blob(5)),
}  # fmt: skip


@given(st.lists(st.sets(st.integers(0, 4), min_size=1, max_size=2).map(sorted), min_size=1, max_size=12))
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("group_of", [alone, lambda expert: GROUPS[expert.expert]], ids=["alone", "grouped"])
@pytest.mark.parametrize("room", [4, 5])
def test_nobody_reads_less_than_belady(
    group_of: Callable[[ExpertId], Group], room: int, chunks: list[list[int]]
) -> None:
    trace = of_chunks(*chunks)

    def reads(cell: Cell) -> int:
        return int(replay(trace, cell, group_of, lambda blob: PAGE).bytes_read.sum()) // PAGE

    wanted = [frozenset(name for e in chunk for name in group_of(ExpertId(0, e))) for chunk in chunks]
    assert reads(belady(trace, group_of, room * PAGE)) == least_reads(wanted, room)
    for make in POLICIES.values():
        assert reads(Cell(room * PAGE, make())) >= least_reads(wanted, room)
    for passes in (0, 2):
        assert reads(belady(trace, group_of, room * PAGE, passes)) >= least_reads(wanted, room)
    assert reads(belady(trace, group_of, room * PAGE, len(chunks))) == least_reads(wanted, room)


@pytest.mark.parametrize("name", POLICIES)
def test_a_run_takes_the_policy_that_is_named(comoe: Comoe, packed: Path, name: str) -> None:
    words = ("--expert-memory", "30%", "-p", "the fox", "-n", 3, "--ignore-eos", "--json")
    told = document(comoe("run", packed, *words, "--policy", name))
    assert told["text"] == document(comoe("run", packed, *words))["text"]
    with load(packed, expert_memory="30%", policy=name).comoe as handle:
        assert type(handle.cache._residency._policy) is POLICIES[name]


def test_a_policy_that_nobody_knows_is_refused(comoe: Comoe, packed: Path) -> None:
    result = comoe("run", packed, "-p", "fox", "--policy", "fifo")
    assert (result.code, result.out) == (2, "")
    assert "choose from lru, lfu, gdsf" in result.sentence
