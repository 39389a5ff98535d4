"""Files that are whole, or as they were."""

from pathlib import Path

import pytest

from comoe.store.whole import UNFINISHED, whole


def test_a_file_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    with whole(tmp_path / "a.profile") as file:
        file.write(b"new")
        assert not (tmp_path / "a.profile").exists()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.profile", b"new")]


def test_a_failure_leaves_the_file_as_it_was_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), whole(tmp_path / "a") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_other_files_keep_their_names(tmp_path: Path) -> None:
    """Two profiles of one stem, and somebody's own file of a likely name."""
    (tmp_path / f"qwen{UNFINISHED}").write_bytes(b"mine")
    with whole(tmp_path / "qwen.code") as code, whole(tmp_path / "qwen.chat") as chat:
        code.write(b"code")
        chat.write(b"chat")
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == {f"qwen{UNFINISHED}": b"mine", "qwen.code": b"code", "qwen.chat": b"chat"}
