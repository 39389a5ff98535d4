"""Byte-bounded anonymous memory for blobs: one private mapping each, so that a shrink really gives memory back."""

import mmap

import numpy as np
import numpy.typing as npt

from comoe.store.layout import PAGE, align

Buffer = npt.NDArray[np.uint8]


def page_buffer(nbytes: int) -> memoryview:
    """A page-aligned writable buffer of `nbytes` rounded up to whole pages."""
    return memoryview(mmap.mmap(-1, align(max(nbytes, 1), PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def held_size(nbytes: int) -> int:
    """Memory that a blob of `nbytes` takes."""
    return align(nbytes, PAGE)


class Arena:
    """Page-aligned uint8 buffers; those in use and those kept for reuse together never exceed `capacity`.

    A mapping goes when the last view of it does: never by force, under somebody's feet.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.mapped = 0
        self._free: dict[int, list[Buffer]] = {}

    def take(self, nbytes: int) -> Buffer:
        """A buffer of `nbytes` rounded up to whole pages; its content is undefined."""
        size = held_size(nbytes)
        if self._free.get(size):
            return self._free[size].pop()
        self._drop_free(size)
        self.mapped += size
        return np.frombuffer(page_buffer(size), np.uint8)

    def give(self, buffer: Buffer) -> None:
        """Take a buffer back, for reuse or, over capacity, for the system."""
        if self.mapped > self.capacity:
            self.mapped -= buffer.nbytes
        else:
            self._free.setdefault(buffer.nbytes, []).append(buffer)

    def resize(self, capacity: int) -> None:
        self.capacity = capacity
        self._drop_free(0)

    def clear(self) -> None:
        """Let every buffer go that nobody looks at."""
        self._free.clear()

    def _drop_free(self, nbytes: int) -> None:
        """Give unused mappings back until `nbytes` more fit, as far as there are any."""
        while self.mapped + nbytes > self.capacity:
            size = next((size for size, buffers in self._free.items() if buffers), None)
            if size is None:
                return
            self._free[size].pop()
            self.mapped -= size
