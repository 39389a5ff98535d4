"""Blob files: what is written is read back, and a header that breaks the format is refused in one sentence."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import refused
from safetensors.numpy import load_file

from comoe.store.blobfile import BlobWriter, name_hash, read_header
from comoe.store.layout import Layout
from comoe.types import HostileFile, PackError

ROWS, NBYTES = 3, 100

Header = dict[str, Any]


def written(folder: Path, rows: list[bytes]) -> Path:
    writer = BlobWriter(folder, "000-high", Layout((), len(rows[0])), len(rows))
    for row in rows:
        writer.add(row)
    return writer.commit()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A sound file of three blobs."""
    return written(tmp_path, [bytes([row]) * NBYTES for row in range(ROWS)])


def rewrite(path: Path, header: bytes, length: int | None = None) -> None:
    """Put `header` in the place of the file's, its data behind it; `length` is what the length field says."""
    data = path.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + body)


def edit(path: Path, change: Callable[[Header], object]) -> None:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    change(header)
    rewrite(path, json.dumps(header).encode())


@given(
    num_rows=st.integers(1, 5),
    nbytes=st.one_of(st.integers(1, 300), st.sampled_from([4096, 256 * 1024 - 1, 256 * 1024, 256 * 1024 + 1])),
)
@settings(max_examples=30, deadline=None)
def test_every_row_lies_where_the_header_says_and_has_its_hash(
    tmp_path_factory: pytest.TempPathFactory, num_rows: int, nbytes: int
) -> None:
    rows = [np.random.default_rng(row).bytes(nbytes) for row in range(num_rows)]
    path = written(tmp_path_factory.mktemp("blobs"), rows)
    found, data = read_header(path), path.read_bytes()
    assert (found.rows, found.nbytes, found.stride) == (num_rows, nbytes, Layout((), nbytes).stride)
    assert [data[found.offset(row) :][:nbytes] for row in range(num_rows)] == rows
    assert found.hashes == tuple(blake3(row).hexdigest() for row in rows)
    assert found.data_start % 4096 == 0


def test_safetensors_reads_the_file_as_one_tensor_whose_padding_is_zero(path: Path) -> None:
    tensors = load_file(path)
    assert list(tensors) == ["blobs"] and tensors["blobs"].shape == (ROWS, 128)
    assert (tensors["blobs"][:, :NBYTES] == np.arange(ROWS)[:, None]).all() and not tensors["blobs"][:, NBYTES:].any()


def test_the_name_is_the_hash_of_the_rows(tmp_path: Path, path: Path) -> None:
    same = written(tmp_path, [bytes([row]) * NBYTES for row in range(ROWS)])
    other = written(tmp_path, [bytes([row + 1]) * NBYTES for row in range(ROWS)])
    assert same.name == path.name == f"000-high-{name_hash(read_header(path).hashes)}.safetensors" != other.name


def test_the_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    writer = BlobWriter(tmp_path, "000-high", Layout((), 8), 2)
    writer.add(bytes(8))
    assert [entry.suffix for entry in tmp_path.iterdir()] == [".unfinished"]
    writer.add(bytes(8))
    assert [writer.commit()] == list(tmp_path.iterdir())


def test_rows_of_the_wrong_length_or_number_are_a_programmers_error(tmp_path: Path) -> None:
    writer = BlobWriter(tmp_path, "000-high", Layout((), 8), 2)
    with pytest.raises(AssertionError):
        writer.add(bytes(9))
    with pytest.raises(AssertionError):
        writer.commit()


def tensor(**entries: object) -> Callable[[Header], object]:
    return lambda header: header["blobs"].update(entries)


def metadata(**entries: object) -> Callable[[Header], object]:
    return lambda header: header["__metadata__"].update(entries)


HASH = "0" * 64

ONE, DISAGREE, SHAPE, NUMBER = "one tensor", "disagree", "shape (rows, stride)", "is not a number"
SIZE, HASHES = "bytes announced", "not one BLAKE3 per row"

