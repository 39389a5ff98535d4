"""A file that is whole, or as it was: written under a name of its own beside it, which nothing else uses."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".unfinished"
"""How the name of a file ends while it is written: a killed run leaves one."""


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """Write a file that takes the name `path` when all of it is on disk; of a failure nothing is left."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
