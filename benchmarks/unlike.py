"""What a bound is worth on text unlike the calibration, and whether a run says so: one JSON document on stdout.

`cells`: every pack's steps with all experts resident, by domain: loss, certified price, calibration distance. `runs`:
the random plans of live.py, answer by answer; those with a floor also by a ledger that charges what was certified,
whatever the text is. Rows are kept in --rows, so that a killed run goes on. Raw results lie beside it, in unlike.json.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from live import ELSEWHERE, PROMPT, SEED, THREADS, TOKENS, WINDOWS, Texts, exact_nats
from msgspec.structs import replace

from comoe.bench.rows import Job, Row, RowFile, collect
from comoe.device.machine import machine
from comoe.make.protocol import Evaluation
from comoe.make.score import DomainScore, Score, compare
from comoe.make.text import windows
from comoe.plan.likeness import UNLIKE, Likeness, likeness_of
from comoe.plan.pin import Pin
from comoe.runtime.load import Loader, Options
from comoe.runtime.seen import copied, profile_between
from comoe.store.decisions import identity
from comoe.store.manifest import ChainStep, Manifest, read_manifest
from comoe.store.pack import Pack
from comoe.store.profile import Profile

CONTEXT = 288
CACHE_BYTES = 256 << 20
EVERY = 2
"""Of a chain's steps, one in so many is a cell."""

RARE = 0.25
"""Of an even share of a layer's gates, what an expert has less of in calibration text that is rare there."""

LEAST_RATE = 0.02
"""Of a run's uses, floors that are taken by less do not make its loss: its target does."""

LEAST_PRICE = 0.002
"""Cells whose certified price is less say nothing: their losses are noise."""


def cells(pack: Path, shared: Path) -> Row:
    """Losses and distances of a pack's steps in every domain, all experts resident."""
    loader = Loader(Pack(pack), Options(dtype="float32", threads=THREADS))
    manifest, texts = loader.pack.manifest, Texts(pack, shared)
    steps = [step for step in manifest.chain if step.certificate is not None][::EVERY]
    known, profiles = _scored(loader, texts, "exact")
    found = []
    for step in steps:
        assert step.certificate is not None
        if step.name == "exact":
            continue
        scores, _ = _scored(loader, texts, step.name)
        for domain in texts.domains:
            loss = compare(Score({domain: scores[domain]}), Score({domain: known[domain]}))
            found.append(
                {
                    "step": step.name,
                    "domain": domain,
                    "price": max(0.0, step.certificate.loss_ci95[1]),
                    "loss": loss.mean,
                    "loss_ci95": list(loss.ci95),
                    "measures": measures(manifest, step, profiles[domain]),
                }
            )
    loader.pack.close()
    return {"calibration": manifest.provenance.calibration, "cells": found}


def _scored(loader: Loader, texts: Texts, rung: str) -> tuple[dict[str, DomainScore], dict[str, Profile]]:
    """Every domain's nats, and what its routers chose."""
    model = loader.streamed(rung, CACHE_BYTES)
    evaluation = Evaluation.for_model(model, texts.tokenizer)
    scores, profiles = {}, {}
    with model.comoe.cache:
        for domain in texts.domains:
            before = copied(model.comoe._serving.seen)
            text = windows(texts.tokenizer, texts._texts[domain], evaluation.window_length, WINDOWS)
            scores[domain] = evaluation.nats(text)
            profiles[domain] = profile_between(before, copied(model.comoe._serving.seen))
    return scores, profiles


def measures(manifest: Manifest, step: ChainStep, profile: Profile) -> dict[str, float]:
    """By what text that uses experts as in `profile` may be told from the calibration's."""
    gates = profile.by_layer(np.sum([routed.gates for routed in profile.routed.values()], 0))
    moved, rare = [], []
    for layer, found in zip(manifest.layers, gates, strict=True):
        shares, usual = found / found.sum(), np.array(layer.mass)
        moved.append(0.5 * float(np.abs(shares - usual).sum()))
        rare.append(float(shares[usual < RARE / layer.num_experts].sum()))
    return {
        "distance": distance(manifest, profile),
        "distance by the step alone": distance(replace(manifest, chain=(step,)), profile),
        "gates that moved": float(np.mean(moved)),
        "gates of rare experts": float(np.mean(rare)),
    }


def distance(manifest: Manifest, profile: Profile) -> float:
    """The calibration distance of text that uses experts as in `profile`."""
    likeness = likeness_of(manifest)
    assert likeness is not None
    for routed in profile.routed.values():
        uses, gates = profile.by_layer(routed.uses), profile.by_layer(routed.gates)
        for layer, pairs in enumerate(zip(uses, gates, strict=True)):
            for expert, (tokens, gate) in enumerate(zip(*pairs, strict=True)):
                likeness.add(layer, expert, float(gate), int(tokens), decode=False)
    return likeness.distance


