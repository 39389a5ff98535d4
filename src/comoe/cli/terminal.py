"""How commands talk: JSON and tables on stdout, progress and remarks on stderr."""

import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from comoe.types import Progress


def print_json(document: object) -> None:
    """One JSON document on stdout; a number that is none, which JSON has no word for, is null."""
    print(json.dumps(_finite(document), indent=1, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(sentence: str) -> None:
    """A remark on stderr."""
    print(sentence, file=sys.stderr, flush=True)


def say_what_is_logged() -> None:
    """From now on, what the library logs goes to stderr, too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("comoe: %(message)s"))
    log = logging.getLogger("comoe")
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as their content; the first to the left, the others to the right."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
    for line in lines:
        first, *others = zip(line, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        print("  ".join(cells).rstrip())


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Names to the left, their values in a column beside them."""
    pairs = list(pairs)
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        print(f"{name.ljust(width)}  {value}")


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr where that is a terminal, else a line for every new step."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield _LineProgress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(
        TextColumn("{task.description:32}"), BarColumn(), *times, console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda step, fraction: bar.update(task, description=step, completed=fraction)


class _LineProgress:
    """Says every step once."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, step: str, fraction: float) -> None:
        if step != self._last:
            self._last = step
            say(f"{fraction:4.0%} {step}")
