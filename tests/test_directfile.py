"""Direct reads: the right bytes from any offset into any buffer, with and without O_DIRECT; never past the end."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comoe.memory.arena import page_buffer
from comoe.store import directfile
from comoe.store.directfile import DirectFile
from comoe.types import PackError

PAGE = 4096
SIZE = 5 * PAGE + 123
DATA = np.random.default_rng(0).bytes(SIZE)

offsets = st.one_of(st.integers(0, SIZE - 1), st.sampled_from(range(0, SIZE, PAGE)))
lengths = st.one_of(st.integers(1, SIZE), st.sampled_from(range(PAGE, SIZE, PAGE)))
shifts = st.one_of(st.just(0), st.integers(0, PAGE))
relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(DATA)
    return path


def is_direct(fd: int) -> bool:
    flags = Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0]
    return bool(int(flags, 8) & os.O_DIRECT)


def without_direct_io(monkeypatch: pytest.MonkeyPatch, *, at_read: bool) -> None:
    """A file system that refuses O_DIRECT when a file is opened, or only when it is read."""
    really_open, really_read = os.open, os.preadv

    def open_(path: Any, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT and not at_read:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really_open(path, flags, *rest)

    def preadv(fd: int, *rest: Any) -> int:
        if is_direct(fd):
            raise OSError(errno.EINVAL, "Invalid argument")
        return really_read(fd, *rest)

    monkeypatch.setattr(os, "open", open_)
    if at_read:
        monkeypatch.setattr(os, "preadv", preadv)


@pytest.fixture(params=["direct", "refused when opened", "refused when read"])
def file(path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> DirectFile:
    if request.param != "direct":
        without_direct_io(monkeypatch, at_read=request.param == "refused when read")
    return DirectFile(path)


@given(offsets, lengths, shifts, st.integers(0, 2 * PAGE))
@relaxed
def test_any_range_comes_into_any_buffer_and_nothing_beside_its_pages_is_touched(
    file: DirectFile, offset: int, nbytes: int, shift: int, spare: int
) -> None:
    nbytes = min(nbytes, SIZE - offset)
    buffer = page_buffer(shift + nbytes + spare)
    buffer[:] = b"\7" * len(buffer)
    into = buffer[shift : shift + nbytes + spare]
    file.read(offset, into, nbytes)
    pages = -(-nbytes // PAGE) * PAGE
    assert into[:nbytes] == DATA[offset : offset + nbytes]
    assert set(buffer[:shift]) | set(into[pages:]) <= {7}
    assert file.direct == offers_direct_io(file.path)


def offers_direct_io(path: Path) -> bool:
    """Whether one aligned page can be read directly: then everything must be."""
    file = DirectFile(path)
    file.read(0, page_buffer(PAGE), PAGE)
    file.close()
    return file.direct


def test_a_range_longer_than_the_bounce_buffer_comes_in_pieces(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directfile, "BOUNCE_BYTES", PAGE)
    file, into = DirectFile(path), page_buffer(SIZE)
    file.read(77, into, SIZE - 77)
    assert into[: SIZE - 77] == DATA[77:]
    assert file.direct == offers_direct_io(path)


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(0, SIZE + 1), (SIZE, 1), (4 * PAGE, 2 * PAGE), (77, SIZE), (9 * PAGE, 9)]
)
def test_a_range_beyond_the_end_is_an_error_and_not_short(file: DirectFile, offset: int, nbytes: int) -> None:
    with pytest.raises(PackError, match="ends before"):
        file.read(offset, page_buffer(nbytes), nbytes)


def test_a_file_that_is_not_there_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"cannot read .*nothing: No such file"):
        DirectFile(tmp_path / "nothing")


@pytest.mark.parametrize("at_read", [False, True])
def test_without_direct_io_reads_are_buffered_and_it_says_so(
    path: Path, monkeypatch: pytest.MonkeyPatch, at_read: bool
) -> None:
    without_direct_io(monkeypatch, at_read=at_read)
    advised: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: advised.append(arguments[1:]))
    file = DirectFile(path)
    into = page_buffer(100)
    file.read(PAGE, into, 100)
    assert into[:100] == DATA[PAGE : PAGE + 100] and not file.direct
    assert advised == [(PAGE, 100, os.POSIX_FADV_DONTNEED)]


def test_a_file_that_vanishes_before_it_can_be_opened_again_is_a_named_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_direct_io(monkeypatch, at_read=True)
    file = DirectFile(path)
    path.unlink()
    with pytest.raises(PackError, match="No such file"):
        file.read(0, page_buffer(10), 10)
    file.close()


def test_a_read_that_is_refused_while_another_thread_falls_back_falls_back_too(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, really_read = DirectFile(path), os.preadv

    def preadv(fd: int, *rest: Any) -> int:
        if not is_direct(fd):
            return really_read(fd, *rest)
        file._fall_back()  # the other thread was refused first
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "preadv", preadv)
    into = page_buffer(10)
    file.read(0, into, 10)
    assert into[:10] == DATA[:10]


@pytest.mark.parametrize("code", [errno.EIO, errno.EBADF])
def test_a_failing_disk_is_a_named_error(path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    file = DirectFile(path)

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(PackError, match=os.strerror(code)):
        file.read(0, page_buffer(10), 10)


def test_short_reads_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: really_read(fd, [buffers[0][:PAGE]], at))
    file, into = DirectFile(path), page_buffer(SIZE)
    file.read(0, into, 3 * PAGE + 5)
    assert into[: 3 * PAGE + 5] == DATA[: 3 * PAGE + 5]


@pytest.mark.parametrize("direct", [True, False])
def test_a_closed_file_gives_its_descriptor_back_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    before = num_descriptors()
    if not direct:
        without_direct_io(monkeypatch, at_read=True)
    file = DirectFile(path)
    file.read(0, page_buffer(10), 10)
    assert num_descriptors() == before + 1
    file.close()
    file.close()
    assert num_descriptors() == before


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
