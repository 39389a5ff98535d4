"""From nothing to the first token over a slow link, and how the loss falls as bytes come: one JSON document on stdout.

Self-contained packs of trained models, served by nginx on this machine; a token bucket in the client lets through what
the link carries. First a cold start by `comoe.load(URL)`: bytes and seconds until the floor is there, and until the
first token of a prompt. Then losses with the floor and the first experts, in order of use, there, and nothing else
coming. Rows are kept in --rows. Raw results lie beside it, in cold_start.json.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import Any

import numpy as np

from comoe.bench.corpus import valid_texts
from comoe.bench.losses import RAW, loss_columns, raw, score_of, without_raw
from comoe.bench.rows import Job, Row, RowFile, collect
from comoe.device.machine import machine
from comoe.make.protocol import Evaluation
from comoe.make.score import DomainScore, Score
from comoe.make.text import windows
from comoe.net.address import Access
from comoe.plan.early import early
from comoe.runtime.generate import Sampling, generate, prompt_ids, quiet_transformers, tokenizer_of
from comoe.runtime.load import Loader, load
from comoe.runtime.options import Options
from comoe.store.decisions import identity
from comoe.store.manifest import read_manifest
from comoe.store.pack import Pack
from comoe.types import BlobId

LINK = (20e6 / 8, 0.02)
BOUNDS = (0.02, 0.3)
"""Losses that the first answers may have: a usual one, and one that lets the smallest floor serve."""

FREE = 1e6
CONTEXT, PROMPT, WINDOWS, TOKENS, THREADS = 288, 32, 2, 96, 1
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""Of what the target has beside the floor, what has come."""


@contextmanager
def published(pack: Path) -> Iterator[str]:
    """The URL of a pack, served by nginx."""
    with socket.socket() as probe, TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        user = "user root;" if os.geteuid() == 0 else ""
        (Path(folder) / "conf").write_text(
            f"daemon off; pid {folder}/pid; error_log stderr; {user}\nevents {{}}\n"
            f"http {{ access_log off; server {{ listen 127.0.0.1:{port}; root {pack.parent}; }} }}\n"
        )
        nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
        if nginx is None:
            raise SystemExit("this benchmark needs nginx: install nginx-light.")
        server = subprocess.Popen([nginx, "-c", f"{folder}/conf", "-p", folder])
        try:
            sleep(1.0)
            yield f"http://127.0.0.1:{port}/{pack.name}"
        finally:
            server.terminate()
            server.wait()


def cold(pack: Path, shared: Path, bound: float) -> Row:
    """One start from an empty cache: what came, and when, until the floor was there and until the first token."""
    texts, tokenizer = valid_texts(shared / "data" / "corpus", None), tokenizer_of(pack)
    text = tokenizer.decode(windows(tokenizer, texts["man_en"], PROMPT, 1)[0])
    whole = read_manifest(pack).expert_bytes_bf16
    with published(pack) as url, TemporaryDirectory() as cache:
        start_s = perf_counter()
        access = Access(Path(cache), link=LINK)
        model = load(url, expert_memory=2 * whole, max_loss=bound, context=CONTEXT, threads=THREADS, access=access)
        loaded_s = perf_counter() - start_s
        with model.comoe as handle:
            plan, floor_read = handle.plan, sum(handle.cache.stats.bytes_read.values())
            ids = prompt_ids(tokenizer, model.config, text)
            generate(model, tokenizer, ids, Sampling(1, 0.0, 0, 1.0, 0, (), True), lambda text: None)
            first_s, first_read = perf_counter() - start_s, sum(handle.cache.stats.bytes_read.values())
            return {
                "floor": plan.floor,
                "target": plan.target,
                "loaded_s": loaded_s,
                "first_token_s": first_s,
                "dense_bytes": read_manifest(pack).dense_bytes,
                "expert_bytes_bf16": whole,
                "floor_share": floor_read / whole,
                "first_token_share": first_read / whole,
                "floor_rate": handle.stats()["floor_rate"],
                "loss_ledger": handle.stats()["loss_ledger"],
            }


def curve(pack: Path, shared: Path, bound: float, share: float) -> Row:
    """Nats by domain with the floor and a share of what the target has beside it, the most used experts first."""
    found = _loader(pack)
    pin = early(found.ladder, 2 * found.pack.manifest.expert_bytes_bf16, bound)
    if pin is None:
        return {"plan": None}
    found.pin = pin
    floor, target = found.ladder.rung(str(pin.floor)), found.ladder.rung(pin.target)
    room = target.group_beside(floor)  # all that comes is held: one expert more must fit
    model = found.as_pinned(floor.nbytes + target.beside(floor) + room)
    with model.comoe as handle:
        serving = handle._serving
        serving.early, serving.cache.prefetch = True, lambda groups: None  # nothing else comes
        groups = [serving.way(*expert, pin.target).blobs for expert in found.most_used]
        blobs = dict.fromkeys(blob for group in groups for blob in group)
        floor_blobs = {blob for expert in found.most_used for blob in serving.way(*expert, str(pin.floor)).blobs}
        coming = [blob for blob in blobs if blob not in floor_blobs]
        came = _first(coming, share, handle.pack)
        handle.cache.hold(came)
        nbytes = sum(map(handle.pack.nbytes, [*floor_blobs, *came]))
        score = _score(model, tokenizer_of(pack), shared)
        return {
            "floor": pin.floor,
            "target": pin.target,
            "bytes_share": nbytes / handle.pack.manifest.expert_bytes_bf16,
            RAW: raw(score),
        }


