"""Attacks on a checkpoint's files that need no model: names that escape, headers that mean two things or nothing.

What a sound header is read as, and the other refusals, is test_checkpoint's.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from packs import refused

from comoe.store.tensorfiles import INDEX, SINGLE, stored_tensors
from comoe.types import HostileFile, MissingShard

ENTRY = b'"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'


def write(path: Path, header: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def write_index(folder: Path, file: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": file}}))


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    write(tmp_path / SINGLE, b"{" + ENTRY + b"}")
    assert stored_tensors(tmp_path)["w"].extent == (SINGLE, 8 + len(ENTRY) + 2, 4)


@pytest.mark.parametrize("file", ["..", ".", "", "../x", "/x", "a/b", "a\0b", 1, None])
def test_an_index_that_names_what_is_no_file_of_its_folder_is_refused(tmp_path: Path, file: object) -> None:
    write_index(tmp_path, file)
    refused(HostileFile, lambda: stored_tensors(tmp_path), tmp_path / INDEX)


HEADERS = {
    "a tensor that is there twice": (b"{" + ENTRY + b"," + ENTRY + b"}", "'w' is there twice"),
    "nested without end": (b"[" * 200_000, "nested too deeply"),
    "NaN": (b'{"w":NaN}', "NaN"),
    "a number without end": (b'{"w":' + b"9" * 10_000 + b"}", "not JSON"),
}


@pytest.mark.parametrize(("header", "reason"), HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_does_not_mean_one_thing_is_refused(tmp_path: Path, header: bytes, reason: str) -> None:
    write(tmp_path / SINGLE, header)
    assert reason in refused(HostileFile, lambda: stored_tensors(tmp_path), tmp_path / SINGLE)


@pytest.mark.parametrize("index", [b"{", b"[" * 200_000, b'{"weight_map":{"w":"a","w":"b"}}', b"{}", b"[]", b"\xff"])
def test_an_index_that_does_not_mean_one_thing_is_refused(tmp_path: Path, index: bytes) -> None:
    (tmp_path / INDEX).write_bytes(index)
    refused(HostileFile, lambda: stored_tensors(tmp_path), tmp_path / INDEX)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["a folder", "a pipe"])
def test_what_is_no_file_is_no_shard(tmp_path: Path, make: Callable[[Path], None]) -> None:
    write_index(tmp_path, "shard.safetensors")
    make(tmp_path / "shard.safetensors")
    refused(MissingShard, lambda: stored_tensors(tmp_path), tmp_path / "shard.safetensors")


def test_a_name_too_long_for_the_file_system_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path, "x" * 300)
    refused(MissingShard, lambda: stored_tensors(tmp_path), tmp_path)
