"""A trace replayed against a cache of any size and policy: the live cache's residency and policy on a virtual clock.

No model, no threads, no reads: what `memory.cache` does with them is done here one event after the other.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from comoe.memory.arena import held_size
from comoe.memory.policy import Policy
from comoe.memory.predict import Foretold, Previous
from comoe.memory.prefetch import Prefetcher
from comoe.memory.residency import Group, Residency, Tally, first_ready
from comoe.plan.missrule import MissRule
from comoe.sim.reader import Reader, Times
from comoe.store.foresight import Link
from comoe.store.trace import Chunk, Trace
from comoe.types import BlobId, ExpertId

GroupOf = Callable[[ExpertId], Group]
"""Which blobs an expert needs, in the form that is replayed."""


class Cell(NamedTuple):
    """What is replayed against a trace: `capacity` bytes of memory, and how blobs leave it.

    `before_chunk` is told the number of every chunk before it asks for anything: for a policy or a predictor that knows
    the trace. `prefetcher` says what is read ahead; None: nothing is. `miss` says which uses take the floor, whose
    blobs `floor_of` answers: they are in memory from the beginning.
    """

    capacity: int
    policy: Policy
    before_chunk: Callable[[int], None] = lambda chunk: None
    prefetcher: Prefetcher | None = None
    miss: MissRule | None = None
    floor_of: GroupOf | None = None


def reading_ahead(cell: Cell, trace: Trace, links: Iterable[Link], *, always: bool = False) -> Cell:
    """`cell` with experts read ahead by what the trace's foresight said: while that pays, or `always`.

    ValueError for a trace of a pack without foresight.
    """
    if trace.ahead is None:
        raise ValueError("the trace has no foresight")
    experts = trace.experts.tolist()
    foretold = Foretold(trace.ahead, experts)
    prefetcher = Prefetcher({"learned": foretold, "previous": Previous(experts)}, links, always=always)
    return cell._replace(before_chunk=foretold.begin, prefetcher=prefetcher)


@dataclass(frozen=True, slots=True)
class Replayed:
    """What each of P passes took, all (P,): virtual milliseconds, uses of experts and hits among them.

    Uses that take the floor are no hits. Of bytes: those of all uses in the wanted form, those of them that were
    resident when asked for, and those that were read. `tally` is of all passes together, as the ledger is.
    """

    ms: npt.NDArray[np.float64]
    uses: npt.NDArray[np.int64]
    hits: npt.NDArray[np.int64]
    floor_uses: npt.NDArray[np.int64]
    bytes_used: npt.NDArray[np.int64]
    bytes_hit: npt.NDArray[np.int64]
    bytes_read: npt.NDArray[np.int64]
    tally: Tally

    @property
    def hit_rate(self) -> float:
        """Share of all uses."""
        return float(self.hits.sum() / max(self.uses.sum(), 1))

    @property
    def byte_hit_rate(self) -> float:
        """Share of the bytes of all uses."""
        return float(self.bytes_hit.sum() / max(self.bytes_used.sum(), 1))


COUNTED = ("uses", "hits", "floor_uses", "bytes_used", "bytes_hit", "bytes_read")
"""What is counted of every pass."""


def replay(
    trace: Trace, cell: Cell, group_of: GroupOf, nbytes: Callable[[BlobId], int], times: Times | None = None
) -> Replayed:
    """What `trace` would have taken; `nbytes` is a blob's size. Raises DoesNotFit where memory holds no group."""
    times, nbytes = times or Times(), cache(nbytes)
    virtual = VirtualCache(cell, nbytes, times)
    if cell.floor_of is not None:
        virtual.hold([cell.floor_of(expert) for expert in _all_experts(trace)])
    totals = np.zeros((len(trace.tokens), 1 + len(COUNTED)))
    pauses_s = trace.tokens * times.token_s / np.maximum(np.diff(trace.chunks), 1)
    for at, (chunk, groups) in enumerate(grouped(trace, group_of)):
        in_pass = chunk.in_pass
        start_s, read = virtual.now_s, virtual.bytes_read
        cell.before_chunk(at)
        virtual.advance(pauses_s[in_pass])
        ahead = _ahead(cell.prefetcher, chunk, int(trace.tokens[in_pass]), virtual.now_s)
        hits = [virtual.resident(group) for group in groups]
        used = [blob for group in groups for blob in group]
        hit_bytes = sum(nbytes(blob) for blob in used if virtual.resident([blob]))
        coarse = _coarse(cell, chunk, hits, decode=trace.tokens[in_pass] == 1)
        virtual.hint([group for group, floor in zip(groups, coarse, strict=True) if floor is not None])
        served = [group if floor is None else floor for group, floor in zip(groups, coarse, strict=True)]
        virtual.serve(served, [group_of(expert) for expert in ahead])
        took_ms, bytes_read = 1e3 * (virtual.now_s - start_s), virtual.bytes_read - read
        num_coarse = len(coarse) - coarse.count(None)
        counted = (len(groups), sum(hits), num_coarse, sum(map(nbytes, used)), hit_bytes, bytes_read)
        totals[in_pass] += (took_ms, *counted)
    return Replayed(
        ms=totals[:, 0],
        **{name: totals[:, at].astype(np.int64) for at, name in enumerate(COUNTED, 1)},
        tally=virtual.tally,
    )


