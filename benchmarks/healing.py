"""How far end-to-end healing moves coarse experts: one JSON document on stdout.

comoe's rows are of packs made with and without `--heal`, everything else alike: one set of scales for all coarse steps,
none of them for one size. The others' scales (a row's group of weights) are trained by the same code, on the same text,
for as many steps, and only for the size they are shown at. Rows are kept in --rows; packs are taken from, or left in,
--work. Raw results in healing.json.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from comoe.bench.bank import Approximation, Bank
from comoe.bench.ladder import FULL, Contest, step_within
from comoe.bench.losses import loss_columns
from comoe.bench.material import read_material
from comoe.bench.published import METHODS, group_of
from comoe.bench.rows import Job, Row, RowFile, collect
from comoe.device.machine import machine
from comoe.make.heal import BATCH, RATE, Lessons, train
from comoe.make.protocol import Evaluation
from comoe.make.pupil import Grid, PupilLayer
from comoe.make.score import Score
from comoe.make.study import oriented
from comoe.runtime.generate import quiet_transformers
from comoe.runtime.skeleton import load_skeleton
from comoe.store.layout import quantised
from comoe.store.pack import Pack
from comoe.types import Leaf

WINDOWS = 24
STEPS = 100
CASES = (("comoe", 0.16), ("comoe", 0.08), ("gptq", 0.16))


class Given:
    """The `Weights` of a layer: what a method made of its experts, every group of them scaled, and the exact ones."""

    def __init__(self, bank: Bank, at: int, made: Approximation) -> None:
        self._exact, self._leaves = bank.experts[at], bank.checkpoint.sites[at].leaves
        self._made = [
            {leaf.name: _grid(leaf, tensors[leaf.name]) for leaf in self._leaves if quantised(leaf)}
            for tensors in made.weights[at]
        ]
        self._rest = made.weights[at]

    def __call__(self, expert: int, form: str) -> dict[str, Tensor]:
        if form == "exact":
            return self._exact[expert]
        scaled = {leaf.name: self._scaled(leaf, expert) for leaf in self._leaves if quantised(leaf)}
        return {**self._rest[expert], **scaled}

    @property
    def factors(self) -> Iterator[torch.nn.Parameter]:
        return (grid.factor for grids in self._made for grid in grids.values())

    def _scaled(self, leaf: Leaf, expert: int) -> Tensor:
        weight = self._made[expert][leaf.name].weight
        return weight.t() if leaf.transposed else weight


def _grid(leaf: Leaf, tensor: Tensor) -> Grid:
    """A matrix that is there as a product already: its scales are all one."""
    levels = oriented(leaf, tensor).reshape(leaf.rows, -1, group_of(leaf))
    return Grid(levels, torch.ones(levels.shape[:2]))


def published_row(contest: Contest, method: str, share: float) -> Row:
    """What a method makes of a model, before and after its scales were trained."""
    bank = contest.bank
    made = METHODS[method](bank, share)
    assert made is not None and made.kept is None
    given = [Given(bank, at, made) for at in range(len(bank.experts))]
    layers = [PupilLayer(found, len(experts)) for found, experts in zip(given, bank.experts, strict=True)]
    evaluation = Evaluation.for_model(load_skeleton(contest.folder, torch.float32), contest.tokenizer)
    assignment = [[method] * len(experts) for experts in bank.experts]
    divergences: list[float] = []
    lessons = Lessons(STEPS, heed=lambda step, divergence: divergences.append(divergence))
    start_s = perf_counter()
    factors = [factor for found in given for factor in found.factors]
    train(evaluation, layers, [assignment], factors, bank.fitted, lessons)
    seconds = perf_counter() - start_s
    with torch.no_grad():
        weights = [
            [found(at, method) for at in range(layer.num_experts)]
            for found, layer in zip(given, bank.checkpoint.sites, strict=True)
        ]
    healed = Approximation(weights, made.nbytes)
    ends = {"kl_first": sum(divergences[:10]) / 10, "kl_last": sum(divergences[-10:]) / 10}
    return {"seconds": seconds, **ends, **compared(contest, made, healed)}


def our_row(contest: Contest, share: float) -> Row:
    """The same step of two packs, one of them healed."""
    step, plain = taken(contest, 0, share)
    healed_step, healed = taken(contest, STEPS, share)
    assert step["step"] == healed_step["step"]
    return {**healed_step, **compared(contest, plain, healed)}


def taken(contest: Contest, heal: int, share: float) -> tuple[Row, Approximation]:
    """The finest step within `share` of a pack that was healed for so many steps."""
    with closing(Pack(contest.pack(replace(contest.recipe, heal=heal)))) as opened:
        found = step_within(opened, opened.manifest, contest.bank, share)
        assert found is not None
        step, made = found
        return {"step": step.name, "healing_steps": opened.manifest.provenance.healing_steps}, made


def compared(contest: Contest, before: Approximation, after: Approximation) -> Row:
    """Losses against the exact model, and the healed one's against the other."""
    scores: list[Score] = [contest.bank.nats(made, contest.windows) for made in (None, before, after)]
    assert before.nbytes == after.nbytes
    return {
        "bytes": after.nbytes,
        "before": loss_columns(scores[1], scores[0]),
        "after": loss_columns(scores[2], scores[0]),
        "after_over_before": loss_columns(scores[2], scores[1]),
    }


def measure(checkpoints: Sequence[Path], shared: Path, work: Path, rows: Path | None) -> dict[str, Any]:
    material = read_material(shared, None, items=0)
    contests = [Contest(folder, material, replace(FULL, windows=WINDOWS), work) for folder in checkpoints]
    settings = {"windows_per_domain": WINDOWS, "steps": STEPS, "batch": BATCH, "rate": RATE, "texts": material.hash}
    jobs = [
        Job(
            {"model": contest.name, "method": method, "share": share},
            {"model": contest.hash, **settings},
            partial(our_row, contest, share) if method == "comoe" else partial(published_row, contest, method, share),
        )
        for method, share in CASES
        for contest in contests
    ]
    found = collect(jobs, RowFile(rows), lambda step, done: print(f"{done:4.0%} {step}", file=sys.stderr))
    return {"name": "healing", "machine": machine(), "settings": settings, "rows": found}


def main(words: Sequence[str] | None = None) -> None:
    """Read the flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="Models that fit in memory.")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="Folder of texts.")
    parser.add_argument("--work", type=Path, required=True, help="Where packs are made or found.")
    parser.add_argument("--rows", type=Path, help="Finished rows, kept and taken from here.")
    flags = parser.parse_args(words)
    quiet_transformers()
    json.dump(measure(flags.checkpoints, flags.shared, flags.work, flags.rows), sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
