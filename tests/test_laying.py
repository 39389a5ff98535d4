"""A floor that comes while the model runs already: edge nodes run what has none yet."""

from collections.abc import Sequence
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from edges import running, until
from webs import serving

from comoe.memory.cache import BlobCache
from comoe.net import breaker, origin
from comoe.net.address import Access
from comoe.net.remote import RemotePack
from comoe.runtime.edgetier import Link
from comoe.runtime.laying import LONGEST_REST_S, Laying
from comoe.runtime.load import load
from comoe.types import BlobId, CorruptBlob, RemoteUnavailable

IDS = torch.arange(6)[None]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Event:
    """No floor comes before it is set, or the cache is closed."""
    gate, hold = Event(), BlobCache.hold

    def held(self: BlobCache, blobs: Sequence[BlobId]) -> None:
        while not gate.wait(0.01) and not self._closed:
            pass
        hold(self, blobs)

    monkeypatch.setattr(BlobCache, "hold", held)
    return gate


def loaded(url: str, edge: str, tmp_path: Path) -> Any:
    access = Access(tmp_path / "cache", 0, link=(2e5, 0.01))
    return load(url, edges=[edge], access=access, expert_memory="500%", max_loss="500%", prefetch="off")


def test_an_answer_begins_before_the_floor_is_there_and_takes_it_once_it_is(
    published: Path, tmp_path: Path, gate: Event
) -> None:
    with serving(published) as web, running(published) as edge:
        model = loaded(web.url, edge.url, tmp_path)
        with model.comoe as handle:
            serving_ = handle._serving
            assert serving_.laying
            serving_.remote._read_s = lambda blob: 1.0  # so slow is the link
            model.generate(IDS, max_new_tokens=2, do_sample=False)
            assert serving_.laying and handle.stats()["edge_runs"] > 0
            gate.set()
            until(lambda: not serving_.laying)
            assert serving_.broken is None
            held = {blob for layer, entry in enumerate(serving_.manifest.layers) for expert in range(entry.num_experts)
                    for blob in serving_.way(layer, expert, handle.plan.floor).blobs}  # fmt: skip
            assert all(handle.cache.residents([(blob,) for blob in held]))


def test_where_a_node_is_late_the_floor_is_read_and_nothing_is_waited_for(
    published: Path, tmp_path: Path, gate: Event
) -> None:
    with serving(published) as web, running(published) as edge:
        model = loaded(web.url, edge.url, tmp_path)
        with model.comoe as handle:
            remote = handle._serving.remote
            remote._read_s = lambda blob: 1.0
            remote.outputs = lambda sent, dtype: [one.link.failed(remote._clock()) for one in sent.exchanges] and None
            model.generate(IDS, max_new_tokens=1, do_sample=False)
            stats = handle.stats()
            assert stats["edge_runs"] == 0 and stats["hit_rate"] < 1
            assert handle._serving.counts.link_failures > 0 and handle._serving.counts.link_wait_s == 0
            gate.set()


def test_a_session_begins_though_no_node_answers_in_time(published: Path, tmp_path: Path) -> None:
    """It is asked again meanwhile, and used once it does."""
    with serving(published) as web, running(published) as edge:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Link, "measure", unanswered)
            model = loaded(web.url, edge.url, tmp_path)
        with model.comoe as handle:
            remote = handle._serving.remote
            assert not remote.ready()
            remote._links[edge.url].rests_until_s = 0.0
            until(remote.ready)


def unanswered(link: Link, clock: object) -> None:
    raise RemoteUnavailable("no answer")


def test_without_a_node_that_runs_experts_the_floor_is_waited_for(published: Path, tmp_path: Path) -> None:
    with serving(published) as web:
        access = Access(tmp_path / "cache", 0)
        model = load(web.url, expert_memory="500%", max_loss="500%", prefetch="off", access=access)
        with model.comoe as handle:
            assert not handle._serving.laying and handle.cache.resident_bytes >= handle.plan.floor_bytes


def test_closing_does_not_wait_for_a_floor(published: Path, tmp_path: Path, gate: Event) -> None:
    with serving(published) as web, running(published) as edge:
        model = loaded(web.url, edge.url, tmp_path)
        assert model.comoe._serving.laying
        model.comoe.close()
        assert model.comoe._serving.broken is None


def test_it_goes_on_once_there_is_a_link_and_says_what_it_cannot_go_on_from(published: Path) -> None:
    model = load(published, expert_memory="500%", prefetch="off")
    with model.comoe as handle:
        serving_, failing = handle._serving, [RemoteUnavailable("gone"), RemoteUnavailable("gone")]
        held: list[Sequence[BlobId]] = []

        def hold(blobs: Sequence[BlobId]) -> None:
            if failing:
                raise failing.pop()
            held.append(blobs)

        serving_.cache.hold = hold
        blobs = handle.pack.blob_ids()[:20]
        Laying(serving_, blobs).start().join()
        assert [blob for few in held for blob in few] == blobs and not serving_.laying
        failing.append(CorruptBlob("damaged"))
        Laying(serving_, blobs).start().join()
        assert isinstance(serving_.broken, CorruptBlob)


def test_a_floor_that_takes_long_leaves_the_link_to_others_until_a_read_is_quick_again(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(published, expert_memory="500%", prefetch="off")
    with model.comoe as handle:
        now_s, took_s, rests = [0.0], [1.0, 0.5, 0.5, 0.01, 0.5, 0.01], []

        def hold(blobs: Sequence[BlobId]) -> None:
            now_s[0] += took_s.pop(0) if took_s else 0.01

        handle._serving.cache.hold = hold
        handle._serving.remote = SimpleNamespace(runs=True, close=lambda: None)
        monkeypatch.setattr("comoe.runtime.laying.monotonic", lambda: now_s[0])
        laying = Laying(handle._serving, handle.pack.blob_ids()[:50])
        laying._stop.wait = lambda seconds: rests.append(seconds)
        laying.start().join()
        assert rests == [LONGEST_REST_S, 1.5, 1.5] and not handle._serving.laying
        rests.clear()
        took_s[:] = [1.0] * 50
        handle._serving.remote.runs = False
        Laying(handle._serving, handle.pack.blob_ids()[:50]).start().join()
        assert not rests and len(took_s) == 50 - 7  # eight at a time
        handle._serving.remote = None


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_a_load_waits_for_its_floor_while_the_link_is_gone_as_long_as_it_may(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_bytes: int
) -> None:
    monkeypatch.setattr(origin, "BACKOFF_S", 0.01)
    monkeypatch.setattr(breaker, "COOL_S", 0.1)
    with serving(published) as web:
        pack = RemotePack(web.url, Access(tmp_path / "cache", cache_bytes, link=(1e8, 0.01)))
        web.fail = 5  # a read is tried three times
        with load(pack, expert_memory="500%", max_loss="500%", prefetch="off").comoe as handle:
            assert web.fail == 0
            assert handle.plan.floor is not None
            assert handle.stats()["link_wait_ms"] > 0
        monkeypatch.setattr("comoe.runtime.load.LINK_GONE_S", 0.0)
        pack = RemotePack(web.url, Access(tmp_path / "other", cache_bytes, link=(1e8, 0.01)))
        web.fail = 1000
        with pytest.raises(RemoteUnavailable):
            load(pack, expert_memory="500%", max_loss="500%", prefetch="off")
