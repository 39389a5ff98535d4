"""`comoe.load`: from a pack and a budget to a transformers model that generates."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from comoe.defaults import CONTEXT, POLICY, PREFETCH, ROUTING_BIAS
from comoe.device import process
from comoe.device.costs import measured_costs
from comoe.device.memory import check_possible, default_memory
from comoe.device.monitor import Monitor
from comoe.device.rates import TimedSource
from comoe.kernels import native
from comoe.memory.cache import BlobCache
from comoe.memory.policy import POLICIES, Policy
from comoe.memory.predict import Frequent, Learned, Predictor, Previous
from comoe.memory.prefetch import Prefetcher
from comoe.net.address import Access
from comoe.net.place import open_nodes, open_pack
from comoe.net.remote_run import Node
from comoe.plan.cost import Costs
from comoe.plan.early import early, steps
from comoe.plan.footprint import FIRST_USE_FILE_BYTES, Workload, advised, beside_experts, dtype_of, unseen_bytes
from comoe.plan.ladder import Band, Ladder, Rung, ladder_of
from comoe.plan.ledger import ledger_of
from comoe.plan.pin import Pin, deterministic, pinned, smallest
from comoe.plan.planner import Plan, Planner, uniform
from comoe.runtime.bias import attach_bias
from comoe.runtime.budget import FIRST_TOKENS, WarmUp, warm_up
from comoe.runtime.choices import Choices, conditions
from comoe.runtime.edgelink import known_answer, open_links
from comoe.runtime.edgetier import RemoteTier
from comoe.runtime.experts import TORCH_DTYPES, SiteMath
from comoe.runtime.handle import Comoe, Promise
from comoe.runtime.hook import attach
from comoe.runtime.hot import hot_experts
from comoe.runtime.layer import ServedLayer, Serving
from comoe.runtime.laying import Laying, lay
from comoe.runtime.options import Options
from comoe.runtime.skeleton import load_skeleton
from comoe.runtime.threads import use_threads
from comoe.store.decisions import read_decisions
from comoe.store.families import experts_modules
from comoe.store.foresight import Foresight, read_foresight
from comoe.store.layout import PAGE
from comoe.store.paced import Paced
from comoe.store.pack import Pack, refuse_idle_source
from comoe.store.profile import Profile, read_profile
from comoe.store.source import Source
from comoe.types import BlobId, DoesNotFit, ExpertId, UsageError
from comoe.units import format_size, parse_budget, parse_share, parse_size

if TYPE_CHECKING:
    from comoe.net.nodes import EdgeNodes

LINK_GONE_S = 60.0
"""So long an answer waits for a link that is gone, where no floor may be taken."""

LINK_THREADS = 4
"""Reads in flight over a network, whose round trips overlap."""


class NewCache(Protocol):
    """Makes the cache of a model: `BlobCache`, or one whose clock is another."""

    def __call__(self, source: Source, capacity: int, *, largest_group: int, policy: Policy) -> BlobCache: ...


def load(
    pack: str | Path | Pack,
    memory: str | int | None = None,
    expert_memory: str | int | None = None,
    max_loss: float | str = 0.0,
    edges: Sequence[str] = (),
    *,
    context: int = CONTEXT,
    dtype: str | None = None,
    threads: int | None = None,
    source: str | Path | None = None,
    profile: str | Path | None = None,
    policy: str = POLICY,
    prefetch: str = PREFETCH,
    live: bool | None = None,
    deterministic: bool = False,
    log: bool = False,
    replay: str | Path | None = None,
    routing_bias: float = ROUTING_BIAS,
    access: Access | None = None,
) -> Any:
    """A transformers model whose experts are streamed from `pack` within a budget; `model.comoe` is its handle.

    `pack` is a folder, an address (https://, s3://) or an open pack; `access` says how addresses are reached.

    `memory` bounds the whole process ("4GiB" or bytes), `expert_memory` the experts only (also "30%" of their bf16
    bytes); without either, four fifths of what is free. `max_loss` bounds the predicted relative increase of nats per
    token (0.02 or "2%"); 0 is exact. `source` is where the checkpoint went, if the pack refers to one that moved.
    `profile` is the file of a profile: the plan is for text that uses experts like that. `policy` says which experts
    leave the cache first: lru, lfu or gdsf. `prefetch` says whether experts are read before they are asked for: auto,
    while that is measured to save time, on or off.

    `live` gives memory back while others need it, and takes it again; by default where no budget is given, so that none
    was promised. `deterministic` makes outputs depend on nothing measured or cached. With `log` the handle keeps the
    choices that outputs depend on (`model.comoe.choices`); `replay` is the file of such a log, which is followed.
    `routing_bias`, in logits, lets decoding prefer experts that are in memory, as far as `max_loss` allows it; 0: off.

    `edges` are URLs of edge nodes that serve the same pack: they run experts that are not in memory, where that is
    sooner done than reading them, and send those of a pack behind an address; `access` has their token, too.

    Raises DoesNotFit, before anything large is loaded, with the smallest budget that would do; PackError for a pack
    that cannot be used; UsageError for a budget or a profile that cannot be read; RemoteUnavailable where no edge node
    answers.
    """
    if memory is not None and expert_memory is not None:
        raise UsageError("give memory for the whole process or expert memory, not both.")
    moved_to = Path(source) if source else None
    opened = pack if isinstance(pack, Pack) else open_pack(pack, moved_to, access)
    refuse_idle_source(moved_to, opened.folder, opened.manifest)
    known = read_profile(Path(profile)) if profile else None
    given = memory is not None or expert_memory is not None
    follows = live if live is not None else not given
    logged = read_decisions(Path(replay)) if replay else None
    nodes = tuple(Node(url, access.token if access else None, access.ca if access else None) for url in edges)
    how = (policy, prefetch, follows, deterministic, log, logged, routing_bias, nodes, access.link if access else None)
    options = Options(parse_share(max_loss), context, dtype, threads, known, *how)
    loader = Loader(opened, options)
    if expert_memory is not None:
        return loader.within_experts(parse_budget(expert_memory, loader.pack.manifest.expert_bytes_bf16))
    return loader.within_process(parse_size(memory) if memory is not None else default_memory())


class Loader:
    """A pack on the way to being served: refuse early, load the dense part, warm up, plan, fill.

    `pin` is what the plan may not choose, None where it is free; `new_cache` makes the cache.
    """

    def __init__(self, pack: Pack, options: Options) -> None:
        self.pack, self.options = pack, options
        if options.routing_bias and pack.manifest.routing_price is None:
            raise UsageError(
                f"{pack.folder} has no price of a routing bias: its model's routers cannot be moved, or it was packed "
                "with too little text or by an older comoe. Leave out --routing-bias."
            )
        self.ladder = ladder_of(pack.manifest, options.profile)
        forms = self.ladder.forms(options.max_loss)
        self._work = Workload(options.context, dtype_of(pack.manifest, options.dtype), forms)
        self._dtype = TORCH_DTYPES[self._work.dtype]
        self.pin = _pin(self.ladder, options)
        self._source = TimedSource(pack, perf_counter, pack.tier)
        self.new_cache: NewCache = partial(BlobCache, io_threads=LINK_THREADS) if pack.remote else BlobCache
        process.steady_malloc()
        process.bound_kernel_caches()
        use_threads(options.threads)

    def within_process(self, memory: int) -> Any:
        """The model, with experts in what the rest of the process leaves of `memory` bytes."""
        memory -= memory % PAGE  # as limits are kept
        check_possible(memory)
        before = process.resident()
        least = self._least()
        self._refuse_below(beside_experts(self.pack.manifest, self._work, before.total) + least, memory)
        planner = self.planner()  # measures while there is room to
        model, foresight = self._skeleton(), self._foresight
        warm = warm_up(model, self._maths(model), self._work)
        unseen = unseen_bytes(max(warm.file_backed, before.file_backed + FIRST_USE_FILE_BYTES), memory)
        beside = warm.anonymous + unseen
        self._refuse_below(beside + least, memory)
        planner = timed(planner, warm)
        plan = self._plan(planner, memory - beside)
        model = self._serve(model, plan, memory - beside, Promise(memory, beside, unseen), warm.earlier_peak, foresight)
        return self._followed(model, planner)

    def within_experts(self, budget: int) -> Any:
        """The model, with experts in `budget` bytes."""
        self._plan(Planner(self.ladder, Costs.unknown()), budget)  # refuses before anything is loaded
        planner, model = self.planner(), self._skeleton()
        warm = warm_up(model, self._maths(model), replace(self._work, context=FIRST_TOKENS))
        planner = timed(planner, warm)
        plan = self._plan(planner, budget)
        model = self._serve(model, plan, budget, None, warm.earlier_peak, self._foresight)
        return self._followed(model, planner)

    def resident(self, rung: str) -> Any:
        """The model with every expert in `rung` in memory, a form or a step: the reference of comparisons."""
        return self.streamed(rung, self.ladder.rung(rung).nbytes)

    def streamed(self, rung: str, capacity: int, earlier: Any = None) -> Any:
        """The model with every expert in `rung` and at most `capacity` bytes of them in memory, one expert at least.

        `earlier` is a model of the same pack and dtype that has served and is now served anew, not loaded again.
        """
        model = self._skeleton() if earlier is None else earlier
        wanted = self.ladder.rung(rung)
        room = min(wanted.nbytes, max(capacity, wanted.group_beside(None)))
        return self._serve(model, uniform(self.ladder, rung), room)

    def as_pinned(self, capacity: int) -> Any:
        """The model by the plan of `pin` in `capacity` bytes of experts; nothing is measured. Raises DoesNotFit."""
        assert self.pin is not None, "there is nothing to go by"
        plan = pinned(self.ladder, self.pin, capacity)
        return self._serve(self._skeleton(), plan, capacity, foresight=self._foresight)

    def pace(self, seconds: Callable[[int], float]) -> None:
        """Let reads of so many bytes take so long: the scale model."""
        self._source = TimedSource(Paced(self.pack, seconds), perf_counter, self.pack.tier)

    def planner(self) -> Planner:
        """A planner with this device's rates; what a token costs beside its experts is not known yet."""
        return Planner(self.ladder, measured_costs(self.pack, perf_counter), self.options.policy)

    def _least(self) -> int:
        """The least expert memory that there is a plan for."""
        if self.pin is not None:
            return smallest(self.ladder, self.pin)
        return Planner(self.ladder, Costs.unknown()).smallest(self.options.max_loss)

    def _plan(self, planner: Planner, budget: int) -> Plan:
        """The best plan in `budget` bytes of experts, or the one that may not be chosen. Raises DoesNotFit."""
        pin = self._pinned_in(budget)
        return planner.best(budget, self.options.max_loss) if pin is None else pinned(self.ladder, pin, budget)

    def _pinned_in(self, budget: int) -> Pin | None:
        """What the plan may not choose in `budget` bytes of experts: where bytes are to come, an early answer."""
        if self.pin is not None or not self.pack.remote:
            return self.pin
        return early(self.ladder, budget, self.options.max_loss)

    def _steps(self, plan: Plan, budget: int) -> list[Rung]:
        """What a link's plans may read towards, coarse to fine; none where outputs are to depend on no link."""
        if plan.floor is None or self.pin is not None or self.options.log or not self.pack.remote:
            return []
        return steps(self.ladder, plan, budget, self.options.max_loss)

    def _followed(self, model: Any, planner: Planner) -> Any:
        """`model`, with its choices kept and its device watched as far as that is wanted."""
        handle, options = model.comoe, self.options
        if options.log or options.replay is not None:
            now = conditions(self.pack.manifest, handle.plan, options.max_loss, self._work.dtype)
            handle.keep_choices(Choices(now, options.replay))
        if self.pack.remote:
            handle.follow_link(self.ladder, planner.costs.framework_ms.high / 1e3, monotonic)
        if options.live:
            replan = partial(self._replan, planner) if handle.following is None else None
            handle.watch(Monitor(self._source.take_bps).snapshot, replan, monotonic)
        return model

    def _replan(self, planner: Planner, profile: Profile, budget: int) -> Plan:
        pin = self._pinned_in(budget)
        if pin is not None:
            return pinned(self.ladder, pin, budget)
        known = ladder_of(self.pack.manifest, profile)
        return replace(planner, ladder=known).best(budget, self.options.max_loss)

    def _skeleton(self) -> Any:
        self.pack.check_files()
        return load_skeleton(self.pack.folder, self._dtype)

    def _refuse_below(self, needed: int, memory: int) -> None:
        if memory < needed:
            smallest = advised(needed)
            raise DoesNotFit(
                f"{self.pack.folder} needs at least --memory {smallest} ({format_size(smallest)}) for a context of "
                f"{self.options.context} tokens; {format_size(memory)} were given.",
                smallest,
            )

    def _maths(self, model: Any) -> list[SiteMath]:
        return [
            SiteMath(module, self.pack.manifest.site(layer), self._dtype)
            for layer, (_, module) in enumerate(experts_modules(model))
        ]

    @cached_property
    def _foresight(self) -> Foresight:
        """What tells the next layer's experts; nothing where nothing is to be read ahead."""
        manifest = self.pack.manifest
        experts = [layer.num_experts for layer in manifest.layers]
        return {} if self.options.prefetch == "off" else read_foresight(self.pack.folder, experts)

    @cached_property
    def most_used(self) -> list[ExpertId]:
        """All experts, in the order in which bytes that are still to come are asked for."""
        use = self.ladder.use
        return sorted(self.pack.manifest.expert_ids, key=lambda expert: -use[expert.layer][expert.expert])

    def _prefetcher(self, foresight: Foresight) -> Prefetcher | None:
        """What reads ahead by `foresight`, or by another predictor that proves better; None without any."""
        if not foresight:
            return None
        sizes = [layer.num_experts for layer in self.pack.manifest.layers]
        predictors: dict[str, Predictor] = {"learned": Learned(foresight)}
        predictors |= {"frequent": Frequent(self.ladder.use), "previous": Previous(sizes)}
        return Prefetcher(predictors, foresight, always=self.options.prefetch == "on")

    def _nodes(self, on_failure: ExitStack, math: SiteMath) -> "EdgeNodes | None":
        """The edge nodes; None without any. Raises RemoteUnavailable, and UsageError where they have nothing to do."""
        if not self.options.edges:
            return None
        if not self.pack.remote and not _runs_elsewhere(math):
            raise UsageError("edge nodes run plain experts for devices with the kernel only: leave out --edge.")
        return on_failure.enter_context(open_nodes(self.options.edges, self.pack, self.options.link))

    def _remote(self, on_failure: ExitStack, nodes: "EdgeNodes", math: SiteMath) -> RemoteTier | None:
        """Runs of experts on edge nodes, `math` the first layer's; None where nodes have but files to give.

        Raises RemoteUnavailable, UsageError.
        """
        if math.plain is None or not _runs_elsewhere(math):
            return None
        same = self.options.max_loss == 0 or self.pin is not None or self.options.log
        right = known_answer(self.pack, math.plain, exact=same)
        links = open_links(nodes.clients(perf_counter), nodes.there, self.pack, right, perf_counter)
        tier = RemoteTier(links, lambda: nodes.serving, self.pack, self._read_s, perf_counter)
        nodes.runs = lambda: tier.runs
        return on_failure.enter_context(closing(tier))

    def _read_s(self, blob: BlobId) -> float:
        """What reading a blob takes: as long as others of its tier did, and as its link lets it now."""
        expected_s = self._source.expected_s(blob) or 0.0
        if self.pack.tier(blob) == "flash" and expected_s:
            return expected_s
        rate_bps, trip_s = self.pack.link_now()
        return max(expected_s, trip_s + self.pack.nbytes(blob) / max(rate_bps, 1.0))

    def _lay(self, serving: Serving, floor: str) -> Laying | None:
        """Hold a floor: now, or while the model runs where edge nodes run what has none yet, and nothing else is asked
        of outputs than a bound."""
        ways = [serving.way(*expert, floor) for expert in self.most_used]
        blobs = list(dict.fromkeys(blob for way in ways for blob in way.blobs))
        if serving.steps and serving.remote is not None:
            return Laying(serving, blobs).start()
        lay(serving, self.pack, blobs)
        return None

    def _serve(
        self,
        model: Any,
        plan: Plan,
        capacity: int,
        promise: Promise | None = None,
        earlier_peak: int = 0,
        foresight: Foresight | None = None,
    ) -> Any:
        manifest = self.pack.manifest
        floor = self.ladder.rung(plan.floor) if plan.floor else None
        target = self.ladder.rung(plan.target)
        rungs = self._steps(plan, capacity)
        largest = max(rung.group_beside(floor) for rung in (target, *rungs))
        streams = self.options.live or plan.floor_bytes + target.beside(floor) > capacity
        with ExitStack() as on_failure:
            maths = self._maths(model)
            nodes = self._nodes(on_failure, maths[0])
            options, policy = self.options, POLICIES[self.options.policy]()
            new = self.new_cache(self._source, capacity, largest_group=largest, policy=policy)
            cache, ledger = on_failure.enter_context(new), ledger_of(manifest, self.ladder, plan, options.max_loss)
            prefetcher = self._prefetcher(foresight or {}) if streams else None
            serving = Serving(manifest, cache, plan, ledger, prefetcher=prefetcher, early=self.pack.remote)
            serving.steps = tuple(rung.name for rung in rungs)
            serving.patience_s = LINK_GONE_S if self.pack.remote else 0.0
            if nodes is not None:
                nodes.hot = partial(hot_experts, serving)
                serving.remote = self._remote(on_failure, nodes, maths[0])
            laying = self._lay(serving, plan.floor) if plan.floor is not None else None
            attach(model, [ServedLayer(at, math, serving) for at, math in enumerate(maths)])
            if options.routing_bias:
                attach_bias(model, serving, options.routing_bias)
            handle = Comoe(self.pack, serving, self.options.context, promise, earlier_peak, nodes=nodes, laying=laying)
            object.__setattr__(model, "comoe", handle)
            if self.pack.remote and plan.floor is not None and laying is None:
                cache.prefetch([serving.way(*expert, plan.target).blobs for expert in self.most_used])
            on_failure.pop_all()  # from here on the handle closes the cache
        return model


def _runs_elsewhere(math: SiteMath) -> bool:
    """Whether an edge node can run such experts for this device."""
    return math.plain is not None and native.available()


def timed(planner: Planner, warm: WarmUp) -> Planner:
    """`planner`, with what a token was measured to cost beside its experts."""
    return replace(planner, costs=replace(planner.costs, framework_ms=Band(warm.low_ms, warm.high_ms)))


def _pin(ladder: Ladder, options: Options) -> Pin | None:
    """What the plan may not choose. UsageError for a log of another pack, whose steps this one may not have."""
    if options.deterministic:
        return deterministic(ladder, options.max_loss)
    if options.replay is None:
        return None
    logged = options.replay.conditions
    names = {rung.name for rung in ladder.rungs}
    if logged.target not in names or logged.floor not in {None, *names}:
        raise UsageError("the decision log is of a run of another pack.")
    return Pin(logged.floor, logged.target)
