"""The cache benchmark: its figures by hand, and whole on a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_quality import shared_folder

from comoe.bench import cache
from comoe.bench.cache_figures import BELADY, figures, page
from comoe.memory.policy import POLICIES


def row(model: str, policy: str, rate: float | None) -> dict[str, Any]:
    name = {"model": model, "share": 0.5, "policy": policy}
    if rate is None:
        return {**name, "fits": False, "capacity_bytes": 1, "smallest_bytes": 4096}
    rates = {"hit_rate": rate, "byte_hit_rate": rate, "decode_hit_rate": rate}
    return {**name, "fits": True, **rates, "decode_bytes_per_token": 1.0}


ROWS = [
    *(row("a", policy, rate) for policy, rate in (("lru", 0.2), ("lfu", 0.3), (BELADY, 0.4))),
    *(row("b", policy, rate) for policy, rate in (("lru", 0.7), ("lfu", 0.6), (BELADY, 0.8))),
    *(row("c", policy, 0.0) for policy in ("lru", "lfu", BELADY)),
    *(row("d", policy, None) for policy in ("lru", "lfu", BELADY)),
]


def test_the_share_is_of_the_policy_whose_worst_cell_is_best() -> None:
    found = figures(ROWS)
    assert found["belady_share_by_policy"] == pytest.approx({"lru": 0.5, "lfu": 0.75})
    assert (found["belady_share"], found["best_policy"]) == (pytest.approx(0.75), "lfu")
    shares = [row.get("belady_share") for row in found["rows"]]
    assert shares == [*map(pytest.approx, (0.5, 0.75, 1, 0.875, 0.75, 1, 1, 1, 1)), None, None, None]


def test_where_nothing_fits_there_is_no_share() -> None:
    assert figures(ROWS[-3:])["belady_share"] is None


def test_the_page_has_a_line_for_every_row() -> None:
    settings = {"comoe": "0", "decode_tokens_per_domain": 8, "domains": ["x"]}
    shown = page({"settings": settings, "models": dict.fromkeys("abcd", ""), **figures(ROWS)})
    assert shown.count("| 50% |") == len(ROWS) and shown.count("does not fit below 4 KiB") == 3
    assert "| 50% | lfu | 30.0% | 30.0% | 75.0% | 30.0% |" in shown


def test_a_tiny_model_is_traced_once_and_rows_are_kept(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_checkpoint)
    shared, out = shared_folder(tmp_path / "shared"), tmp_path / "out"

    def run() -> dict[str, Any]:
        return cache.run(tmp_path / "models", shared, quick=True, out=out, progress=lambda step, done: None)

    document = run()
    assert document.keys() >= {"name", "machine", "settings", "models", "belady_share", "best_policy", "rows"}
    names = [(row["share"], row["policy"]) for row in document["rows"]]
    assert names == [(share, policy) for share in cache.SHARES for policy in (*POLICIES, BELADY)]
    assert 0 < document["belady_share"] < 1
    assert all(row["belady_share"] <= 1 for row in document["rows"] if row["fits"])
    assert {row["tokens"] for row in document["rows"] if row["fits"]} == {2 * cache.QUICK_TOKENS}
    assert json.loads((out / "cache.json").read_text("utf-8")) == document
    monkeypatch.setattr(cache, "record", None)
    assert run() == document
