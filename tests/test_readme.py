"""The README's own commands, run as they stand on the model that ships."""

import contextlib
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import call
from edges import running

from comoe.store.shipped import demo_checkpoint

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")

QUICK = {"COMOE_CALIB_TOKENS": "4096", "COMOE_FORMS": "q3,q4,q8"}
"""Most of the time is packing: on a quarter of the text, and without what experts share. test_shared tells of that."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> Iterator[list[str]]:
    for block in blocks("sh"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["comoe"]:
                yield words[1:]


def test_the_commands_and_the_library_do_what_the_readme_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    Path("Qwen3-30B-A3B").symlink_to(demo_checkpoint())
    shown = list(commands())
    assert [words[0] for words in shown] == ["pack", "plan", "run"]
    for words in shown:
        result = call(capsys, monkeypatch, *words)
        assert result.code == 0, result.err
    assert len(result.out.split()) > 10
    (block,) = blocks("python")
    names: dict[str, object] = {}
    exec(block, names)
    model = names["model"]
    assert model.comoe.stats()["uses"] == 0  # type: ignore[attr-defined]
    with contextlib.closing(model.comoe):  # type: ignore[attr-defined]
        assert model.comoe.plan.target == "exact"  # type: ignore[attr-defined]


def test_what_it_shows_of_two_machines_runs(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMOE_CACHE", str(tmp_path / "cache"))
    (block,) = blocks("console")
    pack, near, here = (shlex.split(line.partition("$")[2])[1:] for line in block.splitlines())
    command, name, listen, place = near
    assert pack[0] == "pack" and pack[2:] == ["-o", name, "--self-contained"]
    assert (command, listen) == ("edge", "--listen")
    shutil.copytree(published, name)
    with running(Path(name)) as edge:
        words = [word.replace(f"http://near:{place.rpartition(':')[2]}", edge.url) for word in here]
        assert sum(edge.url in word for word in words) == 2
        result = call(capsys, monkeypatch, *words)
    assert result.code == 0, result.err
    assert result.out.strip()
