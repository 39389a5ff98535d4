"""The command line called as a shell would call it, in this process or in one of its own."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from comoe.cli import main

CALIBRATION = "the quick brown fox jumps over the lazy dog. " * 200


@dataclass(frozen=True, slots=True)
class Result:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The last line on stderr, which must be comoe's own."""
        last = self.err.strip().splitlines()[-1]
        assert last.startswith("comoe: "), self.err
        return last.removeprefix("comoe: ")


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> Result:
    """`comoe WORDS...` in this process."""
    monkeypatch.setattr(sys, "argv", ["comoe", *map(str, words)])
    capsys.readouterr()
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    shown = capsys.readouterr()
    return Result(code, shown.out, shown.err)


Comoe = Callable[..., Result]
"""`call` from an empty folder: the fixture `comoe`."""


def document(result: Result) -> Any:
    """What a command that went well printed as JSON."""
    assert result.code == 0, result.err
    return json.loads(result.out)


def spawn(*words: object) -> "subprocess.Popen[str]":
    """`comoe WORDS...` in a process of its own."""
    command = [sys.executable, "-m", "comoe", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def calibration_text(folder: Path) -> Path:
    """Text for the tiny checkpoint's tokenizer of characters."""
    path = folder / "fox.txt"
    path.write_text(f"{CALIBRATION}\n<|doc|>\n{CALIBRATION}\n", encoding="utf-8")
    return path
