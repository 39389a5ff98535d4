"""From the joint benchmark's rows to its figures, and a page to read. Pure."""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from comoe.bench.losses import percent
from comoe.bench.rows import Row
from comoe.units import format_size

EXACT, AS_FAST = "exact, best offloader", "joint, as fast"
SEPARABLE, SEPARABLE_BIAS = "separable", "separable, bias"
JOINT, NO_BIAS = "joint", "joint, no bias"
LIVE = (SEPARABLE, SEPARABLE_BIAS, NO_BIAS, JOINT, EXACT)
"""Methods that are timed live; times are set beside the first's."""

RESIDENT_KIND, LIVE_KIND = "resident", "live"
"""Of rows of methods whose experts all stay in memory, and of times that threads and reads really took."""

SHARE = 0.16
"""The budget of the published figures."""

NO_WORSE = 1.01


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """The document's figures, and its rows.

    `ratio_at_16` is the median, over models and rates, of the joint way's ms/token over the best separable one's in
    16 % of the bytes; `loss_ratio_at_16` that of its loss where it is as fast. `cells_no_worse` of `cells` have a joint
    way that is not slower by more than a hundredth; `median_ratio` is over all of them. None where nothing fits.
    """
    ratios = {_cell(row): row["methods"][JOINT]["ms"] / row["methods"][SEPARABLE]["ms"] for row in _compared(rows)}
    losses = [
        max(0.0, row["methods"][AS_FAST]["loss"]) / row["methods"][SEPARABLE]["loss"]
        for row in _compared(rows)
        if row["share"] == SHARE and row["methods"][SEPARABLE]["loss"] > 0
    ]
    at_share = [ratio for (_, share, _), ratio in ratios.items() if share == SHARE]
    return {
        "ratio_at_16": median(at_share) if at_share else None,
        "loss_ratio_at_16": median(losses) if losses else None,
        "cells": len(ratios),
        "cells_no_worse": sum(ratio <= NO_WORSE for ratio in ratios.values()),
        "median_ratio": median(ratios.values()) if ratios else None,
        "rows": list(rows),
    }


def _compared(rows: Sequence[Row]) -> list[Row]:
    """Cells in which both sides fit."""
    cells = [row for row in rows if row["kind"] == "cell"]
    return [row for row in cells if all(row["methods"].get(name, {}).get("fits") for name in (JOINT, SEPARABLE))]


def _cell(row: Row) -> tuple[str, float, float]:
    return row["model"], row["share"], row["ratio"]


def page(document: dict[str, Any]) -> str:
    """The document as Markdown tables."""
    return "\n".join(_lines(document)) + "\n"


def _lines(document: dict[str, Any]) -> Iterator[str]:
    settings = document["settings"]
    yield "# Joint\n"
    yield f"Made by `comoe bench joint` {settings['comoe']}: {settings['judged_tokens_per_domain']} tokens of each of "
    yield f"{len(settings['domains'])} domains on a virtual clock, within a loss of {percent(settings['bound'])} by "
    yield "calibration text. A read of an exact expert takes so many times what a layer takes. A loss with a tilde is "
    yield "the ledger's, others are measured.\n"
    for model in document["models"]:
        yield f"## {model}\n"
        for row in document["rows"]:
            if row["kind"] == "cell" and row["model"] == model:
                yield f"### {row['share']:.0%} of the bytes, a read {row['ratio']:g} times a layer\n"
                yield "| method | way | ms/token | p95 | prompt, ms | read per token | hits | loss |"
                yield "|---|---|---|---|---|---|---|---|"
                yield from (_line(name, found) for name, found in row["methods"].items())
                yield ""


def _line(name: str, found: Row) -> str:
    if not found["fits"]:
        return f"| {name} | does not fit |" + " |" * 6
    way = found.get("way")
    shown = f"{way['rung']}, {way['policy']}, {way['prefetch']}" if way else "the future is known"
    shown += f", floor {way['floor']}" if way and way["floor"] else ""
    loss = percent(found["loss"]) if "loss" in found else f"~{percent(found.get('loss_ledger', 0.0))}"
    return (
        f"| {name} | {shown} | {found['ms']:.2f} | {found['ms_p50_p95'][1]:.2f} | {found['prefill_ms']:.0f} "
        f"| {format_size(round(found['bytes_per_token']))} | {found['hit_rate']:.1%} | {loss} |"
    )
