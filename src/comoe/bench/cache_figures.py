"""From the cache benchmark's rows to its figures: hits over Belady's, times with reading ahead over times without, what
predictors foretell; and a page to read. Pure.
"""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np

from comoe.bench.rows import Row
from comoe.units import format_size

POLICY, KNOWN, AHEAD, RECALL, LIVE = "policy", "known", "ahead", "recall", "live"
"""Kinds of rows."""

BELADY = "belady"
"""The policy that knows what comes: of one trace, nobody has more hits without reading ahead."""


_COMPARED = ("decode_ms", "prefill_ms", "whole_ms", "bytes_read")


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """The document's figures, and its rows; those that count hits with `belady_share`.

    That is byte hits over Belady's in the same cell. `belady_share_by_policy` is each policy's least of all cells;
    `best_policy` has the highest of these, which is the document's `belady_share`; `belady_share_known` has the least
    of who knows so many of the next tokens, `belady_share_ahead` with reading ahead, by what a read takes over what a
    layer takes. `prefetch_vs_off` is the highest ratio of times live; `prefetch_vs_off_replayed` the median and the
    highest of decoding on the virtual clock, and so `_prompts`, and `_whole` of both; `wasted_share` the most bytes
    that reading ahead wasted, of all that were read.
    `slot_recall` is the least of all layers by predictor: among as many experts as are used, and among twice as many.
    None where nothing fits.
    """
    best = {_cell(row): row["byte_hit_rate"] for row in _fitting(rows, POLICY) if row["policy"] == BELADY}
    shown = [{**row, "belady_share": _share(row, best)} if _has_hits(row) else row for row in rows]
    least: dict[str, float] = {}
    for row in _fitting(shown, POLICY):
        if row["policy"] != BELADY:
            least[row["policy"]] = min(row["belady_share"], least.get(row["policy"], 1.0))
    known = _fitting(shown, KNOWN)
    winner = max(least, key=least.__getitem__, default=None)
    return {
        "belady_share": least[winner] if winner is not None else None,
        "best_policy": winner,
        "belady_share_by_policy": least,
        "belady_share_known": {
            str(tokens): min(row["belady_share"] for row in known if row["known_tokens"] == tokens)
            for tokens in sorted({row["known_tokens"] for row in known})
        },
        **_ahead(shown),
        "rows": shown,
    }


def _ahead(rows: Sequence[Row]) -> dict[str, Any]:
    auto = [row for row in _fitting(rows, AHEAD) if row["prefetch"] == "auto"]
    off = {(*_cell(row), row["ratio"]): row for row in _fitting(rows, AHEAD) if row["prefetch"] == "off"}
    over_off = {
        key: [row[key] / off[*_cell(row), row["ratio"]][key] for row in auto]
        for key in ("decode_ms", "prefill_ms", "whole_ms")
    }
    worst = max(_fitting(rows, LIVE), key=lambda row: float(row["ratio_of_times"]), default=None)
    recall: dict[str, list[list[float]]] = {}
    for row in rows:
        for name, layers in row.get("recall", {}).items():
            recall.setdefault(name, []).extend(layers.values())
    return {
        "belady_share_ahead": {
            str(ratio): min(row["belady_share"] for row in auto if row["ratio"] == ratio)
            for ratio in sorted({row["ratio"] for row in auto})
        },
        "prefetch_vs_off": worst["ratio_of_times"] if worst else None,
        "prefetch_vs_off_ci95": worst["ratio_of_times_ci95"] if worst else None,
        "prefetch_vs_off_replayed": _middle_and_most(over_off["decode_ms"]),
        "prefetch_vs_off_prompts": _middle_and_most(over_off["prefill_ms"]),
        "prefetch_vs_off_whole": _middle_and_most(over_off["whole_ms"]),
        "wasted_share": max(
            (row["wasted_bytes"] / row["bytes_read"] for row in auto if row["bytes_read"]), default=None
        ),
        "slot_recall": {name: np.min(found, 0).tolist() for name, found in recall.items() if found},
    }


def _middle_and_most(values: Sequence[float]) -> list[float] | None:
    return [median(values), max(values)] if values else None


def _fitting(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind and row["fits"]]


def _has_hits(row: Row) -> bool:
    return row["kind"] in (POLICY, KNOWN, AHEAD) and row["fits"]


def _cell(row: Row) -> tuple[str, float]:
    return row["model"], row["share"]


def _share(row: Row, best: dict[tuple[str, float], float]) -> float:
    bound = best.get(_cell(row), 0.0)
    return float(row["byte_hit_rate"] / bound) if bound else 1.0


def page(document: dict[str, Any]) -> str:
    """The document as Markdown tables."""
    return "\n".join(_lines(document)) + "\n"


