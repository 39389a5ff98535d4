"""Rows of a benchmark that goes on after a kill: each finished one is kept, under everything its figures depend on.

What a row measures is the benchmark's matter. A row of other settings is never found, so it is measured again.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from comoe.types import Progress

Row = dict[str, Any]


class Job(NamedTuple):
    """A row to be: `name` tells it from the others and opens it; `depends` is what else its figures depend on."""

    name: Mapping[str, Any]
    depends: Mapping[str, Any]
    measure: Callable[[], Row]


class RowFile:
    """Finished rows, a JSON line each; without a path they are forgotten. Delete a line to measure its row again."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows = dict(_kept(path)) if path is not None and path.exists() else {}

    def find(self, job: Job) -> Row | None:
        """The row that a job of this name gave before with the same dependencies."""
        return self._rows.get(_key(job.name, job.depends))

    def add(self, job: Job, row: Row) -> Row:
        """Keep a row; it is on disk when this returns it, as `find` will."""
        line = json.dumps({"name": job.name, "depends": job.depends, "row": row}, ensure_ascii=False)
        if self._path is not None:
            _append(self._path, line.encode())
        kept: Row = json.loads(line)["row"]
        return self._rows.setdefault(_key(job.name, job.depends), kept)


def collect(jobs: Sequence[Job], file: RowFile, progress: Progress) -> list[Row]:
    """The row of every job, opened by its name: kept ones as they were, the others measured now."""
    rows = []
    for done, job in enumerate(jobs):
        progress(" ".join(map(str, job.name.values())), done / len(jobs))
        row = file.find(job)
        if row is None:
            row = file.add(job, job.measure())
        rows.append({**job.name, **row})
    return rows


def _key(name: Mapping[str, Any], depends: Mapping[str, Any]) -> str:
    return json.dumps([name, depends], sort_keys=True)


def _kept(path: Path) -> Iterator[tuple[str, Row]]:
    """(key, row) of every whole line; one that a kill cut short is a row that was not finished."""
    for line in path.read_bytes().split(b"\n"):
        try:
            kept = json.loads(line)
        except ValueError:
            continue
        yield _key(kept["name"], kept["depends"]), kept["row"]


def _append(path: Path, line: bytes) -> None:
    """Add a line, on one of its own even where a kill cut the last one short."""
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line + b"\n")
        file.flush()
        os.fsync(file.fileno())
