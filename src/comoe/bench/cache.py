"""`comoe bench cache`: how near policies of the cache come to the best that anybody could do, on text of real models.

For every model one trace of exact decoding, its domains taking turns, replayed against caches of several sizes.
"""

from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path

from comoe.bench.cache_figures import BELADY, figures, page
from comoe.bench.document import Document, checkpoints, published, settings, workplace
from comoe.bench.material import Material, read_material
from comoe.bench.rows import Job, Row, RowFile, collect
from comoe.bench.subject import Subject
from comoe.make.recipe import Recipe
from comoe.make.trace import CONTEXT, record
from comoe.memory.belady import belady
from comoe.memory.policy import POLICIES
from comoe.memory.replay import Cell, replay
from comoe.runtime.load import Loader, Options
from comoe.store.pack import Pack
from comoe.store.trace import Trace
from comoe.types import BlobId, DoesNotFit, ExpertId, Progress

NAME = "cache"
SHARES = (0.08, 0.16, 0.24, 0.4)
"""Memory, of the experts' bytes."""

FORM = "exact"
FULL_TOKENS, QUICK_TOKENS, QUICK_DOMAINS = 512, 96, 4
"""Tokens decoded of each domain."""


def run(models: Path, shared: Path, *, quick: bool, out: Path | None, progress: Progress) -> Document:
    """The benchmark's document, of every model in a folder of `models`; texts come from `shared`.

    In `out`, finished rows are kept and gone on with (cache.rows.jsonl), as are packs; the document is left there as
    JSON and as a page. Raises UsageError.
    """
    material = read_material(shared, QUICK_DOMAINS if quick else None, 0)
    each = QUICK_TOKENS if quick else FULL_TOKENS
    with workplace(out) as folder:
        subjects = [Traced(path, material, each, folder / "packs") for path in checkpoints(models)]
        conditions = settings(material, quick=quick, decode_tokens_per_domain=each, form=FORM)
        jobs = [job for subject in subjects for job in _jobs(subject, conditions)]
        rows = collect(jobs, RowFile(folder / f"{NAME}.rows.jsonl"), progress)
        hashes = {subject.name: subject.hash for subject in subjects}
        return published(folder, NAME, conditions, hashes, figures(rows), page)


def _jobs(subject: "Traced", conditions: Document) -> Iterator[Job]:
    depends = {"model": subject.hash, **conditions}
    for share in SHARES:
        for policy in (*POLICIES, BELADY):
            name = {"model": subject.name, "share": share, "policy": policy}
            yield Job(name, depends, partial(cell_row, subject, share, policy))


class Traced(Subject):
    """The checkpoint in `folder`, of which `each` tokens of every domain are traced."""

    def __init__(self, folder: Path, material: Material, each: int, packs: Path) -> None:
        super().__init__(folder, packs)
        self._material, self._each = material, each

    @cached_property
    def packed(self) -> Pack:
        return Pack(self.pack(Recipe(forms=())))

    @cached_property
    def trace(self) -> Trace:
        """Of the exact model, with every expert in memory."""
        texts = list(self._material.valid.values())
        model = Loader(Pack(self.packed.folder), Options(context=CONTEXT)).resident(FORM)
        with model.comoe:
            return record(model, self.tokenizer, texts, self._each * len(texts))


def cell_row(subject: Traced, share: float, policy: str) -> Row:
    """A policy in `share` of the experts' bytes; rates of all passes, and of decoding alone."""
    pack, trace = subject.packed, subject.trace
    capacity = int(share * pack.manifest.expert_bytes_bf16)

    def group_of(expert: ExpertId) -> tuple[BlobId, ...]:
        return pack.manifest.blobs(expert, FORM)

    cell = belady(trace, group_of, capacity) if policy == BELADY else Cell(capacity, POLICIES[policy]())
    try:
        found = replay(trace, cell, group_of, pack.nbytes)
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