def _lines(document: dict[str, Any]) -> Iterator[str]:
    settings, rows = document["settings"], document["rows"]
    yield "# Cache\n"
    yield f"Made by `comoe bench cache` {settings['comoe']}: {settings['decode_tokens_per_domain']} tokens of each of "
    yield f"{len(settings['domains'])} domains, decoded by the exact model and replayed. Bytes as hits over the bytes "
    yield "that the policy which knows the future finds; rates of all passes, prompts too, unless decoding is said.\n"
    for model in document["models"]:
        yield f"## {model}\n"
        yield from _of_model([row for row in rows if row["model"] == model])
        yield ""


def _of_model(rows: Sequence[Row]) -> Iterator[str]:
    yield "| memory | policy | hits | bytes hit | of Belady's | hits in decoding | read per token |"
    yield "|---|---|---|---|---|---|---|"
    yield from (_policy_line(row) for row in rows if row["kind"] == POLICY)
    yield "\nBytes hit, of Belady's, by who knows so many of the next tokens' experts, and beyond them has `lfu`:\n"
    yield from _known_lines(_fitting(rows, KNOWN))
    yield "\nReading ahead under `lfu` over not reading ahead, on the virtual clock; a read takes so many times what a "
    yield "layer takes. Wasted: evicted before any use, of all bytes read.\n"
    yield "| memory | read | reads ahead | bytes hit of Belady's | decoding | prompts | both | bytes read | wasted |"
    yield "|---|---|---|---|---|---|---|---|---|"
    yield from _ahead_lines(rows)
    yield "\nFor real, in 16 % of memory, in turns: the median of all windows but the first, and its interval.\n"
    yield "| read | decoding, with over without | ms with | ms without | goes on |"
    yield "|---|---|---|---|---|"
    yield from (_live_line(row) for row in rows if row["kind"] == LIVE)
    yield "\nOf the experts that a layer uses for a token, the share among as many that a predictor held likeliest one "
    yield "layer before (among twice as many).\n"
    yield from _recall_lines(rows)


def _policy_line(row: Row) -> str:
    head = f"| {row['share']:.0%} | {row['policy']} "
    if not row["fits"]:
        return head + f"| does not fit below {format_size(row['smallest_bytes'])} |" + " |" * 4
    rates = (row["hit_rate"], row["byte_hit_rate"], row["belady_share"], row["decode_hit_rate"])
    shown = " | ".join(f"{rate:.1%}" for rate in rates)
    return head + f"| {shown} | {format_size(round(row['decode_bytes_per_token']))} |"


def _known_lines(rows: Sequence[Row]) -> Iterator[str]:
    tokens = list(dict.fromkeys(row["known_tokens"] for row in rows))
    yield f"| memory | {' | '.join(map(str, tokens))} |"
    yield "|---|" + "---|" * len(tokens)
    for share in dict.fromkeys(row["share"] for row in rows):
        shares = [f"{row['belady_share']:.1%}" for row in rows if row["share"] == share]
        yield f"| {share:.0%} | {' | '.join(shares)} |"


def _ahead_lines(rows: Sequence[Row]) -> Iterator[str]:
    off = {(row["share"], row["ratio"]): row for row in _fitting(rows, AHEAD) if row["prefetch"] == "off"}
    for row in _fitting(rows, AHEAD):
        if row["prefetch"] != "off":
            plain = off[row["share"], row["ratio"]]
            ratios = " | ".join(f"{row[key] / plain[key]:.3f}" for key in _COMPARED)
            yield (
                f"| {row['share']:.0%} | {row['ratio']:g} | {row['prefetch']} | {row['belady_share']:.1%} | {ratios} "
                f"| {row['wasted_bytes'] / max(row['bytes_read'], 1):.1%} |"
            )


def _live_line(row: Row) -> str:
    if not row["fits"]:
        return f"| {row['ratio']:g} | does not fit below {format_size(row['smallest_bytes'])} |" + " |" * 3
    low, high = row["ratio_of_times_ci95"]
    goes_on = {True: "yes", False: "no", None: "-"}[row["prefetching"]]
    return (
        f"| {row['ratio']:g} | {row['ratio_of_times']:.3f} ({low:.3f} to {high:.3f}) | {row['ms']:.2f} "
        f"| {row['plain_ms']:.2f} | {goes_on} |"
    )


def _recall_lines(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row["kind"] == RECALL and row["recall"]:
            layers = list(next(iter(row["recall"].values())))
            yield f"| predictor | {' | '.join(f'layer {layer}' for layer in layers)} |"
            yield "|---|" + "---|" * len(layers)
            for name, found in row["recall"].items():
                yield f"| {name} | {' | '.join(f'{one:.2f} ({two:.2f})' for one, two in found.values())} |"
