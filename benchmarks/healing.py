"""How far end-to-end healing would move coarse experts: one JSON document on stdout.

Every scale (a row's group of 32 weights) of comoe's steps, and of GPTQ's two bits, is trained for the same number of
steps to give the exact model's distribution back (KL divergence) on calibration text alone; no byte is added. All
experts and what autograd keeps are in memory, so this is for models that fit. Rows are kept in --rows; packs are taken
from, or left in, --work. Raw results in healing.json.
"""

import argparse
import copy
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from comoe.bench.bank import Approximation, put
from comoe.bench.ladder import FULL, Contest, step_within
from comoe.bench.losses import loss_columns
from comoe.bench.material import read_material
from comoe.bench.published import METHODS
from comoe.bench.rows import Job, Row, RowFile, collect
from comoe.device.machine import machine
from comoe.make.protocol import Evaluation
from comoe.make.score import Score
from comoe.runtime.generate import quiet_transformers
from comoe.store.families import experts_modules
from comoe.store.pack import Pack

GROUP = 32
WINDOWS = 24
STEPS = 150
BATCH = 8
RATE = 3e-3
CASES = (("comoe", 0.16), ("comoe", 0.08), ("gptq", 0.16))


class Scaled(nn.Module):
    """A weight (..., cols) whose groups are scaled, each by its own factor."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(*shape[:-1], shape[-1] // GROUP))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor.repeat_interleave(GROUP, -1)


@contextmanager
def scaled(model: Any) -> Iterator[list[nn.Parameter]]:
    """The factors of all experts of a model whose experts are stacked tensors; they are gone afterwards."""
    modules = [module for _, module in experts_modules(model)]
    model.requires_grad_(False)
    for module in modules:
        for name in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(module, name, Scaled(getattr(module, name).shape), unsafe=True)
    try:
        yield [parameter for parameter in model.parameters() if parameter.requires_grad]
    finally:
        for module in modules:
            for name in ("gate_up_proj", "down_proj"):
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)


def healed(contest: Contest, made: Approximation) -> Row:
    """The loss of `made` before and after its scales were trained."""
    bank = contest.bank
    exact, before = bank.nats(None, contest.windows), bank.nats(made, contest.windows)
    pupil = bank.model
    teacher = copy.deepcopy(pupil)
    for (_, module), experts in zip(experts_modules(teacher), bank.experts, strict=True):
        put(module, experts)
    start_s = perf_counter()
    with scaled(pupil) as factors:
        divergences = list(train(pupil, teacher, factors, torch.tensor(bank.fitted)))
        seconds = perf_counter() - start_s
        evaluation = Evaluation.for_model(pupil, contest.tokenizer, batch=2 * BATCH)
        with torch.no_grad():
            after = Score({name: evaluation.nats(found) for name, found in contest.windows.items()})
    return {
        "bytes": made.nbytes,
        "seconds": seconds,
        "kl_first": sum(divergences[:10]) / 10,
        "kl_last": sum(divergences[-10:]) / 10,
        "before": loss_columns(before, exact),
        "after": loss_columns(after, exact),
        "after_over_before": loss_columns(after, before),
    }


def train(pupil: Any, teacher: Any, factors: Sequence[nn.Parameter], windows: Tensor) -> Iterator[float]:
    """Adam on random windows, its rate falling to nothing; yields the divergence of every step."""
    optimizer = torch.optim.Adam(factors, lr=RATE)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        ids = windows[torch.randint(len(windows), (BATCH,), generator=generator)]
        with torch.no_grad():
            wanted = teacher(input_ids=ids).logits.log_softmax(-1)
        got = pupil(input_ids=ids).logits.log_softmax(-1)
        divergence = (wanted.exp() * (wanted - got)).sum(-1).mean()
        optimizer.zero_grad()
        divergence.backward()
        optimizer.step()
        yield float(divergence.detach())


def row(contest: Contest, method: str, share: float) -> Row:
    if method != "comoe":
        made = METHODS[method](contest.bank, share)
        assert made is not None
        return healed(contest, made)
    with closing(Pack(contest.pack(contest.recipe))) as opened:
        found = step_within(opened, opened.manifest, contest.bank, share)
    assert found is not None
    step, made = found
    return {"step": step.name, **healed(contest, made)}


def measure(checkpoints: Sequence[Path], shared: Path, work: Path, rows: Path | None) -> dict[str, Any]:
    material = read_material(shared, None, items=0)
    contests = [Contest(folder, material, replace(FULL, windows=WINDOWS), work) for folder in checkpoints]
    settings = {"windows_per_domain": WINDOWS, "steps": STEPS, "batch": BATCH, "rate": RATE, "texts": material.hash}
    jobs = [
        Job({"model": contest.name, "method": method, "share": share}, {"model": contest.hash, **settings},
            partial(row, contest, method, share))
        for contest in contests for method, share in CASES
    ]  # fmt: skip
    found = collect(jobs, RowFile(rows), lambda step, done: print(f"{done:4.0%} {step}", file=sys.stderr))
    return {"name": "healing", "machine": machine(), "settings": settings, "rows": found}


def main(words: Sequence[str] | None = None) -> None:
    """Read the flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="Decoder-only models whose experts are stacked.")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="Folder of texts.")
    parser.add_argument("--work", type=Path, required=True, help="Where packs are made or found.")
    parser.add_argument("--rows", type=Path, help="Finished rows, kept and taken from here.")
    flags = parser.parse_args(words)
    quiet_transformers()
    json.dump(measure(flags.checkpoints, flags.shared, flags.work, flags.rows), sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
