"""The planner: how long a plan takes, how its cache model foretells replays, how near the optimum plans are.

One JSON document on stdout, raw result in planner.json. Packs are folders that `comoe pack` made of trained models,
traces what `comoe trace` made of the same: `planner.py --pack P... --trace T...`. Times are of one process on a machine
that may have other work, so their medians count.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from comoe.device.machine import machine
from comoe.memory.policy import POLICIES
from comoe.plan.cost import Costs
from comoe.plan.curve import hit_rate
from comoe.plan.ladder import LEAST_SHARE, Array, Band, Ladder, Rung, ladder_of
from comoe.plan.oracle import optimum
from comoe.plan.pinned import Options, options, pinned
from comoe.plan.planner import Planner
from comoe.sim.replay import Cell, replay
from comoe.store.manifest import Manifest, read_manifest
from comoe.store.pack import Pack
from comoe.store.trace import Trace, read_trace
from comoe.types import DoesNotFit

REPEATS = 400
SHARES = (0.08, 0.16, 0.24, 0.4)
COSTS = Costs(2e8, 1e-4, 8e9, Band(2.0, 4.0))
TIME_LIMIT_S = 10.0
WINDOW = 256
"""Tokens that count as one session."""

FORMS = {"q2": ("q2",), "q3": ("q3",), "q4": ("high",), "q8": ("high", "low"), "exact": ("exact",)}
SIZES = {"q2": 1_622_016, "q3": 2_211_840, "high": 2_506_752, "low": 2_359_296, "exact": 9_437_184}
"""Bytes of the blobs of an expert of Switch-Base: two matrices of 768 x 3072."""


def speed(name: str, ladder: Ladder, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    for policy in ("lru", "lfu"):
        planner = Planner(ladder, COSTS, policy)
        tables_ms = 1e3 * _seconds(lambda planner=planner: planner.pairs)  # type: ignore[misc]
        sessions, taken = [], []
        for _ in range(10):
            use = [size.sum() * rng.dirichlet(20 * len(size) * size / size.sum() + 1e-3) for size in ladder.use]
            sessions.append(_seconds(lambda p=planner, u=use: p.using(u).uses))  # type: ignore[misc]
        for _ in range(REPEATS):
            budget, bound = int(ladder.exact.nbytes * rng.uniform(0.1, 0.6)), float(rng.choice([0.0, 0.005, 0.02, 0.1]))
            taken.append(_seconds(lambda b=budget, x=bound, p=planner: p.best(b, x)))  # type: ignore[misc]
        p50, p95 = np.quantile(taken[1:], (0.5, 0.95)) * 1e6
        yield {
            "ladder": name, "policy": policy, "experts": ladder.num_experts, "pairs": len(planner.pairs.floor),
            "best_us_p50": p50, "best_us_p95": p95, "tables_ms": tables_ms,
            "session_ms": float(np.median(sessions)) * 1e3,
        }  # fmt: skip


def large(rng: np.random.Generator, layers: int = 12, experts: int = 128, steps: int = 23) -> Ladder:
    """A ladder as large as that of Switch-Base-128: nested steps of five forms, finer where use is more."""
    number = layers * experts
    use = [rng.dirichlet(np.full(experts, 0.5)) for _ in range(layers)]
    first = dict(zip(SIZES, range(0, number * len(SIZES), number), strict=True))
    sizes = np.array([size for size in SIZES.values() for _ in range(number)] + [0])
    rank = np.argsort(np.argsort(np.concatenate(use))) / number
    rungs = []
    for step in range(steps + 1):
        level = np.clip(np.floor(5 * (step / steps) ** 0.5 + rank - 0.999), 0, 4).astype(int)
        level = np.full(number, 4) if step == steps else level
        needs = np.full((number, 2), -1)
        for at, form in enumerate(level):
            for place, part in enumerate(list(FORMS.values())[form]):
                needs[at, place] = first[part] + at
        loss = 0.4 * (1 - step / steps) ** 3
        band = Band(0.9 * loss, 1.1 * loss)
        rungs.append(Rung(f"{step}", tuple(FORMS), level, needs, sizes, np.concatenate(use), loss, band, ()))
    layered = tuple(use)
    return Ladder(tuple(rungs), layered, layered, layered, tuple(np.linspace(0, 1, 11).tolist()), 0)


def decoded(trace: Trace, window: int | None = None) -> list[Array]:
    """Uses (N,) of every expert by single tokens: of all, or of every `window` calls of the model."""
    offsets = np.concatenate([[0], np.cumsum(trace.experts)])
    expert = offsets[np.repeat(trace.layers, np.diff(trace.uses))] + trace.expert
    chunk = np.repeat(np.arange(len(trace.tokens)), np.diff(trace.chunks))
    in_pass = np.repeat(chunk, np.diff(trace.uses))
    single = trace.tokens[in_pass] == 1
    of = in_pass // window if window else np.zeros_like(in_pass)
    return [
        np.bincount(expert[single & (of == at)], minlength=offsets[-1]).astype(np.float64) for at in range(of[-1] + 1)
    ]


def cache(pack: Pack, trace: Trace, name: str) -> Iterator[dict[str, Any]]:
    """Hits that Che's and the ranking model foretell from a trace's own uses, and those of a replay, in decoding.

    Of all of the trace's uses, and as the mean over windows of it, each by its own: text keeps to few experts for long.
    """
    manifest, whole = pack.manifest, decoded(trace)
    sessions = [use for use in decoded(trace, WINDOW) if use.sum()]
    for share in SHARES:
        capacity = int(share * manifest.expert_bytes_bf16)
        held = share * int(trace.experts.sum())
        for policy in ("lru", "lfu"):
            cell = Cell(capacity, POLICIES[policy]())
            try:
                found = replay(trace, cell, lambda expert: manifest.blobs(expert, "exact"), pack.nbytes)
            except DoesNotFit:
                continue
            decode = trace.tokens == 1
            replayed = float(found.hits[decode].sum() / found.uses[decode].sum())
            yield {
                "model": name, "share": share, "policy": policy, "replayed": replayed,
                "predicted": hit_rate(whole[0], held, policy),
                "predicted_by_session": float(np.mean([hit_rate(use, held, policy) for use in sessions])),
            }  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A ladder whose losses add up over experts: `forms` and what each expert adds in them, and the chain's steps."""

    name: str
    ladder: Ladder
    forms: tuple[tuple[Rung, Array], ...]
    shared: bool
    share: float = 1.0
    """Of the pack's experts: bounds are so much smaller."""


