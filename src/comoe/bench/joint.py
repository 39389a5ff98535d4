"""`comoe bench joint`: aggregation and offloading decided together, against the best of each chosen apart.

A way of serving is a rung whose experts are streamed, a policy, reading ahead or not, a floor or none, a routing bias
or none. Each method chooses among some ways on calibration text, and is judged on other text: both on a virtual clock
that was set by measurements. Traces tell what a way takes whose answers do not depend on what is in memory; the others
are really served. The ways that matter most are also timed live.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from comoe.bench.contender import Contender, Scope
from comoe.bench.document import Document, checkpoints, published, settings, workplace
from comoe.bench.joint_figures import (
    AS_FAST,
    EXACT,
    JOINT,
    LIVE,
    LIVE_KIND,
    NO_BIAS,
    RESIDENT_KIND,
    SEPARABLE,
    SEPARABLE_BIAS,
    figures,
    page,
)
from comoe.bench.match import FIXED, Match, Way
from comoe.bench.material import read_material
from comoe.bench.rows import Job, Row, RowFile, collect
from comoe.bench.timed import timed
from comoe.types import Progress

NAME = "joint"
BOUND = 0.005
"""The loss that methods keep within, where they may lose anything."""

FULL = Scope((0.08, 0.12, 0.16, 0.24, 0.4), (1.0, 4.0, 16.0), None, 32, 96, 24, 49152, 6, 32)
QUICK = Scope((0.16,), (1.0,), 2, 24, 24, 4, 5120, 1, 8)

OFFLOADERS = (("lru", "off"), ("lfu", "off"), ("lfu", "auto"))
"""A policy, and whether it reads ahead."""

BEST = OFFLOADERS[1:]
STEPS_TRIED = 4
"""Of the chain within the bound, so many of the smallest."""

LEADING = 2
"""Ways, the fastest without, of which others with a routing bias are tried."""

BIASES = (1.0, 4.0)
"""In logits: a mild one, and one that moves what it may."""

RESIDENT = ("reap", "reap + int4", "hc-smoe")
"""Published methods of pruning and merging: what they leave stays in memory."""

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
        live = [job for of, timing in zip(contenders, timings, strict=True) for job in _live(of, timing, scope, rows)]
        rows += collect(live, file, progress)
        return published(folder, NAME, conditions, {of.name: of.hash for of in contenders}, figures(rows), page)


def _timing(of: Contender, conditions: Document) -> Job:
    return Job({"kind": "device", "model": of.name}, {"model": of.hash, **conditions}, of.timed)


def _cells(of: Contender, timing: Row, scope: Scope, conditions: Document) -> Iterator[Job]:
    depends = {"model": of.hash, "timing": timing, **conditions}
    for share in scope.shares:
        for method in RESIDENT:
            name = {"kind": RESIDENT_KIND, "model": of.name, "share": share, "method": method}
            yield Job(name, depends, partial(resident_row, of, timing, share, method))
        for ratio in scope.ratios:
            name = {"kind": "cell", "model": of.name, "share": share, "ratio": ratio}
            yield Job(name, depends, partial(cell_row, of, timing, share, ratio))


def resident_row(of: Contender, timing: Row, share: float, method: str) -> Row:
    """A published method whose experts all stay in memory in a budget: the same at every rate."""
    found = of.published(method, share)
    return {"fits": False} if found is None else {"fits": True, **found, "ms": resident_ms(of, timing)}


def resident_ms(of: Contender, timing: Row) -> float:
    """Milliseconds of a token where nothing is read, its experts computed as exact ones."""
    uses = of.packed.manifest.experts_per_token * of.depth
    return 1e3 * float(timing["outside_s"] + uses * (timing["use_s"] + timing["compute_s"]["exact"]))


def cell_row(of: Contender, timing: Row, share: float, ratio: float) -> Row:
    """All methods in one budget, where reading an exact expert takes `ratio` times a layer."""
    match = Match(of, timing, int(share * of.packed.manifest.expert_bytes_bf16), ratio, BOUND)
    return {"capacity_bytes": match.capacity, "methods": dict(_methods(of, match))}


def _live(of: Contender, timing: Row, scope: Scope, rows: Sequence[Row]) -> Iterator[Job]:
    """A row of times for every cell of a model: it depends on the ways that the cell's methods chose."""
    for cell in rows:
        if cell["kind"] == "cell" and cell["model"] == of.name:
            name = {"kind": LIVE_KIND, **{key: cell[key] for key in ("model", "share", "ratio")}}
            found = {method: cell["methods"].get(method, {}).get("way") for method in LIVE}
            ways = {method: Way(**way) for method, way in found.items() if way}
            match = Match(of, timing, cell["capacity_bytes"], cell["ratio"], BOUND)
            yield Job(
                name,
                {"timing": timing, "ways": found, "windows": scope.live, "tokens": scope.tokens},
                partial(timed, of, match, ways, scope.live, scope.tokens),
            )


