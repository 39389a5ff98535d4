"""Memory of this process, as the kernel counts it, and what keeps it steady: the C allocator, oneDNN's code caches."""

import ctypes
import os
from pathlib import Path
from typing import NamedTuple

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
MADV_DONTNEED = 4

KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
KEPT_KERNELS = 32
"""Shapes of matrices that oneDNN, and torch's own cache of what oneDNN made, keep code for: 0.55 MiB each, made in half
a millisecond. Of their own accord they keep 1024; a decode step needs about ten."""


class Resident(NamedTuple):
    """Pages of this process that are in memory, in bytes: those that no file backs, and those that may be dropped."""

    anonymous: int
    file_backed: int

    @property
    def total(self) -> int:
        return self.anonymous + self.file_backed


def resident() -> Resident:
    """What is in memory now. Takes some microseconds."""
    descriptor = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        _, pages, shared = os.read(descriptor, 128).split()[:3]
    finally:
        os.close(descriptor)
    page = os.sysconf("SC_PAGE_SIZE")
    return Resident((int(pages) - int(shared)) * page, int(shared) * page)


def resident_bytes() -> int:
    """Anonymous and file-backed pages of this process that are in memory."""
    return resident().total


def peak_bytes() -> int:
    """The highest `resident_bytes` since the start or the last `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> int:
    """Start measuring `peak_bytes` afresh (clear_refs, proc(5)); returns the peak until now."""
    peak = peak_bytes()
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def mappings(folder: Path) -> list[range]:
    """The addresses at which files of `folder` are mapped."""
    inside = folder.resolve()
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        words = line.split(maxsplit=5)
        if len(words) == 6 and Path(words[5]).parent == inside:
            start, end = (int(address, 16) for address in words[0].split("-"))
            found.append(range(start, end))
    return found


def unmap_pages(address: int, nbytes: int) -> None:
    """Let the whole pages of a file's mapping among `nbytes` from `address` go (madvise(2)): they are not ours then.

    Never for anonymous memory, whose content would be lost.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    first, last = -(-address // page) * page, (address + nbytes) // page * page
    libc = ctypes.CDLL(None, use_errno=True)
    if last > first and libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise failed")


def steady_malloc() -> None:
    """Give freed memory back to the system: few arenas, big blocks by mmap, trim early (mallopt(3)).

    Does nothing where the C library has no mallopt.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_ARENA_MAX, 2)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 20)


def trim_malloc() -> None:
    """Return free memory of all arenas to the system (malloc_trim(3))."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def bound_kernel_caches() -> None:
    """Let oneDNN keep `KEPT_KERNELS`, unless the environment says how many. Heeded before its first use alone."""
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KEPT_KERNELS))


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
