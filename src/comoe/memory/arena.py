"""Byte-bounded anonymous memory: page-aligned slots, one private mapping each.

Which blob lives in which slot is `cache`'s business; so is thread safety. Mappings are never closed, only dropped:
a slot whose view somebody still holds stays mapped until that view goes, and nobody reads unmapped memory.
"""

from collections import OrderedDict
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import numpy as np
import numpy.typing as npt

PAGE_BYTES = 4096

Bytes = npt.NDArray[np.uint8]


def whole_pages(nbytes: int) -> int:
    """`nbytes` rounded up to pages, at least one: what a blob of that length costs."""
    return max(-(-nbytes // PAGE_BYTES), 1) * PAGE_BYTES


def _map(nbytes: int) -> Bytes:
    return np.frombuffer(mmap(-1, nbytes, flags=MAP_PRIVATE | MAP_ANONYMOUS), dtype=np.uint8)


class Arena:
    """Slots of whole pages whose total, free ones included, never exceeds `capacity` through `allocate`.

    Freed slots are kept for the next blob of the same size (their pages are already faulted in) and are given back
    when another size needs the room or when `resize` asks for it.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._live_bytes = 0
        self._free_bytes = 0
        self._free: OrderedDict[int, list[Bytes]] = OrderedDict()

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def live_bytes(self) -> int:
        """Bytes of the slots in use."""
        return self._live_bytes

    @property
    def mapped_bytes(self) -> int:
        """Bytes of all slots, in use and free."""
        return self._live_bytes + self._free_bytes

    def allocate(self, nbytes: int) -> Bytes:
        """A uint8 slot of `whole_pages(nbytes)` bytes, contents undefined.

        MemoryError where the slots in use leave too little room, OSError where the system refuses.
        """
        size = whole_pages(nbytes)
        if self._live_bytes + size > self._capacity:
            raise MemoryError(f"{size} bytes asked of an arena with {self._capacity - self._live_bytes} left")
        slot = self._reuse(size)
        if slot is None:
            self._give_back(self._capacity - size)
            slot = _map(size)
        self._live_bytes += size
        return slot

    def free(self, slot: Bytes) -> None:
        """Take `slot` back; its bytes may change at once, so nobody may read it any more."""
        self._live_bytes -= slot.nbytes
        self._free_bytes += slot.nbytes
        self._free.setdefault(slot.nbytes, []).append(slot)
        self._give_back(self._capacity)

    def resize(self, capacity: int) -> None:
        """Change the bound and give free slots back to meet it; slots in use leave only through `free`."""
        self._capacity = capacity
        self._give_back(capacity)

    def _reuse(self, size: int) -> Bytes | None:
        slots = self._free.get(size)
        if slots is None:
            return None
        self._free.move_to_end(size)
        return self._pop(size, slots)

    def _give_back(self, target_bytes: int) -> None:
        """Drop free slots, the size longest unused first, until at most `target_bytes` are mapped."""
        while self._free and self.mapped_bytes > target_bytes:
            self._pop(*next(iter(self._free.items())))

    def _pop(self, size: int, slots: list[Bytes]) -> Bytes:
        slot = slots.pop()
        if not slots:
            del self._free[size]
        self._free_bytes -= size
        return slot
