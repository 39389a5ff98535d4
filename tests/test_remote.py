"""A pack behind a URL: as good as a local one, through cuts, kills, changes and a link that goes."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from time import monotonic

import pytest
from edges import until
from sources import SourceContract, read
from webs import Web, serving

from comoe.net import origin
from comoe.net.address import Access
from comoe.net.place import open_pack
from comoe.net.remote import RemotePack, mirror_name
from comoe.plan.pin import Pin
from comoe.store.pack import Pack
from comoe.store.source import Source
from comoe.types import BlobId, CorruptBlob, PackError, RemoteUnavailable


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "BACKOFF_S", 0.01)


@pytest.fixture
def web(published: Path) -> Iterator[Web]:
    with serving(published) as server:
        yield server


def opened(web: Web, tmp_path: Path, capacity: int = 1 << 30) -> RemotePack:
    return RemotePack(web.url, Access(tmp_path / "cache", capacity))


class TestRemotePack(SourceContract):
    @pytest.fixture
    def held(self, web: Web, published: Path, tmp_path: Path) -> tuple[Source, dict[BlobId, bytes]]:
        local = Pack(published)
        return opened(web, tmp_path), {blob: local.read_bytes(blob) for blob in local.blob_ids()}


def test_blobs_come_from_the_origin_once_and_then_from_flash(web: Web, tmp_path: Path) -> None:
    pack = opened(web, tmp_path)
    blob = pack.blob_ids()[0]
    into = bytearray(pack.nbytes(blob) + 8192)
    assert [pack.read(blob, memoryview(into)) for _ in range(3)] == ["origin", "flash", "flash"]
    pack.close()
    again = opened(web, tmp_path)
    asked = len(web.asked)
    assert again.read(blob, memoryview(into)) == "flash"
    assert len(web.asked) == asked


def test_what_is_brought_comes_by_few_ranges_and_is_counted_by_where_it_came_from(
    web: Web, published: Path, tmp_path: Path
) -> None:
    local, pack = Pack(published), opened(web, tmp_path)
    blobs = [blob for blob in pack.blob_ids() if blob.part == "exact"]
    web.asked.clear()
    pack.bring(blobs)
    asked = len(web.asked)
    assert 0 < asked < len(blobs) / 4
    into = bytearray(max(map(pack.nbytes, blobs)) + 8192)
    assert {pack.read(blob, memoryview(into)) for blob in blobs} == {"origin"}
    assert {pack.read(blob, memoryview(into)) for blob in blobs} == {"flash"}
    assert all(read(pack, blob) == local.read_bytes(blob) for blob in blobs)
    pack.bring(blobs)
    assert len(web.asked) == asked


def test_what_is_brought_wrong_is_read_again_and_what_flash_cannot_hold_is_not_brought(
    web: Web, tmp_path: Path
) -> None:
    pack = opened(web, tmp_path)
    blob, other = pack.blob_ids()[:2]
    path = Path(pack.pieces(blob).extents[0].file).name
    data = bytearray((web.folder / path).read_bytes())
    whole = bytes(data)
    data[pack.pieces(blob).extents[0].offset] ^= 1
    (web.folder / path).write_bytes(data)
    pack.bring([blob, other])
    (web.folder / path).write_bytes(whole)
    assert pack.tier(blob) == "origin" and pack.tier(other) == "flash"
    assert len(read(pack, blob)) == pack.nbytes(blob)
    pack.close()
    small = opened(web, tmp_path / "small", capacity=1)
    web.asked.clear()
    small.bring(small.blob_ids())
    assert not web.asked


def test_a_mirror_has_what_transformers_needs_and_no_blobs(web: Web, published: Path, tmp_path: Path) -> None:
    pack = opened(web, tmp_path)
    manifest = Pack(published).manifest
    assert {*manifest.files} <= {path.name for path in pack.folder.iterdir()}
    blob_files = {part.file for layer in manifest.layers for part in layer.parts.values()}
    assert not blob_files & {path.name for path in pack.folder.iterdir()}
    pack.check_files()


def test_a_second_start_asks_for_the_manifest_only(web: Web, tmp_path: Path) -> None:
    opened(web, tmp_path).close()
    web.asked.clear()
    opened(web, tmp_path)
    assert [path for path, _ in web.asked] == ["/comoe.json"]


def test_without_a_link_a_pack_that_was_seen_opens_and_reads_what_flash_has(web: Web, tmp_path: Path) -> None:
    pack = opened(web, tmp_path)
    first, other = pack.blob_ids()[:2]
    data = read(pack, first)
    pack.close()
    web.shutdown()
    web.server_close()
    alone = opened(web, tmp_path)
    assert read(alone, first) == data
    with pytest.raises(RemoteUnavailable):
        read(alone, other)
    with pytest.raises(RemoteUnavailable):
        open_pack(web.url, access=Access(cache=tmp_path / "empty"))


def test_a_tampered_blob_is_refused_and_not_kept(web: Web, published: Path, tmp_path: Path) -> None:
    pack = opened(web, tmp_path)
    blob = pack.blob_ids()[0]
    extent = pack.pieces(blob).extents[0]
    file = published / Path(extent.file).name
    data = bytearray(file.read_bytes())
    data[extent.offset] ^= 1
    file.write_bytes(data)
    for _ in range(2):
        with pytest.raises(CorruptBlob, match="other bytes than were packed"):
            read(pack, blob)
    data[extent.offset] ^= 1
    file.write_bytes(data)
    assert read(pack, blob) == Pack(published).read_bytes(blob)


def test_a_blob_that_flash_spoilt_comes_again(web: Web, tmp_path: Path) -> None:
    pack = opened(web, tmp_path)
    blob = pack.blob_ids()[0]
    data = read(pack, blob)
    pack.close()
    kept = tmp_path / "cache" / "blobs" / pack.pieces(blob).digest
    kept.write_bytes(bytes(len(data)))
    again = opened(web, tmp_path)
    assert read(again, blob) == data and kept.read_bytes() == data


@pytest.mark.parametrize("name", ["config.json", "dense.safetensors"])
def test_a_tampered_file_beside_the_blobs_is_refused(web: Web, published: Path, tmp_path: Path, name: str) -> None:
    path = published / name
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    with pytest.raises(CorruptBlob, match=name):
        opened(web, tmp_path)


def test_a_pack_that_is_published_anew_is_read_anew(web: Web, published: Path, tmp_path: Path) -> None:
    opened(web, tmp_path).close()
    manifest = json.loads((published / "comoe.json").read_text())
    (published / "comoe.json").write_text(json.dumps(manifest, indent=1))
    web.asked.clear()
    opened(web, tmp_path).close()
    assert [path for path, _ in web.asked] == ["/comoe.json"]
    (published / "comoe.json").write_text("{}")
    with pytest.raises(PackError):
        opened(web, tmp_path)


def test_a_pack_that_refers_to_a_checkpoint_is_refused_with_what_to_do(packed: Path, tmp_path: Path) -> None:
    with serving(packed) as web, pytest.raises(PackError, match="--self-contained"):
        opened(web, tmp_path)


def test_two_that_start_at_once_mirror_once(web: Web, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: opened(web, tmp_path), range(2))
    assert [path for path, _ in web.asked].count("/config.json") <= 2
    assert read(first, first.blob_ids()[0]) == read(second, first.blob_ids()[0])
    first.check_files()


def test_a_header_that_a_power_cut_spoilt_comes_again(web: Web, tmp_path: Path) -> None:
    pack = opened(web, tmp_path)
    header = next(pack.folder.glob("*.header"))
    header.write_bytes(header.read_bytes()[:40])
    pack.close()
    assert opened(web, tmp_path).blob_ids() == pack.blob_ids()


def test_an_address_without_a_pack_is_said(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    with serving(tmp_path / "served") as web, pytest.raises(PackError, match=r"has no file comoe\.json"):
        opened(web, tmp_path)


def test_names_of_mirrors_are_plain_and_differ() -> None:
    urls = ["http://host/a/b", "http://host/a-b", "https://host/a/b", "http://host/" + "x" * 300]
    names = {mirror_name(url) for url in urls}
    assert len(names) == 4 and all(len(name) < 100 and "/" not in name and "." not in name for name in names)


def test_a_folder_is_opened_as_ever(published: Path) -> None:
    assert type(open_pack(published)) is Pack and type(open_pack(str(published))) is Pack


def test_served_models_answer_alike(web: Web, published: Path, tmp_path: Path) -> None:
    import torch

    from comoe.runtime.load import load

    ids, answers, read_from, sent = torch.arange(12)[None], [], [], [0]
    for where in (str(published), web.url, web.url):
        with_memory = load(where, expert_memory="40%", access=Access(cache=tmp_path / "cache"))
        with with_memory.comoe as handle:
            answers.append(with_memory.generate(ids, max_new_tokens=8, do_sample=False).tolist())
            read_from.append({*handle.stats()["bytes_read"]})
        sent.append(web.sent)
    assert answers[0] == answers[1] == answers[2]
    assert read_from[0] == {"flash"} and "origin" in read_from[1] and "flash" in read_from[2]
    assert sent[1] == 0 and sent[3] - sent[2] < sent[2] / 2
    shutil.rmtree(tmp_path / "cache")


def test_the_first_answer_comes_early_and_gets_better_as_bytes_come(web: Web, tmp_path: Path) -> None:
    import torch

    from comoe.runtime.load import load

    ids = torch.arange(40)[None]
    model = load(web.url, expert_memory="500%", max_loss="500%", access=Access(tmp_path / "cache", link=(2e5, 0.01)))
    with model.comoe as handle:
        plan, before = handle.plan, handle.cache.resident_bytes
        assert plan.floor is not None and plan.floor_bytes <= 0.08 * handle.pack.manifest.expert_bytes_bf16
        assert before <= 2 * plan.floor_bytes + 100_000
        rates, end_s = list[float](), monotonic() + 60
        while (not rates or rates[-1]) and monotonic() < end_s:
            handle.begin_request()
            model.generate(ids, max_new_tokens=4, do_sample=False)
            rates.append(handle.stats()["floor_rate"])
        assert rates[0] > 0.3 and rates[-1] == 0


def test_without_a_link_answers_come_from_the_floor_as_far_as_the_bound_allows(
    web: Web, published: Path, tmp_path: Path
) -> None:
    import torch

    from comoe.runtime.load import Loader, load
    from comoe.runtime.options import Options

    ids = torch.arange(12)[None]
    loader = Loader(RemotePack(web.url, Access(tmp_path / "cache", 0)), Options(5.0, 64, prefetch="off"))
    loader.pin = Pin("2.93%", "exact", 0.0)  # a miss always waits, as long as there is a link
    model = loader.as_pinned(10 * loader.pack.manifest.expert_bytes_bf16)
    with model.comoe as handle:
        serving, hints = handle._serving, []
        serving.cache.prefetch = hints.extend
        web.leave_after = 0
        model.generate(ids, max_new_tokens=4, do_sample=False)
        stats = handle.stats()
        assert stats["link_failures"] > 0 and stats["floor_rate"] > 0.5
        assert stats["loss_ledger"] <= 5.0
        known = load(published, expert_memory="500%", max_loss=5.0, prefetch="off")
        with known.comoe as other:
            known.generate(ids, max_new_tokens=1, do_sample=False)
            assert serving.ledger.prompt.total == pytest.approx(other._serving.ledger.prompt.total, rel=0.02)
        serving.ledger.bound, serving.patience_s = -1.0, 0.3
        with pytest.raises(RemoteUnavailable):
            model.generate(ids, max_new_tokens=40, do_sample=False)
        assert handle.stats()["link_wait_ms"] >= 300


def test_an_exact_answer_waits_for_a_link_that_comes_back(
    web: Web, published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    from comoe.runtime.load import load

    ids = torch.arange(12)[None]
    local = load(published, expert_memory="500%", prefetch="off")
    wanted = local.generate(ids, max_new_tokens=4, do_sample=False)
    local.comoe.close()
    model = load(web.url, expert_memory="30%", prefetch="off", access=Access(tmp_path / "cache", 0))
    with model.comoe as handle:
        web.leave_after = 0

        def mend() -> None:
            until(lambda: handle.stats()["link_wait_ms"] > 0)
            web.leave_after = None

        mending = Thread(target=mend)
        mending.start()
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), wanted)
        mending.join()
        assert handle.stats()["link_failures"] == 0
        assert any("waiting for a link" in message for message in caplog.messages)
