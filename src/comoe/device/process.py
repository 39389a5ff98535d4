"""Memory of this process, as the kernel counts it, and the two knobs of the C allocator that keep it steady."""

import ctypes
import ctypes.util
import os
from pathlib import Path

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8


def resident_bytes() -> int:
    """Anonymous and file-backed pages of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """The highest `resident_bytes` since the start or the last `reset_peak`."""
    return _status("VmHWM")


def anonymous_bytes() -> int:
    """Pages of this process that no file backs: what cannot be dropped."""
    return _status("RssAnon")


def reset_peak() -> None:
    """Start measuring `peak_bytes` afresh (clear_refs, proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")


def steady_malloc() -> None:
    """Give freed memory back to the system: few arenas, big blocks by mmap, trim early (mallopt(3)).

    Does nothing where the C library has no mallopt.
    """
    libc = _libc()
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(M_ARENA_MAX, 2)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 20)


def trim_malloc() -> None:
    """Return free memory at the ends of all arenas to the system (malloc_trim(3))."""
    libc = _libc()
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _libc() -> ctypes.CDLL | None:
    name = ctypes.util.find_library("c")
    return ctypes.CDLL(name) if name else None


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
