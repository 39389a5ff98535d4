"""`comoe inspect --plot`: pictures are sound files, the same for the same manifest, replaced whole or not at all."""

import errno
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from commands import Comoe, document
from packs import edit, write_pack

from comoe.cli.picture import ClusterTree, Picture, StepLoss, picture_of
from comoe.cli.plot import MOST_TREES, save
from comoe.store.manifest import Certificate, Manifest, read_manifest
from comoe.types import StorageFull, UsageError

LOSSES, ERRORS, TREES = (
    "Loss of every certified step",
    "Error of every layer",
    "Experts in the order in which they join",
)
TEXT = "{http://www.w3.org/2000/svg}text"
NOTHING = Picture("", (), (), ())


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Of the toy pack."""
    write_pack(tmp_path / "toy", None)
    return read_manifest(tmp_path / "toy")


@pytest.fixture
def picture(manifest: Manifest) -> Picture:
    return picture_of(manifest)


def texts(file: Path) -> list[str]:
    """All texts of an SVG, which must be sound XML."""
    return ["".join(element.itertext()) for element in ElementTree.parse(file).iter(TEXT)]


def shown(file: Path) -> tuple[bool, ...]:
    """Which of the three parts an SVG has."""
    whole = "\n".join(texts(file))
    return tuple(title in whole for title in (LOSSES, ERRORS, TREES))


# What is drawn


def test_an_svg_of_a_real_pack_names_every_step_and_layer(comoe: Comoe, packed: Path) -> None:
    got = document(comoe("inspect", packed, "--plot", "p.svg", "--json"))
    assert got["plot"] == "p.svg"
    manifest, found = read_manifest(packed), texts(Path("p.svg"))
    assert len(manifest.chain) > 3
    assert {step.name for step in manifest.chain} <= {*found}
    assert {"layer 0", "layer 1"} <= {*found}
    assert shown(Path("p.svg")) == (True, True, True)


def test_a_png_of_a_real_pack_is_a_picture_of_readable_size(comoe: Comoe, packed: Path) -> None:
    result = comoe("inspect", packed, "--plot", "p.PNG")
    assert result.code == 0
    assert "p.PNG shows losses, errors by layer, cluster trees." in result.err
    pixels = matplotlib.image.imread("p.PNG", format="png")
    assert pixels.shape[0] > 1000 < pixels.shape[1]
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 100


def test_a_pdf_is_a_pdf(picture: Picture, tmp_path: Path) -> None:
    save(picture, tmp_path / "p.pdf")
    data = (tmp_path / "p.pdf").read_bytes()
    assert data.startswith(b"%PDF-") and data.rstrip().endswith(b"%%EOF")


def test_without_plot_nothing_is_drawn_and_json_says_so(comoe: Comoe, packed: Path) -> None:
    assert document(comoe("inspect", packed, "--json"))["plot"] is None
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("ending", [".svg", ".png", ".pdf"])
def test_the_same_manifest_gives_the_same_bytes_whatever_the_settings_of_who_draws(
    picture: Picture, tmp_path: Path, ending: str
) -> None:
    first, second = tmp_path / f"first{ending}", tmp_path / f"second{ending}"
    save(picture, first)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.hashsalt": None}):
        save(picture, second)
        assert matplotlib.rcParams["font.size"] == 20
    assert first.read_bytes() == second.read_bytes()
    assert not re.search(rb"CreationDate|dc:date|\b20\d\d-\d\d-\d\d", first.read_bytes())


def test_parts_without_data_are_left_out(picture: Picture, tmp_path: Path) -> None:
    parts = {"frontier": picture.frontier, "curves": picture.curves, "trees": picture.trees}
    file = tmp_path / "p.svg"
    for at, name in enumerate(parts):
        save(replace(picture, **{name: ()}), file)
        assert shown(file) == tuple(other != at for other in range(3))
        save(replace(NOTHING, **{name: parts[name]}), file)
        assert shown(file) == tuple(other == at for other in range(3))


def test_of_many_layers_a_few_trees_are_shown_from_the_first_to_the_last(picture: Picture, tmp_path: Path) -> None:
    tree = picture.trees[0]
    trees = tuple(ClusterTree(layer, tree.experts, tree.joints) for layer in range(48))
    save(replace(NOTHING, trees=trees), tmp_path / "p.svg")
    found = texts(tmp_path / "p.svg")
    layers = [int(text.removeprefix("layer ")) for text in found if re.fullmatch(r"layer \d+", text)]
    assert (len(layers), layers[0], layers[-1]) == (MOST_TREES, 0, 47)
    assert any(f"{MOST_TREES} of 48 layers" in text for text in found)


def test_names_are_shown_as_they_are_but_for_what_no_text_can_hold(picture: Picture, tmp_path: Path) -> None:
    names = (r"$\frac$", "<&>", "a\0b\ud800c")
    steps = tuple(StepLoss(name, (at + 1) / 4, picture.frontier[0].certificate) for at, name in enumerate(names))
    save(replace(NOTHING, frontier=steps), tmp_path / "p.svg")
    assert {r"$\frac$", "<&>", "a\ufffdb\ufffdc"} <= {*texts(tmp_path / "p.svg")}


def test_names_of_steps_of_one_size_do_not_stand_on_each_other(picture: Picture, tmp_path: Path) -> None:
    steps = tuple(StepLoss(name, 0.3, picture.frontier[0].certificate) for name in ("one", "two", "three"))
    save(replace(NOTHING, frontier=steps), tmp_path / "p.svg")
    found = ElementTree.parse(tmp_path / "p.svg").iter(TEXT)
    places = [element.get("transform") for element in found if element.text in ("one", "two", "three")]
    assert len(places) == len({*places}) == 3


@pytest.mark.parametrize("loss", [-0.5, -1e-9, 0.0, 1e-9, 1.0, 1e6])
@pytest.mark.parametrize("share", [1e-9, 0.3, 30.0])
def test_any_loss_at_any_share_is_drawn(tmp_path: Path, loss: float, share: float) -> None:
    certificate = Certificate(loss, (loss, loss), loss, (loss, loss + 1), "poems")
    save(replace(NOTHING, frontier=(StepLoss("a", share, certificate),)), tmp_path / "p.svg")
    assert "a" in texts(tmp_path / "p.svg")


# What cannot be drawn


def uncalibrated(pack: Any) -> None:
    pack["chain"] = []
    for layer in pack["layers"]:
        layer.update(tree=[], errors={})


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("p.jpg", "give --plot a file that does"),
        ("p", "does not end in .svg, .png or .pdf"),
        ("absent/p.svg", "absent/p.svg cannot be written (No such file or directory): choose another place"),
        ("folder.svg", "folder.svg cannot be written (Is a directory): choose another place"),
        ("a file/p.svg", "Not a directory"),
        ("x" * 250 + ".svg", "File name too long"),
    ],
)
def test_a_target_that_cannot_be_is_refused_in_a_sentence_and_nothing_is_left(
    comoe: Comoe, packed: Path, file: str, said: str
) -> None:
    Path("folder.svg").mkdir()
    Path("a file").touch()
    result = comoe("inspect", packed, "--plot", file)
    assert (result.code, result.out) == (2, "")
    assert said in result.sentence and result.sentence.endswith(".")
    assert sorted(path.name for path in Path().rglob("*")) == ["a file", "folder.svg"]


def test_a_pack_without_anything_to_draw_is_refused(comoe: Comoe, tmp_path: Path) -> None:
    write_pack(tmp_path / "toy", None)
    edit(tmp_path / "toy", uncalibrated)
    result = comoe("inspect", "toy", "--plot", "p.svg")
    assert (result.code, result.out) == (2, "")
    assert "has no losses, errors or clusters; calibrate it, or leave out --plot." in result.sentence
    assert not Path("p.svg").exists()


def test_without_matplotlib_the_extra_is_named(comoe: Comoe, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "comoe.cli.plot")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    result = comoe("inspect", packed, "--plot", "p.svg")
    assert (result.code, result.out) == (2, "")
    assert result.sentence == "--plot needs matplotlib: pip install 'comoe[plot]'."
    assert json.loads(comoe("inspect", packed, "--json").out)["plot"] is None


def test_a_picture_that_was_there_is_replaced(picture: Picture, tmp_path: Path) -> None:
    file = tmp_path / "p.svg"
    file.write_text("an old one")
    os.link(file, tmp_path / "as it was")
    save(picture, file)
    assert LOSSES in file.read_text("utf-8")
    assert (tmp_path / "as it was").read_text() == "an old one", "it takes the name when it is whole"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["as it was", "p.svg"]


FULL = OSError(errno.ENOSPC, "No space left on device")
DENIED = PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize(("fault", "refused"), [(FULL, StorageFull), (DENIED, UsageError)])
def test_a_fault_while_it_is_written_leaves_the_old_picture(
    picture: Picture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: OSError, refused: type[Exception]
) -> None:
    file = tmp_path / "p.svg"
    file.write_text("an old one")

    def fail(descriptor: int) -> None:
        raise fault

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(refused, match=r"p\.svg"):
        save(picture, file)
    assert file.read_text() == "an old one"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["p.svg"]
