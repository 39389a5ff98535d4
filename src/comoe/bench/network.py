"""`comoe bench network`: what plans that follow a link are worth, on recorded ones, against plans that stay.

For every model and every trace one window, which begins with dense weights alone. All in virtual time: a trace of exact
decoding says what tokens use, certificates and errors of forms what they lose. Links are slowed down so that an expert
takes as long as one of the model that this one stands for.
"""

from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from comoe.bench.document import Document, checkpoints, published, settings, workplace
from comoe.bench.material import Material, read_material
from comoe.bench.network_figures import (
    CLAIRVOYANT,
    FALL,
    FETCH,
    JOINT_STATIC,
    LIVE,
    REMOTE,
    STATIC,
    WINDOW,
    figures,
    page,
)
from comoe.bench.rows import Job, Row, RowFile, collect
from comoe.bench.subject import Subject
from comoe.make.protocol import Evaluation
from comoe.make.recipe import Recipe
from comoe.make.trace import CONTEXT, turns
from comoe.plan.ladder import Ladder, ladder_of
from comoe.plan.stream import MISSES, LinkFollower, LinkPlan, Pace, Reads, Streaming, forms_of
from comoe.runtime.load import Loader
from comoe.runtime.options import Options
from comoe.runtime.recorder import recording
from comoe.sim.network import STEP_S, Air, Controller, Outcome, Session, decoded
from comoe.sim.pilots import FETCH_ON_MISS, REMOTE_ONLY, Knowing, Live, Static, Watched
from comoe.sim.traces import BPS_PER_MBPS, WINDOW_S, LinkRate, read_bench_list, read_link_trace
from comoe.store.pack import Pack
from comoe.store.trace import Trace
from comoe.types import BlobId, Progress

NAME = "network"
MAX_LOSS = 0.05
"""A token that loses more is worth nothing."""

FLOORS_LOSS = 4 * MAX_LOSS
"""Floors may lose so much: not all uses take them."""

SHARE = 0.3
"""Of the experts' bytes, what memory and flash hold."""

READER_S = 0.1
"""A token that a reader takes: ten in a second."""

TOKEN_S = 0.022
"""What Switch-Base-128 takes for one, on two cores with everything in memory."""

RTT_S = 0.027
"""To an edge node, driving: the median of measurements on a network in service (see the shared data)."""

ROW_NBYTES = 8192
"""Of hidden states, both ways, when a layer of the large model runs elsewhere."""

READS: tuple[Reads, ...] = ("all", "missed")
HORIZONS_S = (2.0, 5.0, 10.0, 20.0, WINDOW_S)
FALL_MBPS, FALL_AT_S = (100.0, 5.0), 5.0


class Large(NamedTuple):
    """The model that a small one stands for: bytes of an expert, and sparse layers that a token goes through."""

    name: str
    expert_nbytes: int
    layers: int


LARGE = {
    "qwen3_moe": Large("Qwen3-30B-A3B", 9_437_184, 48),
    "switch_transformers": Large("Switch-Base-128", 9_437_184, 6),
}


class Scope(NamedTuple):
    """How much is measured: domains (None: all), traces (None: all), tokens of a trace, calibration tokens, rungs that
    static plans are made of."""

    domains: int | None
    traces: int | None
    tokens: int
    calibration_tokens: int
    rungs: int


FULL, QUICK = Scope(None, None, 480, 24576, 6), Scope(2, 2, 96, 5120, 3)


def run(models: Path, shared: Path, *, quick: bool, out: Path | None, progress: Progress) -> Document:
    """The benchmark's document, of every model in a folder of `models`; texts and traces come from `shared`.

    In `out`, finished rows are kept and gone on with (network.rows.jsonl), as are packs; the document is left there as
    JSON and as a page. Raises UsageError.
    """
    scope = QUICK if quick else FULL
    material = read_material(shared, scope.domains, 0)
    paths = read_bench_list(shared / "data" / "traces")[: scope.traces]
    with workplace(out) as folder:
        travellers = [Traveller(path, material, scope, folder / "work") for path in checkpoints(models)]
        conditions = settings(
            material, quick=quick, max_loss=MAX_LOSS, share=SHARE, reader_s=READER_S, token_s=TOKEN_S, rtt_s=RTT_S
        )
        jobs = [job for of in travellers for job in _jobs(of, paths, conditions)]
        rows = collect(jobs, RowFile(folder / f"{NAME}.rows.jsonl"), progress)
        hashes = {of.name: of.hash for of in travellers}
        return published(folder, NAME, conditions, hashes, figures(rows), page)


