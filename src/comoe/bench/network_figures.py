"""From the network benchmark's rows to its figures, and a page to read. Pure."""

from collections import Counter
from collections.abc import Iterator, Sequence
from math import inf, isfinite
from statistics import median
from typing import Any

from comoe.bench.losses import percent
from comoe.bench.rows import Row

WINDOW, FALL = "window", "fall"
LIVE, STATIC, JOINT_STATIC = "live", "static", "joint_static"
CLAIRVOYANT, FETCH, REMOTE = "clairvoyant", "fetch_on_miss", "remote_only"
STEP_S = 0.5
"""Between two looks at the plan: as `sim.network` has it."""


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """The document's figures, and its rows.

    Ratios are medians over models and windows, of worth: tokens of the exact model that a window is worth. Best plans
    are the best of each window, chosen with hindsight. `gain_over_best_static` is against plans of a planner that knows
    no link, and `total_gain_over_best_static` that of all windows together; `clairvoyant_gain_over_best_static` is the
    clairvoyant's, which nobody who was tried exceeds. `gain_over_best_joint_static` is against plans that are like the
    live ones but stay, `gain_over_one_static` against the one plan of each model that is best
    over all windows. None where nothing else is worth anything.
    """
    windows = [row for row in rows if row["kind"] == WINDOW]
    falls = [row for row in rows if row["kind"] == FALL]
    shares = [_ratio(row[LIVE]["worth"], row[CLAIRVOYANT]["worth"]) for row in windows]
    return {
        "gain_over_best_static": _median([_ratio(row[LIVE]["worth"], max(row[STATIC].values())) for row in windows]),
        "clairvoyant_gain_over_best_static": _median(
            [_ratio(row[CLAIRVOYANT]["worth"], max(row[STATIC].values())) for row in windows]
        ),
        "gain_over_best_joint_static": _median(
            [_ratio(row[LIVE]["worth"], max(row[JOINT_STATIC].values())) for row in windows]
        ),
        "total_gain_over_best_static": _finite(
            _ratio(sum(row[LIVE]["worth"] for row in windows), sum(max(row[STATIC].values()) for row in windows))
        ),
        "gain_over_one_static": _median(list(_over_one(windows))),
        "share_of_clairvoyant": _median(shares),
        "least_share_of_clairvoyant": _finite(min(shares, default=inf)),
        "settles_s": max((row["settles_s"] for row in falls), default=None),
        "most_switches_per_step": max((_most(row) for row in windows), default=None),
        "windows": len(windows),
        "rows": list(rows),
    }


def _over_one(windows: Sequence[Row]) -> Iterator[float]:
    for model in dict.fromkeys(row["model"] for row in windows):
        mine = [row for row in windows if row["model"] == model]
        plans = [{**row[STATIC], **row[JOINT_STATIC]} for row in mine]
        best = max(
            plans[0],
            key=lambda name: sum(
                plan[name] / max(row[CLAIRVOYANT]["worth"], 1e-9) for plan, row in zip(plans, mine, strict=True)
            ),
        )
        yield from (_ratio(row[LIVE]["worth"], plan[best]) for plan, row in zip(plans, mine, strict=True))


def _most(row: Row) -> int:
    return max(Counter(round(at_s / STEP_S) for at_s, _ in row[LIVE]["switches"]).values(), default=0)


def _ratio(one: float, other: float) -> float:
    """1 where neither is worth anything."""
    return one / other if other > 0 else inf if one > 0 else 1.0


def _median(values: Sequence[float]) -> float | None:
    return _finite(median(values)) if values else None


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def page(document: dict[str, Any]) -> str:
    """The document as Markdown tables."""
    return "\n".join(_lines(document)) + "\n"


def _lines(document: dict[str, Any]) -> Iterator[str]:
    told = document["settings"]
    yield "# Network\n"
    yield f"Made by `comoe bench network` {told['comoe']}: one seeded window of 45 s of each trace, in virtual time, "
    yield "from dense weights alone. A window's worth is in tokens of the exact model: a token counts as much as the "
    yield "text was likely, over how likely the exact model finds it, and nothing where it loses more than "
    yield f"{percent(told['max_loss'])}. A reader takes {1 / told['reader_s']:g} tokens a second at most, memory holds "
    yield f"{told['share']:.0%} of the experts' bytes, a round trip is {1e3 * told['rtt_s']:g} ms.\n"
    yield from figure_table(document)
    for model in document["models"]:
        mine = [row for row in document["rows"] if row["model"] == model]
        yield f"## {model}\n"
        yield from _windows([row for row in mine if row["kind"] == WINDOW])
        yield from (line for row in mine if row["kind"] == FALL for line in _fall(row))


def figure_table(document: dict[str, Any]) -> Iterator[str]:
    """A document's own numbers, a line each."""
    yield "| figure | |\n|---|---|"
    names = [name for name, value in document.items() if isinstance(value, int | float) and not isinstance(value, bool)]
    yield from (f"| {name} | {document[name]:.3g} |" for name in names)
    yield ""


def _windows(rows: Sequence[Row]) -> Iterator[str]:
    if rows:
        large = rows[0]["large"]
        scale = f"{rows[0]['scale']:.4g}"
        yield f"Links carry {scale} of what they did, so that an expert takes as long as one of {large}.\n"
    yield (
        "| trace, from | Mbit/s | live | tokens | loss | plans | best static | best joint, static | clairvoyant "
        "| fetch on miss | remote only |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        live = row[LIVE]
        static, joint = (_best(row[kind]) for kind in (STATIC, JOINT_STATIC))
        yield (
            f"| {row['trace']}, {row['begin_s']:g} s | {row['mean_mbps']:.0f} | {live['worth']:.0f} | {live['tokens']} "
            f"| {percent(live['loss'])} | {len(live['switches'])} | {static} | {joint} "
            f"| {row[CLAIRVOYANT]['worth']:.0f} | {row[FETCH]['worth']:.0f} | {row[REMOTE]['worth']:.0f} |"
        )
    yield ""


def _best(worth: dict[str, float]) -> str:
    name = max(worth, key=lambda name: worth[name])
    return f"{worth[name]:.0f} ({name})" if worth[name] > 0 else "0"


def _fall(row: Row) -> Iterator[str]:
    high, low = row["mbps"]
    worth = ", ".join(f"{worth:.0f}" for worth in row["worth"])
    yield f"From {high:g} to {low:g} Mbit/s at {row['at_s']:g} s: plans settle in {row['settles_s']:.1f} s. Worth at "
    yield f"{high:g} alone, so, and at {low:g} alone: {worth} tokens.\n"
