"""One sparse layer while the model runs: choose a form per expert, fetch, compute, add in expert order.

The state of a running model that its layers share is here too. Residency is `memory`'s, the arithmetic
`runtime.experts`'s, prices `plan.ledger`'s.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from comoe.forms.plain import Floats
from comoe.memory.cache import BlobCache
from comoe.memory.prefetch import Prefetcher
from comoe.memory.residency import Group
from comoe.net.wire import MAX_USES
from comoe.plan.footprint import CHUNK_TOKENS
from comoe.plan.ledger import Ledger
from comoe.plan.missrule import MissRule
from comoe.plan.planner import Plan
from comoe.runtime.edgetier import Ran, RemoteTier, Sent, Wanted
from comoe.runtime.experts import KERNEL_TOKENS, SiteMath
from comoe.runtime.outage import Outage
from comoe.store.manifest import Manifest
from comoe.types import BlobId, ExpertId, Late, RemoteUnavailable

DECODE_TOKENS = 1
"""A pass of more tokens is prefill, which never takes the floor: coarse keys and values would stay behind."""


class Use(NamedTuple):
    """An expert's work in one chunk: rows of the chunk, their positions in the top-k, and the sum of their gates.

    A gate counts by its size: some families have negative ones.
    """

    expert: int
    tokens: Tensor
    positions: Tensor
    gate: float


class Way(NamedTuple):
    """How an expert runs: its form and the blobs of it."""

    form: str
    blobs: tuple[BlobId, ...]


class Chosen(NamedTuple):
    """The way of a use, whether it is coarser than the plan's target, and what the ledger spent on it."""

    way: Way
    coarse: bool
    spent: float


class Chunk(NamedTuple):
    """Tokens `x` (N, H), which experts they use in which way, and with which gates (N, K)."""

    x: Tensor
    uses: Sequence[Use]
    ways: Sequence[Way]
    weight: Tensor

    def gates(self, use: Use) -> Tensor:
        """The gates (T,) of a use."""
        return self.weight[use.tokens, use.positions]


NOTHING = Ran([], torch.empty(0, dtype=torch.long), torch.empty(0))
"""What a use comes to that another one's sum has."""


@dataclass(slots=True)
class Counts:
    """What a request did so far; times in seconds."""

    uses: int = 0
    hits: int = 0
    floor_uses: int = 0
    link_failures: int = 0
    link_wait_s: float = 0.0
    expert_s: float = 0.0


@dataclass(slots=True)
class Seen:
    """What a layer's router chose in one phase since the model was loaded, as in a profile.

    Plain numbers, which a decode step counts at once: see `runtime.handle` for the profile itself.
    """

    uses: list[int]
    gates: list[float]
    tokens: int = 0


