"""A pack as a source: every blob's bytes from wherever they lie, and none that are not sound."""

import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packs import SHARDS, SITE, Blobs, edit, refused, write_blobs, write_pack
from sources import MemorySource, SourceContract, read

from comoe.memory.arena import page_buffer
from comoe.store.directfile import BOUNCE_BYTES, Bounce, DirectFile
from comoe.store.layout import layout
from comoe.store.manifest import MANIFEST
from comoe.store.pack import Pack, check_source, header_hash
from comoe.store.source import Source
from comoe.types import (
    BlobId,
    ComoeError,
    CorruptBlob,
    HostileFile,
    NotAPack,
    PackError,
    SourceChanged,
    SourceMissing,
)

EXACT, HIGH = BlobId(1, "exact", 2), BlobId(1, "high", 2)
Tamper = Callable[[Path], object]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Blobs]:
    """A folder with a checkpoint, a pack that refers to it and one that does not; and the blobs of both."""
    root = tmp_path_factory.mktemp("original")
    blobs = write_pack(root / "pack", root / "checkpoint")
    assert write_pack(root / "whole", None) == blobs
    return root, blobs


@pytest.fixture
def root(original: tuple[Path, Blobs], tmp_path: Path) -> Path:
    """A copy to be damaged; its pack refers to its own checkpoint."""
    shutil.copytree(original[0], tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "pack", lambda document: document["source"].update(folder=str(tmp_path / "checkpoint")))
    return tmp_path


@pytest.fixture
def blobs(original: tuple[Path, Blobs]) -> Blobs:
    return original[1]


@pytest.fixture
def opened(root: Path) -> Iterator[Callable[[str], Pack]]:
    """Opens packs of the copy, and closes them."""
    packs: list[Pack] = []

    def open_(name: str) -> Pack:
        packs.append(Pack(root / name))
        return packs[-1]

    yield open_
    for pack in packs:
        pack.close()


class TestMemorySource(SourceContract):
    @pytest.fixture
    def held(self) -> tuple[Source, Blobs]:
        blobs = {BlobId(0, "part", row): bytes([row]) * (1 + 3000 * row) for row in range(3)}
        return MemorySource(blobs), blobs


class TestReferringPack(SourceContract):
    @pytest.fixture
    def held(self, opened: Callable[[str], Pack], blobs: Blobs) -> tuple[Source, Blobs]:
        return opened("pack"), blobs


class TestSelfContainedPack(SourceContract):
    @pytest.fixture
    def held(self, root: Path, opened: Callable[[str], Pack], blobs: Blobs) -> tuple[Source, Blobs]:
        shutil.rmtree(root / "checkpoint")
        return opened("whole"), blobs


def test_a_pack_lists_every_blob_once(opened: Callable[[str], Pack], blobs: Blobs) -> None:
    assert sorted(opened("pack").blob_ids()) == sorted(blobs)


def test_pieces_say_where_the_bytes_lie(opened: Callable[[str], Pack], blobs: Blobs) -> None:
    """For servers that send ranges of files: the pieces' bytes, one after the other, are the blob's."""
    for name in ("pack", "whole"):
        pack = opened(name)
        for blob, data in blobs.items():
            extents = pack.pieces(blob).extents
            found = [Path(file).read_bytes()[offset : offset + length] for file, offset, length in extents]
            assert b"".join(found) == data
            assert len(extents) == (2 if (name, blob.part) == ("pack", "exact") else 1)


def test_own_bytes_are_those_of_the_folder(root: Path, opened: Callable[[str], Pack]) -> None:
    assert opened("pack").own_bytes == sum(path.stat().st_size for path in (root / "pack").iterdir())


def test_a_closed_pack_leaves_no_file_open_and_may_be_read_again(opened: Callable[[str], Pack], blobs: Blobs) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    pack = opened("pack")
    read(pack, EXACT)
    assert len(list(Path("/proc/self/fd").iterdir())) == before + len(SHARDS)
    pack.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert read(pack, EXACT) == blobs[EXACT]


def test_a_file_that_several_threads_need_first_is_opened_once(
    opened: Callable[[str], Pack], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths: list[Path] = []

    class Slow(DirectFile):
        def __init__(self, path: Path, bounce: Bounce | None = None) -> None:
            paths.append(path)
            sleep(0.01)  # long enough for the others to look for it too
            super().__init__(path, bounce)

    monkeypatch.setattr("comoe.store.pack.DirectFile", Slow)
    pack = opened("whole")
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda row: read(pack, HIGH._replace(row=row)), range(3)))
    assert len(paths) == 1


