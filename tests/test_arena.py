"""The arena: whole pages, a byte bound, memory that really goes back."""

import random
import weakref

import numpy as np
import pytest

from comoe.memory.arena import Arena, page_buffer

PAGE = 4096


def mapping_of(buffer: np.ndarray) -> weakref.ref:
    """A weak reference to the mmap below `buffer`."""
    return weakref.ref(buffer.base.obj if isinstance(buffer.base, memoryview) else buffer.base)


def test_a_buffer_is_whole_pages_aligned_and_writable() -> None:
    arena = Arena(4 * PAGE)
    buffer = arena.take(PAGE + 1)
    assert buffer.dtype == np.uint8
    assert buffer.nbytes == 2 * PAGE
    assert buffer.ctypes.data % PAGE == 0
    buffer[:] = 7
    assert buffer.data.contiguous and not buffer.data.readonly


def test_a_page_buffer_of_nothing_is_one_page() -> None:
    assert page_buffer(0).nbytes == PAGE


def test_a_buffer_given_back_serves_the_next_of_its_size_without_a_new_mapping() -> None:
    arena = Arena(4 * PAGE)
    first = arena.take(PAGE)
    address = first.ctypes.data
    arena.give(first)
    assert arena.take(10).ctypes.data == address
    assert arena.mapped == PAGE


def test_free_buffers_make_way_for_another_size() -> None:
    arena = Arena(4 * PAGE)
    free = [arena.take(PAGE) for _ in range(4)]
    for buffer in free:
        arena.give(buffer)
    gone = [mapping_of(buffer) for buffer in free]
    del free, buffer
    arena.take(3 * PAGE)
    assert arena.mapped == 4 * PAGE
    assert sum(reference() is None for reference in gone) == 3


def test_a_shrink_unmaps_free_buffers_at_once_and_used_ones_when_given_back() -> None:
    arena = Arena(4 * PAGE)
    used, free = arena.take(2 * PAGE), arena.take(2 * PAGE)
    gone = [mapping_of(used), mapping_of(free)]
    arena.give(free)
    del free
    arena.resize(PAGE)
    assert arena.mapped == 2 * PAGE and gone[1]() is None
    arena.give(used)
    del used
    assert arena.mapped == 0 and gone[0]() is None


def test_a_view_that_outlives_its_buffer_stays_readable() -> None:
    arena = Arena(PAGE)
    buffer = arena.take(PAGE)
    buffer[:] = 3
    view = buffer[:10]
    arena.give(buffer)
    del buffer
    arena.resize(0)
    assert view.tolist() == [3] * 10


def test_mapped_bytes_never_exceed_the_capacity_while_users_keep_to_it() -> None:
    rng = random.Random(1)
    arena, used = Arena(32 * PAGE), []
    for _ in range(2000):
        size = rng.randint(1, 6) * PAGE
        if sum(buffer.nbytes for buffer in used) + size <= arena.capacity and rng.random() < 0.6:
            used.append(arena.take(size))
        elif used:
            arena.give(used.pop(rng.randrange(len(used))))
        assert sum(buffer.nbytes for buffer in used) <= arena.mapped <= arena.capacity


@pytest.mark.parametrize("pages", [1, 3])
def test_two_buffers_in_use_never_share_memory(pages: int) -> None:
    arena = Arena(8 * PAGE)
    first, second = arena.take(pages * PAGE), arena.take(pages * PAGE)
    assert not np.shares_memory(first, second)
