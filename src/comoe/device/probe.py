"""Rates of this device, measured in a fraction of a second: memory, and reads of a pack's own blobs."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from comoe.memory.arena import page_buffer
from comoe.store.directfile import DirectFile
from comoe.store.source import Source
from comoe.types import BlobId

Clock = Callable[[], float]


def memory_bps(clock: Clock, *, nbytes: int = 64 << 20, repeats: int = 5) -> float:
    """Bytes per second at which one thread sums memory that no cache holds."""
    data = np.ones(nbytes // 8, np.float64)
    return nbytes / median(_timed(clock, lambda: float(data.sum())) for _ in range(repeats))


def read_rate(source: Source, blobs: list[BlobId], clock: Clock) -> tuple[float, float]:
    """(bytes per second, seconds of latency) of reading `blobs` one after the other.

    Latency is what that rate does not explain of the fastest read, at least 20 us: so always 20 us, and all else in the
    rate, where blobs have one size.
    """
    nbytes = [source.nbytes(blob) for blob in blobs]
    buffer = page_buffer(max(nbytes))
    seconds = [_timed(clock, lambda blob=blob: source.read(blob, buffer)) for blob in blobs]  # type: ignore[misc]
    rate = sum(nbytes) / sum(seconds)
    return rate, max(20e-6, min(seconds) - min(nbytes) / rate)


def disk_bps(path: Path, clock: Clock, *, nbytes: int = 64 << 20, block: int = 4 << 20) -> tuple[float, bool]:
    """(bytes per second, whether directly) of reading a new file at `path` of `nbytes` past the page cache."""
    data = np.random.default_rng(0).bytes(block)
    with path.open("wb") as file:
        for _ in range(nbytes // block):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    opened, buffer = DirectFile(path), page_buffer(block)
    try:
        seconds = [_timed(clock, partial(opened.read, at, buffer, block)) for at in range(0, nbytes, block)]
        return nbytes / sum(seconds), opened.direct
    finally:
        opened.close()


def _timed(clock: Clock, call: Callable[[], object]) -> float:
    start_s = clock()
    call()
    return clock() - start_s
