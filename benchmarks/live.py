"""How a running model follows its device and its text: one JSON document on stdout.

Resizes at random moments, another process that takes memory, texts that turn to another domain, losses against their
bounds, and replays of decision logs, on a pack of a trained model with a certificate. Rows are kept in --rows, so that
a killed run goes on. Needs root, for memory cgroups. Raw results lie beside it, in live.json.
"""

import argparse
import json
import random
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import Any

import numpy as np

from comoe.bench.corpus import valid_texts
from comoe.bench.rows import Job, Row, RowFile, collect
from comoe.device.machine import machine
from comoe.make.protocol import Evaluation
from comoe.make.score import DomainScore, Score, compare
from comoe.make.text import windows
from comoe.plan.ladder import Ladder, ladder_of
from comoe.plan.pin import Pin, smallest
from comoe.runtime.generate import quiet_transformers, tokenizer_of
from comoe.runtime.load import Loader, load
from comoe.runtime.options import Options
from comoe.store.decisions import identity, read_decisions, write_decisions
from comoe.store.manifest import read_manifest
from comoe.store.pack import Pack
from comoe.testbed.cgroup import MemoryGroup

SEED, THREADS, CONTEXT = 0, 1, 288
LIMIT = 1 << 30
RESIZES, PAUSE_S, PREFILL_TOKENS, DECODED_TOKENS, LATEST_S = 1000, 0.02, 256, 8, 2.0
SETTLE_S, PATIENCE_S, LOOK_S = 3.0, 60.0, 0.05
SHARE, BEFORE, AFTER, WINDOW = 0.24, 224, 448, 16
PLANS, RUNS_PER_PLAN, WINDOWS, TOKENS, PROMPT = 40, 5, 5, 80, 32
BOUNDS, SHARES, SHARES_BESIDE = (0.005, 0.01, 0.02, 0.03, 0.05), (0.10, 0.40), (0.0, 0.1)
RATES = (5e6, 2e7, 1e8)
ELSEWHERE = "bound elsewhere"
HOG = "import sys, time; held = bytearray(int(sys.argv[1])); print('taken', flush=True); time.sleep(600)"


class Texts:
    """Windows of every domain's validation text, and the evaluation of a model on them."""

    def __init__(self, pack: Path, shared: Path) -> None:
        quiet_transformers()
        self.tokenizer = tokenizer_of(pack)
        self._texts = valid_texts(shared / "data" / "corpus", None)
        self.domains = sorted(self._texts)

    def windows(self, domain: str, number: int) -> list[list[int]]:
        return windows(self.tokenizer, self._texts[domain], 256, number)

    def nats(self, model: Any, domain: str) -> DomainScore:
        """Teacher-forced, token by token; each window is a request."""
        evaluation = Evaluation.for_model(model, self.tokenizer)
        found = []
        for window in self.windows(domain, WINDOWS):
            model.comoe.begin_request()
            target = window[PROMPT : PROMPT + TOKENS]
            found.append(sum(nats for nats, _ in evaluation.forced(window[:PROMPT], target, perf_counter)))
        return DomainScore(np.array(found), np.full(len(found), TOKENS))


def resizes(pack: Path, shared: Path) -> Row:
    """Inside a memory group: how long anonymous memory takes to come under each new budget."""
    import torch

    texts = Texts(pack, shared)
    ids = torch.tensor(texts.windows(texts.domains[0], 1))[:, :PREFILL_TOKENS]
    model = load(pack, memory=LIMIT, context=CONTEXT, threads=THREADS)
    prefilling, done = threading.Event(), threading.Event()
    with model.comoe as handle:
        waits: list[Row] = []
        storm = threading.Thread(target=_storm, args=(handle, prefilling, done, waits))
        storm.start()
        while not done.is_set():
            with torch.inference_mode():
                prefilling.set()
                past = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
                prefilling.clear()
                for _ in range(DECODED_TOKENS):
                    past = model(input_ids=ids[:, :1], past_key_values=past, use_cache=True).past_key_values
        storm.join()
    ms = np.array([wait["ms"] for wait in waits])
    shrinks = np.array([wait["shrinks"] for wait in waits])
    return {
        "resizes": len(ms),
        "shrinks": int(shrinks.sum()),
        "during_prefill": sum(wait["prefill"] for wait in waits),
        "ms_p50": float(np.quantile(ms[shrinks], 0.5)),
        "ms_p99": float(np.quantile(ms[shrinks], 0.99)),
        "ms_max": float(ms.max()),
        "ms_p99_during_prefill": float(np.quantile([w["ms"] for w in waits if w["prefill"] and w["shrinks"]], 0.99)),
        "smallest_budget": min(wait["budget"] for wait in waits),
        "experts_held_at_most": max(wait["held"] for wait in waits),
    }


