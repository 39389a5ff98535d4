"""Rates of this device, measured in a fraction of a second: memory, and reads of a pack's own blobs."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from comoe.kernels import native
from comoe.kernels.matrix import Matrix
from comoe.memory.arena import page_buffer
from comoe.memory.cache import BlobCache
from comoe.memory.residency import Group
from comoe.store.directfile import DirectFile
from comoe.store.layout import PAGE
from comoe.store.paced import Paced
from comoe.store.source import Source
from comoe.types import BlobId

Clock = Callable[[], float]

LEAST_LATENCY_S = 20e-6
MOST_COPIES = 128
PROBED_READ_S = 1e-3
PLANES = ("weight", "scales", "low")


def memory_bps(clock: Clock, *, threads: int = 1, nbytes: int = 64 << 20, repeats: int = 5) -> float:
    """Bytes per second at which `threads` threads together sum memory that no cache holds."""
    parts = np.array_split(np.ones(nbytes // 8, np.float64), threads)
    with ThreadPoolExecutor(threads) as pool:
        return nbytes / median(_timed(clock, lambda: sum(pool.map(np.sum, parts))) for _ in range(repeats))


def read_rate(source: Source, blobs: list[BlobId], clock: Clock) -> tuple[float, float]:
    """(bytes per second, seconds of latency) of reading `blobs` one after the other, once each.

    A least-squares line through time by length. Where lengths do not tell the two apart, the latency is the least,
    20 us, and all else is in the rate.
    """
    nbytes = np.array([source.nbytes(blob) for blob in blobs], np.float64)
    buffer = page_buffer(int(nbytes.max()))
    seconds = np.array([_timed(clock, partial(source.read, blob, buffer)) for blob in blobs])
    latency = LEAST_LATENCY_S
    if nbytes.min() < nbytes.max():
        slope = np.cov(nbytes, seconds)[0, 1] / nbytes.var(ddof=1)
        latency = max(latency, float(seconds.mean() - max(slope, 0.0) * nbytes.mean()))
    latency = min(latency, 0.9 * float(seconds.mean())) if seconds.mean() > LEAST_LATENCY_S else latency
    return float(nbytes.sum() / max(seconds.sum() - latency * len(blobs), 0.1 * seconds.sum())), latency


def wake_s(clock: Clock, *, repeats: int = 64) -> float:
    """Seconds that a read takes beyond its own where somebody waits for it: threads that wake each other, late."""
    groups = [(BlobId(0, "probe", row),) for row in range(2)]
    with BlobCache(Paced(_Nothing(), lambda nbytes: PROBED_READ_S), PAGE) as cache:

        def serve(group: Group) -> None:
            for _ in cache.serve([group]):
                pass

        read_s = median(_timed(clock, partial(serve, groups[at % 2])) for at in range(repeats))
        hit_s = median(_timed(clock, partial(serve, groups[(repeats - 1) % 2])) for _ in range(repeats))
    return max(0.0, read_s - hit_s - PROBED_READ_S)


class _Nothing:
    """A source of blobs of a page that reads nothing."""

    def nbytes(self, blob: BlobId) -> int:
        return PAGE

    def read(self, blob: BlobId, into: memoryview) -> str:
        return "flash"


def kernel_bps(matrix: Matrix, clock: Clock, *, nbytes: int = 8 << 20, repeats: int = 3) -> float:
    """Bytes of weights per second at which the kernel multiplies matrices like `matrix` with one token.

    Copies of together `nbytes` take turns, so that a small cache holds none of them; of tiny matrices, whose calls
    cost more than their bytes, only `MOST_COPIES`.
    """
    copies = [_copy(matrix) for _ in range(min(max(2, nbytes // matrix.nbytes), MOST_COPIES))]
    x, out = np.ones((1, matrix.cols), np.float32), np.empty((1, matrix.rows), np.float32)
    passes = [[_timed(clock, partial(native.linear, copy, x, out)) for copy in copies] for _ in range(repeats + 1)]
    return matrix.nbytes * len(copies) / median(map(sum, passes[1:]))


def _copy(matrix: Matrix) -> Matrix:
    return replace(matrix, **{name: plane.copy() for name in PLANES if (plane := getattr(matrix, name)) is not None})


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
