"""The edge nodes of a session: who serves sends the pack's bytes, others take over, and hear what is hot."""

import json
import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter

import pytest
from edges import running, until
from models import greedy
from sources import read
from webs import Web, serving

from comoe.memory.arena import page_buffer
from comoe.net.address import Access
from comoe.net.breaker import Throttle
from comoe.net.handover import Rule
from comoe.net.nodes import LEAST_PIECE, EdgeNodes
from comoe.net.probe import Probe
from comoe.net.remote import RemotePack
from comoe.net.remote_run import Node, manifest_hash
from comoe.net.roaming import Roaming
from comoe.runtime.load import load
from comoe.store.pack import Pack
from comoe.types import CorruptBlob, RemoteUnavailable, UsageError


@contextmanager
def near(published: Path, tmp_path: Path, name: str) -> Iterator[Web]:
    """A web server that stands for an edge node with the pack, of which it has a copy of its own."""
    folder = tmp_path / name
    shutil.copytree(published, folder / "packs" / "tiny")
    (folder / "health").write_text(json.dumps({"packs": {"tiny": manifest_hash(published)}}))
    with serving(folder) as web:
        yield web


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def roaming(
    stack: ExitStack, origin: Web, published: Path, tmp_path: Path, *webs: Web, slash: str = ""
) -> tuple[RemotePack, EdgeNodes]:
    """The pack behind the origin's URL, read from nodes."""
    pack = RemotePack(origin.url, Access(tmp_path / "cache", 0))
    nodes = EdgeNodes([Node(f"{web.url}{slash}") for web in webs], manifest_hash(published))
    pack.nodes = nodes
    stack.callback(pack.close)
    stack.callback(nodes.close)
    return pack, nodes


def edged(stack: ExitStack, published: Path, tmp_path: Path) -> tuple[Web, Web, RemotePack, EdgeNodes]:
    """An origin, a node near it, and the pack read from both."""
    origin = stack.enter_context(serving(published))
    edge = stack.enter_context(near(published, tmp_path, "edge"))
    return origin, edge, *roaming(stack, origin, published, tmp_path, edge)


def source_of(pack: RemotePack) -> str:
    blob = pack.blob_ids()[0]
    return pack.read(blob, memoryview(bytearray(pack.nbytes(blob) + 8192)))


def test_bytes_come_from_the_node_that_serves_and_none_from_the_origin(
    stack: ExitStack, published: Path, tmp_path: Path
) -> None:
    local = Pack(published)
    origin = stack.enter_context(serving(published))
    edge = stack.enter_context(near(published, tmp_path, "edge"))
    pack, nodes = roaming(stack, origin, published, tmp_path, edge, slash="/")
    origin.asked.clear()
    for blob in pack.blob_ids():
        assert read(pack, blob) == local.read_bytes(blob)
    assert not origin.asked and nodes.serving == edge.url
    assert source_of(pack) == "edge"
    rate_bps, trip_s = pack.link_now()
    assert nodes.link is not None and rate_bps > 0 and trip_s > 0