@dataclass(slots=True)
class Serving:
    """What the layers of a running model share. `before_read` is called before a chunk asks for its experts.

    `heed` is told what every chunk uses: its layer, what its tokens give to experts (N, H), and its experts, ascending.
    `prefetcher` says what comes next; None where nothing is read ahead. `settle` is told whether a use that has a floor
    would take it, and answers whether it does. `early`: prompts may take floors, too. `remote` are edge nodes that run
    what misses; None without any. Where nobody has the bytes of a use that may take no floor, it waits for a link, for
    `patience_s` at most. `steps` are the rungs, coarse to fine, that the plan's target may be one of while it runs: of
    them the finest form that is there is served. While `laying`, floors are still to come; `broken` is why they cannot.
    """

    manifest: Manifest
    cache: BlobCache
    plan: Plan
    ledger: Ledger
    counts: Counts = field(default_factory=Counts)
    before_read: Callable[[], None] | None = None
    heed: Callable[[int, Tensor, Sequence[Use]], None] | None = None
    prefetcher: Prefetcher | None = None
    settle: Callable[[bool], bool] | None = None
    early: bool = False
    remote: RemoteTier | None = None
    patience_s: float = 0.0
    steps: tuple[str, ...] = ()
    laying: bool = False
    broken: Exception | None = None
    rungs: dict[str, list[list[Way]]] = field(default_factory=dict)
    seen: list[tuple[Seen, Seen]] = field(init=False)
    """By layer: of prefill, and of decoding."""

    def __post_init__(self) -> None:
        sizes = [layer.num_experts for layer in self.manifest.layers]
        self.seen = [(Seen([0] * size, [0.0] * size), Seen([0] * size, [0.0] * size)) for size in sizes]

    def way(self, layer: int, expert: int, rung: str) -> Way:
        """How `expert` runs in a form or a step of the chain."""
        if rung not in self.rungs:
            assignment = enumerate(self.manifest.assignment(rung))
            self.rungs[rung] = [[self._way(at, e, form) for e, form in enumerate(forms)] for at, forms in assignment]
        return self.rungs[rung][layer][expert]

    def finest(self, layer: int, expert: int) -> tuple[int, Way] | None:
        """How `expert` runs in the finest of the steps that is in memory, and which one that is; None where none is."""
        ways = [self.way(layer, expert, step) for step in self.steps]
        there = self.cache.residents([way.blobs for way in ways])
        return next(((at, ways[at]) for at in reversed(range(len(ways))) if there[at]), None)

    def nbytes(self, way: Way) -> int:
        """Bytes of what it needs."""
        return sum(self.manifest.layers[blob.layer].parts[blob.part].nbytes for blob in way.blobs)

    def _way(self, layer: int, expert: int, form: str) -> Way:
        return Way(form, self.manifest.blobs(ExpertId(layer, expert), form))


