"""A file read past the page cache: the budget of a run counts cached pages too.

Falls back to buffered reads that are dropped from the cache at once, where the file system has no direct I/O.
"""

import ctypes
import errno
import mmap
import os
import threading
from functools import cached_property
from pathlib import Path

from comoe.store.layout import PAGE, align
from comoe.types import PackError

BOUNCE_BYTES = 4 * 1024 * 1024


class Bounce:
    """Memory for reads that are not aligned, mapped once one is; all files of a pack share it, and take turns."""

    def __init__(self) -> None:
        self.turn = threading.Lock()

    @cached_property
    def view(self) -> memoryview:
        return memoryview(mmap.mmap(-1, BOUNCE_BYTES))


class DirectFile:
    """A file open for reading, by several threads at once; those that need the bounce buffer take turns."""

    def __init__(self, path: Path, bounce: Bounce | None = None) -> None:
        self.path = path
        self.direct = True
        self._bounce = bounce or Bounce()
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
            self.direct = hasattr(os, "O_DIRECT")
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise PackError(f"cannot read {path}: {error.strerror}.") from error
            self._fall_back()

    def read(self, offset: int, into: memoryview, nbytes: int) -> None:
        """Fill `into[:nbytes]` from `offset`. Raises PackError where the file ends earlier or cannot be read."""
        direct = self.direct
        try:
            if not direct:
                self._read_buffered(offset, into[:nbytes])
            elif offset % PAGE == 0 and len(into) >= align(nbytes, PAGE) and _is_page_aligned(into):
                self._read_into(offset, into[: align(nbytes, PAGE)], nbytes)
            else:
                with self._bounce.turn:
                    self._read_bounced(offset, into[:nbytes])
        except OSError as error:
            if direct and error.errno == errno.EINVAL:
                self._fall_back()  # again where another thread just did: that changes nothing
                return self.read(offset, into, nbytes)
            raise PackError(f"cannot read {self.path} at {offset}: {error.strerror}.") from error

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _fall_back(self) -> None:
        """Go on with a buffered descriptor, under the same number: another thread may be about to use it."""
        self.direct = False
        try:
            buffered = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise PackError(f"cannot read {self.path}: {error.strerror}.") from error
        if self._fd < 0:
            self._fd = buffered
        else:
            os.dup2(buffered, self._fd, inheritable=False)
            os.close(buffered)

    def _read_into(self, offset: int, into: memoryview, needed: int) -> None:
        """Read `into` whole, or at least its first `needed` bytes where the file ends inside the last page."""
        done = 0
        while done < needed:
            got = os.preadv(self._fd, [into[done:]], offset + done)
            if got == 0:
                raise PackError(f"{self.path} ends before byte {offset + needed}: it was cut short; pack again.")
            done += got

    def _read_buffered(self, offset: int, into: memoryview) -> None:
        self._read_into(offset, into, len(into))
        os.posix_fadvise(self._fd, offset, len(into), os.POSIX_FADV_DONTNEED)

    def _read_bounced(self, offset: int, into: memoryview) -> None:
        """Over-read to page boundaries, a bounded piece at a time, and copy what was asked for."""
        bounce = self._bounce.view
        done = 0
        while done < len(into):
            skip = (offset + done) % PAGE
            take = min(len(into) - done, len(bounce) - skip)
            self._read_into(offset + done - skip, bounce[: align(skip + take, PAGE)], skip + take)
            into[done : done + take] = bounce[skip : skip + take]
            done += take


def _is_page_aligned(buffer: memoryview) -> bool:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % PAGE == 0