def base_of(name: str, manifest: Manifest, per_error: float | None = None) -> Base:
    """A pack's: local errors times what a unit of them cost where steps were certified, else `per_error`."""
    ladder = ladder_of(manifest)
    names = [*(form for form in manifest.forms if form != "exact"), "exact"]
    errors = {
        form: np.concatenate([np.array(layer.errors.get(form, [0.0] * layer.num_experts)) for layer in manifest.layers])
        for form in names
    }
    index = {form: at for at, form in enumerate(manifest.forms)}
    rungs = {form: _uniform(manifest, ladder, form) for form in names}
    table = np.zeros((len(manifest.forms), ladder.num_experts))
    for form in names:
        table[index[form]] = errors[form]
    certified = [rung for rung in ladder.certified if rung.price > 0]
    ratio = [rung.price / table[rung.form, np.arange(ladder.num_experts)].sum() for rung in certified]
    scale = float(np.median(ratio)) if ratio else per_error or 1.0
    steps = []
    for rung in (*(ladder.rung(step.name) for step in manifest.chain if step.name != "exact"), ladder.exact):
        loss = scale * float(table[rung.form, np.arange(ladder.num_experts)].sum())
        steps.append(replace(rung, loss=loss, loss_ci95=Band(loss, loss)))
    forms = tuple((rungs[form], scale * errors[form]) for form in names)
    shared = any((np.bincount(rung.needs[rung.needs >= 0]) > 1).any() for rung, _ in forms)
    return Base(name, replace(ladder, rungs=tuple(steps)), forms, shared)


def _uniform(manifest: Manifest, ladder: Ladder, form: str) -> Rung:
    return ladder.exact if form == "exact" else ladder.rung(form)


