"""A file that is whole, or as it was: written under a name of its own beside it, which nothing else uses.

And what a full disk is called.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import BinaryIO

from comoe.types import ComoeError, StorageFull, UsageError

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


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """A full disk as StorageFull; what was made so far stays, to be gone on with."""
    try:
        yield
    except OSError as error:
        if isinstance(error, ComoeError | BrokenPipeError):
            raise
        if error.errno not in (ENOSPC, EDQUOT):
            raise UsageError(f"{target} cannot be made ({error}): choose another place.") from error
        raise StorageFull(
            f"the disk is full: {target} was not made. Make room and run the same command to go on."
        ) from error
