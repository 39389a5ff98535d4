"""Settings that exclude each other: the stronger source wins, and only two of one source are an error."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from commands import Comoe, document

from comoe.cli.rivals import displaced
from comoe.store.pack import Pack

Environment = Mapping[str, str]


@pytest.mark.parametrize(
    ("sources", "gone"),
    [
        ([{"expert_memory": "30%"}, {"memory": "4GiB"}], {"memory"}),
        ([{}, {"memory": "4GiB"}, {"expert_memory": "30%", "memory": "1GiB"}], {"expert_memory"}),
        ([{"memory": "4GiB", "expert_memory": "30%"}, {}], set()),
        ([{"exact": True}, {"max_loss": "2%"}], {"max_loss"}),
        ([{"exact": False}, {"max_loss": "2%"}], set()),
        ([{"max_loss": "0"}, {"exact": True}, {"memory": "4GiB"}], {"exact"}),
        ([{"calib": ["a.txt"]}, {"calibrate": "none"}], {"calibrate"}),
        ([{"calibrate": "none"}, {}, {"calib": ["a.txt"]}], {"calib"}),
        ([{"calibrate": "text"}, {"calib": ["a.txt"]}], set()),
        ([], set()),
    ],
)
def test_of_rivals_those_of_weaker_sources_give_way(sources: list[dict[str, object]], gone: set[str]) -> None:
    assert displaced(sources) == gone


@pytest.mark.parametrize(
    ("file", "environment", "words"),
    [
        ("", {"COMOE_MEMORY": "4 apples"}, ("--expert-memory", "50%")),
        ('memory = "4GiB"', {}, ("--expert-memory", "50%")),
        ('memory = "4GiB"', {"COMOE_EXPERT_MEMORY": "50%"}, ()),
        ('memory = "4GiB"\n[plan]\nexpert-memory = "50%"', {}, ()),
    ],
)
def test_memory_of_the_stronger_source_displaces_the_other_kind_of_memory(
    comoe: Comoe, packed: Path, monkeypatch: pytest.MonkeyPatch, file: str, environment: Environment, words: list[str]
) -> None:
    Path("comoe.toml").write_text(file)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (exact, *_) = document(comoe("plan", packed, "--json", *words))["plans"]
    assert exact["total_bytes"] == Pack(packed).manifest.expert_bytes_bf16 // 2


def test_a_bound_and_exactness_displace_each_other(comoe: Comoe, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(*words: str) -> set[str]:
        plans = document(comoe("plan", packed, "--expert-memory", "50%", "--json", *words))["plans"]
        return {plan["name"] for plan in plans}

    monkeypatch.setenv("COMOE_MAX_LOSS", "50%")
    assert "bounded" in names()
    assert "bounded" not in names("--exact")
    monkeypatch.delenv("COMOE_MAX_LOSS")
    Path("comoe.toml").write_text("exact = true")
    assert "bounded" not in names()
    assert "bounded" in names("--max-loss", "50%")
    assert "bounded" in names("--no-exact")  # where no bound is asked for, plan offers one


@pytest.mark.parametrize(
    ("file", "environment", "words"),
    [
        ("", {"COMOE_MEMORY": "4GiB", "COMOE_EXPERT_MEMORY": "50%"}, ()),
        ('memory = "4GiB"\nexpert-memory = "50%"', {}, ()),
        ('expert-memory = "50%"', {}, ("--memory", "4GiB", "--expert-memory", "50%")),
    ],
)
def test_rivals_of_one_source_are_an_error(
    comoe: Comoe, packed: Path, monkeypatch: pytest.MonkeyPatch, file: str, environment: Environment, words: list[str]
) -> None:
    Path("comoe.toml").write_text(file)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = comoe("plan", packed, *words)
    assert (result.code, result.out) == (2, "")
    assert "not both" in result.sentence


def test_what_the_file_turns_on_a_flag_turns_off(comoe: Comoe, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("comoe.toml").write_text("json = true")
    assert document(comoe("inspect", packed))["layers"] == 2
    assert not comoe("inspect", packed, "--no-json").out.startswith("{")
    monkeypatch.setenv("COMOE_JSON", "0")
    assert not comoe("inspect", packed).out.startswith("{")
