"""`comoe verify`: what it prints of predictions and measurements, and which text it takes."""

import re
import sys
from pathlib import Path

import pytest
from commands import Comoe, calibration_text, document

from comoe.cli.verify import outside


@pytest.mark.parametrize(
    ("predicted", "measured", "found"),
    [
        ({"ms_per_token": (1.0, 2.0)}, 1.0, {}),
        ({"ms_per_token": (1.0, 2.0)}, 2.1, {"ms_per_token": "above"}),
        ({"ms_per_token": [1.0, 2.0]}, 0.9, {"ms_per_token": "below"}),
        ({"hit_rate": 0.5}, 0.9, {}),
        ({"resident_bytes": 100}, 90, {}),
        ({"resident_bytes": 100}, 101, {"resident_bytes": "above"}),
        ({}, 1.0, {}),
    ],
)
def test_what_lies_outside_a_predicted_band_is_named(
    predicted: dict[str, object], measured: float, found: dict[str, str]
) -> None:
    assert outside(predicted, {**dict.fromkeys(predicted, measured), "loss_ledger": measured}) == found


def test_every_figure_is_a_line_that_people_can_read(
    comoe: Comoe, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys.modules["comoe.cli.verify"], "outside", lambda predicted, measured: {"ms_per_token": "above"}
    )
    result = comoe("verify", packed, "--text", calibration_text(tmp_path))
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in result.out.splitlines())
    assert lines["bit equal"] == lines["allclose"] == lines["greedy equal"] == "yes"
    number = r"[\d.]+"
    assert re.fullmatch(
        rf"predicted {number} to {number}, measured {number}: above what was predicted", lines["ms/token"]
    )
    assert re.fullmatch(rf"predicted {number}%, measured {number}%", lines["hit rate"])
    assert re.fullmatch(rf"predicted {number} KiB, measured {number} KiB", lines["expert memory"])
    assert re.fullmatch(rf"measured {number} [KM]iB from flash", lines["read"])
    assert lines["loss"] == "predicted +0.00 % to +0.00 %, measured +0.00 %"
    assert lines["loss by the ledger"] == "measured +0.00 %"


def test_the_document_names_what_lies_outside(comoe: Comoe, packed: Path, tmp_path: Path) -> None:
    got = document(comoe("verify", packed, "--text", calibration_text(tmp_path), "--json"))
    assert got["outside"] == outside(got["predicted"], got["measured"])


@pytest.mark.parametrize(
    ("data", "said"), [(None, "cannot be read"), (b" \n", "holds no text"), (b"\xff\xfe", "cannot be read")]
)
def test_text_that_is_none_is_refused_in_a_sentence(comoe: Comoe, packed: Path, data: bytes | None, said: str) -> None:
    if data is not None:
        Path("text.txt").write_bytes(data)
    result = comoe("verify", packed, "--text", "text.txt")
    assert (result.code, result.out) == (2, "")
    assert said in result.sentence and "text.txt" in result.sentence
    assert "Traceback" not in result.err
