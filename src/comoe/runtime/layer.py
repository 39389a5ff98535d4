"""One sparse layer while the model runs: choose a form per expert, fetch, compute, add in expert order.

The state of a running model that its layers share is here too. Residency is `memory`'s, the arithmetic
`runtime.experts`'s, prices `plan.ledger`'s.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import sleep
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
from comoe.runtime.edgetier import RemoteTier, Sent, Wanted
from comoe.runtime.experts import KERNEL_TOKENS, SiteMath
from comoe.store.manifest import Manifest
from comoe.types import BlobId, ExpertId, RemoteUnavailable

LOG = logging.getLogger("comoe")

AGAIN_S = 0.25
"""So often bytes are asked for again while there is no link."""

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


Chunk = tuple[Tensor, Sequence[Use], Sequence[Way]]
"""Tokens (N, H), and which experts they use in which way."""


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
        waited_s = 0.0
        while True:
            ways = [one.way for one in chosen]
            try:
                return self._summed(x, uses, ways, weight, ahead)
            except RemoteUnavailable as error:
                chosen = [self._without_link(use, one, decode=decode) for use, one in zip(uses, chosen, strict=True)]
                ways = [one.way for one in chosen]
                waited_s += self._wait_for_link(ways, waited_s, error)

    def _summed(
        self, x: Tensor, uses: Sequence[Use], ways: Sequence[Way], weight: Tensor, ahead: Sequence[Group] = ()
    ) -> Tensor:
        """Every token's experts, weighted and summed in the order of the uses."""
        out = torch.zeros_like(x)
        waiting: dict[int, Tensor] = {}
        added = 0
        for at, y in self._outputs((x, uses, ways), ahead):
            use = uses[at]
            waiting[at] = (y * weight[use.tokens, use.positions, None]).to(out.dtype)
            while added in waiting:
                _add(out, uses[added].tokens, waiting.pop(added))
                added += 1
        return out

    def _outputs(self, chunk: Chunk, ahead: Sequence[Group]) -> Iterator[tuple[int, Tensor]]:
        """(position, outputs (T, H)) of every use, as they are there: what an edge node runs comes last."""
        x, uses, ways = chunk
        sent = self._send(x, uses, ways)
        away = [use.position for use in sent.wanted] if sent is not None else []
        here = [at for at in range(len(uses)) if at not in away]
        yield from self._computed(here, chunk, ahead)
        if sent is None or self.serving.remote is None:
            return
        found = self.serving.remote.outputs(sent, x.dtype)
        if found is not None:
            if not self.serving.laying:
                self.serving.cache.used_elsewhere([ways[at].blobs for at in away])
            yield from zip(away, found, strict=True)
        elif self.serving.laying:
            raise RemoteUnavailable("the edge node does not answer in time.")
        else:
            yield from self._computed(away, chunk, ())

    def _computed(self, positions: Sequence[int], chunk: Chunk, ahead: Sequence[Group]) -> Iterator[tuple[int, Tensor]]:
        """Outputs of those uses of a chunk, computed here."""
        x, uses, ways = chunk
        for found, blobs in self.serving.cache.serve([ways[at].blobs for at in positions], ahead):
            at = positions[found]
            yield at, self._maths.run(ways[at].form, blobs, x[uses[at].tokens])

    def _send(self, x: Tensor, uses: Sequence[Use], ways: Sequence[Way]) -> Sent | None:
        """Let an edge node run what misses, as far as that is sooner done than reading it."""
        serving = self.serving
        if serving.remote is None or self._maths.plain is None or not self._sends:
            return None
        resident = serving.cache.residents([way.blobs for way in ways])
        wanted = [
            Wanted(at, use.expert, way.form, way.blobs, tuple(use.tokens.tolist()))
            for at, (use, way) in enumerate(zip(uses, ways, strict=True))
            if not resident[at]
        ]
        return serving.remote.send(self._index, self._maths.plain, wanted, x) if wanted else None

    def _can_send(self, tokens: int, uses: int) -> bool:
        """Whether an edge node may run experts of such a chunk: with as many tokens as the kernel takes here, whose
        numbers are the same there, and more where a floor that loses more is all that there will be."""
        serving = self.serving
        if serving.remote is None or not serving.remote.ready:
            return False
        return tokens <= KERNEL_TOKENS or (serving.laying and uses <= MAX_USES)

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
            if serving.laying and self._sends and not serving.cache.resident(coarse.blobs):
                floor = None  # a node is sooner
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

    def _wait_for_link(self, ways: Sequence[Way], waited_s: float, error: RemoteUnavailable) -> float:
        """Wait a little if bytes of `ways` are still to come; the seconds. Raises the error after all patience."""
        serving = self.serving
        if all(serving.cache.residents([way.blobs for way in ways])):
            return 0.0
        if waited_s >= serving.patience_s:
            raise error
        if not waited_s:
            LOG.warning(f"waiting for a link: {error}")
        sleep(AGAIN_S)
        serving.counts.link_wait_s += AGAIN_S
        return AGAIN_S

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


def _add(out: Tensor, tokens: Tensor, y: Tensor) -> None:
    """Add `y` (T, H) to the rows `tokens` of `out`. One row alone is added without torch's parallel scatter.

    A token may use an expert twice (DeepSeek-V4's table of experts by token).
    """
    if len(out) == len(y) == 1:
        out += y
    else:
        out.index_add_(0, tokens, y)