def part_of(base: Base, experts: Array) -> Base:
    """The base with only some experts: small, so that what is shared or does not divide weighs more."""

    def cut(rung: Rung) -> Rung:
        return replace(rung, form=rung.form[experts], needs=rung.needs[experts], use=rung.use[experts])

    (use, certified) = ((np.concatenate(found)[experts],) for found in (base.ladder.use, base.ladder.calibrated))
    rungs = tuple(cut(rung) for rung in base.ladder.rungs)
    ladder = replace(base.ladder, rungs=rungs, use=use, calibrated=certified, mass=use)
    forms = tuple((cut(rung), loss[experts]) for rung, loss in base.forms)
    share = len(experts) / base.ladder.num_experts
    return Base(f"{base.name}, {len(experts)} experts", ladder, forms, base.shared, share)


def for_session(base: Base, use: list[Array]) -> Base:
    """The base for a session that uses experts as in `use`: what an expert adds to the loss goes with its uses."""
    certified = np.concatenate(base.ladder.calibrated)
    ratio = np.concatenate(use) / np.maximum(certified, LEAST_SHARE * certified.sum() / base.ladder.num_experts)
    forms = tuple((rung, loss * ratio) for rung, loss in base.forms)
    table = {rung.forms[rung.form[0]]: loss for rung, loss in forms}
    steps = []
    for rung in base.ladder.using(use).rungs:
        loss = float(sum(table[rung.forms[form]][at] for at, form in enumerate(rung.form)))
        steps.append(replace(rung, loss=loss, loss_ci95=Band(loss, loss)))
    ladder = replace(base.ladder, rungs=tuple(steps), use=tuple(use), calibrated=tuple(use), mass=tuple(use))
    return replace(base, ladder=ladder, forms=forms)


def instance(base: Base, seed: int) -> dict[str, Any] | None:
    """One seeded problem: gaps of the pinned plan and of the chain's, over HiGHS's."""
    rng = np.random.default_rng(seed)
    costs = replace(
        COSTS,
        framework_ms=Band(0.0, 0.0),
        read_bps=10 ** rng.uniform(7, 9.3),
        read_latency_s=10 ** rng.uniform(-4.5, -3),
    )
    use = [layer.sum() * rng.dirichlet(len(layer) * 5 * layer / layer.sum() + 1e-2) for layer in base.ladder.use]
    budget, bound = rng.uniform(0.05, 0.6) * base.ladder.exact.nbytes, base.share * 10 ** rng.uniform(-3, -1)
    base = for_session(base, use)
    ways = options(base.forms, np.concatenate(use), costs)
    start_s = perf_counter()
    found = pinned(ways, budget, bound)
    took_s = perf_counter() - start_s
    best = optimum(ways, budget, bound, TIME_LIMIT_S)
    if found is None or best is None:
        return {"base": base.name, "seed": seed, "planned": found is not None, "solved": best is not None}
    ms, nbytes, loss = ways.total(found)
    assert nbytes <= budget and loss <= bound * (1 + 1e-9)
    chain = chain_ms(base, use, costs, int(budget), bound)
    return {
        "base": base.name, "shared": base.shared, "seed": seed, "planned": True, "solved": True,
        "pinned_ms": ms, "oracle_ms": best.ms, "oracle_bound_ms": best.bound, "chain_ms": chain,
        "seconds": took_s, "budget": budget, "bound": bound, "read_bps": costs.read_bps,
    }  # fmt: skip


