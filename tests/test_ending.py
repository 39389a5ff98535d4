"""How the command line ends when its reader goes away, or somebody presses Ctrl-C: quietly, with a shell's code."""

import os
import signal
from pathlib import Path

import pytest
from commands import spawn

UNREAD, INTERRUPTED = 141, 130


BUFFERING = {"buffered": "", "unbuffered": "1"}
"""Values of PYTHONUNBUFFERED: Python notices when it ends that nobody reads, or at the first write."""


@pytest.mark.parametrize("unbuffered", BUFFERING.values(), ids=BUFFERING)
@pytest.mark.parametrize("words", [("--help",), ("pack", "--help"), ("inspect", "PACK"), ("inspect", "PACK", "--json")])
def test_a_reader_that_goes_away_ends_a_command_quietly(
    packed: Path, monkeypatch: pytest.MonkeyPatch, unbuffered: str, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    process = spawn(*(packed if word == "PACK" else word for word in words))
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == UNREAD


def test_an_error_keeps_its_sentence_and_code_where_nobody_reads_the_rest(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", "")
    process = spawn("plan", packed, "--expert-memory", "1KiB")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    (sentence,) = process.stderr.read().splitlines()
    assert sentence.startswith("comoe: there is no plan")
    assert process.wait() == 3


def test_packing_stops_where_nobody_reads_what_it_says(tiny_checkpoint: Path, tmp_path: Path) -> None:
    process = spawn("pack", tiny_checkpoint, "-o", tmp_path / "p", "--calibrate", "none")
    assert process.stdout is not None and process.stderr is not None
    process.stderr.close()
    assert process.stdout.read() == ""
    assert process.wait() == UNREAD
    assert not (tmp_path / "p").exists()


def test_an_error_that_nobody_reads_keeps_its_code() -> None:
    process = spawn("inspect", "nowhere")
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait() == 1


def test_ctrl_c_is_said_in_a_sentence(packed: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "prompt")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    process = spawn("run", packed, "--prompt-file", tmp_path / "prompt")
    with (tmp_path / "prompt").open("w"):  # waits until the command opens it, and so do we
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    signal.signal(signal.SIGINT, before)
    assert (process.returncode, out) == (INTERRUPTED, "")
    assert err.splitlines()[-1] == "comoe: interrupted."
    assert "Traceback" not in err
