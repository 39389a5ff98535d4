"""The cache against an in-memory source whose reads wait at gates: content, order, budget, errors. Nothing sleeps."""

import random
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from comoe.memory.cache import BlobCache
from comoe.types import BlobId, DoesNotFit

PAGE = 4096
NBYTES = 5000  # two pages
GROUP = 4 * PAGE  # what a group of two blobs costs
PATIENCE_S = 20.0


class GatedSource:
    """Blobs of NBYTES equal bytes. While `gated`, each read announces itself in `begun` and waits for `let`."""

    def __init__(self) -> None:
        self.gated = False
        self.broken: set[BlobId] = set()
        self.order: list[BlobId] = []
        self.begun = threading.Semaphore(0)
        self.let = threading.Semaphore(0)

    def nbytes(self, blob: BlobId) -> int:
        if blob.row < 0:
            raise KeyError(blob)
        return NBYTES

    def read(self, blob: BlobId, into: memoryview) -> str:
        self.order.append(blob)
        self.begun.release()
        if self.gated:
            assert self.let.acquire(timeout=PATIENCE_S)
        if blob in self.broken:
            raise OSError(f"{blob} is broken")
        np.frombuffer(into, np.uint8)[:] = value(blob)
        return "flash"

    def await_read(self) -> None:
        assert self.begun.acquire(timeout=PATIENCE_S)


def value(blob: BlobId) -> int:
    return (blob.row * 2 + (blob.part == "b")) % 251


def group(row: int) -> tuple[BlobId, BlobId]:
    return BlobId(0, "a", row), BlobId(0, "b", row)


def right(position_row: int, parts: tuple[np.ndarray, ...]) -> bool:
    wanted = group(position_row)
    return all(
        part.shape == (NBYTES,) and (part == value(name)).all() for name, part in zip(wanted, parts, strict=True)
    )


def settle(cache: BlobCache) -> None:
    """Wait until everything prefetched has been read: a demand for it queues behind nothing."""
    list(cache.serve([group(99)]))


@contextmanager
def opened(capacity_groups: int, **options: int) -> Iterator[tuple[BlobCache, GatedSource]]:
    source = GatedSource()
    options.setdefault("largest_group", GROUP)
    cache = BlobCache(source, capacity_groups * GROUP, **options)
    try:
        yield cache, source
    finally:
        source.gated = False
        source.let.release(1000)
        cache.close()


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Run `call` in a daemon thread; its result or its error is appended to the list."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


@pytest.mark.parametrize("io_threads", [1, 2])
@pytest.mark.parametrize("capacity_groups", [1, 2, 30])
def test_every_group_is_served_once_with_its_own_bytes(capacity_groups: int, io_threads: int) -> None:
    with opened(capacity_groups, io_threads=io_threads) as (cache, _):
        for _ in range(2):
            served = []
            for position, parts in cache.serve([group(row) for row in range(20)]):
                assert right(position, parts)
                assert cache.resident_bytes <= cache.capacity
                served.append(position)
            assert sorted(served) == list(range(20))


def test_resident_groups_come_first_in_order_and_the_others_as_they_arrive() -> None:
    with opened(6) as (cache, _):
        list(cache.serve([group(3), group(1)]))
        order = [position for position, _ in cache.serve([group(row) for row in range(5)])]
        assert order == [1, 3, 0, 2, 4]


def test_a_resident_group_asked_for_last_is_not_evicted_for_the_others() -> None:
    with opened(2) as (cache, source):
        list(cache.serve([group(1)]))
        order = [position for position, _ in cache.serve([group(0), group(2), group(1)])]
        assert order == [2, 0, 1]
        assert source.order.count(group(1)[0]) == 1


def test_reads_go_on_while_the_consumer_computes() -> None:
    with opened(3) as (cache, source):
        serving = cache.serve([group(0), group(1)])
        next(serving)
        for _ in range(4):
            source.await_read()
        assert source.order == [*group(0), *group(1)]


def test_a_group_in_hand_keeps_its_bytes_while_others_are_read() -> None:
    with opened(2) as (cache, _):
        for position, parts in cache.serve([group(row) for row in range(12)]):
            cache.prefetch([group(row) for row in range(50, 55)])
            assert right(position, parts)


