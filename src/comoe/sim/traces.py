"""Recorded links: files of rates over time, windows of them, and when bytes that are asked for have come.

A rate holds until the next one is told. All rates here are bytes per second; files have Mbit/s.
"""

import csv
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from zlib import crc32

import numpy as np
import numpy.typing as npt

from comoe.types import UsageError

Array = npt.NDArray[np.float64]

BPS_PER_MBPS = 1e6 / 8
WINDOW_S = 45.0
ARTEFACT_S = 2.0
"""Zeros of at most so long, after a rate, are the logger's in traces of `ARTEFACTS`; longer ones are outages."""

ARTEFACTS = "ucc5g_"
COLUMNS = {"t_s", "down_mbps", "rtt_ms", "cell_id"}


@dataclass(frozen=True, slots=True, eq=False)
class LinkRate:
    """A link's rate over time: `bps` (N,) bytes per second from `start_s` (N,) on, the first at 0, until `end_s`.

    Nothing comes after the end.
    """

    start_s: Array
    bps: Array
    end_s: float
    _sent: Array

    @staticmethod
    def of(start_s: Array, bps: Array, end_s: float) -> "LinkRate":
        """ValueError where times do not begin at 0 and rise to the end, or a rate is negative."""
        bounds = np.append(start_s, end_s).astype(np.float64)
        rates = np.asarray(bps, np.float64)
        if not len(rates) or bounds[0] != 0 or (np.diff(bounds) <= 0).any() or not (rates >= 0).all():
            raise ValueError("rates need times that rise from 0, and are not negative")
        return LinkRate(bounds[:-1], rates, float(end_s), np.append(0.0, np.cumsum(np.diff(bounds) * rates)))

    @staticmethod
    def steady(bps: float, end_s: float = WINDOW_S) -> "LinkRate":
        """The same rate all the time."""
        return LinkRate.of(np.zeros(1), np.array([bps]), end_s)

    def at(self, now_s: float) -> float:
        """Bytes per second at a moment."""
        if not 0 <= now_s < self.end_s:
            return 0.0
        return float(self.bps[np.searchsorted(self.start_s, now_s, "right") - 1])

    def sent(self, until_s: float) -> float:
        """Bytes that the link can have carried from 0 to a moment."""
        return float(np.interp(until_s, np.append(self.start_s, self.end_s), self._sent))

    def mean(self, begin_s: float, end_s: float) -> float:
        """Mean bytes per second between two moments."""
        return (self.sent(end_s) - self.sent(begin_s)) / (end_s - begin_s)

    def done_s(self, begin_s: float, nbytes: float) -> float:
        """When so many bytes, asked for at a moment, have come; inf where they never do."""
        wanted = self.sent(begin_s) + nbytes
        if nbytes <= 0:
            return begin_s
        if wanted > self._sent[-1]:
            return float("inf")
        at = int(np.searchsorted(self._sent, wanted, "left")) - 1
        return float(self.start_s[at] + (wanted - self._sent[at]) / self.bps[at])

    def scaled(self, factor: float) -> "LinkRate":
        """The same link, so many times as fast."""
        return LinkRate.of(self.start_s, factor * self.bps, self.end_s)

    def window(self, begin_s: float, seconds: float = WINDOW_S) -> "LinkRate":
        """What it does in so many seconds from a moment, which is 0 then. ValueError beyond its end."""
        end_s = begin_s + seconds
        if begin_s < 0 or end_s > self.end_s + 1e-9:
            raise ValueError(f"from {begin_s:g} s to {end_s:g} s there is no link that lasts {self.end_s:g} s")
        inside = (self.start_s > begin_s) & (self.start_s < end_s)
        start_s = np.append(0.0, self.start_s[inside] - begin_s)
        return LinkRate.of(start_s, np.append(self.at(begin_s), self.bps[inside]), seconds)


@dataclass(frozen=True, slots=True, eq=False)
class LinkTrace:
    """A recorded link, by the name of its file: its `rate`, and what else was recorded at the same moments.

    `rtt_s` (N,) is NaN where it was not measured; `cells` (N,) are empty where they were not.
    """

    name: str
    rate: LinkRate
    rtt_s: Array
    cells: tuple[str, ...]

    def window(self, seed: int, seconds: float = WINDOW_S) -> tuple[float, LinkRate]:
        """Where a window of so many seconds begins, drawn by `seed`, and the window. UsageError for a short trace."""
        if self.rate.end_s < seconds:
            raise UsageError(f"{self.name} lasts {self.rate.end_s:g} s: a window takes {seconds:g} s.")
        draw = np.random.default_rng([seed, crc32(self.name.encode())])
        begin_s = float(np.floor(draw.uniform(0, self.rate.end_s - seconds)))
        return begin_s, self.rate.window(begin_s, seconds)


def read_link_trace(path: Path) -> LinkTrace:
    """The trace in a file of rows `t_s,down_mbps,...,rtt_ms,cell_id,...`; empty is not measured.

    A row holds until the next one, the last as long as the one before. Raises UsageError.
    """
    rows = read_table(path, COLUMNS)
    try:
        times = np.array([float(row["t_s"]) for row in rows])
        bps = np.array([float(row["down_mbps"]) for row in rows]) * BPS_PER_MBPS
        rtt_s = np.array([float(row["rtt_ms"] or "nan") for row in rows]) / 1e3
        start_s = times - times[0]
        end_s = float(start_s[-1] + (start_s[-1] - start_s[-2]))
        rate = LinkRate.of(start_s, without_artefacts(start_s, bps) if path.name.startswith(ARTEFACTS) else bps, end_s)
    except (ValueError, IndexError) as error:
        raise UsageError(f"{path} holds no link trace: its rows need numbers, and times that rise.") from error
    return LinkTrace(path.stem, rate, rtt_s, tuple(row["cell_id"] or "" for row in rows))


def without_artefacts(start_s: Array, bps: Array) -> Array:
    """Rates (N,) with the one before held over zeros of at most `ARTEFACT_S`, which are the logger's."""
    found = bps.copy()
    changes = np.flatnonzero(np.diff(found == 0)) + 1
    for begin, end in pairwise(changes):
        if found[begin] == 0 and start_s[end] - start_s[begin] <= ARTEFACT_S:
            found[begin:end] = found[begin - 1]
    return found


def read_bench_list(folder: Path) -> list[Path]:
    """The files that bench_list.txt of a folder of traces names. Raises UsageError."""
    try:
        names = (folder / "bench_list.txt").read_text("utf-8").split()
    except OSError as error:
        raise UsageError(f"{folder} holds no bench_list.txt: name the shared folder by COMOE_SHARED.") from error
    return [folder / name for name in names]


def read_table(path: Path, columns: set[str]) -> list[dict[str, str]]:
    """The rows of a CSV file with a header that has at least these columns. Raises UsageError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            named, rows = {*(reader.fieldnames or ())}, list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read: name a CSV file.") from error
    missing = sorted(columns - named)
    if missing or not rows:
        raise UsageError(f"{path} has no rows, or no column {', '.join(missing) or 'with any'}.")
    return rows