def exact(pack: Path, shared: Path) -> Row:
    """Nats by domain of the exact model."""
    found = _loader(pack)
    model = found.resident("exact")
    with model.comoe:
        score = _score(model, tokenizer_of(pack), shared)
        return {RAW: raw(score)}


def _loader(pack: Path) -> Loader:
    return Loader(Pack(pack), Options(FREE, CONTEXT, "float32", THREADS, prefetch="off"))


def _first(blobs: list[BlobId], share: float, pack: Pack) -> list[BlobId]:
    """The first of `blobs`, up to a share of their bytes."""
    ends = np.cumsum([pack.nbytes(blob) for blob in blobs])
    return blobs[: int(np.searchsorted(ends, share * ends[-1], side="right"))]


def _score(model: Any, tokenizer: Any, shared: Path) -> Score:
    evaluation, texts = Evaluation.for_model(model, tokenizer), valid_texts(shared / "data" / "corpus", None)
    domains = {}
    for name, text in sorted(texts.items()):
        found = []
        for window in windows(tokenizer, text, evaluation.window_length, WINDOWS):
            model.comoe.begin_request()
            prompt, target = evaluation.split(window)
            if not model.config.is_encoder_decoder:
                prompt, target = list(window[:PROMPT]), list(window[PROMPT:])
            found.append(sum(nats for nats, _ in evaluation.forced(prompt, target[:TOKENS], perf_counter)))
        domains[name] = DomainScore(np.array(found), np.full(len(found), len(target[:TOKENS])))
    return Score(domains)


def measure(packs: list[Path], shared: Path, rows: Path | None) -> dict[str, Any]:
    """All rows, with losses against the exact model; whether each curve falls within its intervals."""
    file, found = RowFile(rows), list[Row]()
    for pack in packs:
        measured = collect(list(_jobs(pack, shared)), file, lambda step, done: print(step, file=sys.stderr))
        known = score_of(next(row for row in measured if row["kind"] == "exact"))
        for row in measured:
            lost = loss_columns(score_of(row), known) if row["kind"] == "curve" else {}
            found.append(without_raw(row) | lost)
    cold_rows = [row for row in found if row["kind"] == "cold"]
    curves = [[row for row in found if row["kind"] == "curve" and row["pack"] == pack.name] for pack in packs]
    return {
        "name": "cold_start",
        "machine": machine(),
        "settings": {"link": LINK, "bounds": BOUNDS, "prompt_tokens": PROMPT, "threads": THREADS},
        "first_token_share": {f"{row['pack']}, {row['bound']:.0%}": row["first_token_share"] for row in cold_rows},
        "falls": {row[0]["pack"]: all(_falls(*pair) for pair in pairwise(row)) for row in curves},
        "rows": found,
    }


def _jobs(pack: Path, shared: Path) -> Iterator[Job]:
    depends = {"pack": identity(read_manifest(pack)), "machine": machine(), "windows": WINDOWS, "tokens": TOKENS}
    for bound in BOUNDS:
        name = {"kind": "cold", "pack": pack.name, "bound": bound}
        yield Job(name, depends, partial(cold, pack, shared, bound))
    yield Job({"kind": "exact", "pack": pack.name}, depends, partial(exact, pack, shared))
    for share in SHARES:
        name = {"kind": "curve", "pack": pack.name, "bound": BOUNDS[-1], "share": share}
        yield Job(name, depends, partial(curve, pack, shared, BOUNDS[-1], share))


def _falls(before: Row, after: Row) -> bool:
    """Whether more bytes lose no more, within the intervals."""
    return bool(after["loss_ci95"][0] <= before["loss_ci95"][1])


def main() -> None:
    """Read the flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pack", type=Path, action="append", required=True, help="A self-contained pack; several.")
    parser.add_argument("--shared", type=Path, required=True, help="The folder of the shared texts.")
    parser.add_argument("--rows", type=Path, help="Finished rows, kept and taken from here.")
    flags = parser.parse_args()
    quiet_transformers()
    json.dump(measure([pack.resolve() for pack in flags.pack], flags.shared, flags.rows), sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
