"""From what devices under way wrote, and what nodes counted meanwhile, to figures. Pure."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import exp, inf, isfinite
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from comoe.bench.ratio import median_interval
from comoe.bench.rows import Row

SOON_S = 5.0
"""So long after a handover, tokens count as near it."""

SPAN_S = 2.0
"""Of a node's requests, what its share of hits is taken over."""

BACK = 0.9
"""A node is back once it has so much of the share of hits that the one before had."""

RAM = 'comoe_expert_requests_total{{result="{}",tier="ram"}}'
PULLED = 'comoe_expert_bytes_total{tier="origin"}'
TOLD = "comoe_edge_hot_experts_total"


class Known(NamedTuple):
    """What the exact model makes of a turn's tokens: nats and the likeliest token of each."""

    nats: Sequence[float]
    greedy: Sequence[int]


class Count(NamedTuple):
    """What a node had counted at a moment."""

    at_s: float
    counters: Mapping[str, float]

    def of(self, name: str) -> float:
        return self.counters.get(name, 0.0)


def window(lines: Sequence[Row], known: Sequence[Known]) -> Row:
    """What a window came to: `worth` in tokens of the exact model, of which each counts as much as the text is likely,
    by the geometric mean over the window, over how likely the exact model finds it; nothing more than 1."""
    tokens = lines[:-1]
    exact = [known[line["turn"] % len(known)].nats[line["at"]] for line in tokens]
    lost = float(np.mean([line["nats"] for line in tokens]) - np.mean(exact)) if tokens else 0.0
    return {
        "worth": len(tokens) * exp(-max(lost, 0.0)),
        "tokens": len(tokens),
        "loss": lost / float(np.mean(exact)) if tokens else 0.0,
        "first_s": tokens[0]["at_s"] if tokens else None,
        "median_ms": float(np.median([line["ms"] for line in tokens])) if tokens else None,
        "failed": lines[-1]["failed"],
        "loaded_s": lines[-1]["loaded_s"],
        "stats": lines[-1]["stats"],
    }


def identical(lines: Sequence[Row], known: Sequence[Known]) -> bool:
    """Whether every token has the exact model's nats, to the bit, and its likeliest token."""
    return all(
        line["nats"] == of.nats[line["at"]] and line["greedy"] == of.greedy[line["at"]]
        for line in lines[:-1]
        for of in (known[line["turn"] % len(known)],)
    )


def waits_s(lines: Sequence[Row], begin_s: float, end_s: float) -> list[float]:
    """Seconds between tokens that came from one moment to another, and to the end of the last wait."""
    at_s = [line["at_s"] for line in lines[:-1] if begin_s <= line["at_s"] < end_s]
    moments = [begin_s, *at_s, end_s]
    return [later_s - sooner_s for sooner_s, later_s in pairwise(moments)]


def edge_counts(lines: Sequence[Row]) -> list[Count]:
    """What the edge tier, whichever node answered, had in memory of what this device asked, as a node counts it."""
    return [
        Count(
            line["at_s"],
            {RAM.format("hit"): line["edge_runs"] - line["edge_read"], RAM.format("miss"): line["edge_read"]},
        )
        for line in lines[:-1]
    ]


def gaps_ms(lines: Sequence[Row], moves_s: Sequence[float], begin_s: float) -> tuple[list[float], list[float]]:
    """What tokens took: all from `begin_s` on, and those that came within `SOON_S` after one of the moves."""
    tokens = [line for line in lines[:-1] if line["at_s"] >= begin_s]
    soon = [line["ms"] for line in tokens if any(0 <= line["at_s"] - move_s <= SOON_S for move_s in moves_s)]
    return [line["ms"] for line in tokens], soon


def hit_share(counts: Sequence[Count], begin_s: float, end_s: float) -> float | None:
    """Of what a node was asked for in between, the share that was in its memory; None where it was asked nothing."""
    hits, misses = (_grown(counts, RAM.format(result), begin_s, end_s) for result in ("hit", "miss"))
    return hits / (hits + misses) if hits + misses else None


def recovery_s(before: Sequence[Count], after: Sequence[Count], move_s: float) -> float | None:
    """Seconds after a move until there is, over `SPAN_S` from then on, nine tenths of the share of hits that there was
    in the `SPAN_S` up to it: of one node and of the next, or of both together; None where nothing can be said, or that
    never is."""
    wanted = hit_share(before, move_s - SPAN_S, move_s)
    if wanted is None:
        return None
    for count in after:
        share = hit_share(after, count.at_s, count.at_s + SPAN_S)
        if count.at_s >= move_s and share is not None and share >= BACK * wanted:
            return count.at_s - move_s
    return None


def moved_bytes(counts: Sequence[Count], announced_s: float, expert_nbytes: int) -> int:
    """What a node pulled from the origin because of an announcement: at most what it was told then, and what it pulled
    within `SOON_S`."""
    end_s = announced_s + SOON_S
    told = _grown(counts, TOLD, announced_s - 0.5, end_s) * expert_nbytes
    return int(min(told, _grown(counts, PULLED, announced_s, end_s)))


def _grown(counts: Sequence[Count], name: str, begin_s: float, end_s: float) -> float:
    """How much a counter grew between two moments; what it was before the first look does not count."""
    if not counts:
        return 0.0
    moments = [count.at_s for count in counts]
    first, last = (max(0, bisect_right(moments, at_s) - 1) for at_s in (begin_s, end_s))
    return counts[last].of(name) - counts[first].of(name)


def ratios(rows: Sequence[Row], one: str, other: str) -> dict[str, Any]:
    """By how much the windows of one policy are worth more than those of another: the median with its interval, all
    together, and those together in which the other, too, is worth anything, `answered` of them. None where the other's
    are worth nothing; windows where neither is worth anything do not count."""
    pairs = [(row[one]["worth"], row[other]["worth"]) for row in rows]
    found = [mine / theirs if theirs else inf for mine, theirs in pairs if mine or theirs]
    total, both = sum(theirs for _, theirs in pairs), sum(mine for mine, theirs in pairs if theirs)
    return {
        "gain": _finite(median(found)) if found else None,
        "gain_ci95": [_finite(bound) for bound in median_interval(found)] if found else None,
        "total_gain": sum(mine for mine, _ in pairs) / total if total else None,
        "answered": sum(theirs > 0 for _, theirs in pairs),
        "answered_gain": both / total if total else None,
    }


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
