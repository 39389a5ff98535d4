"""A device process, whole, on a pack in a folder: what it writes is what figures read."""

import json
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

from corpora import shared_folder

from comoe.bench.driven import reading, steps
from comoe.bench.driven_figures import identical, window
from comoe.make.protocol import Evaluation
from comoe.runtime.generate import tokenizer_of
from comoe.runtime.load import load

SECONDS = 6.0


def orders(pack: Path, folder: Path, turns: Any, **load: Any) -> Path:
    told = {
        "pack": str(pack),
        "cache": str(folder / "cache"),
        "cache_bytes": None,
        "load": load,
        "remote_only": False,
        "stays": True,
        "piece_nbytes": 4096,
    }
    path = folder / "orders.json"
    path.write_text(json.dumps({**told, "turns": turns, "seconds": SECONDS, "reader_s": 0.05}))
    return path


def test_steps_are_those_of_the_protocol_with_the_likeliest_token_beside(self_contained: Path) -> None:
    model = load(self_contained, expert_memory="200%", threads=1)
    with model.comoe:
        evaluation = Evaluation.for_model(model, tokenizer_of(self_contained))
        found = list(steps(evaluation, [40, 41, 42], [43, 44]))
        known = [nats for nats, _ in evaluation.forced([40, 41, 42], [43, 44], perf_counter)]
        greedy = evaluation.model.generate(evaluation._tensor([[40, 41, 42]]), max_new_tokens=1, do_sample=False)
    assert [step.nats for step in found] == known and found[0].greedy == int(greedy[0, -1])


def test_an_exact_device_writes_what_the_model_in_memory_makes_of_the_text(
    self_contained: Path, tmp_path: Path
) -> None:
    turns, known = reading(self_contained, shared_folder(tmp_path / "shared"), 32)
    told = orders(self_contained, tmp_path, turns, expert_memory="60%")
    command = [sys.executable, "-m", "comoe.bench.driven", told]
    written = subprocess.run(command, input="\n", capture_output=True, text=True, timeout=120, check=True).stdout
    ready, begun, *lines = map(json.loads, written.splitlines())
    assert ready["ready_s"] <= begun["begun_s"] and len(lines) > 2
    assert identical(lines, known)
    found = window(lines, known)
    assert found["worth"] == found["tokens"] == len(lines) - 1 <= SECONDS / 0.05 + 1
    assert found["loaded_s"] <= found["first_s"] and found["stats"]["loss_ledger"] == 0
    assert not lines[-1]["events"] and not lines[-1]["links"]
    assert lines[-2]["at_s"] < SECONDS + 1


def test_a_window_that_ends_before_the_model_is_there_has_no_tokens(self_contained: Path, tmp_path: Path) -> None:
    told = orders(self_contained, tmp_path, [[[40], [41]]], expert_memory="60%")
    told.write_text(told.read_text().replace(f'"seconds": {SECONDS}', '"seconds": 0.0'))
    command = [sys.executable, "-m", "comoe.bench.driven", told]
    written = subprocess.run(command, input="\n", capture_output=True, text=True, timeout=120, check=True).stdout
    assert json.loads(written.splitlines()[-1]) == {
        "failed": None,
        "stats": None,
        "loaded_s": None,
        "events": [],
        "links": {},
    }


def test_a_device_that_cannot_go_on_says_why_at_its_end(self_contained: Path, tmp_path: Path) -> None:
    told = orders(self_contained, tmp_path, [[[40], [41]]], expert_memory=1)
    command = [sys.executable, "-m", "comoe.bench.driven", told]
    written = subprocess.run(command, input="\n", capture_output=True, text=True, timeout=120, check=True).stdout
    assert "experts need at least" in json.loads(written.splitlines()[-1])["failed"]
