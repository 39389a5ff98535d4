"""What every source must do: subclass `SourceContract` and say how to make one and what it holds."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from comoe.memory.arena import page_buffer
from comoe.store.source import Source
from comoe.types import BlobId


class MemorySource:
    """Blobs in a dict: the smallest source there is."""

    def __init__(self, blobs: dict[BlobId, bytes]) -> None:
        self._blobs = blobs

    def nbytes(self, blob: BlobId) -> int:
        return len(self._blobs[blob])

    def read(self, blob: BlobId, into: memoryview) -> str:
        data = self._blobs[blob]
        into[: len(data)] = data
        return "flash"


def read(source: Source, blob: BlobId) -> bytes:
    """A blob's bytes, through a buffer of just the room that the protocol promises."""
    buffer = page_buffer(source.nbytes(blob))
    source.read(blob, buffer)
    return bytes(buffer[: source.nbytes(blob)])


class SourceContract:
    """Subclasses give a fixture `held`: the source and every blob that it holds, with its bytes."""

    @pytest.fixture
    def held(self) -> tuple[Source, dict[BlobId, bytes]]:
        raise NotImplementedError

    def test_every_blob_has_its_length_and_its_bytes(self, held: tuple[Source, dict[BlobId, bytes]]) -> None:
        source, blobs = held
        assert len(blobs) > 1
        for blob, data in blobs.items():
            assert source.nbytes(blob) == len(data)
            assert read(source, blob) == data

    def test_a_blob_read_again_has_the_same_bytes(self, held: tuple[Source, dict[BlobId, bytes]]) -> None:
        source, blobs = held
        blob = next(iter(blobs))
        assert read(source, blob) == read(source, blob) == blobs[blob]

    def test_only_the_pages_of_the_blob_are_written_in_a_larger_buffer(
        self, held: tuple[Source, dict[BlobId, bytes]]
    ) -> None:
        source, blobs = held
        for blob, data in blobs.items():
            pages = len(page_buffer(len(data)))
            buffer = page_buffer(pages + 4096)
            buffer[pages:] = b"\7" * 4096
            source.read(blob, buffer)
            assert buffer[: len(data)] == data and buffer[pages:] == b"\7" * 4096

    def test_a_numpy_view_of_pages_will_do_as_a_buffer(self, held: tuple[Source, dict[BlobId, bytes]]) -> None:
        source, blobs = held
        blob = next(iter(blobs))
        array = np.frombuffer(page_buffer(source.nbytes(blob)), np.uint8)
        source.read(blob, array.data)
        assert array[: source.nbytes(blob)].tobytes() == blobs[blob]

    def test_a_blob_that_is_not_there_is_a_key_error(self, held: tuple[Source, dict[BlobId, bytes]]) -> None:
        source, blobs = held
        layer, part, row = next(iter(blobs))
        strangers = [BlobId(-1, part, row), BlobId(999, part, row), BlobId(layer, "?", row)]
        for stranger in [*strangers, BlobId(layer, part, -1), BlobId(layer, part, 10**9)]:
            with pytest.raises(KeyError):
                source.nbytes(stranger)
            with pytest.raises(KeyError):
                source.read(stranger, page_buffer(1))

    def test_several_threads_may_read_at_once_while_lengths_are_asked_for(
        self, held: tuple[Source, dict[BlobId, bytes]]
    ) -> None:
        source, blobs = held

        def wrong() -> list[BlobId]:
            return [blob for _ in range(30) for blob, data in blobs.items() if read(source, blob) != data]

        with ThreadPoolExecutor(3) as pool:
            readers = [pool.submit(wrong) for _ in range(3)]
            for _ in range(30):
                assert all(source.nbytes(blob) == len(data) for blob, data in blobs.items())
            assert [reader.result() for reader in readers] == [[], [], []]

    def test_its_tier_is_a_known_one(self, held: tuple[Source, dict[BlobId, bytes]]) -> None:
        source, blobs = held
        blob = next(iter(blobs))
        assert source.read(blob, page_buffer(source.nbytes(blob))) in ("flash", "edge", "origin")
