"""Where a checkpoint's folder is: a path, or a hub id through the hub library's own cache."""

import shutil
from pathlib import Path

import pytest

from comoe.store.checkpoint import Checkpoint
from comoe.store.tensorfiles import find_folder
from comoe.types import CheckpointError, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub library, which may not look further."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def downloaded(cache: Path, checkpoint: Path) -> Path:
    """`some/model` in the cache, as the hub library lays it out."""
    repository = cache / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(checkpoint, repository / "snapshots" / COMMIT)
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize("name", ["some/model", f"some/model@{COMMIT}"])
def test_a_hub_id_is_found_in_the_hub_librarys_cache(hub_cache: Path, tiny_checkpoint: Path, name: str) -> None:
    folder = downloaded(hub_cache, tiny_checkpoint)
    assert find_folder(name) == folder
    assert Checkpoint.open(name).model_type == "qwen3_moe"


def test_a_hub_id_that_is_not_there_is_named(hub_cache: Path) -> None:
    with pytest.raises(CheckpointError, match="some/other is neither a folder nor a repository"):
        find_folder("some/other")


@pytest.mark.parametrize("path", ["./absent", "/absent/folder", "absent", "a/b/c"])
def test_a_path_that_is_no_folder_is_not_taken_for_a_hub_id(hub_cache: Path, path: str) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        find_folder(path)
