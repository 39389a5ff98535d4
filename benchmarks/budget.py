"""The budget promise under a hard memory limit, from barely fits to all resident: one JSON document on stdout.

A checkpoint of 2 GB of random weights is made, packed and run in a memory cgroup whose limit is the budget; beside it
a control that runs the same model without its experts. Rows are kept in --rows, so that a killed run goes on. Needs
root: cgroups, dropped caches and read_ahead_kb, which is put back. Raw results lie beside it, in budget.json.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from blake3 import blake3

from comoe.bench.rows import Job, Row, RowFile, collect
from comoe.device.machine import machine
from comoe.store.manifest import read_manifest
from comoe.testbed.cgroup import MemoryGroup, drop_caches
from comoe.testbed.checkpoints import QwenShape, text, write_checkpoint
from comoe.testbed.libraries import own_copy

SHAPE = QwenShape(hidden=1024, layers=10, experts=64, active=4, width=512, heads=16, kv_heads=4)
PROMPT_TOKENS, NEW_TOKENS, SETTLED_TOKENS = 512, 256, 32
READ_AHEAD_KB = 128
SHARES = (0.25, 0.5, 0.75)
TIMEOUT_S = 900
PACKAGES = ("torch", "numpy", "tokenizers", "safetensors")
"""Whose libraries a group pays for, though others have them mapped."""
AMPLE = 8 << 30


@dataclass(frozen=True)
class Bench:
    """What all rows share: a pack, a prompt, and an environment in which a group pays for its libraries."""

    pack: Path
    prompt: Path
    environment: dict[str, str]

    def command(self, memory: int) -> list[str]:
        words = ["-m", "comoe", "run", str(self.pack), "--prompt-file", str(self.prompt), "--memory", str(memory)]
        return [sys.executable, *words, "-n", str(NEW_TOKENS), "--ignore-eos", "--threads", "1"]

    def control(self, memory: int) -> list[str]:
        return [sys.executable, __file__, "--control", str(self.pack), str(self.prompt), str(memory)]

    def smallest(self) -> int:
        """The smallest budget, from the refusal of a smaller one."""
        with MemoryGroup(AMPLE) as group:
            refused = group.run([*self.command(1 << 20), "--json"], TIMEOUT_S, env=self.environment)
        found = re.search(r"at least --memory (\d+) ", refused.stderr)
        if refused.returncode != 3 or found is None:
            raise SystemExit(f"expected a refusal, got {refused.returncode}: {refused.stderr}")
        return int(found.group(1))

    def row(self, memory: int) -> Row:
        """Three runs in `memory` bytes: one whose tokens are watched, one that reports, and the control."""
        watched, reported = self._watched(self.command(memory)), self._reported(memory)
        control = self._watched(self.control(memory))
        document = reported["document"]
        return {
            "exit_codes": [run["exit_code"] for run in (watched, reported, control)],
            "oom_kills": watched["oom_kills"] + reported["oom_kills"],
            "refaults_per_token": watched["refaults_per_token"],
            "refaults_per_token_control": control["refaults_per_token"],
            "ms_per_token": watched["ms_per_token"],
            "ms_per_token_control": control["ms_per_token"],
            **{key: document[key] for key in ("hit_rate", "peak_bytes", "beside_experts_bytes", "yielded_bytes")},
            "expert_memory_bytes": document["expert_memory_bytes"],
            "bytes_read": document["bytes_read"],
            "prefill_ms": document["prefill_ms"],
            "file_pages_paid_by_others": watched["file_pages_paid_by_others"],
            "text_hash": document["text_hash"],
            "watched_text_is_the_same": watched["text_hash"] == document["text_hash"],
        }

    def _watched(self, command: Sequence[str]) -> Row:
        """A run whose text is read as it comes; what happens once SETTLED_TOKENS are out counts."""
        drop_caches()
        with MemoryGroup(memory_of(command)) as group:
            pipe = subprocess.PIPE
            process = group.start(command, env=self.environment, stdout=pipe, stderr=subprocess.DEVNULL)
            assert process.stdout is not None
            shown, marks = "", []
            while len(shown) < NEW_TOKENS and (character := process.stdout.read(1)):
                shown += character
                if len(shown) in (SETTLED_TOKENS, NEW_TOKENS):
                    marks.append((perf_counter(), group.refaults))
            shared = file_bytes(process.pid) - group.stat.get("mapped_file", group.stat.get("file_mapped", 0))
            process.communicate(timeout=TIMEOUT_S)
            tokens = NEW_TOKENS - SETTLED_TOKENS
            (start_s, before), (end_s, after) = marks if len(marks) == 2 else [(0.0, 0)] * 2
            return {
                "exit_code": process.returncode,
                "oom_kills": group.oom_kills,
                "refaults_per_token": (after - before) / tokens,
                "ms_per_token": 1e3 * (end_s - start_s) / tokens,
                "file_pages_paid_by_others": max(shared, 0),
                "text_hash": digest(shown),
            }

    def _reported(self, memory: int) -> Row:
        drop_caches()
        with MemoryGroup(memory) as group:
            done = group.run([*self.command(memory), "--json"], TIMEOUT_S, env=self.environment)
            if done.returncode:
                raise SystemExit(f"a run in {memory} bytes ended with {done.returncode}: {done.stderr}")
            document = json.loads(done.stdout)
            document["text_hash"] = digest(document["text"])
            return {"exit_code": done.returncode, "oom_kills": group.oom_kills, "document": document}


def memory_of(command: Sequence[str]) -> int:
    """The budget that a command was given, which its group gets as its limit."""
    return int(command[command.index("--memory") + 1] if "--memory" in command else command[-1])


def digest(text_: str) -> str:
    return blake3(text_.encode()).hexdigest()[:16]


def file_bytes(pid: int) -> int:
    """Pages of files that the process has in memory; 0 where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return 0
    found = re.search(r"RssFile:\s+(\d+)", status)
    return int(found.group(1)) * 1024 if found else 0


