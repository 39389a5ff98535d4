"""From the cache benchmark's rows to its figures: each policy's hits over Belady's; and a page to read. Pure."""

from collections.abc import Iterator, Sequence
from typing import Any

from comoe.bench.rows import Row
from comoe.units import format_size

BELADY = "belady"
"""The policy that knows what comes: of one trace, nobody has more hits."""


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """The document's figures, and its rows with `belady_share`: byte hits over Belady's in the same cell.

    `belady_share_by_policy` is each policy's least of all cells; `best_policy` has the highest of these, which is the
    document's `belady_share`. None where nothing fits.
    """
    best = {_cell(row): row["byte_hit_rate"] for row in rows if row["policy"] == BELADY and row["fits"]}
    shown = [{**row, "belady_share": _share(row, best[_cell(row)])} if row["fits"] else row for row in rows]
    least: dict[str, float] = {}
    for row in shown:
        if row["fits"] and row["policy"] != BELADY:
            least[row["policy"]] = min(row["belady_share"], least.get(row["policy"], 1.0))
    winner = max(least, key=least.__getitem__, default=None)
    return {
        "belady_share": least[winner] if winner is not None else None,
        "best_policy": winner,
        "belady_share_by_policy": least,
        "rows": shown,
    }


def _cell(row: Row) -> tuple[str, float]:
    return row["model"], row["share"]


def _share(row: Row, best: float) -> float:
    return float(row["byte_hit_rate"] / best) if best else 1.0


def page(document: dict[str, Any]) -> str:
    """The document as Markdown tables."""
    return "\n".join(_lines(document)) + "\n"


def _lines(document: dict[str, Any]) -> Iterator[str]:
    settings = document["settings"]
    yield "# Cache\n"
    yield f"Made by `comoe bench cache` {settings['comoe']}: {settings['decode_tokens_per_domain']} tokens of each of "
    yield f"{len(settings['domains'])} domains, decoded by the exact model and replayed. Bytes as hits over the bytes "
    yield "that the policy which knows the future finds; rates of all passes, prompts too, unless decoding is said.\n"
    for model in document["models"]:
        yield f"## {model}\n"
        yield "| memory | policy | hits | bytes hit | of Belady's | hits in decoding | read per token |"
        yield "|---|---|---|---|---|---|---|"
        for row in document["rows"]:
            if row["model"] == model:
                yield _line(row)
        yield ""


def _line(row: Row) -> str:
    head = f"| {row['share']:.0%} | {row['policy']} "
    if not row["fits"]:
        return head + f"| does not fit below {format_size(row['smallest_bytes'])} |" + " |" * 4
    rates = (row["hit_rate"], row["byte_hit_rate"], row["belady_share"], row["decode_hit_rate"])
    shown = " | ".join(f"{rate:.1%}" for rate in rates)
    return head + f"| {shown} | {format_size(round(row['decode_bytes_per_token']))} |"