HOSTILE: dict[str, tuple[Callable[[Header], object], str]] = {
    "no tensor": (lambda header: header.pop("blobs"), "'blobs'"),
    "no metadata": (lambda header: header.pop("__metadata__"), "'__metadata__'"),
    "a second tensor": (lambda header: header.update(more={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}), ONE),
    "a tensor that is no object": (lambda header: header.update(blobs=[1, 2]), "keys"),
    "an unknown key of the tensor": (tensor(strides=[1]), ONE),
    "an unknown key of the metadata": (metadata(format="pt"), ONE),
    "another dtype": (tensor(dtype="I8"), SHAPE),
    "one dimension": (tensor(shape=[ROWS * 128]), "unpack"),
    "three dimensions": (tensor(shape=[ROWS, 2, 64]), "unpack"),
    "rows as a fraction": (tensor(shape=[float(ROWS), 128]), SHAPE),
    "rows as a truth": (tensor(shape=[True, ROWS * 128]), SHAPE),
    "no rows": (tensor(shape=[0, 128], data_offsets=[0, 0]), DISAGREE),
    "negative rows and stride": (tensor(shape=[-ROWS, -128]), DISAGREE),
    "more rows than there are": (tensor(shape=[ROWS + 1, 128], data_offsets=[0, 128 * (ROWS + 1)]), SIZE),
    "fewer rows than there are": (tensor(shape=[ROWS - 1, 128], data_offsets=[0, 128 * (ROWS - 1)]), SIZE),
    "rows beyond counting": (tensor(shape=[2**64, 128], data_offsets=[0, 2**71]), SIZE),
    "another stride": (tensor(shape=[ROWS, 256], data_offsets=[0, ROWS * 256]), SIZE),
    "a stride shorter than a blob": (tensor(shape=[ROWS * 2, 64]), DISAGREE),
    "other rows of the same size": (tensor(shape=[1, ROWS * 128]), HASHES),
    "overlapping offsets": (tensor(data_offsets=[64, ROWS * 128]), DISAGREE),
    "offsets beyond the file": (tensor(data_offsets=[0, ROWS * 128 + 1]), DISAGREE),
    "offsets that turn round": (tensor(data_offsets=[ROWS * 128, 0]), DISAGREE),
    "blobs longer than the stride": (metadata(nbytes="129"), DISAGREE),
    "blobs of nothing": (metadata(nbytes="0"), DISAGREE),
    "blobs of a negative length": (metadata(nbytes="-1"), DISAGREE),
    "a length that is no number": (metadata(nbytes="many"), "many"),
    "a length that is no text": (metadata(nbytes=NBYTES), NUMBER),
    "a length as only Python writes it": (metadata(nbytes="1_00"), NUMBER),
    "a length with a blank": (metadata(nbytes=" 100"), NUMBER),
    "a hash too few": (metadata(hashes=HASH * (ROWS - 1)), HASHES),
    "a hash too many": (metadata(hashes=HASH * (ROWS + 1)), HASHES),
    "hashes that are none": (metadata(hashes="x" * 64 * ROWS), HASHES),
    "hashes as a list": (metadata(hashes=["0"] * 64 * ROWS), "list"),
    "no hashes": (metadata(hashes=None), "None"),
    "other hashes than the name says": (metadata(hashes=HASH * ROWS), "the name"),
}


@pytest.mark.parametrize(("change", "reason"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_header_that_breaks_the_format_is_refused(
    path: Path, change: Callable[[Header], object], reason: str
) -> None:
    edit(path, change)
    assert reason in refused(HostileFile, lambda: read_header(path), path)


DOCUMENTS = {
    "not JSON": (b"{nothing", "not JSON"),
    "not text": (b"\xff\xfe\x00\x80", "not JSON"),
    "a list": (b"[]", "not a blob file"),
    "a number": (b"17", "not a blob file"),
    "null": (b"null", "not a blob file"),
    "nested without end": (b"[" * 200_000, "nested too deeply"),
    "the key of the tensor twice": (b'{"__metadata__":{},"blobs":{},"blobs":{}}', "'blobs' is there twice"),
    "a number without end": (b'{"blobs":' + b"9" * 10_000 + b"}", "not JSON"),
    "NaN": (b'{"blobs":NaN}', "NaN"),
}


@pytest.mark.parametrize(("document", "reason"), DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_a_header_that_is_no_blob_files_is_refused(path: Path, document: bytes, reason: str) -> None:
    rewrite(path, document)
    assert reason in refused(HostileFile, lambda: read_header(path), path)


@pytest.mark.parametrize("length", [0, 1, 10**5, 101 * 1024 * 1024, 2**63, 2**64 - 1])
def test_a_header_of_an_impossible_length_is_refused_unread(path: Path, length: int) -> None:
    rewrite(path, b"{}", length)
    assert str(length) in refused(HostileFile, lambda: read_header(path), path)


def test_a_huge_header_is_refused_even_if_the_file_is_as_huge(path: Path) -> None:
    with path.open("r+b") as file:
        file.write((1 << 40).to_bytes(8, "little"))
        file.truncate((1 << 40) + 8)  # sparse: takes no room
    refused(HostileFile, lambda: read_header(path), path)


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_a_file_that_was_cut_short_is_refused(path: Path, size: int) -> None:
    os.truncate(path, size % path.stat().st_size)
    refused(HostileFile, lambda: read_header(path), path)


def test_a_file_that_grew_is_refused(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")
    refused(HostileFile, lambda: read_header(path), path)


def test_a_file_under_another_name_is_refused(path: Path) -> None:
    other = path.with_name(f"000-high-{'0' * 32}.safetensors")
    path.rename(other)
    assert "name" in refused(HostileFile, lambda: read_header(other), other)


@pytest.mark.parametrize("name", ["nothing", ".", "pipe", "x" * 300], ids=["nothing", "a folder", "a pipe", "too long"])
def test_what_is_no_file_is_not_there(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(PackError, lambda: read_header(tmp_path / name), tmp_path / name)


@given(at=st.integers(0, 600), byte=st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_a_header_with_any_other_byte_is_refused_or_means_the_same(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int
) -> None:
    path = written(tmp_path_factory.mktemp("blobs"), [bytes([row]) * NBYTES for row in range(ROWS)])
    sound, data = read_header(path), bytearray(path.read_bytes())
    data[at] = byte
    path.write_bytes(data)
    try:
        assert read_header(path) == sound
    except HostileFile as error:
        assert "\n" not in str(error)