def _storm(handle: Any, prefilling: threading.Event, done: threading.Event, waits: list[Row]) -> None:
    from comoe.device import process

    rng = random.Random(SEED)
    promise = handle._promise
    smallest = promise.beside + handle.cache.smallest
    largest = promise.beside + handle.pack.manifest.form_bytes("exact")
    before = LIMIT
    for at in range(RESIZES):
        sleep(rng.uniform(0, PAUSE_S))
        if at % 3 == 0:
            prefilling.wait()
        budget, held = rng.randrange(smallest, largest), handle.cache.resident_bytes
        start_s, in_prefill = perf_counter(), prefilling.is_set()
        handle.resize(budget)
        while process.resident().anonymous + promise.unseen > budget and perf_counter() - start_s < LATEST_S:
            sleep(0.0005)
        ms = 1e3 * (perf_counter() - start_s)
        waits.append({"ms": ms, "prefill": in_prefill, "budget": budget, "held": held, "shrinks": budget < before})
        before = budget
    done.set()


def watched(pack: Path, shared: Path) -> None:
    """Inside a memory group: serve without end, and say ever again what the cache may hold and does."""
    texts = Texts(pack, shared)
    model = load(pack, expert_memory="100%", context=CONTEXT, threads=THREADS, live=True)
    threading.Thread(target=_tell, args=(model.comoe,), daemon=True).start()
    while True:
        for domain in texts.domains:
            texts.nats(model, domain)


def _tell(handle: Any) -> None:
    while True:
        print(json.dumps([handle.cache.capacity, handle.cache.resident_bytes]), flush=True)
        sleep(LOOK_S)


