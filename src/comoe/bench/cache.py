"""`comoe bench cache`: how near policies of the cache come to the best that anybody could do, on text of real models;
and what reading ahead adds.

For every model one trace of exact decoding, its domains taking turns, replayed against caches of several sizes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from comoe.bench.ahead import Live, live, replayed
from comoe.bench.cache_figures import AHEAD, BELADY, KNOWN, LIVE, POLICY, RECALL, figures, page
from comoe.bench.document import Document, checkpoints, published, settings, workplace
from comoe.bench.material import Material, read_material
from comoe.bench.recall import recalled
from comoe.bench.rows import Job, Row, RowFile, collect
from comoe.bench.subject import Subject
from comoe.make.recipe import Recipe
from comoe.make.text import windows
from comoe.make.trace import CONTEXT, record
from comoe.memory.policy import POLICIES
from comoe.memory.prefetch import PREFETCHES
from comoe.runtime.load import Loader
from comoe.runtime.options import Options
from comoe.sim.belady import belady
from comoe.sim.replay import Cell, reading_ahead, replay
from comoe.store.foresight import Foresight, read_foresight
from comoe.store.pack import Pack
from comoe.store.trace import Trace
from comoe.types import BlobId, DoesNotFit, ExpertId, Progress

NAME = "cache"
SHARES = (0.08, 0.16, 0.24, 0.4)
"""Memory, of the experts' bytes."""

RATIOS = (0.25, 1.0, 4.0)
"""What reading an expert takes, over what a layer takes."""

KNOWN_TOKENS = (1, 2, 4, 8, 16, 32)
"""So many tokens to come are known beforehand, which nobody does: how much foresight a share of the optimum takes."""

FORM = "exact"
PREFETCH_POLICY = "lfu"
LIVE_SHARE = 0.16


@dataclass(frozen=True, slots=True)
class Scope:
    """How much is measured: of so many `domains` (None: all), `tokens` decoded of each for the trace, `live_tokens` of
    each window live. The foresight is fitted to about `calibration_tokens`."""

    domains: int | None
    tokens: int
    live_tokens: int
    calibration_tokens: int


FULL, QUICK = Scope(None, 512, 192, 49152), Scope(4, 96, 24, 5120)


def run(models: Path, shared: Path, *, quick: bool, out: Path | None, progress: Progress) -> Document:
    """The benchmark's document, of every model in a folder of `models`; texts come from `shared`.

    In `out`, finished rows are kept and gone on with (cache.rows.jsonl), as are packs; the document is left there as
    JSON and as a page. Raises UsageError.
    """
    scope = QUICK if quick else FULL
    material = read_material(shared, scope.domains, 0)
    with workplace(out) as folder:
        subjects = [Traced(path, material, scope, folder / "packs") for path in checkpoints(models)]
        conditions = settings(material, quick=quick, decode_tokens_per_domain=scope.tokens, form=FORM)
        jobs = [job for subject in subjects for job in _jobs(subject, conditions)]
        rows = collect(jobs, RowFile(folder / f"{NAME}.rows.jsonl"), progress)
        hashes = {subject.name: subject.hash for subject in subjects}
        return published(folder, NAME, conditions, hashes, figures(rows), page)


def _jobs(subject: "Traced", conditions: Document) -> Iterator[Job]:
    depends = {"model": subject.hash, **conditions}
    named = {"model": subject.name}
    for share in SHARES:
        for policy in (*POLICIES, BELADY):
            cell = {"kind": POLICY, **named, "share": share, "policy": policy}
            yield Job(cell, depends, partial(policy_row, subject, share, policy))
        for tokens in KNOWN_TOKENS:
            cell = {"kind": KNOWN, **named, "share": share, "known_tokens": tokens}
            yield Job(cell, depends, partial(known_row, subject, share, tokens))
    for share in SHARES:
        for ratio in RATIOS:
            for prefetch in PREFETCHES:
                cell = {"kind": AHEAD, **named, "share": share, "ratio": ratio, "prefetch": prefetch}
                yield Job(cell, depends, partial(ahead_row, subject, share, ratio, prefetch))
    yield Job({"kind": RECALL, **named}, depends, partial(recall_row, subject))
    for ratio in RATIOS:
        yield Job({"kind": LIVE, **named, "ratio": ratio}, depends, partial(live_row, subject, ratio))