def test_an_error_of_the_source_is_raised_to_the_consumer_of_that_group_only() -> None:
    with opened(4) as (cache, source):
        source.broken.add(group(1)[1])
        with pytest.raises(OSError, match="broken"):
            list(cache.serve([group(1)]))
        assert [right(0, parts) for _, parts in cache.serve([group(0)])] == [True]
        source.broken.clear()
        assert [right(1, parts) for _, parts in cache.serve([group(1)])] == [True]


def test_an_error_of_a_prefetch_is_counted_and_raised_to_nobody() -> None:
    with opened(4) as (cache, source):
        source.broken.update(group(1))
        cache.prefetch([group(1)])
        source.await_read()
        source.await_read()
        settle(cache)
        assert cache.stats.tally.prefetch_failed == 16384


def test_ending_early_unpins_what_was_not_served() -> None:
    with opened(4) as (cache, _):
        for _ in cache.serve([group(row) for row in range(4)]):
            break
        serving = cache.serve([group(row) for row in range(4)])
        next(serving)
        serving.close()
        with pytest.raises(RuntimeError, match="consumer"):
            for _ in cache.serve([group(row) for row in range(4)]):
                raise RuntimeError("the consumer failed")
        cache.resize(GROUP)
        settle(cache)
        assert cache.resident_bytes <= GROUP


def test_held_blobs_stay_whatever_is_served() -> None:
    with opened(2) as (cache, source):
        cache.hold(group(7))
        for _ in range(3):
            list(cache.serve([group(row) for row in range(5)]))
        reads = len(source.order)
        assert [right(7, parts) for _, parts in cache.serve([group(7)])] == [True]
        assert len(source.order) == reads


def test_a_floor_that_leaves_no_room_for_a_group_is_refused() -> None:
    with opened(2) as (cache, _):
        with pytest.raises(DoesNotFit) as refusal:
            cache.hold([*group(1), *group(2)])
        assert refusal.value.smallest == 3 * GROUP


def test_a_resize_below_the_floor_and_one_group_is_refused_and_changes_nothing() -> None:
    with opened(4) as (cache, _):
        cache.hold(group(0))
        with pytest.raises(DoesNotFit) as refusal:
            cache.resize(GROUP)
        assert refusal.value.smallest == 2 * GROUP == cache.smallest
        assert cache.capacity == 4 * GROUP


def test_a_resize_gives_anonymous_memory_back() -> None:
    with opened(8) as (cache, _):
        list(cache.serve([group(row) for row in range(8)]))
        cache.resize(2 * GROUP)
        assert cache.resident_bytes <= cache._arena.mapped <= 2 * GROUP


def test_a_resize_gives_back_memory_that_no_blob_is_in() -> None:
    with opened(2) as (cache, source):
        source.broken.update(group(1))
        list(cache.serve([group(0)]))
        with pytest.raises(OSError, match="broken"):
            list(cache.serve([group(1)]))
        assert cache._arena.mapped > GROUP
        cache.resize(GROUP)
        assert cache._arena.mapped <= GROUP


def test_a_used_prefetch_and_a_wasted_one_are_told_apart() -> None:
    with opened(2) as (cache, source):
        cache.prefetch([group(1)])
        source.await_read()
        source.await_read()
        list(cache.serve([group(1)]))
        assert cache.stats.tally.prefetch_used == 16384
        cache.prefetch([group(2)])
        source.await_read()
        source.await_read()
        list(cache.serve([group(row) for row in range(3, 6)]))
        assert cache.stats.tally.prefetch_wasted == 16384


def test_bytes_read_are_counted_by_tier_and_the_copy_does_not_move() -> None:
    with opened(2) as (cache, _):
        list(cache.serve([group(0)]))
        stats = cache.stats
        list(cache.serve([group(1)]))
        assert (stats.reads, stats.bytes_read) == (2, {"flash": 2 * NBYTES})


def test_a_thousand_resizes_from_another_thread_leave_every_byte_right() -> None:
    with opened(12) as (cache, _):
        rng = random.Random(3)
        cache.hold(group(40))
        sizes = [rng.randint(2, 12) * GROUP for _ in range(1000)]
        thread, outcome = in_thread(lambda: [cache.resize(size) for size in sizes])
        rounds = 0
        while thread.is_alive() or rounds < 5:
            for position, parts in cache.serve([group(row) for row in range(10)]):
                assert right(position, parts)
            rounds += 1
        thread.join(PATIENCE_S)
        assert len(outcome[0]) == 1000
        cache.resize(2 * GROUP)
        assert cache._arena.mapped <= 2 * GROUP
        cache._residency.check()