def hog(pack: Path, shared: Path) -> Row:
    """A process that takes so much of a group's memory that experts must go, and goes again."""
    experts = read_manifest(pack).form_bytes("exact")
    with MemoryGroup(LIMIT) as group:
        served = group.start(own("watched", pack, shared), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        told = Told(served)
        told.until(lambda capacity, held: capacity >= experts and held >= 0.9 * experts, PATIENCE_S)
        sleep(SETTLE_S)
        before, start_s = told.last, perf_counter()
        free = LIMIT - group.usage + group.stat.get("total_inactive_file", group.stat.get("inactive_file", 0))
        taking = free - round(0.05 * LIMIT) + experts // 2
        taker = group.start([sys.executable, "-S", "-c", HOG, str(taking)], stdout=subprocess.PIPE)
        shrank = told.until(lambda capacity, held: held < before[1] - experts // 4, PATIENCE_S)
        shrink_s = perf_counter() - start_s
        sleep(SETTLE_S)
        during, start_s = told.last, perf_counter()
        kills = group.oom_kills
        taker.kill()
        grew = told.until(lambda capacity, held: capacity >= before[0] and held >= 0.95 * before[1], 2 * PATIENCE_S)
        grow_s = perf_counter() - start_s
        return {
            "taken_bytes": taking,
            "shrank": shrank,
            "grew": grew,
            "shrink_s": shrink_s,
            "grow_s": grow_s,
            "expert_bytes_before": before[1],
            "expert_bytes_during": during[1],
            "expert_bytes_after": told.last[1],
            "capacity_before": before[0],
            "capacity_during": during[0],
            "capacity_after": told.last[0],
            "oom_kills": max(kills, group.oom_kills),
        }


class Told:
    """What a served process said last: its cache's capacity and what it holds."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process, self.last = process, (0, 0)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.last = tuple(json.loads(line))

    def until(self, holds: Any, patience_s: float) -> bool:
        end_s = perf_counter() + patience_s
        while perf_counter() < end_s:
            if self._process.poll() is not None:
                raise SystemExit(f"the served process ended with {self._process.returncode}")
            if holds(*self.last):
                return True
            sleep(LOOK_S / 5)
        return False


def switches(pack: Path, shared: Path, policy: str, live: bool) -> Row:
    """Every domain followed by another: tokens until the hit rate is back."""
    texts = Texts(pack, shared)
    pairs = list(zip(texts.domains, [*texts.domains[5:], *texts.domains[:5]], strict=True))
    tokens, hits, early, noticed = [], [], 0, 0
    for first, second in pairs:
        model = load(
            pack, expert_memory=f"{100 * SHARE:g}%", context=CONTEXT, threads=THREADS, policy=policy, live=live
        )
        with model.comoe as handle:
            _hits(model, texts, first, BEFORE)
            early += handle.live.shifts if live else 0
            after = _hits(model, texts, second, AFTER)
            noticed += handle.live.shifts if live else 0
        steady = float(np.mean(after[AFTER // 2 :]))
        rates = np.convolve(after, np.full(WINDOW, 1 / WINDOW), "valid")
        tokens.append(int(np.argmax(rates >= 0.9 * steady)) + WINDOW if (rates >= 0.9 * steady).any() else AFTER)
        hits.append([float(np.mean(after[:WINDOW])), steady])
    return {
        "pairs": len(pairs),
        "tokens_until_back": tokens,
        "tokens_until_back_median": float(np.median(tokens)),
        "tokens_until_back_max": max(tokens),
        "within_64": float(np.mean(np.array(tokens) <= 64)),
        "hit_rate_first_window": float(np.mean([first for first, _ in hits])),
        "hit_rate_steady": float(np.mean([steady for _, steady in hits])),
        "shifts_noticed_before": early,
        "shifts_noticed_after": noticed - early,
    }


def _hits(model: Any, texts: Texts, domain: str, number: int) -> list[float]:
    """The hit rate of each of so many tokens."""
    evaluation, counts, found = Evaluation.for_model(model, texts.tokenizer), model.comoe._serving, list[float]()
    for window in texts.windows(domain, -(-number // (256 - PROMPT))):
        steps = evaluation.forced(window[:PROMPT], window[PROMPT:], perf_counter)
        before = (counts.counts.uses, counts.counts.hits)
        for at, _ in enumerate(steps):
            now = (counts.counts.uses, counts.counts.hits)
            if at:  # the first step's figures hold the prompt's
                found.append((now[1] - before[1]) / (now[0] - before[0]))
            before = now
    return [*found, *found[-1:] * number][:number]


def exact_nats(pack: Path, shared: Path) -> Row:
    """What the exact model loses in each domain."""
    texts = Texts(pack, shared)
    model = load(pack, expert_memory="100%", context=CONTEXT, threads=THREADS)
    with model.comoe:
        return {"nats": {domain: texts.nats(model, domain).nats.tolist() for domain in texts.domains}}


def bound(pack: Path, shared: Path, number: int, exact: dict[str, list[float]]) -> Row:
    """A random plan within a random bound, on random domains: the planner's, or any pair of a floor and a target."""
    rng = random.Random(SEED + number)
    limit, share, rate = rng.choice(BOUNDS), rng.uniform(*SHARES), rng.choice(RATES)
    texts = Texts(pack, shared)
    loader = slow(pack, limit, rate)
    if number % 2:
        loader.pin = any_pair(rng, loader.ladder, limit)
        least = smallest(loader.ladder, loader.pin) / loader.pack.manifest.expert_bytes_bf16
        share = least + rng.uniform(*SHARES_BESIDE)
    model = loader.within_experts(int(share * loader.pack.manifest.expert_bytes_bf16))
    runs = []
    with model.comoe as handle:
        for domain in rng.sample(texts.domains, RUNS_PER_PLAN):
            score = Score({domain: texts.nats(model, domain)})
            known = Score({domain: DomainScore(np.array(exact[domain]), np.full(WINDOWS, TOKENS))})
            loss = compare(score, known)
            stats = handle.stats()
            runs.append({"domain": domain, "loss": loss.mean, "loss_ci95": list(loss.ci95)})
            runs[-1] |= {"above": loss.ci95[0] > limit, "floor_rate": stats["floor_rate"]}
            runs[-1] |= {"loss_ledger": stats["loss_ledger"]}
        plan = handle.plan
    named = {
        "bound": limit,
        "planned": loader.pin is None,
        "share": share,
        "read_bps": rate,
        "floor": plan.floor,
        "target": plan.target,
    }
    return {**named, "runs": runs}


def any_pair(rng: random.Random, ladder: Ladder, limit: float) -> Pin:
    """A target that keeps the bound and a coarser floor that need not, which any miss may take as far as it lasts."""
    target = rng.choice([at for at, rung in enumerate(ladder.certified) if rung.price <= limit])
    return Pin(ladder.certified[rng.randrange(target)].name, ladder.certified[target].name, float("inf"))


def slow(pack: Path, max_loss: float, read_bps: float, **options: Any) -> Loader:
    """A loader that plans for a disk of such a rate; the rest is measured."""
    loader = Loader(Pack(pack), Options(max_loss, CONTEXT, threads=THREADS, live=True, **options))
    measured = loader.planner()
    loader.planner = lambda: replace(measured, costs=replace(measured.costs, read_bps=read_bps))  # type: ignore[method-assign]
    return loader


def replays(pack: Path, shared: Path) -> Row:
    """A run with a log, and replays of it in other memory: whether all nats are the same to the bit."""
    texts = Texts(pack, shared)
    ladder = ladder_of(read_manifest(pack))
    floor = next(rung for rung in ladder.certified if rung.price < 0.1)
    little, much = (floor.nbytes + int(share * ladder.expert_bytes_bf16) for share in (0.1, 1.0))
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        loader = slow(pack, 0.03, RATES[0], log=True)
        loader.pin = Pin(floor.name, "exact", float("inf"))
        first, rate = _all_nats(loader.within_experts(little), texts, log)
        same, rates = [], []
        for room in (little, little, much):
            loader = slow(pack, 0.03, RATES[0], replay=read_decisions(log))
            again, of = _all_nats(loader.within_experts(room), texts, None)
            same.append(again == first)
            rates.append(of)
        loader = slow(pack, 0.03, RATES[0])
        loader.pin = Pin(floor.name, "exact", float("inf"))
        unlogged, _ = _all_nats(loader.within_experts(little), texts, None)
        tokens = len(texts.domains) * WINDOWS * TOKENS
        return {
            "tokens": tokens,
            "floor_rate": rate,
            "floor_rates_replayed": rates,
            "identical": all(same),
            "identical_without_the_log": unlogged == first,
            "log_bytes_per_token": log.stat().st_size / tokens,
        }


def _all_nats(model: Any, texts: Texts, log: Path | None) -> tuple[list[float], float]:
    with model.comoe as handle:
        nats = [float(nats) for domain in texts.domains for nats in texts.nats(model, domain).nats]
        if log is not None:
            write_decisions(log, handle.choices.decisions())
        return nats, handle.stats()["floor_rate"]


def own(part: str, pack: Path, shared: Path) -> list[str]:
    return [sys.executable, __file__, "--part", part, "--pack", str(pack), "--shared", str(shared)]


def in_group(part: str, pack: Path, shared: Path) -> Row:
    """A part in a memory group of its own."""
    with MemoryGroup(LIMIT) as group:
        done = group.run(own(part, pack, shared), 1800)
        if done.returncode:
            raise SystemExit(f"{part} ended with {done.returncode}, {group.oom_kills} OOM kills: {done.stderr[-2000:]}")
        return {**json.loads(done.stdout), "oom_kills": group.oom_kills}


def measure(pack: Path, shared: Path, rows: Path | None, plans: int, elsewhere: Path | None) -> dict[str, Any]:
    """All rows, and the figures. `elsewhere` is a pack whose calibration had little of these texts' domains."""
    depends = {"pack": identity(read_manifest(pack)), "machine": machine(), "threads": THREADS, "seed": SEED}
    file = RowFile(rows)

    def row(kind: str, call: Any, **named: Any) -> Row:
        job = Job({"kind": kind, **named}, depends, call)
        return collect([job], file, lambda step, done: print(step, file=sys.stderr))[0]

    found = [row("resizes", partial(in_group, "resizes", pack, shared)), row("hog", partial(hog, pack, shared))]
    found += [row("replays", partial(replays, pack, shared))]
    for policy in ("lru", "lfu"):
        for live in (True, False):
            found.append(row("switches", partial(switches, pack, shared, policy, live), policy=policy, live=live))
    exact = row("exact", partial(exact_nats, pack, shared))["nats"]
    found += [row("bound", partial(bound, pack, shared, at, exact), plan=at) for at in range(plans)]
    if elsewhere is not None:
        found += [row(ELSEWHERE, partial(bound, elsewhere, shared, at, exact), plan=at) for at in range(plans)]
    return {
        "name": "live",
        "machine": machine(),
        "settings": settings() | {"plans": plans},
        **figures(found),
        "rows": found,
    }


def settings() -> dict[str, Any]:
    return {
        "limit": LIMIT,
        "threads": THREADS,
        "prefill_tokens": PREFILL_TOKENS,
        "resize_pause_s": PAUSE_S,
        "switch_share": SHARE,
        "bounds": BOUNDS,
        "shares": SHARES,
        "shares_beside_floor": SHARES_BESIDE,
        "read_bps_planned_for": RATES,
        "windows_per_run": WINDOWS,
        "tokens_per_window": TOKENS,
    }


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """What the rows come to; `share_above_bound_elsewhere` is of the other pack, None without one."""
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in {row["kind"] for row in rows}}
    runs = [run for row in of["bound"] for run in row["runs"]]
    others = [run for row in of.get(ELSEWHERE, ()) for run in row["runs"]]
    return {
        "resize_ms_p99": of["resizes"][0]["ms_p99"],
        "oom_kills": of["resizes"][0]["oom_kills"] + of["hog"][0]["oom_kills"],
        "shrank_and_grew": of["hog"][0]["shrank"] and of["hog"][0]["grew"],
        "tokens_until_back_median": {_name(row): row["tokens_until_back_median"] for row in of["switches"]},
        "back_within_64": {_name(row): row["within_64"] for row in of["switches"]},
        "runs": len(runs),
        "runs_with_floor": sum(run["floor_rate"] > 0 for run in runs),
        "share_above_bound": sum(run["above"] for run in runs) / max(len(runs), 1),
        "share_above_bound_elsewhere": sum(run["above"] for run in others) / len(others) if others else None,
        "replays_identical": of["replays"][0]["identical"],
    }


def _name(row: Row) -> str:
    return f"{row['policy']}, {'live' if row['live'] else 'left alone'}"


def main() -> None:
    """Read the flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pack", type=Path, required=True, help="A pack of a trained model, with a certificate.")
    parser.add_argument("--shared", type=Path, required=True, help="The folder of the shared texts.")
    parser.add_argument("--rows", type=Path, help="Finished rows, kept and taken from here.")
    parser.add_argument("--plans", type=int, default=PLANS, help="Plans whose losses are held against their bounds.")
    parser.add_argument("--elsewhere", type=Path, help="A pack that was calibrated on other text: its losses, too.")
    parser.add_argument("--part", choices=("resizes", "watched"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.part == "watched":
        watched(flags.pack, flags.shared)
    elif flags.part == "resizes":
        json.dump(resizes(flags.pack, flags.shared), sys.stdout)
    else:
        found = measure(flags.pack, flags.shared, flags.rows, flags.plans, flags.elsewhere)
        json.dump(found, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
