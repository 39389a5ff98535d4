"""Files behind a URL: ranges, cut connections, refusals, a node that is gone; real sockets throughout."""

from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
from webs import serving

from comoe.net import origin
from comoe.net.address import Access
from comoe.net.breaker import Breaker
from comoe.net.origin import Origin, throttle_of
from comoe.types import PackError, RemoteUnavailable, UsageError

DATA = bytes(range(256)) * 4000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "file").write_bytes(DATA)
    return tmp_path / "served"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "BACKOFF_S", 0.01)


def fetched(of: Origin, start: int, length: int) -> bytes:
    into = bytearray(length)
    of.fetch("file", start, memoryview(into))
    return bytes(into)


def test_a_range_of_a_file_comes_and_nothing_else(folder: Path) -> None:
    with serving(folder) as web:
        assert fetched(Origin(web.url, Access()), 1000, 70_000) == DATA[1000:71_000]
        assert web.asked == [("/file", "bytes=1000-70999")]


def test_a_read_that_is_cut_goes_on_where_it_broke(folder: Path) -> None:
    with serving(folder) as web:
        web.cut = 3
        assert fetched(Origin(web.url, Access()), 0, len(DATA)) == DATA
        assert len(DATA) <= web.sent <= len(DATA) + 3 * origin.CHUNK_BYTES
        starts = [int(span.split("=")[1].split("-")[0]) for _, span in web.asked if span]
        assert starts == sorted(starts) and len(starts) == 4


def test_a_slow_link_is_measured_by_less(published: Path) -> None:
    """By what comes in half a second."""
    with serving(published) as web:
        file = max(published.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        part = SimpleNamespace(file=file.name)
        manifest = SimpleNamespace(layers=[SimpleNamespace(parts={"exact": part})])
        of, came = Origin(web.url, Access(), throttle=throttle_of((1.5 * origin.CHUNK_BYTES, 0.0))), []
        stream = of.stream

        def counted(*words: Any) -> Any:
            for chunk in stream(*words):
                came.append(len(chunk))
                yield chunk

        of.stream = counted
        rate_bps, trip_s = of.measured(manifest)
        assert 0 < rate_bps < 10 * origin.CHUNK_BYTES and trip_s >= 0
        assert sum(came) < min(file.stat().st_size, origin.MEASURED_BYTES)


def test_a_busy_server_is_asked_again(folder: Path) -> None:
    with serving(folder) as web:
        web.fail = 2
        assert fetched(Origin(web.url, Access()), 0, 10) == DATA[:10]
        assert len(web.asked) == 3


def test_a_node_that_is_busy_is_asked_more_often_and_not_given_up(folder: Path) -> None:
    with serving(folder) as web:
        of = Origin(web.url, Access())
        for _ in range(3):
            web.busy = 3
            assert fetched(of, 0, 10) == DATA[:10]


def test_a_head_has_the_first_bytes_and_the_size(folder: Path) -> None:
    with serving(folder) as web:
        of = Origin(web.url, Access())
        assert of.head("file", 16) == (DATA[:16], len(DATA))
        assert of.head("file", 1 << 24) == (DATA, len(DATA))
        with pytest.raises(PackError, match="more than such a file may have"):
            of.read("file", 1000)


def test_a_download_goes_on_after_a_kill(folder: Path, tmp_path: Path) -> None:
    to = tmp_path / "came"
    (tmp_path / "came.part").write_bytes(DATA[:1_000_000])
    with serving(folder) as web:
        Origin(web.url, Access()).download("file", to)
        assert web.sent <= len(DATA) - 1_000_000 + 1
    assert to.read_bytes() == DATA and [path.name for path in tmp_path.iterdir() if path.is_file()] == ["came"]


def test_a_whole_part_is_not_asked_for_again(folder: Path, tmp_path: Path) -> None:
    to = tmp_path / "came"
    (tmp_path / "came.part").write_bytes(DATA)
    with serving(folder) as web:
        Origin(web.url, Access()).download("file", to)
        assert web.sent == 1
    assert to.read_bytes() == DATA


def test_a_missing_file_and_a_missing_token_are_said_at_once(folder: Path) -> None:
    with serving(folder, token="secret") as web:
        with pytest.raises(UsageError, match="--token-file"):
            Origin(web.url, Access()).head("file")
        with pytest.raises(UsageError, match="--token-file"):
            Origin(web.url, Access(token="wrong")).head("file")
        assert Origin(web.url, Access(token="secret")).head("file", 4)[0] == DATA[:4]
        with pytest.raises(PackError, match="has no file absent"):
            Origin(web.url, Access(token="secret")).head("absent")
        assert len(web.asked) == 4


def test_a_node_that_is_gone_is_soon_not_asked_any_more(folder: Path) -> None:
    with serving(folder) as web:
        of = Origin(web.url, Access())
    with pytest.raises(RemoteUnavailable, match="does not answer"):
        fetched(of, 0, 10)
    start_s = perf_counter()
    with pytest.raises(RemoteUnavailable, match="not asked again"):
        fetched(of, 0, 10)
    assert perf_counter() - start_s < 0.5


def test_a_request_that_ends_early_and_brought_bytes_is_no_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a slow link, whose requests take too long and end together, would look like a node that is gone."""
    failures = []
    monkeypatch.setattr(Breaker, "failed", lambda self: failures.append(self))
    with serving(folder) as web:
        web.cut = 4
        assert fetched(Origin(web.url, Access()), 0, len(DATA)) == DATA
        assert web.cut == 0 and not failures
        web.fail = 1
        assert fetched(Origin(web.url, Access()), 0, 10) == DATA[:10]
        assert failures


def test_no_more_than_the_rate_comes(folder: Path) -> None:
    with serving(folder) as web:
        start_s = perf_counter()
        fetched(Origin(web.url, Access(), throttle=throttle_of((2 * len(DATA), 0.0))), 0, len(DATA))
        assert perf_counter() - start_s > 0.35


@pytest.mark.parametrize("url", ["ftp://host/pack", "http://", "host/pack", "s3://"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is no address of a pack"):
        Origin(url, Access())
