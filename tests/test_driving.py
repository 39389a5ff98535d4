"""A device and an edge node as real processes, by the harness of the live benchmarks."""

import os
from pathlib import Path
from time import monotonic

import pytest

from comoe.testbed.driving import QUIET, Device, at_moments, serve
from comoe.testbed.site import Site, Trip

SECONDS = 8.0


@pytest.mark.network
def test_a_device_decodes_from_an_edge_node_and_its_end_is_the_windows(
    network: None, self_contained: Path, tmp_path: Path
) -> None:
    env = {**os.environ, **QUIET}
    with Site([Trip(0.01)], Trip()) as site:
        (node,) = site.edges
        serve(node, self_contained, tmp_path / "node", env)
        orders = {
            "pack": f"{node.url}/packs/{self_contained.name}",
            "cache": str(tmp_path / "cache"),
            "cache_bytes": None,
            "load": {"expert_memory": "60%", "edges": [node.url]},
            "remote_only": True,
            "stays": False,
            "piece_nbytes": 4096,
            "turns": [[[40], list(range(41, 60))]],
            "seconds": SECONDS,
            "reader_s": 0.1,
        }
        device = Device(site.device, orders, tmp_path, env)
        begun_s = device.begin()
        lines = device.end()
        assert SECONDS <= monotonic() - begun_s < 2 * SECONDS
    *tokens, last = lines
    assert tokens and last["stats"]["edge_runs"] > 0
    assert last["links"][node.url]["rtt_s"] >= 0.01
    assert ["attached", node.url] in [[event[0], event[2]] for event in last["events"]]


@pytest.mark.network
def test_a_device_that_fails_says_why(network: None, tmp_path: Path) -> None:
    with Site([], Trip()) as site, pytest.raises(OSError, match="the device ended with 1"):
        Device(
            site.device,
            {"seconds": 1.0, "pack": str(tmp_path), "cache": str(tmp_path), "cache_bytes": None, "piece_nbytes": 4096},
            tmp_path,
            dict(os.environ),
        )


def test_things_happen_at_their_moments_in_order() -> None:
    happened: list[tuple[str, float]] = []
    begun_s = monotonic()
    moments = [
        (0.2, lambda: happened.append(("later", monotonic()))),
        (0.1, lambda: happened.append(("first", monotonic()))),
    ]
    at_moments(begun_s, moments)
    assert [name for name, _ in happened] == ["first", "later"]
    assert happened[0][1] >= begun_s + 0.1 and happened[1][1] >= begun_s + 0.2
