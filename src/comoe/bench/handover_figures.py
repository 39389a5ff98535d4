"""From the handover benchmark's rows to its figures, and a page to read. Pure."""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

from comoe.bench.network_figures import figure_table
from comoe.bench.rows import Row

DRIVE, FAULT = "drive", "fault"
STAY, NEAREST, RULE, SLOW = "first node", "nearest at once", "rule", "rule, 3 s"
ANNOUNCED, BOTH = "rule, announced", "rule, announced, both asked"
POLICIES = (STAY, NEAREST, RULE, SLOW, ANNOUNCED, BOTH)


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """The document's figures, and its rows.

    All are of the last policy. `gap_p95_over_median_token` is of tokens within 5 s after a handover, over the median of
    the drive's tokens, `gap_p95_over_drives_p95` over their p95, medians over drives that have any;
    `hit_rate_recovery_s` is of the edge tier, whichever node answered, the median over handovers, of which `recovered`
    is the share that recovered at all; `node_recovery_s` and `node_recovered` are of the node that serves alone;
    `bytes_moved_share` the most of a drive's mean per handover. `identical` is None: in virtual time no model runs.
    """
    drives = [row["policies"][BOTH] for row in rows if row["kind"] == DRIVE]
    moved = [found for found in drives if found["soon_p95_ms"] is not None]
    gaps = [found["soon_p95_ms"] / found["median_ms"] for found in moved]
    others = [found["soon_p95_ms"] / found["p95_ms"] for found in moved]
    tier, node = recovery(drives, "recovery_s"), recovery(drives, "node_recovery_s")
    return {
        "gap_p95_over_median_token": median(gaps) if gaps else None,
        "gap_p95_over_drives_p95": median(others) if others else None,
        "identical": None,
        "hit_rate_recovery_s": tier.seconds,
        "recovered": tier.share,
        "node_recovery_s": node.seconds,
        "node_recovered": node.share,
        "bytes_moved_share": max((found["announced_share"] for found in drives), default=None),
        "handovers": sum(found["handovers"] for found in drives),
        "returns": sum(found["returns"] for found in drives),
        "longest_gap_ms": max((row["longest_gap_ms"] for row in rows if row["kind"] == FAULT), default=None),
        "rows": list(rows),
    }


class Recovery(NamedTuple):
    """The median of the seconds that moves took to recover from, and the share of moves that did; None of nothing."""

    seconds: float | None
    share: float | None


def recovery(rows: Sequence[Row], name: str) -> Recovery:
    """Of all moves in `rows`, whose seconds, or None, have that name."""
    found = [seconds for row in rows for seconds in row[name]]
    known = [seconds for seconds in found if seconds is not None]
    return Recovery(median(known) if known else None, len(known) / len(found) if found else None)


def page(document: dict[str, Any]) -> str:
    """The document as Markdown tables."""
    return "\n".join(_lines(document)) + "\n"


def _lines(document: dict[str, Any]) -> Iterator[str]:
    told = document["settings"]
    yield "# Handover, in virtual time\n"
    yield f"Made by `comoe bench handover` {told['comoe']}: recorded drives past {told['edges']} edge nodes. Sessions "
    yield f"are exact; a device holds {told['capacity_share']:.0%} of the experts' bytes, and what misses runs on the "
    yield f"node that serves. Announcements name {told['hot_share']:.0%} of the experts at most.\n"
    yield from figure_table(document)
    for model in document["models"]:
        mine = [row for row in document["rows"] if row["model"] == model]
        yield f"## {model}\n"
        yield from _policies([row for row in mine if row["kind"] == DRIVE])
        yield from _faults([row for row in mine if row["kind"] == FAULT])


def _policies(rows: Sequence[Row]) -> Iterator[str]:
    """Policies over all drives, those with a recorded rate apart."""
    yield (
        "| drives | policy | handovers | undone in 10 s | lost, stalled | far | ms/token | p95 | p95 after handover "
        "| recovery, s | nodes' hits |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for recorded in (False, True):
        some = [row for row in rows if row["recorded"] == recorded]
        for policy in POLICIES if some else ():
            found = [row["policies"][policy] for row in some]
            name = f"{len(some)}, {'recorded' if recorded else 'steady'} rate"
            yield f"| {name} | {policy} | {_cells(found)} |"
    yield ""


def _cells(found: Sequence[Row]) -> str:
    soon = [one["soon_p95_ms"] for one in found if one["soon_p95_ms"] is not None]
    known = [seconds for one in found for seconds in one["recovery_s"] if seconds is not None]
    counts = [sum(one["counts"][kind] for one in found) for kind in ("lost", "stalled")]
    cells = [
        str(sum(one["handovers"] for one in found)),
        str(sum(one["returns"] for one in found)),
        ", ".join(map(str, counts)),
        f"{median(one['far_share'] for one in found):.0%}",
        f"{median(one['median_ms'] for one in found):.0f}",
        f"{median(one['p95_ms'] for one in found):.0f}",
        f"{median(soon):.0f}" if soon else "",
        f"{median(known):.1f}" if known else "",
        f"{median(one['hit_rate'] for one in found):.1%}",
    ]
    return " | ".join(cells)


def _faults(rows: Sequence[Row]) -> Iterator[str]:
    yield "| fault | longest gap, ms | tokens in the 30 s after it | what happened |\n|---|---|---|---|"
    for row in rows:
        moves = "; ".join(f"{event} {node} at {at_s:.1f} s" for at_s, node, event in row["moves"])
        counts = ", ".join(f"{count} {kind}" for kind, count in row["counts"].items() if count)
        yield f"| {row['fault']} | {row['longest_gap_ms']:.0f} | {row['tokens_during']} | {counts}; {moves} |"
    yield ""