class Uncharged(Likeness):
    """Tells what text is like, and lets it cost what was certified."""

    @property
    def charge(self) -> float:
        return 1.0


def runs(pack: Path, shared: Path, plan: Row, exact: dict[str, list[float]], *, careful: bool) -> Row:
    """A plan of live.json on its domains, each window an answer."""
    texts = Texts(pack, shared)
    options = Options(plan["bound"], CONTEXT, threads=THREADS)
    loader = Loader(Pack(pack), options)
    loader.pin = Pin(plan["floor"], plan["target"], float("inf"))
    found = []
    model = loader.as_pinned(int(plan["share"] * loader.pack.manifest.expert_bytes_bf16))
    with model.comoe as handle:
        if not careful:
            assert handle.ledger.likeness is not None
            handle.ledger.likeness = Uncharged(handle.ledger.likeness.layers)
        for run in plan["runs"]:
            answers = list(_answers(model, texts, run["domain"]))
            nats = DomainScore(np.array([answer["nats"] for answer in answers]), np.full(WINDOWS, TOKENS))
            known = DomainScore(np.array(exact[run["domain"]]), np.full(WINDOWS, TOKENS))
            loss = compare(Score({"": nats}), Score({"": known}))
            above = loss.ci95[0] > plan["bound"]
            found.append(
                {
                    "domain": run["domain"],
                    "loss": loss.mean,
                    "loss_ci95": list(loss.ci95),
                    "above": above,
                    "answers": answers,
                }
            )
    return {key: plan[key] for key in ("bound", "share", "floor", "target")} | {"runs": found}


def _answers(model: Any, texts: Texts, domain: str) -> Iterator[Row]:
    evaluation = Evaluation.for_model(model, texts.tokenizer)
    for window in texts.windows(domain, WINDOWS):
        model.comoe.begin_request()
        nats = [nats for nats, _ in evaluation.forced(window[:PROMPT], window[PROMPT : PROMPT + TOKENS], perf_counter)]
        stats = model.comoe.stats()
        kept = ("loss_ledger", "floor_rate", "calibration_distance", "like_calibration")
        yield {"nats": sum(nats), **{key: stats[key] for key in kept}}


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """What the rows come to, by pack."""
    found: dict[str, Any] = {"cells": {}, "runs": {}}
    for row in rows:
        if row["kind"] == "cells":
            found["cells"][row["pack"]] = _of_cells(row["cells"])
    for name in dict.fromkeys(row["pack"] for row in rows if row["kind"] == "runs"):
        before, after = ([run for row in rows for run in _runs(row, name, careful)] for careful in (False, True))
        told = {"after": _of_runs(after), **_of_ledger(after)}
        found["runs"][name] = told | ({"before": _of_runs(before)} if len(before) == len(after) else {})
    return found


def _runs(row: Row, pack: str, careful: bool) -> list[Row]:
    """A row's runs, if it is of this pack and ledger: one without a floor is of both."""
    of = row["kind"] == "runs" and row["pack"] == pack and (row["careful"] is careful or row["floor"] is None)
    return [{**run, "bound": row["bound"], "floor": row["floor"]} for run in row["runs"]] if of else []


def _of_cells(found: Sequence[Row]) -> Row:
    """How well measures rank what losses are of certified prices, and how often losses exceed what is charged."""
    kept = [cell for cell in found if cell["price"] > LEAST_PRICE]
    losses, prices = (np.array([cell[key] for cell in kept]) for key in ("loss", "price"))
    by = {name: np.array([cell["measures"][name] for cell in kept]) for name in kept[0]["measures"]}
    far = by["distance"]
    return {
        "cells": len(kept),
        "rank_correlation": {name: _rank_correlation(found, losses / prices) for name, found in by.items()},
        "distances": [float(far.min()), float(far.max())],
        "slope": float(np.polyfit(np.log(far), np.log(np.maximum(losses / prices, 0.1)), 1)[0]),
        "unlike": int((far >= UNLIKE).sum()),
        "like_above_price": _share(losses > prices, far < UNLIKE),
        "unlike_above_price": _share(losses > prices, far >= UNLIKE),
        "unlike_above_charge": _share(losses > prices * far**2, far >= UNLIKE),
    }