def test_however_many_files_a_pack_has_they_share_one_bounce_buffer(
    opened: Callable[[str], Pack], monkeypatch: pytest.MonkeyPatch, blobs: Blobs
) -> None:
    into, mapped, real = page_buffer(len(blobs[EXACT])), list[int](), mmap.mmap

    def counting(descriptor: int, length: int) -> mmap.mmap:
        mapped.append(length)
        return real(descriptor, length)

    monkeypatch.setattr("comoe.store.directfile.mmap.mmap", counting)
    opened("pack").read(EXACT, into)  # a leaf in each of two shards, both at odd offsets
    assert mapped == [BOUNCE_BYTES]


def test_a_checkpoint_that_moved_is_found_where_it_is_said_to_be(root: Path, blobs: Blobs) -> None:
    (root / "checkpoint").rename(root / "moved")
    refused(SourceMissing, lambda: Pack(root / "pack"), root / "checkpoint")
    pack = Pack(root / "pack", source=root / "moved")
    assert read(pack, EXACT) == blobs[EXACT]
    pack.close()


def test_a_checkpoints_relative_folder_is_relative_to_the_pack(root: Path, blobs: Blobs) -> None:
    edit(root / "pack", lambda document: document["source"].update(folder="../checkpoint"))
    pack = Pack(root / "pack")
    assert read(pack, EXACT) == blobs[EXACT]
    pack.close()


def shard(root: Path, number: int = 0) -> Path:
    return root / "checkpoint" / SHARDS[number]


def blob_file(root: Path) -> Path:
    return next((root / "pack").glob("001-high-*"))


def flip(path: Path, at: int) -> None:
    """Flip one bit; `at` counts from the end where it is negative."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def swap_source(root: Path) -> None:
    """Another file of the same size in the place of the first."""
    shutil.copyfile(shard(root), root / "other")
    flip(root / "other", 12)
    (root / "other").replace(shard(root))


def exchange_blob_files(root: Path) -> None:
    """The manifest names the sound file of another part."""
    low = next((root / "pack").glob("001-low-*")).name
    edit(root / "pack", lambda document: document["layers"][1]["parts"]["high"].update(file=low))


def shorten_blob_file(root: Path) -> None:
    """A sound file with a row too few."""
    rows = [bytes(layout(SITE, "high").nbytes) for _ in range(3)]
    name = write_blobs(root / "pack", "new", "high", rows).name
    edit(root / "pack", lambda document: document["layers"][1]["parts"]["high"].update(file=name))


def make_pipe(path: Path) -> None:
    """A pipe in a file's place: opening it would wait for ever."""
    path.unlink()
    os.mkfifo(path)


ATTACKS: dict[str, tuple[Tamper, type[ComoeError]]] = {
    "no manifest": (lambda root: (root / "pack" / MANIFEST).unlink(), NotAPack),
    "a pipe for a manifest": (lambda root: make_pipe(root / "pack" / MANIFEST), NotAPack),
    "a blob file that is gone": (lambda root: blob_file(root).unlink(), PackError),
    "a pipe for a blob file": (lambda root: make_pipe(blob_file(root)), PackError),
    "a blob file cut short": (lambda root: os.truncate(blob_file(root), 6000), HostileFile),
    "a blob file with a byte flipped in its hashes": (lambda root: flip(blob_file(root), 60), HostileFile),
    "the blob file of another part": (exchange_blob_files, HostileFile),
    "a blob file with fewer rows": (shorten_blob_file, HostileFile),
    "a source that is gone": (lambda root: shard(root).unlink(), SourceMissing),
    "a pipe for a source": (lambda root: make_pipe(shard(root)), SourceMissing),
    "no checkpoint": (lambda root: shutil.rmtree(root / "checkpoint"), SourceMissing),
    "a source cut short": (lambda root: os.truncate(shard(root), 1000), SourceChanged),
    "a source of nothing": (lambda root: os.truncate(shard(root, 1), 0), SourceChanged),
    "a source that grew": (lambda root: os.truncate(shard(root), 10**6), SourceChanged),
    "another source of the same size": (swap_source, SourceChanged),
}  # fmt: skip


@pytest.mark.parametrize(("tamper", "error"), ATTACKS.values(), ids=ATTACKS.keys())
def test_a_pack_that_is_not_sound_is_refused_when_it_is_opened(
    root: Path, tamper: Tamper, error: type[ComoeError]
) -> None:
    tamper(root)
    refused(error, lambda: Pack(root / "pack"), root)


ESCAPES = ["../secret", "../../secret", "/etc/passwd", "..", "", "below/secret"]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_source_outside_the_checkpoint_is_refused_even_where_it_would_fit(root: Path, name: str) -> None:
    """The file is there and has the size and the header that the manifest gives."""
    secret = root / "secret"
    shutil.copyfile(shard(root), secret)
    entry = {"name": name, "size": secret.stat().st_size, "header": header_hash(secret)}
    edit(root / "pack", lambda document: document["source"]["files"].__setitem__(0, entry))
    assert "leaves" in refused(HostileFile, lambda: Pack(root / "pack"), root)


