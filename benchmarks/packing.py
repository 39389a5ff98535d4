"""Packing a checkpoint that does not fit, under a hard memory limit: one JSON document on stdout.

A Switch-Base-128 of random weights (15 GB) is packed with --forms q8,q4 in a memory cgroup of 3 GB, page cache
included: once killed (SIGKILL) when a third of it is done and gone on with, once in one go. The full ladder is made of
a model with one of its layers. Compared are the peak, the time with the estimate that was printed first, and the bytes
of both packs. Rows are kept in --rows. Needs root (cgroups, dropped caches) and 50 GB; raw results in packing.json.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from blake3 import blake3

from comoe.bench.rows import Job, Row, RowFile, collect
from comoe.device.machine import machine
from comoe.store.manifest import MANIFEST
from comoe.testbed.cgroup import MemoryGroup, drop_caches
from comoe.testbed.checkpoints import SwitchShape, text, write_checkpoint

SHAPE = SwitchShape(hidden=768, layers=12, experts=128, width=3072, heads=12)
ONE_LAYER = replace(SHAPE, layers=2)
"""An encoder and a decoder of one sparse layer each."""

CALIBRATION_TOKENS = 4096
"""Of random text: it says nothing, but is read, recorded and certified on as any. More takes more passes, no memory."""

LIMIT = 3 << 30
TIMEOUT_S = 3 * 3600
KILLED_AT = 1 / 3
"""Of the layers, how many are done when the first run is killed."""


def packing(checkpoint: Path, target: Path, forms: str | None) -> list[str]:
    texts = str(checkpoint.with_suffix(".txt"))
    words = ["-m", "comoe", "pack", str(checkpoint), "-o", str(target), "--json"]
    words += ["--calib", texts, "--calib-tokens", str(CALIBRATION_TOKENS)]
    return [sys.executable, *words, *(["--forms", forms] if forms else [])]


def whole(checkpoint: Path, target: Path, forms: str | None) -> Row:
    """A pack made in one go."""
    drop_caches()
    start_s = perf_counter()
    with MemoryGroup(LIMIT) as group:
        done = group.run(packing(checkpoint, target, forms), TIMEOUT_S)
        killed = group.oom_kills
    return _row(done.returncode, done.stdout, done.stderr, killed) | {
        "wall_seconds": perf_counter() - start_s,
        "pack_hash": folder_hash(target),
    }


def resumed(checkpoint: Path, target: Path, forms: str | None, num_layers: int) -> Row:
    """A pack whose making was killed when a third of the layers was done."""
    drop_caches()
    with MemoryGroup(LIMIT) as group:
        process = group.start(packing(checkpoint, target, forms), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        work = target.with_name(f"{target.name}.partial") / "work"
        while process.poll() is None and len(list(work.glob("[0-9]*.json"))) < KILLED_AT * num_layers:
            time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = len(list(work.glob("[0-9]*.json")))
    return {"layers_done_when_killed": done, **whole(checkpoint, target, forms)}


def _row(code: int, out: str, err: str, oom_kills: int) -> Row:
    if code:
        raise SystemExit(f"packing ended with {code}: {err}")
    report = json.loads(out)
    over = report["seconds"] / report["estimated_seconds"]
    said = re.findall(r"^Packing .* ((?:takes|goes on).*)$", err, re.MULTILINE)
    del report["pack"]  # a folder of this machine
    return {**report, "oom_kills": oom_kills, "seconds_over_estimate": over, "said_first": said[:1]}


def folder_hash(folder: Path) -> str:
    """BLAKE3 of all files' names and bytes, but for where the manifest says that the checkpoint lies."""
    source = json.loads((folder / MANIFEST).read_bytes())["source"]["folder"]
    found = [(path.name, _file_hash(path, source)) for path in sorted(folder.iterdir())]
    return blake3(repr(found).encode()).hexdigest()


def _file_hash(path: Path, source: str) -> str:
    if path.name == MANIFEST:
        return blake3(path.read_bytes().replace(json.dumps(source).encode(), b"")).hexdigest()
    return blake3(max_threads=2).update_mmap(path).hexdigest()


def measure(folder: Path, rows: Path | None) -> dict[str, Any]:
    """All rows, on checkpoints made in `folder`."""
    large, small = folder / "switch", folder / "layer"
    for path, shape in ((small, ONE_LAYER), (large, SHAPE)):
        write_checkpoint(path, shape)
        path.with_suffix(".txt").write_text(text(2 * CALIBRATION_TOKENS, shape.vocab), "utf-8")
    settings = {"shape": asdict(SHAPE), "limit": LIMIT, "calibration_tokens": CALIBRATION_TOKENS}
    jobs = [
        Job({"pack": "q8,q4"}, settings, partial(whole, large, folder / "whole", "q8,q4")),
        Job({"pack": "q8,q4, killed"}, settings, partial(resumed, large, folder / "killed", "q8,q4", SHAPE.layers)),
        Job({"pack": "one layer, full ladder"}, settings, partial(whole, small, folder / "full", None)),
    ]
    found = collect(jobs, RowFile(rows), lambda step, done: print(f"{done:4.0%} {step}", file=sys.stderr))
    hashes = [row["pack_hash"] for row in found[:2]]
    return {
        "name": "packing",
        "machine": machine(),
        "settings": settings,
        "oom_kills": sum(row["oom_kills"] for row in found),
        "peak_bytes": max(row["peak_bytes"] for row in found),
        "worst_seconds_over_estimate": max(found[at]["seconds_over_estimate"] for at in (0, 2)),
        "resumed_is_the_same": len({*hashes}) == 1,
        "rows": found,
    }


def main(words: Sequence[str] | None = None) -> None:
    """Read the flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scratch", type=Path, help="Where 50 GB may be written for a while.")
    parser.add_argument("--rows", type=Path, help="Finished rows, kept and taken from here.")
    flags = parser.parse_args(words)
    with TemporaryDirectory(prefix="comoe-packing-", dir=flags.scratch) as folder:
        json.dump(measure(Path(folder), flags.rows), sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
