"""`comoe bench joint`: aggregation and offloading decided together, against the best of each chosen apart.

A way of serving is a rung whose experts are streamed, a policy, reading ahead or not, and a floor or none. Each method
chooses among some ways on a trace of calibration text, and is judged on one of other text: both on a virtual clock that
was set by measurements. Losses are measured where a rung serves alone, and are the ledger's where a floor helps out.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from comoe.bench.contender import Contender, Scope
from comoe.bench.document import Document, checkpoints, published, settings, workplace
from comoe.bench.joint_figures import figures, page
from comoe.bench.match import Match, Way
from comoe.bench.material import read_material
from comoe.bench.rows import Job, Row, RowFile, collect
from comoe.types import Progress

NAME = "joint"
BOUND = 0.005
"""The loss that methods keep within, where they may lose anything."""

FULL = Scope((0.08, 0.12, 0.16, 0.24, 0.4), (1.0, 4.0, 16.0), None, 48, 128, 24, 49152)
QUICK = Scope((0.16,), (1.0,), 2, 24, 24, 4, 5120)

OFFLOADERS = (("lru", "off"), ("lfu", "off"), ("lfu", "auto"))
"""A policy, and whether it reads ahead."""

BEST = OFFLOADERS[1:]
STEPS_TRIED = 4
"""Of the chain within the bound, so many of the smallest."""

FLOOR_SHARE = 0.7
"""Of a budget, what a floor may take."""


def run(models: Path, shared: Path, *, quick: bool, out: Path | None, progress: Progress) -> Document:
    """The benchmark's document, of every model in a folder of `models`; texts come from `shared`.

    In `out`, finished rows are kept and gone on with (joint.rows.jsonl), as are packs; the document is left there as
    JSON and as a page. Raises UsageError.
    """
    scope = QUICK if quick else FULL
    material = read_material(shared, scope.domains, 0)
    with workplace(out) as folder:
        contenders = [Contender(path, material, scope, folder / "work") for path in checkpoints(models)]
        conditions = settings(material, quick=quick, bound=BOUND, judged_tokens_per_domain=scope.judging)
        file = RowFile(folder / f"{NAME}.rows.jsonl")
        timings = collect([_timing(of, conditions) for of in contenders], file, progress)
        jobs = [
            job for of, timing in zip(contenders, timings, strict=True) for job in _cells(of, timing, scope, conditions)
        ]
        rows = [*timings, *collect(jobs, file, progress)]
        return published(folder, NAME, conditions, {of.name: of.hash for of in contenders}, figures(rows), page)


def _timing(of: Contender, conditions: Document) -> Job:
    return Job({"kind": "device", "model": of.name}, {"model": of.hash, **conditions}, of.timed)


def _cells(of: Contender, timing: Row, scope: Scope, conditions: Document) -> Iterator[Job]:
    depends = {"model": of.hash, "timing": timing, **conditions}
    for share in scope.shares:
        for ratio in scope.ratios:
            name = {"kind": "cell", "model": of.name, "share": share, "ratio": ratio}
            yield Job(name, depends, partial(cell_row, of, timing, share, ratio))


def cell_row(of: Contender, timing: Row, share: float, ratio: float) -> Row:
    """All methods in one budget, where reading an exact expert takes `ratio` times a layer."""
    match = Match(of, timing, int(share * of.packed.manifest.expert_bytes_bf16), ratio, BOUND)
    return {"capacity_bytes": match.capacity, "methods": dict(_methods(of, match))}


def _methods(of: Contender, match: Match) -> Iterator[tuple[str, Row]]:
    """Every method's best way, judged."""
    exact = [Way("exact", *how) for how in OFFLOADERS]
    yield "exact, lru", match.judged(exact[0])
    yield "exact, best offloader", match.judged(match.best(exact))
    for name, rungs in (("uniform, resident", of.forms), ("chain, resident", of.steps)):
        fitting = [rung for rung in rungs if of.ladder.rung(rung).nbytes <= match.capacity]
        finest = max(fitting, key=lambda rung: of.ladder.rung(rung).nbytes, default=None)
        yield name, match.judged(Way(finest, "lru", "off") if finest else None)
    separable = [Way(form, *how) for form in of.forms for how in OFFLOADERS]
    chosen = match.best(separable)
    yield "separable", match.judged(chosen)
    floors = [step for step in of.steps if of.ladder.rung(step).nbytes <= FLOOR_SHARE * match.capacity]
    fallback = [Way("exact", "lfu", "auto", form) for form in of.forms[:-1] if match.holds(form)]
    yield "exact over a uniform floor", match.judged(match.best(fallback))
    within = [step for step in of.steps if of.told.get(step, 1.0) <= match.bound][:STEPS_TRIED]
    alone = [Way(step, *how) for step in within for how in BEST]
    floored = [
        Way(rung, "lfu", "auto", floor) for floor in floors[-1:] for rung in dict.fromkeys((*within[:2], "exact"))
    ]
    yield "joint", match.judged(match.best([*separable, *alone, *floored]))
    if chosen is not None:
        yield "joint, as fast", match.judged(_least_loss(of, match, chosen))
    if within:
        yield "clairvoyant", match.clairvoyant(within[0])


def _least_loss(of: Contender, match: Match, rival: Way) -> Way | None:
    """Of the chain's steps, the one that loses least and is as fast as `rival` on the choosing trace."""
    limit = match.chosen_ms(rival)
    finer = [step for step in reversed(of.steps) if of.told.get(step, 1.0) <= of.told[rival.rung]]
    ways: Sequence[Way] = [Way(step, *how) for step in finer for how in BEST]
    return next((way for way in ways if (ms := match.chosen_ms(way)) is not None and limit and ms <= limit), rival)
