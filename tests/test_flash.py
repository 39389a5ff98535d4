"""The cache on flash: bounded, whole or nothing, shared by processes, emptied when asked."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from blake3 import blake3

from comoe.memory.arena import page_buffer
from comoe.net.flash import FlashCache, default_folder
from comoe.types import UsageError


def blob(at: int, nbytes: int = 1000) -> tuple[str, bytes]:
    data = bytes([at]) * nbytes
    return blake3(data).hexdigest(), data


def put(cache: FlashCache, *numbers: int) -> None:
    for at in numbers:
        digest, data = blob(at)
        cache.put(digest, memoryview(data))


def holds(cache: FlashCache, at: int) -> bool:
    digest, data = blob(at)
    into = page_buffer(len(data))
    found = cache.read(digest, into, len(data))
    assert not found or bytes(into[: len(data)]) == data
    return found


def test_what_was_put_is_read_and_nothing_else(tmp_path: Path) -> None:
    cache = FlashCache(tmp_path, 10_000)
    put(cache, 1, 2)
    assert holds(cache, 1) and holds(cache, 2) and not holds(cache, 3)
    assert cache.nbytes == 2000


def test_it_keeps_its_bytes_and_the_oldest_used_goes_first_also_after_a_start(tmp_path: Path) -> None:
    cache = FlashCache(tmp_path, 3500)
    put(cache, 1, 2, 3)
    assert holds(cache, 1)
    put(cache, 4)
    assert [holds(cache, at) for at in (1, 2, 3, 4)] == [True, False, True, True]
    cache.close()
    for age, at in enumerate((4, 1, 3)):
        os.utime(tmp_path / "blobs" / blob(at)[0], (age, age))
    again = FlashCache(tmp_path, 2500)
    assert [holds(again, at) for at in (1, 3, 4)] == [True, True, False]
    assert again.nbytes == 2000


def test_a_blob_larger_than_all_is_not_kept(tmp_path: Path) -> None:
    cache = FlashCache(tmp_path, 500)
    put(cache, 1)
    assert not holds(cache, 1) and cache.nbytes == 0


def test_a_file_that_is_gone_or_short_is_a_miss(tmp_path: Path) -> None:
    cache = FlashCache(tmp_path, 10_000)
    put(cache, 1, 2)
    (tmp_path / "blobs" / blob(1)[0]).unlink()
    (tmp_path / "blobs" / blob(2)[0]).write_bytes(b"short")
    assert not holds(cache, 1) and not holds(cache, 2)
    assert cache.nbytes == 0
    put(cache, 1)
    assert holds(cache, 1)


def test_of_two_processes_one_writes_and_both_read(tmp_path: Path) -> None:
    first = FlashCache(tmp_path, 10_000)
    put(first, 1)
    second = FlashCache(tmp_path, 10_000)
    put(second, 2)
    assert holds(second, 1) and not holds(second, 2)
    with pytest.raises(UsageError, match="another process"):
        second.clear()


WRITER = """
import sys
from pathlib import Path
from blake3 import blake3
from comoe.net.flash import FlashCache
cache, at = FlashCache(Path(sys.argv[1]), 50 << 20), 0
while True:
    data = at.to_bytes(8, "little") * 50_000
    cache.put(blake3(data).hexdigest(), memoryview(data))
    at += 1
    print(at, flush=True)
"""


def test_a_kill_leaves_whole_blobs_only(tmp_path: Path) -> None:
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        for _ in range(5):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    cache = FlashCache(tmp_path, 50 << 20)
    files = list((tmp_path / "blobs").iterdir())
    assert len(files) >= 5
    assert all(blake3(file.read_bytes()).hexdigest() == file.name for file in files)
    assert cache.nbytes == sum(file.stat().st_size for file in files)


def test_clearing_frees_what_was_held(tmp_path: Path) -> None:
    cache = FlashCache(tmp_path, 10_000)
    put(cache, 1, 2)
    (cache.mirror("pack") / "config.json").write_text("x" * 100)
    assert cache.held() == ({"pack": 100}, 2, 2000)
    assert cache.clear() == 2100
    assert cache.held() == ({}, 0, 0) and not holds(cache, 1)


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--cache"):
        FlashCache(tmp_path / "file")


def test_by_default_it_lies_where_caches_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "comoe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "comoe"