def test_a_blob_file_outside_the_pack_is_refused_even_where_it_would_fit(root: Path) -> None:
    path = blob_file(root)
    path.rename(root / path.name)
    edit(root / "pack", lambda document: document["layers"][1]["parts"]["high"].update(file=f"../{path.name}"))
    assert "leaves" in refused(HostileFile, lambda: Pack(root / "pack"), root)


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_bit_flipped_in_any_blob_is_found_at_its_first_use(root: Path, blobs: Blobs, data: st.DataObject) -> None:
    blob = data.draw(st.sampled_from(sorted(blobs)))
    at = data.draw(st.integers(0, len(blobs[blob]) - 1))
    pack = Pack(root / "pack")
    extents = pack.pieces(blob).extents
    while at >= extents[0].length:
        at -= extents[0].length
        extents = extents[1:]
    path, offset = Path(extents[0].file), extents[0].offset + at
    flip(path, offset)
    try:
        refused(CorruptBlob, lambda: read(pack, blob), root / "pack")
        refused(CorruptBlob, lambda: read(pack, blob), root / "pack")
    finally:
        pack.close()
        flip(path, offset)


@pytest.mark.parametrize(("blob", "remedy"), [(EXACT, "checkpoint"), (HIGH, "pack again")])
def test_a_corrupt_blob_says_which_it_is_and_what_to_do(root: Path, blob: BlobId, remedy: str) -> None:
    pack = Pack(root / "pack")
    extent = pack.pieces(blob).extents[0]
    flip(Path(extent.file), extent.offset)
    message = refused(CorruptBlob, lambda: read(pack, blob), root / "pack")
    assert f"layer 1, part '{blob.part}', row 2" in message and remedy in message
    pack.close()


def test_a_corrupt_blob_does_not_spoil_the_others(root: Path, blobs: Blobs) -> None:
    pack = Pack(root / "pack")
    flip(Path(pack.pieces(EXACT).extents[0].file), pack.pieces(EXACT).extents[0].offset)
    neighbour = EXACT._replace(row=3)
    assert read(pack, neighbour) == blobs[neighbour]
    pack.close()


def test_a_blob_is_hashed_once_and_then_trusted(root: Path, blobs: Blobs) -> None:
    """Reads are many and hashing is dear: what changes under a running pack is not looked for again."""
    pack = Pack(root / "pack")
    assert read(pack, HIGH) == blobs[HIGH]
    extent = pack.pieces(HIGH).extents[0]
    flip(Path(extent.file), extent.offset)
    assert read(pack, HIGH) != blobs[HIGH]
    pack.close()


@pytest.mark.parametrize(
    ("tamper", "error"),
    [
        (lambda root: shard(root, 1).unlink(), SourceMissing),
        (lambda root: os.truncate(shard(root, 1), 3000), SourceChanged),
    ],
    ids=["gone", "cut short"],
)
def test_a_source_lost_while_a_pack_is_open_is_named_when_it_is_read(
    root: Path, tamper: Tamper, error: type[ComoeError]
) -> None:
    pack = Pack(root / "pack")
    tamper(root)
    refused(error, lambda: read(pack, EXACT), root)
    pack.close()


def test_a_blob_file_lost_while_a_pack_is_open_is_named_when_it_is_read(root: Path) -> None:
    pack = Pack(root / "pack")
    blob_file(root).unlink()
    refused(PackError, lambda: read(pack, HIGH), root)
    pack.close()


def test_a_source_is_compared_by_its_length_field_its_header_and_its_size(root: Path) -> None:
    source = Pack(root / "pack").manifest.source
    assert source is not None
    check_source(root / "checkpoint", source)
    flip(shard(root), -1)  # a weight: its blob's hash finds it
    check_source(root / "checkpoint", source)
    flip(shard(root), 7)
    refused(SourceChanged, lambda: check_source(root / "checkpoint", source), root)


def test_a_header_is_hashed_with_its_length_field(root: Path) -> None:
    data = shard(root).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    assert header_hash(shard(root)) == blake3(data[:end]).hexdigest()


def test_a_huge_length_field_of_a_source_is_not_read_as_one(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    path.write_bytes((1 << 62).to_bytes(8, "little"))
    os.truncate(path, 1 << 40)  # sparse: takes no room
    assert len(header_hash(path)) == 64


def test_without_direct_io_a_pack_says_so(root: Path, monkeypatch: pytest.MonkeyPatch, blobs: Blobs) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    pack = Pack(root / "pack")
    assert pack.direct  # of the files opened so far
    buffer = page_buffer(pack.nbytes(EXACT))
    pack.read(EXACT, buffer)
    assert not pack.direct and buffer[: len(blobs[EXACT])] == blobs[EXACT]
    pack.close()
