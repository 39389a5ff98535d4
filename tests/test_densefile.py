"""The dense file: what safetensors reads is what was given, one tensor in memory at a time, whole or not there."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from comoe.store.densefile import RawTensor, write_dense
from comoe.store.manifest import DENSE

DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "U8": np.uint8}
INDEX = "model.safetensors.index.json"

names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40).filter(
    lambda name: name != "__metadata__"
)
tensors = st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=6))


def raw(name: str, dtype: str, shape: tuple[int, ...]) -> tuple[RawTensor, np.ndarray]:
    size = int(np.prod(shape, dtype=np.int64))
    array = np.random.default_rng(len(name)).integers(0, 100, size).astype(DTYPES[dtype]).reshape(shape)
    return RawTensor(name, dtype, shape, array.tobytes()), array


@given(st.dictionaries(names, tensors, max_size=6))
@settings(max_examples=60, deadline=None)
def test_safetensors_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, given_: dict[str, tuple[str, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("dense") / DENSE
    made = {name: raw(name, dtype, tuple(shape)) for name, (dtype, shape) in given_.items()}
    nbytes = write_dense(path, made, (tensor for tensor, _ in made.values()))
    found = load_file(path)
    assert nbytes == sum(array.nbytes for _, array in made.values())
    assert found.keys() == made.keys()
    for name, (_, array) in made.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found[name], array)


def test_a_long_name_and_many_dimensions_have_room_in_the_header(tmp_path: Path) -> None:
    tensor, array = raw("ü" * 200, "U8", (1,) * 20)
    write_dense(tmp_path / DENSE, [tensor.name], [tensor])
    np.testing.assert_array_equal(load_file(tmp_path / DENSE)[tensor.name], array)


def test_data_begins_on_a_page(tmp_path: Path) -> None:
    write_dense(tmp_path / DENSE, ["w"], [raw("w", "F32", (3,))[0]])
    header = int.from_bytes((tmp_path / DENSE).read_bytes()[:8], "little")
    assert (8 + header) % 4096 == 0


def test_the_index_names_the_file_of_every_tensor_and_their_bytes(tmp_path: Path) -> None:
    made = [raw("a", "F32", (2, 3))[0], raw("b", "F16", (5,))[0]]
    write_dense(tmp_path / DENSE, ["a", "b"], made)
    index = json.loads((tmp_path / INDEX).read_bytes())
    assert index == {"metadata": {"total_size": 34}, "weight_map": {"a": DENSE, "b": DENSE}}


def test_transformers_takes_it_for_a_file_of_torchs(tmp_path: Path) -> None:
    write_dense(tmp_path / DENSE, ["w"], [raw("w", "F32", (3,))[0]])
    with safe_open(tmp_path / DENSE, "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tensor_is_asked_for_after_the_one_before_it_was_written(tmp_path: Path) -> None:
    sizes = []

    def produce() -> Iterator[RawTensor]:
        for name in ("a", "b", "c"):
            (unfinished,) = tmp_path.glob("*.unfinished")
            sizes.append(unfinished.stat().st_size)
            yield RawTensor(name, "U8", (1 << 20,), bytes(1 << 20))

    write_dense(tmp_path / DENSE, ["a", "b", "c"], produce())
    assert sizes[1] >= 1 << 20 and sizes[2] >= 2 << 20


def test_a_tensor_that_cannot_be_made_leaves_no_file_under_its_name(tmp_path: Path) -> None:
    def produce() -> Iterator[RawTensor]:
        yield raw("a", "F32", (3,))[0]
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_dense(tmp_path / DENSE, ["a", "b"], produce())
    assert not (tmp_path / DENSE).exists() and not (tmp_path / INDEX).exists()


@pytest.mark.parametrize("given_", [["a"], ["a", "b", "c"], ["a", "c"], ["a", "b", "b"]])
def test_other_tensors_than_named_are_a_programmers_error_and_leave_no_file(tmp_path: Path, given_: list[str]) -> None:
    with pytest.raises(AssertionError):
        write_dense(tmp_path / DENSE, ["a", "b"], [raw(name, "U8", (1,))[0] for name in given_])
    assert not (tmp_path / DENSE).exists()


def test_the_same_tensors_make_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_dense(tmp_path / name / DENSE, ["w"], [raw("w", "F32", (30,))[0]])
    assert (tmp_path / "one" / DENSE).read_bytes() == (tmp_path / "two" / DENSE).read_bytes()
