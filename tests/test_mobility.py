"""Recorded drives: who serves when, and which edge node is near."""

from itertools import pairwise
from pathlib import Path

import pytest

from comoe.sim.mobility import Site, Stay, edges_of, read_drives, read_sites
from comoe.types import UsageError

HEADER = "traj_id,t_s,lat,lon,speed_mps,cell_id,node_id,tech,rsrp_dbm\n"
ROWS = (
    "d,0,51.9,-8.4,0,1,A,LTE,-90\nd,2,51.9,-8.4,0,1,B,LTE,\nd,1,51.9,-8.4,0,1,A,LTE,-91\ne,5,51.9,-8.4,0,1,B,LTE,-9\n"
)


def drives_file(folder: Path, rows: str = ROWS) -> Path:
    path = folder / "drives.csv"
    path.write_text(HEADER + rows)
    return path


def test_drives_are_told_apart_and_put_in_order(tmp_path: Path) -> None:
    first, second = read_drives(drives_file(tmp_path))
    assert (first.name, first.nodes, first.t_s.tolist()) == ("d", ("A", "A", "B"), [0, 1, 2])
    assert (second.name, second.t_s.tolist(), second.end_s) == ("e", [0], 1)


def test_stays_follow_each_other_without_gaps(tmp_path: Path) -> None:
    drive = read_drives(drives_file(tmp_path))[0]
    assert drive.stays() == [Stay("A", 0, 2), Stay("B", 2, 3)]
    assert drive.stays({"A": "edge-0", "B": "edge-0"}) == [Stay("edge-0", 0, 3)]
    assert drive.stays({"B": "edge-1"}) == [Stay("edge-1", 0, 3)]
    assert drive.stays({"A": "edge-1"}) == [Stay("edge-1", 0, 3)]


@pytest.mark.parametrize("rows", ["", "d,x,1,1,0,1,A,LTE,-9\n", "d,nan,1,1,0,1,A,LTE,-9\n"])
def test_what_is_no_drive_is_refused(tmp_path: Path, rows: str) -> None:
    with pytest.raises(UsageError):
        read_drives(drives_file(tmp_path, rows))


def test_base_stations_that_are_near_share_an_edge_node() -> None:
    sites = [
        Site("a", 51.9, -8.4, 10),
        Site("b", 51.9, -8.41, 900),
        Site("c", 51.9, -8.6, 5),
        Site("d", 51.91, -8.6, 5),
    ]
    found = edges_of(sites, 2)
    assert found["a"] == found["b"] == "edge-0" and found["c"] == found["d"] == "edge-1"
    assert len({*edges_of(sites, 4).values()}) == 4
    for number in (0, 5):
        with pytest.raises(ValueError, match="cannot be shared"):
            edges_of(sites, number)


def test_sites_without_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sites.csv"
    path.write_text("node_id,lat,lon,observations\na,1,x,3\n")
    with pytest.raises(UsageError, match="no base stations"):
        read_sites(path)


def test_the_shared_drives_pass_two_edge_nodes(shared: Path) -> None:
    folder = shared / "data" / "mobility"
    drives = read_drives(folder / "traj_cork_drive_cells.csv")
    edge_of = edges_of(read_sites(folder / "sites_cork_estimated.csv"), 2)
    assert len(drives) == 30
    known = [node in edge_of for drive in drives for node in drive.nodes]
    assert sum(known) > 0.9 * len(known)
    for drive in drives:
        stays = drive.stays(edge_of)
        assert stays[0].begin_s == 0 and stays[-1].end_s == drive.end_s
        assert all(one.end_s == other.begin_s and one.node != other.node for one, other in pairwise(stays))
    assert sum(len(drive.stays(edge_of)) > 1 for drive in drives) >= 10
