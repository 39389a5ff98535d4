"""A device, two edge nodes and an origin as real processes."""

import sys
from pathlib import Path

import pytest

from comoe.sim.traces import BPS_PER_MBPS
from comoe.testbed.site import SERVER_PORT, Site, Trip, eventually

pytestmark = pytest.mark.network

GET = """
import sys, time, urllib.request
start = time.monotonic()
data = urllib.request.urlopen(sys.argv[1], timeout=10).read()
print(len(data), time.monotonic() - start)
"""


def server(folder: Path) -> list[str | Path]:
    return [sys.executable, "-m", "http.server", str(SERVER_PORT), "--directory", folder]


def test_the_device_reaches_every_node_at_its_round_trip_and_one_dies(network: None, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(bytes(100_000))
    with Site([Trip(0.02), Trip(0.15)], Trip(0.05)) as site:
        for node in (*site.edges, site.origin):
            node.serve(server(tmp_path), stderr=-3)

        def get(url: str) -> tuple[int, float]:
            found = site.device.run([sys.executable, "-c", GET, f"{url}/blob"], 60)
            if found.returncode:
                raise OSError(found.stderr)
            nbytes, seconds = found.stdout.split()
            return int(nbytes), float(seconds)

        near, far = get(site.edges[0].url), get(site.edges[1].url)
        assert near[0] == far[0] == 100_000 and near[1] >= 0.04 and far[1] >= 0.3
        site.edges[0].move(Trip(0.2))
        eventually(lambda: get(site.edges[0].url)[1] >= 0.4)
        found = site.edges[0].host.run([sys.executable, "-c", GET, f"{site.origin_url(0)}/blob"], 60)
        assert found.stdout.startswith("100000")
        site.edges[1].mend(0.2 * BPS_PER_MBPS)
        assert get(site.edges[1].url)[1] > 2
        site.edges[0].kill()
        with pytest.raises(OSError, match=r"Remote end closed|refused|reset"):
            get(site.edges[0].url)
        assert get(site.origin.url)[0] == 100_000


def test_a_server_that_ends_at_once_is_told(network: None) -> None:
    with Site([], Trip()) as site, pytest.raises(OSError, match="ended with 3"):
        site.origin.serve([sys.executable, "-c", "raise SystemExit(3)"])
