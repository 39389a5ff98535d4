"""What a routing bias gains and loses: one JSON document on stdout.

Exact experts of a pack with a price (qwen3moe-mini's, of its calibration text), LFU, nothing read ahead, in float32.
With every bias the same windows are decoded token by token, told what comes next. Losses are against no bias, paired by
window; `ledger` is what the ledger had each answer lose, on average. Rows are kept in --rows. Raw results in bias.json.
"""

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from comoe.bench.corpus import valid_texts
from comoe.bench.rows import Job, Row, RowFile, collect
from comoe.device.machine import machine
from comoe.make.price import most_used, preferring
from comoe.make.protocol import Evaluation
from comoe.make.score import DomainScore, Score, compare
from comoe.make.text import windows
from comoe.plan.pin import Pin
from comoe.runtime.bias import routers
from comoe.runtime.generate import quiet_transformers, tokenizer_of
from comoe.runtime.load import Loader
from comoe.runtime.options import Options
from comoe.store.decisions import identity
from comoe.store.manifest import read_manifest
from comoe.store.pack import Pack

SHARE, WINDOWS, PROMPT, TOKENS, THREADS = 0.16, 3, 32, 128, 1
FREE = 1.0
"""A bound that no bias reaches."""

WHOLE, SETS, DELTAS = 2, (0.125, 0.25, 0.5, 0.75), (0.5, 1.0, 2.0, 4.0, 8.0)
"""Windows of each domain, the most used experts that stay, and biases, of `prices`."""

CASES = ((0.0, FREE), (0.25, FREE), (0.5, FREE), (1.0, FREE), (2.0, FREE), (4.0, FREE), (4.0, 0.01), (4.0, 0.03))
"""Biases in logits, and bounds."""


def measure(pack: Path, shared: Path, delta: float, bound: float) -> Row:
    """One bias: nats of each domain's windows, and what the handle counted."""
    options = Options(bound, PROMPT + TOKENS, "float32", THREADS, prefetch="off", routing_bias=delta)
    loader = Loader(Pack(pack), options)
    loader.pin = Pin(None, "exact")
    budget = int(SHARE * loader.pack.manifest.expert_bytes_bf16)
    texts, tokenizer = valid_texts(shared / "data" / "corpus", None), tokenizer_of(pack)
    model = loader.within_experts(budget)
    nats: dict[str, list[float]] = {domain: [] for domain in sorted(texts)}
    found: list[dict[str, Any]] = []
    with model.comoe as handle:
        evaluation = Evaluation.for_model(model, tokenizer)
        for domain, done in nats.items():
            for window in windows(tokenizer, texts[domain], PROMPT + TOKENS, WINDOWS):
                handle.begin_request()
                steps = evaluation.forced(window[:PROMPT], window[PROMPT:], perf_counter)
                done.append(sum(each for each, _ in steps))
                found.append(handle.stats())
    uses = np.array([stats["uses"] for stats in found])
    return {
        "nats": nats,
        "hit_rate": float(np.average([stats["hit_rate"] for stats in found], weights=uses)),
        "bytes_read": sum(sum(stats["bytes_read"].values()) for stats in found),
        "moved_share": float(np.mean([stats["moved_share"] for stats in found])),
        "ledger": float(np.mean([stats["loss_ledger"] for stats in found])),
        "ledger_most": max(stats["loss_ledger"] for stats in found),
    }


def prices(pack: Path, shared: Path) -> Row:
    """What moving gates costs with sets of experts that stay, on whole windows: the loss over the share moved."""
    loader = Loader(Pack(pack), Options(dtype="float32", threads=THREADS))
    tokenizer, texts = tokenizer_of(pack), valid_texts(shared / "data" / "corpus", None)
    model = loader.resident("exact")
    with model.comoe:
        evaluation = Evaluation.for_model(model, tokenizer)
        cut = {name: windows(tokenizer, text, evaluation.window_length, WHOLE) for name, text in texts.items()}

        def scored() -> Score:
            return Score({name: evaluation.nats(found) for name, found in cut.items()})

        exact, found = scored(), []
        for share, delta in product(SETS, DELTAS):
            sets = [most_used(layer, share) for layer in loader.pack.manifest.layers]
            with preferring(routers(model), sets, delta) as tally:
                loss = compare(scored(), exact)
            moved = tally.share / tally.tokens
            row = {"resident": share, "delta": delta, "moved_share": moved, "loss": loss.mean, "ci95": loss.ci95}
            found.append({**row, "price": loss.mean / moved})
    return {"sets": found}


def score(row: Row) -> Score:
    """A row's nats as the protocol has them."""
    return Score({name: DomainScore(np.array(nats), np.full(len(nats), TOKENS)) for name, nats in row["nats"].items()})


def say(step: str, done: float) -> None:
    """What is measured now, on stderr."""
    print(step, file=sys.stderr)


def main() -> None:
    """Read the flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pack", type=Path, required=True, help="A pack with a certificate.")
    parser.add_argument("--shared", type=Path, required=True, help="The folder of the shared texts.")
    parser.add_argument("--rows", type=Path, help="Finished rows, kept and taken from here.")
    flags = parser.parse_args()
    quiet_transformers()
    manifest = read_manifest(flags.pack)
    settings = {
        "expert_share": SHARE,
        "windows": WINDOWS,
        "prompt": PROMPT,
        "tokens": TOKENS,
        "threads": THREADS,
        "policy": "lfu",
    }
    depends = {"pack": identity(manifest), "machine": machine(), **settings}
    jobs = [
        Job({"delta": delta, "bound": bound}, depends, partial(measure, flags.pack, flags.shared, delta, bound))
        for delta, bound in CASES
    ]
    file = RowFile(flags.rows)
    rows = collect(jobs, file, say)
    for row in rows:
        loss = asdict(compare(score(row), score(rows[0])))
        row |= {key: loss[key] for key in ("mean", "ci95", "worst_domain", "worst")}
    static = Job({"part": "prices"}, depends, partial(prices, flags.pack, flags.shared))
    (priced,) = collect([static], file, say)
    found = {"name": "bias", "machine": machine(), "routing_price": manifest.routing_price, **settings}
    found |= {"rows": rows, "prices": priced["sets"]}
    json.dump(found, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
