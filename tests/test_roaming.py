"""Several nodes on real sockets: one serves, a dead one is left, and a link comes back."""

from threading import Timer
from time import monotonic, sleep

import pytest
from nodes import Node, eventually, nodes

from comoe.net.handover import DEFAULT_RULE, Event
from comoe.net.probe import Probe
from comoe.net.roaming import Roaming
from comoe.types import RemoteUnavailable, UsageError


def roaming(*served: Node, told: list[Event] | None = None) -> Roaming:
    heard: list[Event] = [] if told is None else told
    return Roaming([(node.url, Probe(node.url, 0.5)) for node in served], heard.append)


def test_one_node_serves_and_all_links_are_measured() -> None:
    with nodes(2) as found, roaming(*found) as links:
        assert eventually(lambda: all(state.rtt_s is not None for state in links.links().values()))
        assert links.serving in {node.url for node in found}
        with links.reading() as (node, came):
            came(1000)
            came(1000)
        assert node == links.serving and links.links()[node].rate_bps > 0


def test_a_node_that_dies_is_left_for_the_other_and_without_any_there_is_no_link_until_one_is_back() -> None:
    told: list[Event] = []
    with nodes(2) as found, roaming(*found, told=told) as links:
        assert eventually(lambda: all(state.rtt_s is not None for state in links.links().values()))
        first = next(node for node in found if node.url == links.serving)
        other = next(node for node in found if node is not first)
        first.close()
        assert eventually(lambda: links.serving == other.url)
        port = other.port
        other.close()
        assert eventually(lambda: links.serving is None)
        with pytest.raises(RemoteUnavailable, match="no edge node"), links.reading():
            pass
        again = Node(port)
        try:
            assert eventually(lambda: links.serving == again.url)
        finally:
            again.close()
        assert links.counts["lost"] >= 2 and links.counts["back"] >= 1
        assert [event.kind for event in told] == [event.kind for event in links.log]


def test_a_node_that_answers_probes_but_sends_nothing_is_stalled() -> None:
    with nodes(2) as found, roaming(*found) as links:
        assert eventually(lambda: all(state.rtt_s is not None for state in links.links().values()))
        with links.reading() as (stalled, _):
            assert eventually(lambda: links.counts["stalled"] == 1)
            assert links.serving not in (stalled, None)


class Scripted:
    """A node that takes as long as `rtt_s` says."""

    def __init__(self, rtt_s: float) -> None:
        self.rtt_s, self.asked, self.came = rtt_s, 0, 0

    def ask(self) -> float:
        self.asked += 1
        return self.rtt_s

    def close(self) -> None:
        pass


def test_a_node_that_sends_nothing_yet_but_to_which_bytes_come_is_not_stalled() -> None:
    with nodes(1) as [node], roaming(node) as links:
        assert eventually(lambda: links.serving == node.url)
        with links.reading():
            until_s = monotonic() + 3 * DEFAULT_RULE.stalled_s
            while monotonic() < until_s:
                node.came += 1
                sleep(0.05)
            assert not links.counts["stalled"] and links.serving == node.url
            assert eventually(lambda: links.counts["stalled"] == 1)


@pytest.mark.parametrize("gentle", [True, False])
def test_that_a_node_went_away_shows_while_it_is_read_from_gently(gentle: bool) -> None:
    probe = Scripted(0.02)
    with Roaming([("a", probe)], gentle=lambda: gentle) as links:
        assert eventually(lambda: links.serving == "a")
        with links.reading() as (_, came):
            probe.rtt_s, asked = 0.1, probe.asked

            def noticed() -> bool:
                came(1)
                rtt_s = links.links()["a"].rtt_s
                assert rtt_s is not None
                return probe.asked > asked + 8 if not gentle else rtt_s > 0.07

            assert eventually(noticed)
            assert links.links()["a"].rtt_s == pytest.approx(0.1 if gentle else 0.02, abs=0.03)


def test_nodes_may_be_awaited_where_the_link_is_gone_at_first() -> None:
    with nodes(1) as [node]:
        node.answering.clear()
        with Roaming([(node.url, Probe(node.url, 0.2))]) as links:
            with pytest.raises(RemoteUnavailable, match="does not answer"):
                links.first(5.0)
            Timer(1.0, node.answering.set).start()
            links.first(30.0, awaited=True)
            assert links.there == [node.url]
        node.answering.clear()
        with Roaming([(node.url, Probe(node.url, 0.2))]) as links, pytest.raises(RemoteUnavailable):
            links.first(0.5, awaited=True)
        node.answering.set()


def test_a_request_that_breaks_counts_against_the_link() -> None:
    with nodes(1) as found, roaming(*found) as links:
        assert eventually(lambda: links.serving is not None)
        with pytest.raises(RemoteUnavailable), links.reading():
            raise RemoteUnavailable("broken")
        assert links.links()[found[0].url].loss > 0


def test_closing_twice_is_closing_once_and_names_are_wanted_once() -> None:
    with nodes(1) as [node]:
        links = roaming(node)
        links.close()
        links.close()
        with pytest.raises(UsageError, match="once"):
            roaming(node, node)
    with pytest.raises(UsageError, match="once"):
        Roaming([])


def test_once_they_are_closed_none_serves() -> None:
    with nodes(1) as found:
        with roaming(*found) as links:
            assert eventually(lambda: links.serving is not None)
        assert links.serving is None
