"""Hosts and wires on a real kernel."""

import sys

import pytest

from comoe.testbed import namespaces
from comoe.testbed.namespaces import Host, Wire, tool

pytestmark = pytest.mark.network


def test_hosts_see_each_other_over_a_wire_alone(network: None) -> None:
    with Host("a") as one, Host("b") as other:
        wire = Wire(one, other)
        assert one.run(["ping", "-c1", "-W5", wire.far], 30).returncode == 0 if _has_ping() else True
        found = one.run([sys.executable, "-c", "import socket; print([name for _, name in socket.if_nameindex()])"], 30)
        assert wire.near_interface in found.stdout and wire.far_interface not in found.stdout


def _has_ping() -> bool:
    try:
        tool("which", "ping")
    except OSError:
        return False
    return True


def test_what_runs_on_a_host_ends_with_it(network: None) -> None:
    with Host("a") as host:
        process = host.start([sys.executable, "-c", "import time; print('on', flush=True); time.sleep(600)"], stdout=-1)
        assert process.stdout is not None and process.stdout.readline() == "on\n"
        assert process.pid in host.pids()
        name = host.name
    assert process.wait(30) != 0
    process.stdout.close()
    assert name not in tool("ip", "netns", "list")


def test_a_tool_that_fails_says_so(network: None) -> None:
    with Host("a") as host, pytest.raises(OSError, match="ip link set nowhere up"):
        host.tool("ip", "link", "set", "nowhere", "up")


def test_without_root_namespaces_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces.os, "geteuid", lambda: 1000)
    assert namespaces.missing() == "needs root for network namespaces"
