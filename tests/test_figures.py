"""From rows to figures: losses, what held, the page."""

from typing import Any

import pytest

from comoe.bench.figures import figures, page, with_losses

TOKENS = [255, 255]


def reference(nats: float = 3.0, **more: Any) -> dict[str, Any]:
    row = {"kind": "reference", "model": "m", "nats": nats, "nats_per_domain": {"x": nats}, "next_chunk": 0.4}
    row |= {"next_chunk_per_domain": {"x": 0.4}, "expected": None}
    return row | {"windows": {"x": {"nats": [700.0, 800.0], "tokens": TOKENS}}} | more


def form(name: str, factor: float) -> dict[str, Any]:
    row = {"kind": "form", "model": "m", "form": name, "nats": 3.0 * factor, "next_chunk": 0.3}
    windows = {"x": {"nats": [700 * factor, 800 * factor], "tokens": TOKENS}}
    return row | {"resident_bytes": 1 << 20, "windows": windows}


def plan(bound: float, factors: tuple[float, float], **more: Any) -> dict[str, Any]:
    raw = {"exact_nats": [400.0, 300.0], "tokens": [128, 128]}
    row = {
        "kind": "plan", "model": "m", "bound": bound, "share": 0.3, "fits": True, "identical": factors == (1, 1),
        "plan": {"target": "q4", "floor": None}, "bytes_read": {"flash": 25600}, "tokens": 256, "hit_rate": 0.75,
        "floor_rate": 0.0, "ms_per_token": 5.0, "ms_per_token_p95": 7.0, "ms_over_exact": 1.25,
        "ms_over_exact_ci95": [1.1, 1.4],
    }  # fmt: skip
    return row | {"windows": {"x": {**raw, "nats": [400 * factors[0], 300 * factors[1]]}}} | more


def test_a_forms_loss_is_against_the_reference_window_by_window() -> None:
    rows = with_losses([reference(), form("exact", 1.0), form("q4", 1.01)])
    assert [row.get("loss") for row in rows] == [None, 0.0, pytest.approx(0.01)]
    assert rows[2]["loss_ci95"] == pytest.approx([0.01, 0.01])
    assert (rows[2]["worst_domain"], rows[2]["loss_per_domain"]) == ("x", {"x": pytest.approx(0.01)})


def test_raw_columns_stay_in_the_file_of_rows() -> None:
    assert all("windows" not in row for row in with_losses([reference(), form("q4", 1.01), plan(0.02, (1, 1))]))


def test_a_plans_loss_is_against_the_exact_model_beside_it_and_is_held_to_its_bound() -> None:
    rows = with_losses([reference(), plan(0.02, (1.01, 1.018)), plan(0.02, (1.01, 1.04)), plan(0.0, (1, 1))])[1:]
    assert [row["loss"] for row in rows] == pytest.approx([0.014, 0.025, 0.0])
    assert [row["within_bound"] for row in rows] == [True, False, True]
    assert [row["within_bound_ci95"] for row in rows] == [True, False, True]
    wide = with_losses([reference(), plan(0.02, (1.0, 1.03))])[1]
    assert (wide["within_bound"], wide["within_bound_ci95"]) == (True, False)


def test_the_reference_is_compared_with_the_models_own_figures_domain_by_domain() -> None:
    expected = {"nats_per_token": {"x": 3.001, "mean": 3.0}, "next_chunk": {"x": 0.41, "all": 0.4, "n": 9}}
    row, unknown = with_losses([reference(expected=expected), reference()])
    assert row["max_difference"] == {"nats": pytest.approx(0.001), "next_chunk": pytest.approx(0.01)}
    assert unknown["max_difference"] is None


def test_figures_name_what_exceeded_its_bound_and_what_was_not_identical() -> None:
    rows = [reference(), form("q4", 1.01), plan(0.0, (1, 1)), plan(0.02, (1.03, 1.03))]
    found = figures(with_losses(rows))
    assert found["loss"] == {"m": {"q4": pytest.approx(0.01)}}
    assert found["next_chunk"] == {"m": {"q4": 0.3}}
    assert found["identical"] is True
    assert (found["within_bound"], found["within_bound_ci95"]) == (False, False)
    assert found["exceeded"] == [{"model": "m", "bound": 0.02, "share": 0.3, "loss": pytest.approx(0.03)}]
    assert figures(with_losses([reference(), plan(0.0, (1, 1), identical=False)]))["identical"] is False


def test_the_page_shows_every_row() -> None:
    refused = {"kind": "plan", "model": "m", "bound": 0.0, "share": 0.01, "fits": False, "smallest_bytes": 4096}
    rows = with_losses([reference(), form("q4", 1.01), plan(0.0, (1, 1)), plan(0.02, (1.01, 1.01)), refused])
    machine = {"cores": 2, "cpu": "a processor", "torch": "2", "transformers": "5", "kernel": "native"}
    text = page({"machine": machine, "settings": {"comoe": "0"}, "models": {"m": "hash"}, "rows": rows})
    assert "| q4 | 1 MiB | 3.0300 | 1.00% | 1.00% to 1.00% | 1.00% (x) | 30.0% |" in text
    assert "| 0.0% | 30% | q4 | identical |" in text
    assert "| 2.0% | 30% | q4 | 1.00% |" in text and "| 1.25 | 1.10 to 1.40 | 75.0% | 0.0% | 100 B |" in text
    assert "does not fit below 4 KiB" in text
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {8, 13}
