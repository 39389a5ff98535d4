"""The cache benchmark: its figures by hand, and whole on a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
from corpora import bench_folders

from comoe.bench import cache
from comoe.bench.cache_figures import BELADY, figures, page
from comoe.memory.policy import POLICIES


def row(model: str, policy: str, rate: float | None) -> dict[str, Any]:
    name = {"kind": "policy", "model": model, "share": 0.5, "policy": policy}
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


def known(model: str, tokens: int, rate: float) -> dict[str, Any]:
    return {**row(model, "", rate), "kind": "known", "known_tokens": tokens}


def test_what_knowing_the_next_tokens_is_worth_is_the_least_of_all_cells() -> None:
    rows = [*ROWS, *(known("a", tokens, rate) for tokens, rate in ((1, 0.3), (8, 0.38))), known("b", 1, 0.4)]
    found = figures(rows)
    assert found["belady_share_known"] == pytest.approx({"1": 0.5, "8": 0.95})
    assert (found["belady_share"], found["best_policy"]) == (pytest.approx(0.75), "lfu")
    settings = {"comoe": "0", "decode_tokens_per_domain": 8, "domains": ["x"]}
    shown = page({"settings": settings, "models": {"a": ""}, **found})
    assert "| memory | 1 | 8 |" in shown and "| 50% | 75.0% | 95.0% |" in shown


def ahead(prefetch: str, ratio: float, ms: float, rate: float) -> dict[str, Any]:
    name = {"kind": "ahead", "model": "a", "share": 0.5, "ratio": ratio, "prefetch": prefetch, "fits": True}
    times = {
        "decode_ms": ms,
        "prefill_ms": 2 * ms,
        "whole_ms": 3 * ms,
        "bytes_read": 100,
        "prefetched_bytes": 20,
        "wasted_bytes": 10 * ms,
    }
    return {**name, "byte_hit_rate": rate, **times}


def live(model: str, ratio: float) -> dict[str, Any]:
    times = {"ratio_of_times": ratio, "ratio_of_times_ci95": [ratio - 0.1, ratio + 0.1], "ms": 1.0, "plain_ms": 2.0}
    return {"kind": "live", "model": model, "ratio": 1.0, "fits": True, "prefetching": ratio < 1, **times}


READ_AHEAD = [
    *(ahead("off", ratio, 1.0, 0.2) for ratio in (0.25, 4.0)),
    ahead("auto", 0.25, 0.5, 0.5),
    ahead("auto", 4.0, 0.9, 0.3),
    *(live("a", 0.8), live("b", 1.02)),
    {"kind": "recall", "model": "a", "recall": {"learned": {"1": [0.8, 0.9], "2": [0.7, 0.95]}, "other": {}}},
]


def test_figures_of_reading_ahead_are_over_the_same_cell_without_and_the_worst_live() -> None:
    found = figures([*ROWS, *READ_AHEAD])
    assert found["belady_share_ahead"] == pytest.approx({"0.25": 1.25, "4.0": 0.75})
    assert (found["prefetch_vs_off"], found["prefetch_vs_off_ci95"]) == (1.02, pytest.approx([0.92, 1.12]))
    assert found["prefetch_vs_off_replayed"] == pytest.approx([0.7, 0.9])
    assert found["prefetch_vs_off_whole"] == pytest.approx([0.7, 0.9])
    assert found["wasted_share"] == pytest.approx(0.09)
    assert found["slot_recall"] == {"learned": [0.7, 0.9]}


def test_the_page_shows_what_reading_ahead_saves() -> None:
    settings = {"comoe": "0", "decode_tokens_per_domain": 8, "domains": ["x"]}
    shown = page({"settings": settings, "models": {"a": ""}, **figures([*ROWS, *READ_AHEAD])})
    assert "| 50% | 0.25 | auto | 125.0% | 0.500 | 0.500 | 0.500 | 1.000 | 5.0% |" in shown
    assert "| 1 | 0.800 (0.700 to 0.900) | 1.00 | 2.00 | yes |" in shown
    assert "| learned | 0.80 (0.90) | 0.70 (0.95) |" in shown


def test_a_tiny_model_is_traced_once_and_rows_are_kept(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, shared, out = bench_folders(tmp_path, tiny_checkpoint)

    def run() -> dict[str, Any]:
        return cache.run(models, shared, quick=True, out=out, progress=lambda step, done: None)

    document = run()
    assert document.keys() >= {"name", "machine", "settings", "models", "belady_share", "best_policy", "rows"}
    names = [(row["share"], row["policy"]) for row in document["rows"] if row["kind"] == "policy"]
    assert names == [(share, policy) for share in cache.SHARES for policy in (*POLICIES, BELADY)]
    assert 0 < document["belady_share"] < 1
    fitting = [row for row in document["rows"] if row["kind"] == "policy" and row["fits"]]
    assert all(row["belady_share"] <= 1 for row in fitting)
    assert {row["tokens"] for row in fitting} == {2 * cache.QUICK.tokens}
    assert document["slot_recall"].keys() == {"learned", "previous", "frequent", "next router"}
    kinds = [row["kind"] for row in document["rows"]]
    assert (kinds.count("ahead"), kinds.count("live")) == (len(cache.SHARES) * 9, 3)
    assert json.loads((out / "cache.json").read_text("utf-8")) == document
    monkeypatch.setattr(cache, "record", None)
    assert run() == document