class Traced(Subject):
    """The checkpoint in `folder`, and a trace of `scope` of it."""

    def __init__(self, folder: Path, material: Material, scope: Scope, packs: Path) -> None:
        super().__init__(folder, packs)
        self.material, self.scope = material, scope

    @cached_property
    def packed(self) -> Pack:
        texts, tokens = self.material.calibration, self.scope.calibration_tokens
        return Pack(self.pack(Recipe(forms=(), texts=texts, num_tokens=tokens, certified=False)))

    def loader(self, prefetch: str) -> Loader:
        """The pack, on its way to being served."""
        return Loader(Pack(self.packed.folder), Options(context=CONTEXT, policy=PREFETCH_POLICY, prefetch=prefetch))

    @cached_property
    def trace(self) -> Trace:
        """Of the exact model, with every expert in memory."""
        texts = list(self.material.valid.values())
        model = self.loader("off").resident(FORM)
        with model.comoe:
            return record(model, self.tokenizer, texts, self.scope.tokens * len(texts))

    @cached_property
    def foresight(self) -> Foresight:
        return read_foresight(self.packed.folder, [layer.num_experts for layer in self.packed.manifest.layers])

    @cached_property
    def windows(self) -> list[list[int]]:
        """One of each domain."""
        return [windows(self.tokenizer, text, self.window_length, 1)[0] for text in self.material.valid.values()]

    def group_of(self, expert: ExpertId) -> tuple[BlobId, ...]:
        return self.packed.manifest.blobs(expert, FORM)

    def capacity(self, share: float) -> int:
        return int(share * self.packed.manifest.expert_bytes_bf16)


def policy_row(subject: Traced, share: float, policy: str) -> Row:
    """A policy in `share` of the experts' bytes; rates of all passes, and of decoding alone."""
    capacity = subject.capacity(share)
    known = policy == BELADY
    cell = belady(subject.trace, subject.group_of, capacity) if known else Cell(capacity, POLICIES[policy]())
    return _hits(subject, cell)


def known_row(subject: Traced, share: float, tokens: int) -> Row:
    """As a policy's: the optimum, as far as the next `tokens` tell it; beyond them LFU's."""
    return _hits(subject, belady(subject.trace, subject.group_of, subject.capacity(share), tokens))


def _hits(subject: Traced, cell: Cell) -> Row:
    pack, trace, capacity = subject.packed, subject.trace, cell.capacity
    try:
        found = replay(trace, cell, subject.group_of, pack.nbytes)
    except DoesNotFit as error:
        return {"fits": False, "capacity_bytes": capacity, "smallest_bytes": error.smallest}
    decode = trace.tokens == 1
    return {
        "fits": True,
        "capacity_bytes": capacity,
        "tokens": int(decode.sum()),
        "hit_rate": found.hit_rate,
        "byte_hit_rate": found.byte_hit_rate,
        "decode_hit_rate": float(found.hits[decode].sum() / found.uses[decode].sum()),
        "decode_bytes_per_token": float(found.bytes_read[decode].mean()),
    }


def ahead_row(subject: Traced, share: float, ratio: float, prefetch: str) -> Row:
    """Reading ahead or not in `share` of the experts' bytes, where a read takes `ratio` times a layer."""
    cell = Cell(subject.capacity(share), POLICIES[PREFETCH_POLICY]())
    if prefetch != "off":
        cell = reading_ahead(cell, subject.trace, subject.foresight, always=prefetch == "on")
    try:
        return {"fits": True, **replayed(subject.trace, cell, ratio, subject.packed, subject.group_of)}
    except DoesNotFit as error:
        return {"fits": False, "smallest_bytes": error.smallest}


def recall_row(subject: Traced) -> Row:
    """What predictors foretell, layer by layer."""
    model = subject.loader("off").resident(FORM)
    with model.comoe:
        return recalled(model, subject.tokenizer, subject.foresight, subject.windows, subject.scope.live_tokens)


def live_row(subject: Traced, ratio: float) -> Row:
    """Decoding for real, with reading ahead and without, in turns."""
    how = Live(subject.windows, subject.scope.live_tokens, LIVE_SHARE, ratio)
    try:
        return {"fits": True, **live(subject.loader, subject.tokenizer, how)}
    except DoesNotFit as error:
        return {"fits": False, "smallest_bytes": error.smallest}