def run_control(pack: Path, prompt: Path, memory: int) -> None:
    """What `comoe run` does, with experts that add nothing and are never read: the dense part alone."""
    import torch

    from comoe.runtime.budget import WarmLayer
    from comoe.runtime.generate import Sampling, generate, prompt_ids, tokenizer_of
    from comoe.runtime.hook import attach
    from comoe.runtime.load import load

    tokenizer = tokenizer_of(pack)
    ids = tokenizer(prompt.read_text()).input_ids
    torch.set_num_threads(1)
    model = load(pack, memory, context=len(ids) + NEW_TOKENS + 1)
    attach(model, [WarmLayer(None, ()) for _ in read_manifest(pack).layers])
    with model.comoe:
        given = prompt_ids(tokenizer, model.config, prompt.read_text())
        sampling = Sampling(NEW_TOKENS, ignore_eos=True)
        generate(model, tokenizer, given, sampling, lambda piece: print(piece, end="", flush=True))


@contextmanager
def read_ahead(folder: Path, kilobytes: int) -> Iterator[int]:
    """Linux's default read-ahead on the disk of `folder`; yields what it was, and puts it back."""
    device = folder.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    file = next(path for at in (block, block.parent) if (path := at / "queue/read_ahead_kb").exists())
    before = file.read_text()
    file.write_text(str(kilobytes))
    try:
        yield int(before)
    finally:
        file.write_text(before)


def prepare(folder: Path) -> Bench:
    """Make the checkpoint, its pack, the prompt, and libraries of one's own."""
    write_checkpoint(folder / "checkpoint", SHAPE)
    pack = [sys.executable, "-m", "comoe", "pack", str(folder / "checkpoint"), "-o", str(folder / "pack")]
    subprocess.run([*pack, "--calibrate", "none", "--forms", ""], check=True, stdout=subprocess.DEVNULL)
    (folder / "prompt").write_text(text(PROMPT_TOKENS, SHAPE.vocab))
    single = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return Bench(folder / "pack", folder / "prompt", own_copy(PACKAGES, folder / "site") | single)


def budgets(smallest: int, experts: int) -> dict[str, int]:
    """Budgets by name, in whole pages; shares are of the experts' bytes beside the smallest budget."""
    named = {"barely fits": smallest, "barely fits + 5 %": int(1.05 * smallest)}
    named |= {f"{share:.0%} of experts": smallest + int(share * experts) for share in SHARES}
    named["all resident"] = smallest + int(1.01 * experts)
    return {name: memory // 4096 * 4096 for name, memory in named.items()}


def measure(folder: Path, rows: Path | None) -> dict[str, Any]:
    """All rows, on a checkpoint made in `folder`."""
    bench = prepare(folder)
    experts = read_manifest(bench.pack).form_bytes("exact")
    settings = {"shape": asdict(SHAPE), "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "threads": 1}
    with read_ahead(folder, READ_AHEAD_KB) as read_ahead_before:
        smallest = bench.smallest()
        jobs = [
            Job({"budget": name}, settings, partial(_row, bench, memory))
            for name, memory in budgets(smallest, experts).items()
        ]
        found = collect(jobs, RowFile(rows), lambda step, done: print(f"{done:4.0%} {step}", file=sys.stderr))
    return {
        "name": "budget",
        "machine": machine(),
        "settings": {**settings, "settled_tokens": SETTLED_TOKENS, "read_ahead_kb": READ_AHEAD_KB}
        | {"read_ahead_kb_before": read_ahead_before, "expert_bytes": experts, "greedy": True},
        "oom_kills": sum(row["oom_kills"] for row in found),
        "refaults_per_token_above_control": max(
            row["refaults_per_token"] - row["refaults_per_token_control"] for row in found
        ),
        "one_text": len({row["text_hash"] for row in found}) == 1 and all(r["watched_text_is_the_same"] for r in found),
        "rows": found,
    }


def _row(bench: Bench, memory: int) -> Row:
    return {"limit": memory, **bench.row(memory)}


def main() -> None:
    """Read the flags, measure, print."""
    if sys.argv[1:2] == ["--control"]:
        run_control(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scratch", type=Path, help="Where 3 GB may be written for a while.")
    parser.add_argument("--rows", type=Path, help="Finished rows, kept and taken from here.")
    flags = parser.parse_args()
    with TemporaryDirectory(prefix="comoe-budget-", dir=flags.scratch) as folder:
        json.dump(measure(Path(folder), flags.rows), sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
