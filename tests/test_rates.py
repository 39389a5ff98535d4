"""The rate of real transfers, by a clock that only reads move."""

import pytest
from sources import MemorySource

from comoe.device.rates import TimedSource
from comoe.memory.arena import page_buffer
from comoe.types import BlobId

BLOB = BlobId(0, "exact", 0)


class SlowSource(MemorySource):
    """Takes two seconds for a read."""

    now_s = 0.0

    def read(self, blob: BlobId, into: memoryview) -> str:
        SlowSource.now_s += 2.0
        return super().read(blob, into)


def test_a_rate_is_that_of_the_reads_since_it_was_asked_for() -> None:
    source = SlowSource({BLOB: bytes(100)})
    timed = TimedSource(source, lambda: SlowSource.now_s)
    assert timed.take_bps() is None
    for _ in range(2):
        timed.read(BLOB, memoryview(bytearray(4096)))
    assert timed.take_bps() == 50
    assert timed.take_bps() is None


def test_a_read_that_fails_counts_nothing() -> None:
    timed = TimedSource(SlowSource({BLOB: bytes(100)}), lambda: SlowSource.now_s)
    with pytest.raises(KeyError):
        timed.read(BlobId(1, "exact", 0), memoryview(bytearray(4096)))
    assert timed.take_bps() is None


def test_what_a_blob_would_take_is_told_by_its_tier() -> None:
    tier = "flash"
    timed = TimedSource(SlowSource({BLOB: bytes(100)}), lambda: SlowSource.now_s, lambda blob: tier)
    assert timed.expected_s(BLOB) is None
    timed.read(BLOB, memoryview(bytearray(4096)))
    assert timed.expected_s(BLOB) == 2.0
    tier = "edge"
    assert timed.expected_s(BLOB) is None
    timed._recent["edge"] = 1.0
    assert timed.expected_s(BLOB) == 100.0


def test_a_read_counts_for_the_tier_that_it_was_expected_from_whatever_it_is_called() -> None:
    timed = TimedSource(SlowSource({BLOB: bytes(100)}), lambda: SlowSource.now_s, lambda blob: "edge")
    assert timed.read(BLOB, memoryview(bytearray(4096))) == "flash"
    assert timed.expected_s(BLOB) == 2.0


def test_it_is_the_source_otherwise() -> None:
    source = SlowSource({BLOB: bytes(100)})
    timed = TimedSource(source, lambda: 0.0)
    assert (timed.read(BLOB, page_buffer(100)), timed.nbytes(BLOB)) == ("flash", 100)