def _jobs(of: "Traveller", paths: list[Path], conditions: Document) -> Iterator[Job]:
    depends = {"model": of.hash, **conditions}
    for path in paths:
        yield Job({"kind": WINDOW, "model": of.name, "trace": path.stem}, depends, partial(window_row, of, path))
    yield Job({"kind": FALL, "model": of.name}, depends, partial(fall_row, of))


class Traveller(Subject):
    """The checkpoint in `folder`, on its way: its pack, what its tokens use, and its plans."""

    def __init__(self, folder: Path, material: Material, scope: Scope, packs: Path) -> None:
        super().__init__(folder, packs)
        self._material, self._scope = material, scope

    @cached_property
    def packed(self) -> Pack:
        texts, tokens = self._material.calibration, self._scope.calibration_tokens
        return Pack(self.pack(Recipe(texts=texts, num_tokens=tokens)))

    @cached_property
    def ladder(self) -> Ladder:
        return ladder_of(self.packed.manifest)

    @cached_property
    def recorded(self) -> tuple[Trace, float]:
        """What exact decoding uses, and its nats per token."""
        texts = list(self._material.valid.values())
        model = Loader(self.packed, Options(context=CONTEXT)).resident("exact")
        with model.comoe:
            evaluation = Evaluation.for_model(model, self.tokenizer)
            with recording(model) as recorder:
                nats = [
                    step[0]
                    for turn in turns(evaluation, texts, self._scope.tokens)
                    for step in evaluation.forced(turn.prompt, turn.target, perf_counter)
                ]
            return recorder.trace(), float(np.mean(nats))

    @cached_property
    def large(self) -> Large:
        return LARGE[self.packed.manifest.model_type]

    @cached_property
    def scale(self) -> float:
        """By which links are slowed down: an expert's bytes over one of the large model's."""
        return self.ladder.exact.group_beside(None) / self.large.expert_nbytes

    @cached_property
    def layers(self) -> list[int]:
        """Those that decoding goes through."""
        return sorted({chunk.layer for chunk in next(decoded(self.recorded[0]))})

    @cached_property
    def streaming(self) -> Streaming:
        """Plans of every certified rung."""
        manifest = self.packed.manifest
        remote_s = RTT_S * self.large.layers / len(self.layers)
        pace = Pace(TOKEN_S, READER_S, remote_s, RTT_S, self.recorded[1], MAX_LOSS)
        capacity = int(SHARE * manifest.expert_bytes_bf16)
        return Streaming(forms_of(manifest, self.ladder), self.ladder.certified, capacity, pace)

    @cached_property
    def blobs(self) -> list[BlobId]:
        """In the order in which the ladder counts them."""
        layers = enumerate(self.packed.manifest.layers)
        return [
            BlobId(at, part, row)
            for at, layer in layers
            for part, entry in layer.parts.items()
            for row in range(entry.rows)
        ]

    @cached_property
    def prior(self) -> Any:
        """Uses (N,) of a token, by calibration, of the layers that decoding goes through."""
        use = np.concatenate(self.ladder.use)
        return np.where(np.isin(self.streaming.forms.layer, self.layers), use, 0.0)

    @cached_property
    def statics(self) -> dict[str, dict[str, LinkPlan]]:
        """Plans that stay, by how they are written.

        `STATIC` are those of a planner that knows no link: all of a floor first, then what is missed, which takes the
        floor or waits. `JOINT_STATIC` are like those that follow the link: reads in the order of worth, or of what was
        missed, and every miss rule.
        """
        names = self._some(MAX_LOSS)
        floors = [name for name in self._some(FLOORS_LOSS) if self.ladder.rung(name).nbytes < self.streaming.capacity]
        alone = [
            LinkPlan(target, miss, floor, "missed")
            for floor in floors
            for target in names
            if self.ladder.rung(target).nbytes >= self.ladder.rung(floor).nbytes
            for miss in ("coarse", "wait")
        ]
        joint = [LinkPlan(name, miss, None, reads) for name in names for miss in MISSES for reads in READS]
        return {STATIC: {written(plan): plan for plan in alone}, JOINT_STATIC: {written(plan): plan for plan in joint}}

    def _some(self, max_loss: float) -> list[str]:
        """Some certified rungs within a loss, spread over all of them."""
        within = [rung.name for rung in self.ladder.certified if (rung.loss or 0.0) <= max_loss]
        some = np.unique(np.linspace(0, len(within) - 1, self._scope.rungs).astype(int))
        return [within[at] for at in some.tolist()]

    def session(self, rate: LinkRate, controller: Controller) -> Outcome:
        """A window of a link, its rate that of the large model's."""
        air = Air(rate.scaled(self.scale), RTT_S, ROW_NBYTES * self.scale)
        return Session(self.streaming, air, controller, self.blobs, self.prior).run(self.recorded[0])

    def live(self) -> Live:
        return Live(LinkFollower(self.streaming))