def test_closing_twice_is_harmless_and_ends_the_threads() -> None:
    cache = BlobCache(GatedSource(), GROUP)
    cache.close()
    cache.close()
    assert not any(thread.is_alive() for thread in cache._threads)


def test_what_is_held_already_is_held_again_without_more_room() -> None:
    with BlobCache(GatedSource(), 2 * PAGE + GROUP, largest_group=GROUP) as cache:
        for _ in range(2):
            cache.hold(group(7)[:1])


def test_a_closed_cache_holds_no_memory_though_somebody_holds_it() -> None:
    cache = BlobCache(GatedSource(), 3 * GROUP)
    held = [weakref.ref(blob.base) for _, blobs in cache.serve([group(0), group(1)]) for blob in blobs]
    cache.resize(GROUP)  # one group's buffers are kept for reuse, or gone
    cache.close()
    assert held and not any(reference() is not None for reference in held)
    assert cache.capacity == GROUP


def test_a_closed_cache_serves_nobody() -> None:
    cache = BlobCache(GatedSource(), GROUP)
    cache.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(cache.serve([group(0)]))


def test_a_shrink_takes_room_from_reads_that_have_not_begun() -> None:
    with opened(6) as (cache, source):
        source.gated = True
        serving = cache.serve([group(row) for row in range(6)])
        thread, outcome = in_thread(lambda: next(serving))
        source.await_read()
        cache.resize(GROUP)
        source.let.release(2)
        source.await_read()
        thread.join(PATIENCE_S)
        assert outcome and cache.resident_bytes <= GROUP
        assert not source.begun.acquire(timeout=0.1), "a read began for which there is no room"
        source.gated = False
        assert all(right(position, parts) for position, parts in serving)


def test_a_demand_that_is_refused_leaves_nothing_pinned() -> None:
    with opened(2) as (cache, _):
        list(cache.serve([group(0)]))
        with pytest.raises(DoesNotFit):
            list(cache.serve([group(0), (*group(1), *group(2), *group(3))]))
        thread, outcome = in_thread(lambda: list(cache.serve([(*group(4), *group(5))])))
        thread.join(2.0)
        assert outcome and not isinstance(outcome[0], Exception)


def test_closing_wakes_a_consumer_that_waits() -> None:
    with opened(2) as (cache, source):
        source.gated = True
        thread, outcome = in_thread(lambda: list(cache.serve([group(0), group(1)])))
        source.await_read()
        closer, _ = in_thread(cache.close)
        source.let.release(1)
        closer.join(PATIENCE_S)
        thread.join(1.0)
        assert outcome and isinstance(outcome[0], RuntimeError)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_memory_that_the_system_refuses_is_an_error_of_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(2) as (cache, _):

        def refuse(nbytes: int) -> np.ndarray:
            raise OSError("no memory")

        monkeypatch.setattr(cache._arena, "take", refuse)
        thread, outcome = in_thread(lambda: list(cache.serve([group(0)])))
        thread.join(2.0)
        assert outcome and isinstance(outcome[0], OSError)


def test_reads_for_an_abandoned_demand_do_not_delay_the_next() -> None:
    with opened(20) as (cache, source):
        source.gated = True
        serving = cache.serve([group(row) for row in range(10)])
        thread, _ = in_thread(lambda: next(serving))
        source.await_read()
        source.let.release(2)
        thread.join(PATIENCE_S)
        serving.close()
        begun = len(source.order)
        source.gated = False
        source.let.release(100)
        list(cache.serve([group(50)]))
        assert len(source.order) - begun <= 3


def test_an_io_thread_is_woken_for_reads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(3) as (cache, _):
        list(cache.serve([group(0), group(1)]))
        woken = []
        monkeypatch.setattr(cache._changed, "notify_all", lambda: woken.append(1))
        list(cache.serve([group(0), group(1)], [group(1)]))
        cache.prefetch([group(0)])
        assert not woken
        monkeypatch.undo()
        assert [position for position, _ in cache.serve([group(2), group(0)])] == [1, 0]
