"""Ways of serving that the virtual clock compared, for real: threads that read, and reads as slow as the device's.

All decode the same windows in turns, and two with everything in memory among them: by their times the virtual clock is
set once more, so that what it gets wrong can be told from what a busy machine adds.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from time import perf_counter

import numpy as np

from comoe.bench.contender import Contender
from comoe.bench.match import Match, Way
from comoe.bench.ratio import median_interval
from comoe.bench.rows import Row
from comoe.bench.turns import Side, decode_in_turns
from comoe.make.trace import Turn


def timed(of: Contender, match: Match, ways: Mapping[str, Way], windows: int, tokens: int) -> Row:
    """By name of a way: `ms` of a token, its times over the first way's, and `ms_foretold` by the virtual clock.

    So many tokens of so many windows; one more window, the first, is for warming up. Ways that are the same are timed
    once.
    """
    chosen = of.windows[: windows + 1]
    with ExitStack() as stack:
        sides = {way: _side(of, match, way) for way in dict.fromkeys(ways.values())}
        for side in sides.values():
            stack.enter_context(side.evaluation.model.comoe)
        resident, foretelling = of.references(stack)
        decode_in_turns([*sides.values(), resident, foretelling], chosen, tokens, perf_counter)
    timing = of.timing(resident, foretelling, match.compute_s)
    cut = [resident.evaluation.split(window) for window in chosen]
    turns = [Turn(0, prompt, target[:tokens]) for prompt, target in cut]
    first = next(iter(sides.values()))
    timed_ways = {
        way: {"way": way._asdict(), **_columns(side, first), "ms_foretold": _foretold_ms(match.at(timing), way, turns)}
        for way, side in sides.items()
    }
    return {"timing": timing, "methods": {name: timed_ways[way] for name, way in ways.items()}}


def _side(of: Contender, match: Match, way: Way) -> Side:
    pin, how = match.options(way)
    loader = of.loader(pin, **how)
    loader.pace(match.times(way.rung).read_s)
    return of.side(loader.as_pinned(match.capacity))


def _foretold_ms(match: Match, way: Way, turns: Sequence[Turn]) -> float:
    """Milliseconds of a token on the virtual clock."""
    return float(np.mean([answer.ms[1:].mean() for answer in match.answers(way, turns)[1:]]))


def _columns(side: Side, first: Side) -> Row:
    ratios = [float(mine[1:].mean() / other[1:].mean()) for mine, other in zip(side.ms[1:], first.ms[1:], strict=True)]
    return {
        "ms": float(np.mean([ms[1:].mean() for ms in side.ms[1:]])),
        "hit_rate": side.rate("hit"),
        "ratio_of_times": float(np.median(ratios)),
        "ratio_of_times_ci95": median_interval(ratios),
    }