def written(plan: LinkPlan) -> str:
    """A plan in words."""
    floor = f"floor {plan.floor}, " if plan.floor else ""
    return f"{floor}{plan.target}, {plan.miss}{', what is missed' if plan.reads == 'missed' else ''}"


def window_row(of: Traveller, path: Path) -> Row:
    """One seeded window of a trace, by every method."""
    begin_s, rate = read_link_trace(path).window(0)

    def worth(outcome: Outcome) -> float:
        return outcome.worth(of.streaming)

    live = of.session(rate, of.live())
    static = {
        kind: {name: of.session(rate, Static(plan)) for name, plan in plans.items()}
        for kind, plans in of.statics.items()
    }
    slowed = rate.scaled(of.scale)
    knowing = [of.session(rate, Knowing(of.streaming, slowed, horizon_s)) for horizon_s in HORIZONS_S]
    fetch, remote = (of.session(rate, Static(plan)) for plan in (FETCH_ON_MISS, REMOTE_ONLY))
    best = max((*knowing, live, fetch, remote, *(one for kind in static.values() for one in kind.values())), key=worth)
    return {
        "begin_s": begin_s,
        "mean_mbps": rate.mean(0.0, WINDOW_S) / BPS_PER_MBPS,
        "scale": of.scale,
        "large": of.large.name,
        LIVE: {**columns(of, live), "switches": [[switch.at_s, written(switch.plan)] for switch in live.switches]},
        **{kind: {name: worth(outcome) for name, outcome in found.items()} for kind, found in static.items()},
        CLAIRVOYANT: columns(of, best),
        FETCH: columns(of, fetch),
        REMOTE: columns(of, remote),
    }


def fall_row(of: Traveller) -> Row:
    """A link that falls: after how long the plan is worth 95 % of the best one at the rate that there is, and stays so
    for ten seconds; and what windows at the higher and at the lower rate alone are worth."""
    bps = np.array(FALL_MBPS) * BPS_PER_MBPS
    links = {
        "high": LinkRate.steady(bps[0]),
        "fell": LinkRate.of(np.array([0.0, FALL_AT_S]), bps, WINDOW_S),
        "low": LinkRate.steady(bps[1]),
    }
    watched = {name: Watched(of.live(), rate.scaled(of.scale)) for name, rate in links.items()}
    found = {name: of.session(links[name], watch) for name, watch in watched.items()}
    poor_s = [at_s - FALL_AT_S for at_s in watched["fell"].poor_s if FALL_AT_S <= at_s <= FALL_AT_S + 10.0]
    return {
        "mbps": list(FALL_MBPS),
        "at_s": FALL_AT_S,
        "settles_s": max(poor_s) + STEP_S if poor_s else 0.0,
        "switches": [[switch.at_s, written(switch.plan)] for switch in found["fell"].switches],
        "worth": [outcome.worth(of.streaming) for outcome in found.values()],
    }


def columns(of: Traveller, outcome: Outcome) -> Row:
    """What a window came to."""
    gaps = np.diff(np.append(0.0, outcome.at_s))
    return {
        "worth": outcome.worth(of.streaming),
        "tokens": len(outcome.at_s),
        "loss": outcome.loss(of.streaming),
        "stalled_s": float(np.maximum(gaps - READER_S, 0.0).sum()) if len(gaps) else WINDOW_S,
        "hit_rate": outcome.hits / max(outcome.uses, 1),
        "remote_rate": outcome.remote / max(outcome.uses, 1),
        "bytes": outcome.bytes_read,
    }