def _all_experts(trace: Trace) -> Iterator[ExpertId]:
    return (ExpertId(layer, expert) for layer, size in enumerate(trace.experts.tolist()) for expert in range(size))


def _coarse(cell: Cell, chunk: Chunk, hits: Sequence[bool], *, decode: bool) -> list[Group | None]:
    """The floor of every use that takes it, in the order in which the runtime asks; prompts never do."""
    if cell.miss is None or cell.floor_of is None:
        return [None] * len(hits)
    found: list[Group | None] = []
    for expert, tokens, gate, hit in zip(chunk.experts, chunk.counts, chunk.gates, hits, strict=True):
        floor = decode and not hit and cell.miss.takes_floor(chunk.layer, gate, tokens)
        cell.miss.ledger.add(chunk.layer, "floor" if floor else "target", gate, floor=floor, decode=decode)
        found.append(cell.floor_of(ExpertId(chunk.layer, expert)) if floor else None)
    return found


def _ahead(prefetcher: Prefetcher | None, chunk: Chunk, tokens: int, now_s: float) -> list[ExpertId]:
    if prefetcher is None:
        return []
    return prefetcher.step(chunk.layer, tokens, chunk.experts, lambda: np.zeros((tokens, 0), np.float32), now_s)


def grouped(trace: Trace, group_of: GroupOf) -> Iterator[tuple[Chunk, list[Group]]]:
    """Every chunk, and what its experts need."""
    groups = [[group_of(ExpertId(layer, expert)) for expert in range(size)] for layer, size in enumerate(trace.experts)]
    for chunk in trace:
        yield chunk, [groups[chunk.layer][expert] for expert in chunk.experts]


class VirtualCache:
    """What `memory.cache.BlobCache` is to a thread that computes, without bytes: its reads take virtual time."""

    def __init__(self, cell: Cell, nbytes: Callable[[BlobId], int], times: Times) -> None:
        self._times = times
        self._residency = Residency(cell.capacity, lambda blob: held_size(nbytes(blob)), cell.policy)
        self._reader = Reader(self._residency, nbytes, times.load_s)

    @property
    def now_s(self) -> float:
        return self._reader.now_s

    @property
    def bytes_read(self) -> int:
        return self._reader.bytes_read

    def resident(self, group: Sequence[BlobId]) -> bool:
        """Whether every blob of `group` is in memory now."""
        return self._residency.resident(group)

    @property
    def tally(self) -> Tally:
        """What prefetching was worth."""
        return self._residency.tally

    def serve(self, groups: Sequence[Group], ahead: Sequence[Group] = ()) -> None:
        """Ask for all groups, and use each as it is there: resident ones first, then by arrival.

        Groups `ahead` are read when nothing else is.
        """
        if ahead:
            self.advance(self._times.ahead_s)
        self._residency.foresee(ahead)
        tickets = self._residency.demand_all(groups)
        self._begin()
        while tickets:
            position = first_ready(tickets)
            if position is None:
                self._reader.end()
                continue
            ticket = tickets.pop(position)
            self.advance(self._times.use_s)
            self._residency.release(ticket)
            self._begin()

    def hold(self, groups: Sequence[Group]) -> None:
        """Have all groups in memory for ever, before anything begins."""
        for blob in dict.fromkeys(blob for group in groups for blob in group):
            ticket = self._residency.demand([blob])
            while (loading := self._residency.next_load()) is not None:
                self._residency.loaded(loading)
            self._residency.hold([blob])
            self._residency.release(ticket)

    def hint(self, groups: Sequence[Group]) -> None:
        """Read groups when there is nothing better to read."""
        for group in groups:
            self._residency.prefetch(group)

    def advance(self, seconds: float) -> None:
        """Compute for so long."""
        self._reader.advance(seconds)

    def _begin(self) -> None:
        self._reader.begin()
        self._residency.take_evictions()  # no memory is to be freed