def _methods(of: Contender, match: Match) -> Iterator[tuple[str, Row]]:
    """Every method's best way, judged."""
    exact = [Way("exact", *how) for how in OFFLOADERS]
    yield "exact, lru", match.judged(exact[0])
    yield EXACT, match.judged(best_exact := match.best(exact))
    yield "exact, bias", match.judged(_biased(of, match, [best_exact] if best_exact else []))
    for name, rungs in (("uniform, resident", of.forms), ("chain, resident", of.steps)):
        fitting = [rung for rung in rungs if of.ladder.rung(rung).nbytes <= match.capacity]
        finest = max(fitting, key=lambda rung: of.ladder.rung(rung).nbytes, default=None)
        yield name, match.judged(Way(finest, "lru", "off") if finest else None)
    separable = [Way(form, *how) for form in of.forms for how in OFFLOADERS]
    chosen = match.best(separable)
    yield SEPARABLE, match.judged(chosen)
    yield SEPARABLE_BIAS, match.judged(_biased(of, match, [chosen] if chosen else []))
    fallback = [Way("exact", "lfu", "auto", form) for form in of.forms[:-1] if match.holds(form)]
    yield "exact over a uniform floor", match.judged(match.best(fallback))
    within = [step for step in of.steps if of.told.get(step, 1.0) <= match.bound][:STEPS_TRIED]
    yield "joint static", match.judged(match.best([Way(step, FIXED, "off") for step in within]))
    alone = match.ranked([*separable, *(Way(step, *how) for step in within for how in BEST)])
    yield NO_BIAS, match.judged(alone[0] if alone else None)
    joint = _joint(of, match, alone)
    yield JOINT, match.judged(joint)
    if chosen is not None:
        yield AS_FAST, match.judged(_least_loss(of, match, chosen))
    if within:
        yield "clairvoyant", match.clairvoyant(within[0])


def _joint(of: Contender, match: Match, alone: Sequence[Way]) -> Way | None:
    """The fastest of those that need neither a floor nor a bias, and of some that have one."""
    floors = [step for step in of.steps if of.ladder.rung(step).nbytes <= FLOOR_SHARE * match.capacity]
    floored = [way._replace(floor=floor) for floor in floors[-1:] for way in alone[:1]]
    biased = [way._replace(bias=bias) for way in alone[:LEADING] for bias in _biases(of)]
    return match.best([*alone[:LEADING], *floored, *biased])


def _biased(of: Contender, match: Match, ways: Sequence[Way]) -> Way | None:
    """The fastest of `ways` with a routing bias; None where routers cannot be moved."""
    return match.best([way._replace(bias=bias) for way in ways for bias in _biases(of)])


def _biases(of: Contender) -> tuple[float, ...]:
    return BIASES if of.packed.manifest.routing_price is not None else ()


def _least_loss(of: Contender, match: Match, rival: Way) -> Way | None:
    """Of the chain's steps, the one that loses least and is as fast as `rival` on the choosing trace."""
    limit = match.chosen_ms(rival)
    finer = [step for step in reversed(of.steps) if of.told.get(step, 1.0) <= of.told[rival.rung]]
    ways: Sequence[Way] = [Way(step, *how) for step in finer for how in BEST]
    return next((way for way in ways if (ms := match.chosen_ms(way)) is not None and limit and ms <= limit), rival)