def _rank_correlation(one: Any, other: Any) -> float:
    ranks = [values.argsort().argsort() for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def _of_runs(found: Sequence[Row]) -> Row:
    """How many runs lost more than their bound, and of how many it was said that their text is unlike."""
    above, exceeds = (np.array([_loses(run, by) for run in found]) for by in ("interval", "mean"))
    warned = np.array([any(answer["like_calibration"] is False for answer in run["answers"]) for run in found])
    floored = np.array([run["floor"] is not None for run in found])
    rates = np.array([np.mean([answer["floor_rate"] for answer in run["answers"]]) for run in found])
    return {
        "runs": len(found),
        "above": int(above.sum()),
        "above_with_floor": int(above[floored].sum()),
        "above_with_floor_hardly_taken": int((above & floored & (rates < LEAST_RATE)).sum()),
        "exceed": int(exceeds.sum()),
        "floor_rate_with_floor": float(rates[floored].mean()),
        "loss_with_floor": float(np.mean([run["loss"] for run in found if run["floor"] is not None])),
        "warned": int(warned.sum()),
        "warned_of_above": _share(warned, above),
        "warned_of_exceeding": _share(warned, exceeds),
        "warned_of_not_above": _share(warned, ~above),
        "warned_of_not_exceeding": _share(warned, ~exceeds),
    }


def _of_ledger(found: Sequence[Row]) -> Row:
    """How often the ledger, which charges for unlike text, has an answer lose more than its bound; the distances."""
    beyond = np.array([any(answer["loss_ledger"] > run["bound"] for answer in run["answers"]) for run in found])
    above, exceeds = (np.array([_loses(run, by) for run in found]) for by in ("interval", "mean"))
    far = [answer["calibration_distance"] for run in found for answer in run["answers"]]
    return {
        "ledger_beyond_of_above": _share(beyond, above),
        "ledger_beyond_of_not_above": _share(beyond, ~above),
        "ledger_beyond_of_not_exceeding": _share(beyond, ~exceeds),
        "most_distant": max(far),
        "distances": {domain: _distance(found, domain) for domain in sorted({run["domain"] for run in found})},
    }


def _distance(found: Sequence[Row], domain: str) -> float:
    mine = [run for run in found if run["domain"] == domain]
    return float(np.mean([answer["calibration_distance"] for run in mine for answer in run["answers"]]))


def _loses(run: Row, by: str) -> bool:
    """Whether a run's loss is above its bound, or its whole interval is."""
    return bool((run["loss_ci95"][0] if by == "interval" else run["loss"]) > run["bound"])


def _share(flags: Any, among: Any) -> float | None:
    return float(flags[among].mean()) if among.any() else None


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """All rows, and the figures."""
    file = RowFile(flags.rows)
    plans = json.loads(flags.live.read_text())["rows"]

    def row(folder: Path, kind: str, call: Any, **named: Any) -> Row:
        depends = {"identity": identity(read_manifest(folder)), "machine": machine(), "threads": THREADS, "seed": SEED}
        job = Job({"kind": kind, **named}, depends, call)
        return collect([job], file, lambda step, done: print(step, file=sys.stderr))[0]

    found = []
    for name, pack in (given.split("=", 1) for given in flags.cells):
        found.append(row(Path(pack), "cells", partial(cells, Path(pack), flags.shared), pack=name))
    for name, kind, pack in (("calibrated elsewhere", ELSEWHERE, flags.elsewhere), ("calibrated", "bound", flags.own)):
        if pack is None:
            continue
        exact = row(pack, "exact", partial(exact_nats, pack, flags.shared), pack=name)["nats"]
        for plan in (plan for plan in plans if plan["kind"] == kind):
            for careful in (True, False) if plan["floor"] is not None and pack == flags.elsewhere else (True,):
                call = partial(runs, pack, flags.shared, plan, exact, careful=careful)
                found.append(row(pack, "runs", call, pack=name, plan=plan["plan"], careful=careful))
    return {"name": "unlike", "machine": machine(), "unlike": UNLIKE, **figures(found), "rows": found}


def main() -> None:
    """Read the flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--elsewhere", type=Path, help="A pack calibrated on the text that comes along.")
    parser.add_argument("--own", type=Path, help="A pack calibrated on text of all domains.")
    parser.add_argument("--cells", nargs="*", default=[], metavar="NAME=PACK", help="Packs whose steps are scored.")
    parser.add_argument("--live", type=Path, default=Path(__file__).with_name("live.json"), help="Plans to run again.")
    parser.add_argument("--shared", type=Path, required=True, help="The folder of the shared texts.")
    parser.add_argument("--rows", type=Path, help="Finished rows, kept and taken from here.")
    json.dump(measure(parser.parse_args()), sys.stdout)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