def test_while_the_node_runs_experts_bytes_come_in_pieces_one_at_a_time(
    stack: ExitStack, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comoe.net.nodes.PIECE_S", 0.0)
    _, edge, pack, nodes = edged(stack, published, tmp_path)
    blob = max(pack.blob_ids(), key=pack.nbytes)
    right = Pack(published).read_bytes(blob)
    for runs, pieces in ((False, 1), (True, -(-pack.nbytes(blob) // LEAST_PIECE))):
        nodes.runs = lambda runs=runs: runs
        edge.asked.clear()
        assert read(pack, blob) == right
        assert len([path for path, _ in edge.asked if "packs" in path]) == pieces
    assert pieces > 1
    with nodes._turn, ThreadPoolExecutor(1) as pool:
        edge.asked.clear()
        reading = pool.submit(read, pack, blob)
        with pytest.raises(TimeoutError):
            reading.result(0.2)
        assert not [path for path, _ in edge.asked if "packs" in path]
        nodes._turn.release()
        assert reading.result(10) == right
        nodes._turn.acquire()


def test_while_no_node_serves_the_origin_leaves_room_for_probes(
    stack: ExitStack, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comoe.net.nodes.SEARCHING_S", 0.0)
    origin, edge, pack, nodes = edged(stack, published, tmp_path)
    blob = max(pack.blob_ids(), key=pack.nbytes)
    right = Pack(published).read_bytes(blob)
    edge.leave_after = 0
    until(lambda: nodes.serving is None)
    pack.link_now()
    origin.asked.clear()
    assert read(pack, blob) == right
    assert len(origin.asked) == -(-pack.nbytes(blob) // LEAST_PIECE) > 1
    monkeypatch.setattr("comoe.net.nodes.SEARCHING_S", 0.2)
    with nodes._searching, ThreadPoolExecutor(1) as pool:  # as long as a piece may take, not as its origin does
        origin.asked.clear()
        reading = pool.submit(read, pack, blob)
        with pytest.raises(TimeoutError):
            reading.result(0.2)
        assert not origin.asked
        assert reading.result(10) == right
    alone: list[bool] = []
    fetch = pack._origin.fetch
    monkeypatch.setattr(pack._origin, "fetch", lambda *of: (alone.append(nodes._searching.locked()), fetch(*of)))
    assert read(pack, blob) == right and alone and all(alone)
    assert not nodes._searching.locked()


def test_a_range_that_breaks_goes_on_at_the_origin(stack: ExitStack, published: Path, tmp_path: Path) -> None:
    origin, edge, pack, _ = edged(stack, published, tmp_path)
    edge.cut, origin.asked = 1, []
    assert source_of(pack) == "origin"
    assert len(origin.asked) == 1
    assert source_of(pack) == "edge"


def test_a_node_that_sends_other_bytes_changes_nothing(stack: ExitStack, published: Path, tmp_path: Path) -> None:
    origin, edge, pack, _ = edged(stack, published, tmp_path)
    for file in {part.file for layer in pack.manifest.layers for part in layer.parts.values()}:
        path = edge.folder / "packs" / "tiny" / str(file)
        path.write_bytes(bytes(len(path.read_bytes())))
    assert source_of(pack) == "origin"
    shutil.rmtree(origin.folder)
    shutil.copytree(edge.folder / "packs" / "tiny", origin.folder)
    with pytest.raises(CorruptBlob):
        source_of(pack)


def test_another_node_takes_over_and_every_event_is_counted_and_logged(
    stack: ExitStack, published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "comoe")
    origin = stack.enter_context(serving(published))
    webs = [stack.enter_context(near(published, tmp_path, name)) for name in ("one", "two")]
    pack, nodes = roaming(stack, origin, published, tmp_path, *webs)
    first = next(web for web in webs if web.url == nodes.serving)
    other = next(web for web in webs if web is not first)
    first.leave_after = 0
    until(lambda: nodes.serving == other.url)
    other.asked.clear()
    assert source_of(pack) == "edge" and any("packs" in path for path, _ in other.asked)
    other.leave_after = 0
    until(lambda: nodes.serving is None)
    assert nodes.link is None and source_of(pack) == "origin"
    first.leave_after = None
    until(lambda: nodes.serving == first.url)
    assert {"attached", "lost", "handover", "back"} <= {kind for kind, count in nodes.counts.items() if count}
    assert [event.kind for event in nodes.log].count("back") == nodes.counts["back"] == 1
    assert f"edge node {other.url} serves, after {first.url}." in caplog.messages


def test_who_may_serve_next_is_told_what_is_hot(published: Path) -> None:
    with running(published) as edge, EdgeNodes([Node(edge.url)], manifest_hash(published)) as nodes:
        nodes._announce(edge.url)
        assert nodes.announced.experts == 0
        nodes.hot = lambda: [(0, 1, "exact"), (0, 0, "exact")]
        nodes._announce(edge.url)
        until(lambda: edge.metric("comoe_edge_hot_experts_total") == 2)
        assert nodes.announced == (2, 0)
        nodes.hot = lambda: [(99, 1, "exact")]
        nodes._announce(edge.url)
        assert nodes.announced == (2, 1)


def test_nodes_of_another_pack_or_none_are_refused(published: Path, tmp_path: Path) -> None:
    with near(published, tmp_path, "edge") as web:
        with pytest.raises(RemoteUnavailable, match="does not serve this pack"):
            EdgeNodes([Node(web.url)], "0" * 64)
        with pytest.raises(UsageError, match="once"):
            EdgeNodes([Node(web.url), Node(web.url)], "0" * 64)
        with serving(published) as other, pytest.raises(RemoteUnavailable, match="does not answer"):
            EdgeNodes([Node(other.url)], manifest_hash(published))
        (web.folder / "health").write_text("[]")
        with pytest.raises(RemoteUnavailable, match="no health to tell"):
            EdgeNodes([Node(web.url)], manifest_hash(published))


def test_a_node_out_of_reach_is_no_reason_to_refuse_where_another_answers(published: Path, tmp_path: Path) -> None:
    with near(published, tmp_path, "edge") as web:
        gone, here = Node("http://127.0.0.1:1"), Node(web.url)
        nodes = EdgeNodes([gone, here], manifest_hash(published))
        assert nodes.there == [web.url] and nodes.serving == web.url
        nodes.close()


def test_a_token_that_a_node_does_not_know_is_said(stack: ExitStack, published: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a" * 20)
    edge = stack.enter_context(running(published, "--token-file", token))
    here = stack.enter_context(near(published, tmp_path, "near"))
    for nodes in ([Node(edge.url, "b" * 20)], [Node(edge.url)], [Node(here.url), Node(edge.url)]):
        for awaited in (False, True):
            with pytest.raises(UsageError, match=f"{edge.url} does not know this token"):
                EdgeNodes(nodes, manifest_hash(published), awaited=awaited)
    with EdgeNodes([Node(edge.url, "a" * 20)], manifest_hash(published)) as found:
        assert found.serving == edge.url


def test_a_node_that_is_reached_later_and_does_not_know_the_token_never_serves(
    stack: ExitStack, published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    origin, edge = stack.enter_context(serving(published)), stack.enter_context(near(published, tmp_path, "edge"))
    edge.leave_after = 0
    other = stack.enter_context(near(published, tmp_path, "other"))
    _, nodes = roaming(stack, origin, published, tmp_path, edge, other)
    edge.token = "another"
    edge.leave_after = None
    until(lambda: f"{edge.url} does not know this token" in caplog.text)
    assert nodes.there == [other.url]
    other.leave_after = 0
    until(lambda: nodes.serving is None)


def test_who_served_another_pack_at_first_is_asked_for_its_token_too(published: Path, tmp_path: Path) -> None:
    with near(published, tmp_path, "edge") as edge, closing(Probe(edge.url, 5.0, manifest_hash(published))) as probe:
        health, edge.token = (edge.folder / "health").read_text(), "another"
        (edge.folder / "health").write_text('{"packs": {}}')
        with pytest.raises(RemoteUnavailable):
            probe.ask()
        (edge.folder / "health").write_text(health)
        with pytest.raises(UsageError, match="token"):
            probe.ask()


def test_a_node_that_refuses_what_it_gave_before_is_one_that_fails(
    stack: ExitStack, published: Path, tmp_path: Path
) -> None:
    _, edge, pack, nodes = edged(stack, published, tmp_path)
    blobs = pack.blob_ids()[:2]
    tiers = []
    with closing(Pack(published)) as local:
        for blob in blobs:
            into = page_buffer(pack.nbytes(blob))
            tiers.append(pack.read(blob, into))
            assert bytes(into[: pack.nbytes(blob)]) == read(local, blob)
            edge.token = "another"
    assert tiers == ["edge", "origin"]
    until(lambda: nodes.serving is None)


def test_all_that_comes_over_a_link_is_held_to_what_it_carries_together(
    stack: ExitStack, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[Throttle, int]] = []
    monkeypatch.setattr(Throttle, "take", lambda self, nbytes: taken.append((self, nbytes)))
    origin, edge = stack.enter_context(serving(published)), stack.enter_context(running(published))
    access = Access(tmp_path / "cache", 0, link=(1e9, 0.001))
    model = load(origin.url, expert_memory="20%", edges=[edge.url], prefetch="off", access=access)
    with model.comoe as handle:
        for stop in (lambda: None, handle.nodes.close):  # then what is missed comes from the origin
            stop()
            handle.begin_request()
            before = len(taken)
            greedy(model, 8)
            came = handle.stats()["bytes_read"]
            assert sum(nbytes for _, nbytes in taken[before:]) >= sum(came.values()) > 0
        assert came["origin"] > 0
        before = len(taken)
        with closing(handle.nodes.clients(perf_counter)[0]) as client:
            client.announce([(0, 0, "exact")])
        handle.nodes.hot = lambda: [(0, 0, "exact")]
        handle.nodes._announce(edge.url)
        assert len(taken) >= before + 4
    assert len({throttle for throttle, _ in taken}) == 1


def test_an_exact_answer_over_the_network_is_the_same_though_the_node_that_serves_dies(
    stack: ExitStack, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a node that is gone must be lost before it can be but the worse one
    monkeypatch.setattr("comoe.net.nodes.Roaming", partial(Roaming, rule=Rule(trigger_s=60.0)))
    local = load(published, expert_memory="500%", prefetch="off")
    with local.comoe:
        wanted = greedy(local, 24)
    origin = stack.enter_context(serving(published))
    edges = [stack.enter_context(running(published)) for _ in range(2)]
    urls = [edge.url for edge in edges]
    model = load(origin.url, expert_memory="20%", edges=urls, prefetch="off", access=Access(tmp_path / "cache", 0))
    with model.comoe as handle:
        first = next(edge for edge in edges if edge.url == handle.stats()["edge"])
        assert greedy(model, 24) == wanted
        assert handle.stats()["bytes_read"]["edge"] > 0
        first.process.kill()
        until(lambda: handle.stats()["edge"] not in (first.url, None))
        handle.begin_request()
        assert greedy(model, 24) == wanted
        assert handle.stats()["edge_events"]["lost"] == handle.stats()["edge_events"]["handover"] == 1
