"""`model.comoe`: what a program may ask of, and tell, a model that comoe serves while it runs."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from comoe.device import process
from comoe.memory.cache import BlobCache
from comoe.plan.ladder import Ladder, Prices
from comoe.plan.ledger import Ledger
from comoe.plan.planner import Plan
from comoe.plan.snapshot import Snapshot
from comoe.runtime.choices import Choices
from comoe.runtime.edgetier import RemoteCounts
from comoe.runtime.following import Following, following_of
from comoe.runtime.layer import Counts, Serving, Use
from comoe.runtime.laying import Laying
from comoe.runtime.live import Live
from comoe.runtime.seen import nothing, profile_between
from comoe.store.pack import Pack
from comoe.store.profile import Profile
from comoe.types import DoesNotFit, UsageError

if TYPE_CHECKING:
    from comoe.net.nodes import EdgeNodes

SLACK_BYTES = 4 << 20
"""Memory may go so far beyond the sizes that were measured before the cache gives way, twice as much at a time."""


class Promise(NamedTuple):
    """A budget of the whole process, in bytes: `memory`, of which `beside` are not the experts'.

    Of those again, `unseen` are no anonymous memory: pages of programs and files that must stay, and the kernel's own.
    """

    memory: int
    beside: int
    unseen: int


class Comoe:
    """The handle of a served model. A context manager: leaving it stops all threads.

    `context` is the longest prompt and answer together, in tokens; `promise` the budget of the whole process, None
    where only experts were given one; `earlier_peak` the resident memory that loading took at most; `nodes` are edge
    nodes, None without any; `laying` brings a floor.
    """

    def __init__(
        self,
        pack: Pack,
        serving: Serving,
        context: int,
        promise: Promise | None = None,
        earlier_peak: int = 0,
        *,
        nodes: "EdgeNodes | None" = None,
        laying: Laying | None = None,
    ) -> None:
        self._pack, self._serving, self._context, self._promise = pack, serving, context, promise
        self._earlier_peak, self._planned = earlier_peak, serving.cache.capacity
        self._read_before: dict[str, int] = {}
        self._used_before = (0, 0)
        self._changing = threading.RLock()
        self.choices: Choices | None = None
        self.live: Live | None = None
        self.following: Following | None = None
        self.nodes, self._laying = nodes, laying
        if promise is not None:
            serving.before_read = self._guard

    @property
    def plan(self) -> Plan:
        return self._serving.plan

    @property
    def ledger(self) -> Ledger:
        return self._serving.ledger

    @property
    def pack(self) -> Pack:
        return self._pack

    @property
    def cache(self) -> BlobCache:
        return self._serving.cache

    @property
    def profile(self) -> Profile:
        """What routers chose since the model was loaded, by phase; the domain is `seen.SESSION`."""
        return profile_between(nothing(self._serving.seen), self._serving.seen)

    @contextmanager
    def heeded(self, heed: Callable[[int, Tensor, Sequence[Use]], None]) -> Iterator[None]:
        """While it lasts, `heed` is told what every chunk uses: see `Serving`."""
        self._serving.heed = heed
        try:
            yield
        finally:
            self._serving.heed = None

    def resize(self, nbytes: int) -> None:
        """Change the budget to `nbytes`, of the process or of the experts, whichever `load` was given.

        Callable from any thread; obeyed between expert reads. Raises DoesNotFit, and changes nothing, below the
        floor and the two experts that must be there at once.
        """
        promise = self._promise
        beside = promise.beside if promise is not None else 0
        try:
            with self._changing:
                self.obey(nbytes - beside, "asked")
                if self.live is not None:
                    self.live.scheduler.promise(nbytes - beside)
        except DoesNotFit as error:
            if promise is None:
                raise
            smallest = error.smallest + beside
            raise DoesNotFit(f"the process needs {smallest} bytes of memory, {nbytes} were given.", smallest) from error

    def obey(self, capacity: int, reason: str) -> None:
        """Give experts `capacity` bytes, and the process as much as that leaves it. Raises DoesNotFit."""
        with self._changing:
            self.cache.resize(capacity)
            self._planned = capacity
            if self._promise is not None:
                self._promise = self._promise._replace(memory=capacity + self._promise.beside)
            self._switched(reason)

    def follow(self, plan: Plan, reason: str, prices: Prices | None = None) -> None:
        """Go on by `plan`, whose floor is that of the plan that there is, as is its target where there are no `prices`
        for another one."""
        with self._changing:
            if prices is not None:
                self.ledger.prices = prices
            self._serving.plan = plan
            self._switched(reason)

    def stats(self) -> dict[str, Any]:
        """Counters of the request: rates as fractions, bytes as integers; what is resident is so now.

        `prefetched_bytes` were read before they were asked for, `prefetch_wasted_bytes` of them left unused, since the
        model was loaded; `prefetching` says whether that goes on, None where there is nothing to go by.
        `link_failures` uses took the floor because no node had their experts' bytes, others waited `link_wait_ms`.
        `plan_switches` plans followed a link since the model was loaded.
        `edge_events` counts what became of links to edge nodes since then, by kind, and `announced_experts` those that
        nodes were told of; `edge` is the node that serves, None without a link.
        `edge_runs` uses were run by edge nodes since then, in `edge_bytes` of messages, `edge_read` of them of experts
        that the node had to read first; `edge_failures` requests to them failed, and the device read instead.
        `calibration_distance` is how many times the error of calibration text this request's experts have, over all
        steps of the chain; `like_calibration` says whether certified losses hold for such text. Where they do not,
        `loss_ledger` is higher by as much as was measured. None where no loss was allowed, or none was certified.
        `moved_share` of the answer's gates went to other experts, as a routing bias has it.
        `yielded_bytes` are what the cache gave up to keep the budget; `beside_experts_bytes` what the process was
        measured to need beside it, None where experts alone have a budget; `peak_bytes` counts from its start.
        """
        counts, cache, likeness = self._serving.counts, self.cache.stats, self.ledger.likeness
        remote = self._serving.remote.counts if self._serving.remote is not None else RemoteCounts()
        read, prefetcher = cache.bytes_read, self._serving.prefetcher
        uses = max(counts.uses, 1)
        return {
            "uses": counts.uses,
            "hit_rate": counts.hits / uses,
            "floor_rate": counts.floor_uses / uses,
            "expert_s": counts.expert_s,
            "bytes_read": {tier: nbytes - self._read_before.get(tier, 0) for tier, nbytes in read.items()},
            "link_failures": counts.link_failures,
            "link_wait_ms": 1e3 * counts.link_wait_s,
            "plan_switches": self.following.switches if self.following is not None else 0,
            "edge": self.nodes.serving if self.nodes is not None else None,
            "edge_events": self.nodes.counts if self.nodes is not None else {},
            "announced_experts": self.nodes.announced.experts if self.nodes is not None else 0,
            "edge_runs": remote.uses,
            "edge_read": remote.read,
            "edge_failures": remote.failures,
            "edge_bytes": remote.nbytes,
            "prefetched_bytes": cache.tally.prefetched,
            "prefetch_wasted_bytes": cache.tally.prefetch_wasted,
            "prefetching": prefetcher.active if prefetcher is not None else None,
            "resident_bytes": self.cache.resident_bytes,
            "capacity_bytes": self.cache.capacity,
            "yielded_bytes": self._planned - self.cache.capacity,
            "beside_experts_bytes": self._promise.beside if self._promise is not None else None,
            "peak_bytes": max(self._earlier_peak, process.peak_bytes()),
            "loss_ledger": self.ledger.loss,
            "calibration_distance": likeness.distance if likeness is not None else None,
            "like_calibration": likeness.alike if likeness is not None else None,
            "moved_share": self.ledger.moved,
            "shares": self.ledger.shares(),
        }

    def used(self) -> tuple[int, int]:
        """Uses of experts since the model was loaded, and those that found their form in memory."""
        counts, before = self._serving.counts, self._used_before
        return before[0] + counts.uses, before[1] + counts.hits

    def keep_choices(self, choices: Choices) -> None:
        """From now on write down, or take from a log, what outputs depend on."""
        self.choices, self._serving.settle = choices, choices.settle

    def watch(
        self,
        snapshot: Callable[[], Snapshot],
        replan: Callable[[Profile, int], Plan] | None,
        clock: Callable[[], float],
    ) -> None:
        """From now on follow the device and the text: see `runtime.live`."""
        self.live = Live(self, self._serving, self._pack, snapshot, replan)
        self.live.start(clock)

    def follow_link(self, ladder: Ladder, token_s: float, clock: Callable[[], float]) -> None:
        """From now on follow the link that bytes come over, where plans may: see `runtime.following`.

        A token takes `token_s` with everything in memory.
        """
        self.following = following_of(self, self._serving, self._pack, ladder, token_s)
        if self.following is not None:
            self.following.start(clock)

    def check_context(self, tokens: int) -> None:
        """Raise UsageError where prompt and answer together are longer than what memory was sized for."""
        if tokens > self._context:
            raise UsageError(f"prompt and answer have {tokens} tokens, memory is for {self._context}: raise --context.")

    @property
    def expert_s(self) -> float:
        """Seconds that the request's experts took so far, waiting for them included."""
        return self._serving.counts.expert_s

    def begin_request(self, asked: str = "") -> None:
        """Start the ledger and the request's counters afresh; what the cache yielded in the last one it gets back.

        `asked` is all that its answer depends on. Raises UsageError where a decision log is replayed that has another.
        """
        if self.choices is not None:
            self.choices.begin(asked)
        self.ledger.clear()
        self._used_before = self.used()
        self._serving.counts = Counts()
        self._read_before = self.cache.stats.bytes_read
        with self._changing:
            if self.cache.capacity < self._planned:
                self.cache.resize(self._planned)

    def close(self) -> None:
        """Stop all threads and close files. The model cannot run afterwards."""
        for driver in (self.live, self.following):
            if driver is not None:
                driver.close()
        if self._laying is not None:
            self._laying.stop()
        if self._serving.remote is not None:
            self._serving.remote.close()
        if self.nodes is not None:
            self.nodes.close()
        self.cache.close()
        if self._laying is not None:
            self._laying.join()
        self._pack.close()

    def __enter__(self) -> "Comoe":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _guard(self) -> None:
        """Keep the budget's promise where the process grew beyond what its warm-up showed: the cache gives way.

        Anonymous memory alone is looked at: short of room, the kernel drops pages of programs first, which then seem
        to take less than they need.
        """
        if self._excess() <= SLACK_BYTES:
            return
        process.trim_malloc()
        with self._changing:
            excess = self._excess()
            room = self.cache.capacity - self.cache.smallest
            if excess > SLACK_BYTES and room > 0:
                self.cache.resize(self.cache.capacity - min(excess + SLACK_BYTES, room))

    def _switched(self, reason: str) -> None:
        if self.choices is not None:
            self.choices.switched(reason, self.cache.capacity, self.plan)

    def _excess(self) -> int:
        assert self._promise is not None
        return process.resident().anonymous + self._promise.unseen - self._promise.memory