def chain_ms(base: Base, use: list[Array], costs: Costs, budget: int, bound: float) -> float | None:
    """What the planner's fastest pair could do at best with pinned experts: each is the floor, or the target in
    memory, or the target read at every use. None where no pair fits."""
    planner = Planner(base.ladder, costs, "lfu")
    pairs = planner.pairs
    fitting = planner.candidates(pairs.allowed(bound), budget, bound)
    if not len(fitting.pair):
        return None
    at = fitting.pair[fitting.ms.argmin()]
    target, floor = pairs.rungs[pairs.target[at]], pairs.rungs[pairs.floor[at]] if pairs.floor[at] >= 0 else None
    each, table = np.concatenate(use), {rung.forms[rung.form[0]]: loss for rung, loss in base.forms}
    columns = []
    for rung, kept in ((target, True), (target, False), (floor, True)):
        if rung is None:
            continue
        names = [rung.forms[at] for at in rung.form]
        loss = np.array([table[form][at] for at, form in enumerate(names)])
        whole, beside = rung.groups_beside(None), rung.groups_beside(floor)
        beside *= rung.beside(floor) / max(beside.sum(), 1)
        missing = np.zeros(len(each)) if kept else beside
        per = np.array([costs.expert_ms(1.0, form) for form in names])
        ms = each * (per * whole + costs.read_ms(1, 0) * missing + costs.read_ms(0, 1) * (missing > 0))
        columns.append((ms, beside if kept else 0 * beside, loss))
    cost, nbytes, losses = (np.stack(column, axis=1) for column in zip(*columns, strict=True))
    none = np.full(cost.shape, -1)
    ways = Options(cost, nbytes, losses, none, np.zeros(len(each), np.int64), np.zeros((0, 1)))
    found = pinned(ways, budget - (floor.nbytes if floor else 0), bound * (1 + 1e-9))
    return None if found is None else ways.total(found)[0]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    solved = [row for row in rows if row["solved"] and row["planned"]]
    found: dict[str, Any] = {"instances": len(rows), "solved": len(solved)}
    found["unplanned"] = sum(row["solved"] and not row["planned"] for row in rows)
    for kind in (False, True):
        of = [row for row in solved if row["shared"] is kind]
        if not of:
            continue
        name = "shared" if kind else "unshared"
        found[name] = {"instances": len(of), "pinned": _gaps(of, "pinned_ms"), "chain": _gaps(of, "chain_ms")}
    found["pinned_ms_p50"], found["pinned_ms_p95"] = np.quantile([1e3 * row["seconds"] for row in solved], (0.5, 0.95))
    return found


def _gaps(rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    gaps = [
        row[key] / row["oracle_bound_ms"] - 1 for row in rows if row[key] is not None and row["oracle_bound_ms"] > 0
    ]
    p50, p95, worst = np.quantile(gaps, (0.5, 0.95, 1.0))
    within = {f"within_{share:.0%}": float(np.mean(np.array(gaps) <= share)) for share in (0.01, 0.05)}
    return {"plans": len(gaps), "gap_p50": p50, "gap_p95": p95, "gap_worst": worst, **within}


def bases(packs: list[tuple[str, Pack]], rng: np.random.Generator) -> list[Base]:
    found = [base_of(name, pack.manifest) for name, pack in packs]
    small = [part_of(base, np.sort(rng.choice(base.ladder.num_experts, 24, replace=False))) for base in found]
    return [*found, *small]


def _seconds(call: Callable[[], object]) -> float:
    start_s = perf_counter()
    call()
    return perf_counter() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pack", nargs="+", type=Path, default=[], help="certified packs, with and without sharing")
    parser.add_argument("--name", nargs="+", default=[], help="what they are called")
    parser.add_argument("--trace", nargs="*", type=Path, default=[], help="a trace of each, in the same order")
    parser.add_argument("--instances", type=int, default=200)
    asked = parser.parse_args()
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # HiGHS writes there
    rng = np.random.default_rng(0)
    packs = [(name, Pack(path)) for name, path in zip(asked.name, asked.pack, strict=True)]
    ladders = [(name, ladder_of(read_manifest(pack.folder))) for name, pack in packs]
    fast = [
        row
        for name, ladder in [*ladders, ("Switch-Base-128, synthetic", large(rng))]
        for row in speed(name, ladder, rng)
    ]
    hits = [
        row
        for (name, pack), path in zip(packs, asked.trace, strict=False)
        for row in cache(pack, read_trace(path), name)
    ]
    sources = bases(packs, rng)
    rows = []
    for seed in range(asked.instances):
        row = instance(sources[seed % len(sources)], seed)
        rows.append(row)
        print(seed, row, file=sys.stderr, flush=True)
    document = {"machine": machine(), "speed": fast, "hit_rates": hits, "oracle": summary(rows), "rows": rows}
    print(json.dumps(document, indent=1, default=float), file=stdout)


if __name__ == "__main__":
    main()
