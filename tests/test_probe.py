"""A question to a node, over real sockets."""

import socket

import pytest
from nodes import nodes

from comoe.net.health import came_in
from comoe.net.probe import Probe
from comoe.types import RemoteUnavailable, UsageError


def test_a_node_that_answers_has_a_round_trip() -> None:
    with nodes(1) as [node]:
        probe = Probe(node.url, 5.0)
        assert 0 < probe.ask() < 5 and 0 < probe.ask() < 5
        probe.close()
        assert probe.ask() > 0
        probe.close()


def test_a_node_that_drains_or_is_silent_or_gone_is_unavailable() -> None:
    with nodes(1) as [node]:
        probe = Probe(node.url, 0.3)
        node.status = 503
        with pytest.raises(RemoteUnavailable, match="does not answer"):
            probe.ask()
        node.status = 200
        assert probe.ask() > 0
        node.answering.clear()
        with pytest.raises(RemoteUnavailable):
            probe.ask()
        node.answering.set()
        assert probe.ask() > 0
    probe.close()
    with socket.socket() as bound, pytest.raises(RemoteUnavailable):
        bound.bind(("127.0.0.1", 0))
        Probe(f"http://127.0.0.1:{bound.getsockname()[1]}", 0.3).ask()


@pytest.mark.parametrize("url", ["", "edge:80", "ftp://edge", "http://", "https:///x"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is no edge node"):
        Probe(url, 1.0)


@pytest.mark.parametrize("told", [b"", b"{}", b"[]", b'{"came": "x"}', b'{"came": 1e999}', b'{"came": {}}', b"\xff"])
def test_a_node_that_does_not_say_what_came_to_it_says_nothing_came(told: bytes) -> None:
    assert came_in(told) == 0
