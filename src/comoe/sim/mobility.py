"""Recorded drives: which base station served a phone every second, where it was, and which edge node is near that.

Edge nodes stand where several base stations are near each other; which do is reckoned here, for no record tells.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from comoe.sim.traces import Array, read_table
from comoe.types import UsageError

DRIVE_COLUMNS = {"traj_id", "t_s", "node_id", "cell_id", "rsrp_dbm", "lat", "lon"}
SITE_COLUMNS = {"node_id", "lat", "lon", "observations"}
ROUNDS = 50


class Stay(NamedTuple):
    """From `begin_s` to `end_s` of a drive, `node` serves."""

    node: str
    begin_s: float
    end_s: float


class Site(NamedTuple):
    """A base station, where it is estimated to be, and the seconds of drives in which it served."""

    node: str
    lat: float
    lon: float
    observations: int


@dataclass(frozen=True, slots=True, eq=False)
class Drive:
    """N moments of a drive: `t_s` (N,) from 0 on, the serving base station `nodes` (N,) and its cell, its strength
    `rsrp_dbm` (N,), NaN where it was not measured, and `place` (N, 2) as latitude and longitude."""

    name: str
    t_s: Array
    nodes: tuple[str, ...]
    cells: tuple[str, ...]
    rsrp_dbm: Array
    place: Array

    @property
    def end_s(self) -> float:
        """A second after the last moment."""
        return float(self.t_s[-1]) + 1.0

    def stays(self, edge_of: Mapping[str, str] | None = None) -> list[Stay]:
        """Who serves when: base stations, or the edge nodes that `edge_of` gives them; without gaps.

        A base station that `edge_of` does not know changes nothing.
        """
        named: list[tuple[float, str]] = []
        for at, node in zip(self.t_s.tolist(), self.nodes, strict=True):
            edge = node if edge_of is None else edge_of.get(node, named[-1][1] if named else None)
            if edge is not None:
                named.append((at, edge))
        starts = [(node, next(group)[0]) for node, group in groupby(named, key=lambda item: item[1])]
        ends = [begin_s for _, begin_s in starts[1:]] + [self.end_s]
        begins = [0.0, *(begin_s for _, begin_s in starts[1:])]
        return [Stay(node, begin_s, end_s) for (node, _), begin_s, end_s in zip(starts, begins, ends, strict=True)]


def read_drives(path: Path) -> list[Drive]:
    """All drives in a file, in its order; rows in order of time, the last of a moment counting. Raises UsageError."""
    rows = read_table(path, DRIVE_COLUMNS)
    grouped = [(name, list(group)) for name, group in groupby(rows, key=lambda row: row["traj_id"])]
    try:
        return [_drive(name, group) for name, group in grouped]
    except ValueError as error:
        raise UsageError(f"{path} holds no drives: its rows need numbers.") from error


def _drive(name: str, unordered: Sequence[Mapping[str, str]]) -> Drive:
    by_time = {float(row["t_s"]): row for row in unordered}  # loggers write a second late, or twice, now and then
    t_s = np.array(sorted(by_time))
    if not np.isfinite(t_s).all():
        raise ValueError("a moment is no number")
    rows = [by_time[at] for at in t_s.tolist()]
    return Drive(
        name=name,
        t_s=t_s - t_s[0],
        nodes=tuple(row["node_id"] for row in rows),
        cells=tuple(row["cell_id"] for row in rows),
        rsrp_dbm=np.array([float(row["rsrp_dbm"] or "nan") for row in rows]),
        place=np.array([[float(row["lat"] or "nan"), float(row["lon"] or "nan")] for row in rows]),
    )


def read_sites(path: Path) -> list[Site]:
    """The base stations in a file. Raises UsageError."""
    rows = read_table(path, SITE_COLUMNS)
    try:
        return [Site(row["node_id"], float(row["lat"]), float(row["lon"]), int(row["observations"])) for row in rows]
    except ValueError as error:
        raise UsageError(f"{path} holds no base stations: its rows need numbers.") from error


def edges_of(sites: Sequence[Site], number: int) -> dict[str, str]:
    """The edge node, `edge-0` on, of every base station: `number` of them, by k-means over where drives were served.

    The first centre is the busiest base station, each next one the farthest from all before: the same every time.
    ValueError for fewer base stations than edge nodes.
    """
    if not 0 < number <= len(sites):
        raise ValueError(f"{len(sites)} base stations cannot be shared by {number} edge nodes")
    place, weight = _plane(sites), np.array([float(site.observations) for site in sites])
    centres = place[[int(weight.argmax())]]
    while len(centres) < number:
        centres = np.vstack([centres, place[_distances(place, centres).min(1).argmax()]])
    for _ in range(ROUNDS):
        own = _distances(place, centres).argmin(1)
        centres = np.stack(
            [
                np.average(place[own == at], 0, weight[own == at]) if (own == at).any() else centre
                for at, centre in enumerate(centres)
            ]
        )
    own = _distances(place, centres).argmin(1)
    return {site.node: f"edge-{at}" for site, at in zip(sites, own.tolist(), strict=True)}


def _plane(sites: Sequence[Site]) -> Array:
    """Degrees (N, 2) as if all were as long: those of longitude are shorter by the cosine of the latitude."""
    degrees = np.array([(site.lat, site.lon) for site in sites])
    found: Array = degrees * (1.0, float(np.cos(np.radians(degrees[:, 0].mean()))))
    return found


def _distances(place: Array, centres: Array) -> npt.NDArray[np.float64]:
    found: Array = np.linalg.norm(place[:, None] - centres[None], axis=2)
    return found
