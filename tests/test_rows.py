"""Rows that are kept: finished ones are not measured again, stale ones never come back."""

from pathlib import Path
from typing import Any

import pytest

from comoe.bench.rows import Job, RowFile, collect


class Bench:
    """Two rows, `a` and `b`, that note when they are measured."""

    def __init__(self) -> None:
        self.measured: list[str] = []

    def run(self, path: Path | None, **depends: Any) -> list[dict[str, Any]]:
        """Rows by settings `depends`; what was measured is in `measured`."""
        self.measured.clear()
        jobs = [Job({"row": name}, depends, lambda name=name: self._measure(name)) for name in "ab"]  # type: ignore[misc]
        return collect(jobs, RowFile(path), lambda step, done: None)

    def _measure(self, name: str) -> dict[str, Any]:
        self.measured.append(name)
        return {"value": ord(name), "interval": (1, 2)}


ROWS = [{"row": "a", "value": 97, "interval": [1, 2]}, {"row": "b", "value": 98, "interval": [1, 2]}]


def test_finished_rows_are_kept_and_read_back_as_they_were(tmp_path: Path) -> None:
    bench, path = Bench(), tmp_path / "rows.jsonl"
    assert bench.run(path, seed=1) == ROWS
    assert bench.measured == ["a", "b"]
    assert bench.run(path, seed=1) == ROWS
    assert bench.measured == []


def test_rows_of_other_settings_are_measured_again(tmp_path: Path) -> None:
    bench, path = Bench(), tmp_path / "rows.jsonl"
    bench.run(path, seed=1)
    bench.run(path, seed=2)
    assert bench.measured == ["a", "b"]
    bench.run(path, seed=1, version="2")
    assert bench.measured == ["a", "b"]
    bench.run(path, seed=1)
    assert bench.measured == []


def test_a_deleted_line_is_a_row_to_measure_again(tmp_path: Path) -> None:
    bench, path = Bench(), tmp_path / "rows.jsonl"
    bench.run(path)
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[1])
    assert bench.run(path) == ROWS
    assert bench.measured == ["a"]


def test_a_line_that_a_kill_cut_short_is_measured_again_and_harms_no_other(tmp_path: Path) -> None:
    bench, path = Bench(), tmp_path / "rows.jsonl"
    bench.run(path)
    path.write_bytes(path.read_bytes()[:-9])
    assert bench.run(path) == ROWS
    assert bench.measured == ["b"]
    assert bench.run(path) == ROWS
    assert bench.measured == []


def test_a_row_that_fails_leaves_those_before_it(tmp_path: Path) -> None:
    bench, path = Bench(), tmp_path / "rows.jsonl"
    broken = Job({"row": "c"}, {}, lambda: {"value": object()})
    file = RowFile(path)
    collect([Job({"row": "a"}, {}, lambda: bench._measure("a"))], file, lambda step, done: None)
    with pytest.raises(TypeError):
        collect([broken], file, lambda step, done: None)
    assert bench.run(path) == ROWS
    assert bench.measured == ["b"]


def test_without_a_file_nothing_is_kept() -> None:
    bench = Bench()
    assert bench.run(None) == bench.run(None) == ROWS
    assert bench.measured == ["a", "b"]


def test_progress_names_the_row_and_the_share_that_is_done() -> None:
    told: list[tuple[str, float]] = []
    jobs = [Job({"kind": "plan", "bound": bound}, {}, dict) for bound in (0.0, 0.02)]
    collect(jobs, RowFile(None), lambda step, done: told.append((step, done)))
    assert told == [("plan 0.0", 0.0), ("plan 0.02", 0.5)]
