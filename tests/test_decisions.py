"""The file of a decision log: read again as it was written, refused when it is anything else."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packs import refused, write_pack

from comoe.store.decisions import (
    FORMAT_VERSION,
    Conditions,
    Decisions,
    Request,
    Switch,
    identity,
    packed,
    read_decisions,
    write_decisions,
)
from comoe.store.manifest import read_manifest
from comoe.types import UsageError

CONDITIONS = Conditions("pack", "20%", "exact", 0.03, "bfloat16", 2, "none")


def log(floors: list[bool]) -> Decisions:
    switches = (Switch(1, "memory", 1000, None), Switch(2, "domain", 1000, 0.25))
    return Decisions(FORMAT_VERSION, CONDITIONS, (Request("prompt", len(floors), packed(floors), switches),))


@given(st.lists(st.booleans(), max_size=50))
def test_choices_take_a_bit_each_and_come_back(floors: list[bool]) -> None:
    request = log(floors).requests[0]
    assert request.bits() == floors
    assert len(request.floors) <= 4 * (len(floors) / 8 / 3 + 1)


def test_a_log_reads_as_it_was_written(tmp_path: Path) -> None:
    write_decisions(tmp_path / "log", log([True, False, True]))
    assert read_decisions(tmp_path / "log") == log([True, False, True])


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("requests", 0, "choices"), 17),
        (("requests", 0, "choices"), -1),
        (("requests", 0, "floors"), "???"),
        (("requests", 0, "more"), 1),
        (("conditions", "threads"), "two"),
        (("format_version",), FORMAT_VERSION + 1),
    ],
)
def test_a_log_that_was_changed_is_refused(tmp_path: Path, at: tuple[str | int, ...], value: object) -> None:
    path = tmp_path / "log"
    write_decisions(path, log([True] * 9))
    document = json.loads(path.read_bytes())
    place: Any = document
    for key in at[:-1]:
        place = place[key]
    place[at[-1]] = value
    path.write_text(json.dumps(document))
    refused(UsageError, lambda: read_decisions(path), path)


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    refused(UsageError, lambda: read_decisions(tmp_path / "log"), tmp_path / "log")
    (tmp_path / "log").write_bytes(b"\xff{")
    refused(UsageError, lambda: read_decisions(tmp_path / "log"), tmp_path / "log")


def test_a_pack_is_the_same_wherever_its_checkpoint_lies_and_another_is_another(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_pack(tmp_path / name / "pack", tmp_path / name / "checkpoint")
    write_pack(tmp_path / "whole", None)
    one, two, whole = (identity(read_manifest(tmp_path / name)) for name in ("one/pack", "two/pack", "whole"))
    assert one == two != whole
