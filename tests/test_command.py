"""How a command's words become its parameters: several values after one flag."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import Comoe, calibration_text, document

from comoe.cli.command import spread

OPTIONS = {
    "--calib": SimpleNamespace(is_flag=False, multiple=True),
    "--seed": SimpleNamespace(is_flag=False, multiple=False),
    "--json": SimpleNamespace(is_flag=True, multiple=False),
    "-o": SimpleNamespace(is_flag=False, multiple=False),
}


@pytest.mark.parametrize(
    ("words", "spread_out"),
    [
        ("ckpt --calib a b c --json", "ckpt --calib a --calib b --calib c --json"),
        ("ckpt --calib=a b", "ckpt --calib=a --calib b"),
        ("ckpt --calib a --calib b c", "ckpt --calib a --calib b --calib c"),
        ("ckpt -o p --calib a b --seed 3", "ckpt -o p --calib a --calib b --seed 3"),
        ("ckpt --calib a b --seed 3 c", "ckpt --calib a --calib b --seed 3 c"),
        ("ckpt --json c", "ckpt --json c"),
        ("--calib a ckpt -o p", "--calib a ckpt -o p"),
        ("--calib a ckpt b", "--calib a ckpt b"),
        ("-o p --calib a ckpt", "-o p --calib a ckpt"),
        ("ckpt --calib -- b", "ckpt --calib -- b"),
        ("ckpt --calib a - --unknown x", "ckpt --calib a --calib - --unknown x"),
        ("", ""),
    ],
)
def test_words_behind_a_flag_that_may_be_repeated_are_its_values_once_the_argument_is_given(
    words: str, spread_out: str
) -> None:
    assert spread(words.split(), OPTIONS, 1) == spread_out.split()


def test_pack_calibrates_on_all_files_after_one_flag(comoe: Comoe, tiny_checkpoint: Path, tmp_path: Path) -> None:
    first = calibration_text(tmp_path)
    second = first.with_name("hound.txt")
    second.write_text(first.read_text())
    words = ("--calib-tokens", 4096, "--forms", "q8", "--json")
    document(comoe("pack", tiny_checkpoint, "-o", "one", "--calib", first, second, *words))
    document(comoe("pack", "--calib", first, "--calib", second, tiny_checkpoint, "-o", "two", *words))
    packs = [document(comoe("inspect", name, "--json")) for name in ("one", "two")]
    assert packs[0]["provenance"] == packs[1]["provenance"]
    domains = {step["worst_domain"] for step in packs[0]["chain"] if step["step"] != "exact"}
    assert domains and domains <= {"fox", "hound"}
    (Path("twice")).mkdir()
    again = Path("twice") / "fox.txt"
    again.write_text(first.read_text())
    assert "two calibration files" in comoe("pack", tiny_checkpoint, "-o", "p", "--calib", first, again).sentence