class ServedLayer:
    """The `ExpertLayer` that streams: what `runtime.hook` calls in place of a family's own experts."""

    def __init__(self, index: int, maths: SiteMath, serving: Serving) -> None:
        self._index, self._maths, self.serving = index, maths, serving
        self._num_experts = serving.manifest.layers[index].num_experts
        self._seen = serving.seen[index]
        self._sends = False

    def forward(self, module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Sum over each token's experts: `x` (N, H), `index` and `weight` (N, K) to (N, H).

        An index of `num_experts` or more means no expert.
        """
        start_s = self.serving.cache.now_s()
        chunks = zip(*(torch.split(t, CHUNK_TOKENS) for t in (x, index, weight)), strict=True)
        decode = len(x) <= DECODE_TOKENS
        self._seen[decode].tokens += len(x)
        outputs = [self._chunk(*chunk, decode=decode) for chunk in chunks]
        self.serving.counts.expert_s += self.serving.cache.now_s() - start_s
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _chunk(self, x: Tensor, index: Tensor, weight: Tensor, *, decode: bool) -> Tensor:
        if self.serving.before_read is not None:
            self.serving.before_read()
        uses = list(self._uses(index, weight))
        if self.serving.heed is not None:
            self.serving.heed(self._index, x, uses)
        if self.serving.broken is not None:
            raise self.serving.broken
        self._sends = self._can_send(len(x), index.numel())
        chosen, ahead = [self._choose(use, decode=decode) for use in uses], self._ahead(x, uses)
        outage = Outage(self.serving.patience_s, self.serving.counts)
        while True:
            ways = [one.way for one in chosen]
            try:
                return self._summed(x, uses, ways, weight, ahead)
            except RemoteUnavailable as error:
                chosen = [self._without_link(use, one, decode=decode) for use, one in zip(uses, chosen, strict=True)]
                there = self.serving.cache.residents([one.way.blobs for one in chosen])
                if not all(there) and not isinstance(error, Late):
                    outage.wait(error, sum(there))

    def _summed(
        self, x: Tensor, uses: Sequence[Use], ways: Sequence[Way], weight: Tensor, ahead: Sequence[Group] = ()
    ) -> Tensor:
        """Every token's experts, weighted and summed in the order of the uses."""
        out = torch.zeros_like(x)
        waiting: dict[int, Ran] = {}
        added = 0
        for ran in self._outputs(Chunk(x, uses, ways, weight), ahead):
            waiting |= dict.fromkeys(ran.positions, NOTHING)
            waiting[ran.positions[0]] = ran
            while added in waiting:
                _add(out, waiting.pop(added))
                added += 1
        return out

    def _outputs(self, chunk: Chunk, ahead: Sequence[Group]) -> Iterator[Ran]:
        """What all uses come to, as they are there: what an edge node runs comes last.

        Where one is back for which reads were waited for, it runs what is not there yet.
        """
        remote, left = self.serving.remote, set(range(len(chunk.uses)))
        while left:
            until = remote.ready if remote is not None and self._sends and not remote.ready() else None
            sent = self._send(remote, chunk, left) if remote is not None and self._sends else None
            here = left.difference(sent.positions if sent is not None else ())
            try:
                for ran in chain(self._computed(sorted(here), chunk, ahead, until), self._answered(sent, chunk)):
                    left.difference_update(ran.positions)
                    yield ran
            finally:
                if sent is not None:
                    sent.cancel()  # if it never began: what was read beside it could not be

    def _answered(self, sent: Sent | None, chunk: Chunk) -> Iterator[Ran]:
        """What the node makes of what was sent; nothing where it fails. Raises Late: a coarse form is sooner there."""
        if sent is None or self.serving.remote is None:
            return
        found = self.serving.remote.outputs(sent, chunk.x.dtype)
        if found is None and self.serving.laying:
            raise Late("the edge node does not answer in time.")
        if found is not None and not self.serving.laying:
            self.serving.cache.used_elsewhere([chunk.ways[at].blobs for at in sent.positions])
        yield from found or ()

    def _computed(
        self, positions: Sequence[int], chunk: Chunk, ahead: Sequence[Group], until: Callable[[], bool] | None
    ) -> Iterator[Ran]:
        """What those uses of a chunk come to, computed here."""
        for found, blobs in self.serving.cache.serve([chunk.ways[at].blobs for at in positions], ahead, until):
            at = positions[found]
            use, x = chunk.uses[at], chunk.x
            y = self._maths.run(chunk.ways[at].form, blobs, x[use.tokens])
            yield Ran([at], use.tokens, (y * chunk.gates(use)[:, None]).to(x.dtype))

    def _send(self, remote: RemoteTier, chunk: Chunk, left: Collection[int]) -> Sent | None:
        """Let an edge node run what misses of `left`, as far as that is sooner done than reading it."""
        uses, ways = chunk.uses, chunk.ways
        resident = self.serving.cache.residents([way.blobs for way in ways])
        missing = [(at, uses[at], ways[at]) for at in sorted(left) if not resident[at]]
        wanted = [Wanted(at, use.expert, way.form, way.blobs, use.tokens, chunk.gates(use)) for at, use, way in missing]
        assert self._maths.plain is not None
        return remote.send(self._index, self._maths.plain, wanted, chunk.x) if wanted else None

    def _can_send(self, tokens: int, uses: int) -> bool:
        """Whether edge nodes may run experts of such a chunk: with as many tokens as the kernel takes here, whose
        numbers are the same there, and more where a floor that loses more is all that there will be."""
        serving = self.serving
        if serving.remote is None or self._maths.plain is None:
            return False
        return tokens <= KERNEL_TOKENS or (serving.laying and uses <= MAX_USES)

    def _runs_elsewhere(self) -> bool:
        """Whether an edge node would run experts of this chunk now."""
        return self._sends and self.serving.remote is not None and self.serving.remote.ready()

    def _uses(self, index: Tensor, weight: Tensor) -> Iterator[Use]:
        """The experts that a chunk uses, ascending; rows in the order in which eager transformers takes them."""
        by_position = index.t()
        for expert in torch.unique(index).tolist():
            if expert < self._num_experts:
                positions, tokens = torch.where(by_position == expert)
                yield Use(expert, tokens, positions, float(weight[tokens, positions].abs().sum()))

    def _choose(self, use: Use, *, decode: bool) -> Chosen:
        """The miss rule: the wanted form if it is there or worth waiting for, else the floor."""
        serving, plan = self.serving, self.serving.plan
        way = serving.way(self._index, use.expert, plan.target)
        hit, there = serving.cache.resident(way.blobs), None
        if serving.steps and not (hit and plan.target == serving.steps[-1]):
            there = serving.finest(self._index, use.expert)
        if there is not None and (hit := there[0] >= serving.steps.index(plan.target)):
            way = there[1]
        floor = plan.floor if (decode or serving.early) and self._takes_floor(use, hit, decode=decode) else None
        if floor is not None:
            coarse = there[1] if there is not None else serving.way(self._index, use.expert, floor)
            if serving.laying and self._runs_elsewhere() and not serving.cache.resident(coarse.blobs):
                floor = None
            else:
                serving.cache.prefetch([way.blobs])
                way = coarse
        serving.counts.uses += 1
        serving.counts.hits += hit and floor is None
        serving.counts.floor_uses += floor is not None
        spent = serving.ledger.add(self._index, way.form, use.gate, floor=floor is not None, decode=decode)
        if serving.ledger.likeness is not None:
            serving.ledger.likeness.add(self._index, use.expert, use.gate, len(use.tokens), decode=decode)
        seen = self._seen[decode]
        seen.uses[use.expert] += len(use.tokens)
        seen.gates[use.expert] += use.gate
        return Chosen(way, floor is not None, spent)

    def _without_link(self, use: Use, chosen: Chosen, *, decode: bool) -> Chosen:
        """What a use takes that no node has bytes for: the floor where the bound allows it, else its way as it is."""
        serving, plan, way = self.serving, self.serving.plan, chosen.way
        there = chosen.coarse or serving.cache.resident(way.blobs)
        if there or plan.floor is None or serving.settle is not None:
            return chosen
        serving.ledger.take_back(way.form, use.gate, chosen.spent, decode=decode)
        if not serving.ledger.allows_floor(self._index, use.gate, decode=decode):
            return chosen._replace(spent=serving.ledger.add(self._index, way.form, use.gate, decode=decode))
        way = serving.way(self._index, use.expert, plan.floor)
        serving.counts.floor_uses += 1
        serving.counts.link_failures += 1
        return Chosen(way, True, serving.ledger.add(self._index, way.form, use.gate, floor=True, decode=decode))

    def _ahead(self, x: Tensor, uses: Sequence[Use]) -> list[tuple[BlobId, ...]]:
        """What the next layer is likely to want."""
        serving = self.serving
        if serving.prefetcher is None:
            return []
        used = [use.expert for use in uses]
        found = serving.prefetcher.step(self._index, len(x), used, lambda: floats(x), serving.cache.now_s())
        return [serving.way(layer, expert, serving.plan.target).blobs for layer, expert in found]

    def _takes_floor(self, use: Use, hit: bool, *, decode: bool) -> bool:
        if self.serving.plan.floor is None:
            return False
        coarse = not hit and self._may_take_floor(use, decode=decode)
        return coarse if self.serving.settle is None else self.serving.settle(coarse)

    def _may_take_floor(self, use: Use, *, decode: bool) -> bool:
        rule = MissRule(self.serving.plan, self.serving.ledger)
        return rule.takes_floor(self._index, use.gate, len(use.tokens), decode=decode)


def floats(x: Tensor) -> Floats:
    """A tensor as float32 numbers, which predictors take."""
    found: Floats = x.float().numpy()
    return found


def _add(out: Tensor, ran: Ran) -> None:
    """Add what uses come to. One row alone is added without torch's parallel scatter.

    A token may use an expert twice (DeepSeek-V4's table of experts by token).
    """
    if len(out) == len(ran.rows) == 1:
        out += ran.y
    elif len(ran.rows):
        out.index_add_(0, ran.rows, ran.y)
