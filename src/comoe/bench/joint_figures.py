"""From the joint benchmark's rows to its figures, and a page to read. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np

from comoe.bench.losses import percent, percents
from comoe.bench.rows import Row
from comoe.units import format_size

EXACT, AS_FAST = "exact, best offloader", "joint, as fast"
SEPARABLE, SEPARABLE_BIAS = "separable", "separable, bias"
JOINT, NO_BIAS = "joint", "joint, no bias"
LIVE = (SEPARABLE, JOINT, EXACT)
"""Methods that are timed live; times are set beside the first's."""

RESIDENT_KIND, LIVE_KIND = "resident", "live"
"""Of rows of methods whose experts all stay in memory, and of times that threads and reads really took."""

SHARE = 0.16
"""The budget of the published figures."""

NO_WORSE = 1.01


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """The document's figures, and its rows.

    `ratio_at_16` is the median, over models and rates, of the joint way's ms/token over the best separable one's in
    16 % of the bytes, `ratio_at_16_live` that of the times of threads and reads; `loss_ratio_at_16` that of its loss
    where it is as fast. `cells_no_worse` of `cells` have a joint way that is not slower by more than a hundredth;
    `median_ratio` is over all of them. `foretold` is how far the virtual clock is off what was timed live, over so many
    ways of so many cells, and how sure such times are: half the interval of a way's time over another's, timed in turns
    with it, over that ratio. None where nothing fits.
    """
    ratios = {_cell(row): row["methods"][JOINT]["ms"] / row["methods"][SEPARABLE]["ms"] for row in _compared(rows)}
    losses = [
        max(0.0, row["methods"][AS_FAST]["loss"]) / row["methods"][SEPARABLE]["loss"]
        for row in _compared(rows)
        if row["share"] == SHARE and row["methods"][SEPARABLE]["loss"] > 0
    ]
    live = [row for row in rows if row["kind"] == LIVE_KIND]
    timed = [row["methods"][JOINT]["ratio_of_times"] for row in live if row["share"] == SHARE and _both(row)]
    return {
        "ratio_at_16": _median(ratio for (_, share, _), ratio in ratios.items() if share == SHARE),
        "ratio_at_16_live": _median(timed),
        "loss_ratio_at_16": _median(losses),
        "cells": len(ratios),
        "cells_no_worse": sum(ratio <= NO_WORSE for ratio in ratios.values()),
        "median_ratio": _median(ratios.values()),
        "foretold": _foretold(live),
        "rows": list(rows),
    }


def _foretold(live: Sequence[Row]) -> Row | None:
    ways = [list({str(found["way"]): found for found in row["methods"].values()}.values()) for row in live]
    errors = [abs(found["ms_foretold"] / found["ms"] - 1) for row in ways for found in row]
    if not errors:
        return None
    spans = [
        (high - low) / 2 / found["ratio_of_times"]
        for row in ways
        for found in row
        for low, high in [found["ratio_of_times_ci95"]]
        if high > low
    ]
    return {
        "ways": len(errors),
        "median_error": median(errors),
        "p95_error": float(np.quantile(errors, 0.95)),
        "median_half_interval": _median(spans),
        "p95_half_interval": float(np.quantile(spans, 0.95)) if spans else None,
    }


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return median(found) if found else None


def _compared(rows: Sequence[Row]) -> list[Row]:
    """Cells in which both sides fit."""
    cells = [row for row in rows if row["kind"] == "cell"]
    return [row for row in cells if _both(row) and all(row["methods"][name]["fits"] for name in (JOINT, SEPARABLE))]


def _both(row: Row) -> bool:
    return JOINT in row["methods"] and SEPARABLE in row["methods"]


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
    yield "calibration text. A read of an exact expert takes so many times what a layer takes. Losses are measured, "
    yield 'with their 95 % interval; "exact, lru" is what mapping the file comes to at best, with the right hints.\n'
    yield from _summary(document)
    rows = document["rows"]
    for model in document["models"]:
        mine = [row for row in rows if row["model"] == model]
        yield f"\n## {model}\n"
        yield from _resident([row for row in mine if row["kind"] == RESIDENT_KIND])
        for row in mine:
            if row["kind"] == "cell":
                live = next(
                    (other for other in mine if other["kind"] == LIVE_KIND and _cell(other) == _cell(row)), None
                )
                yield from _cell_lines(row, live["methods"] if live else {})


def _summary(document: dict[str, Any]) -> Iterator[str]:
    yield "| the joint way against the best separable one | |"
    yield "|---|---|"
    yield f"| ms/token in 16 % of the bytes, virtual | {_times(document['ratio_at_16'])} |"
    yield f"| the same, live | {_times(document['ratio_at_16_live'])} |"
    yield f"| loss where it is as fast, in 16 % | {_times(document['loss_ratio_at_16'])} |"
    yield f"| ms/token, median of all cells | {_times(document['median_ratio'])} |"
    yield f"| cells in which it is no slower | {document['cells_no_worse']} of {document['cells']} |"
    if found := document["foretold"]:
        yield (
            f"| the virtual clock's error, of {found['ways']} ways | median {found['median_error']:.1%}, "
            f"p95 {found['p95_error']:.1%} |"
        )


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _resident(rows: Sequence[Row]) -> Iterator[str]:
    yield "### Pruned or merged, all in memory, nothing read\n"
    yield "| method | share of the bytes | resident | ms/token | loss | worst domain |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        if row["fits"]:
            yield (
                f"| {row['method']} | {row['share']:.0%} | {format_size(row['resident_bytes'])} | {row['ms']:.2f} "
                f"| {_loss(row)} | {percent(row['loss_worst_domain'])} |"
            )
        else:
            yield f"| {row['method']} | {row['share']:.0%} | is never so small |" + " |" * 3
    yield ""


def _cell_lines(row: Row, live: Row) -> Iterator[str]:
    yield f"### {row['share']:.0%} of the bytes, a read {row['ratio']:g} times a layer\n"
    yield (
        "| method | way | resident | ms/token | p95 | live | foretold | prompt, ms | read per token | hits | moved "
        "| loss | worst domain |"
    )
    yield "|---" * 13 + "|"
    yield from (_line(name, found, live.get(name)) for name, found in row["methods"].items())
    yield ""


def _line(name: str, found: Row, live: Row | None) -> str:
    if not found["fits"]:
        return f"| {name} | does not fit |" + " |" * 11
    way = found.get("way")
    shown = f"{way['rung']}, {way['policy']}, {way['prefetch']}" if way else "the future is known"
    shown += f", floor {way['floor']}" if way and way["floor"] else ""
    shown += f", bias {way['bias']:g}" if way and way["bias"] else ""
    timed = f"{live['ms']:.2f} | {live['ms_foretold']:.2f}" if live else " | "
    resident = format_size(found["resident_bytes"]) if "resident_bytes" in found else ""
    lost = f"{_loss(found)} | {percent(found['loss_worst_domain'])}" if "loss" in found else " | "
    return (
        f"| {name} | {shown} | {resident} | {found['ms']:.2f} | {found['ms_p50_p95'][1]:.2f} | {timed} "
        f"| {found['prefill_ms']:.0f} | {format_size(round(found['bytes_per_token']))} | {found['hit_rate']:.1%} "
        f"| {percent(found.get('moved_share', 0.0))} | {lost} |"
    )


def _loss(row: Row) -> str:
    return f"{percent(row['loss'])} ({percents(row['loss_ci95'])})"
