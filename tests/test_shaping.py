"""Shaped wires on a real kernel: what comes through is what the recorded link says."""

import sys

import numpy as np
import pytest

from comoe.sim.traces import BPS_PER_MBPS, LinkRate
from comoe.testbed.namespaces import Host, Wire
from comoe.testbed.shaping import Shaped, shape

pytestmark = pytest.mark.network

PORT = 9000

SOURCE = f"""
import socket
server = socket.create_server(("0.0.0.0", {PORT}))
print("on", flush=True)
one, _ = server.accept()
try:
    while True:
        one.sendall(bytes(65536))
except OSError:
    pass
"""
SINK = """
import socket, sys, time
one = socket.create_connection((sys.argv[1], int(sys.argv[2])), 30)
one.settimeout(0.1)
begun, end = time.monotonic(), float(sys.argv[3])
while (now := time.monotonic() - begun) < end:
    try:
        print(now, len(one.recv(65536)))
    except TimeoutError:
        pass
"""


def measured(wire: Wire, seconds: float) -> np.ndarray:
    """(when, bytes) of every piece that came in so many seconds."""
    server = wire.far_host.start([sys.executable, "-c", SOURCE], stdout=-1)
    assert server.stdout is not None and server.stdout.readline() == "on\n"
    words = [sys.executable, "-c", SINK, wire.far, str(PORT), str(seconds)]
    found = wire.near_host.run(words, 60 + seconds)
    server.kill()
    server.wait()
    server.stdout.close()
    assert found.returncode == 0, found.stderr
    return np.array([line.split() for line in found.stdout.splitlines()], np.float64).reshape(-1, 2)


@pytest.mark.parametrize("told", [(8.0, 2.0, 16.0, 40.0), (0.6, 0.4, 0.8, 0.5)])
def test_a_shaped_wire_carries_what_the_recorded_link_says(network: None, told: tuple[float, ...]) -> None:
    mbps = np.array(told)
    rate = LinkRate.of(np.array([0.0, 3.0, 6.0, 9.0]), mbps * BPS_PER_MBPS, 12.0)
    with Host("device") as device, Host("edge") as edge:
        wire = Wire(device, edge)
        with Shaped(edge, wire.far_interface, rate) as shaped:
            late_s = shaped.now_s
            pieces = measured(wire, 12.0)
    late_s += 0.3  # a Python is started in between
    for at, expected in enumerate(mbps * BPS_PER_MBPS):
        begin_s, end_s = 3.0 * at + 0.7 - late_s, 3.0 * at + 2.7 - late_s
        inside = (pieces[:, 0] >= begin_s) & (pieces[:, 0] < end_s)
        assert pieces[inside, 1].sum() / 2.0 == pytest.approx(expected, rel=0.2), (at, late_s)


def test_a_cut_wire_carries_nothing(network: None) -> None:
    with Host("device") as device, Host("edge") as edge:
        wire = Wire(device, edge)
        shape(edge, wire.far_interface, 0.0)
        script = f"import socket; socket.create_connection(({wire.far!r}, {PORT}), 1)"
        assert "timed out" in device.run([sys.executable, "-c", script], 30).stderr
        shape(edge, wire.far_interface, 10 * BPS_PER_MBPS)
        assert measured(wire, 1.0)[:, 1].sum() > 0
