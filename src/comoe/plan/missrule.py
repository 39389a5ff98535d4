"""The miss rule: what a use does whose wanted form is not in memory. Pure; the runtime and the simulator ask it."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from comoe.plan.ledger import Ledger
from comoe.plan.planner import Plan

AWAY_SHARE = 0.1
"""The cache's policy would not keep most of it: a fifth is read, at half the time of other reads."""

WARM, HELP_S = 16, 30.0
"""A node that answered so often in a row from memory, or serves for longer, needs no help from the one before."""


class MissRule(NamedTuple):
    """Take the floor where the plan has one, the use is cheap and the ledger allows it; else wait."""

    plan: Plan
    ledger: Ledger

    def takes_floor(self, layer: int, gate: float, tokens: int, *, decode: bool = True) -> bool:
        """Whether so many tokens, whose gates sum to `gate`, take an expert's floor rather than wait for it."""
        cheap = self.plan.floor is not None and gate < self.plan.wait_threshold * tokens
        return cheap and self.ledger.allows_floor(layer, gate, decode=decode)


def num_away(read_s: Sequence[float], exchange_s: float, run_s: float) -> int:
    """How many of a layer's missing experts, each of which is read in so many seconds, an edge node runs: the last
    ones, while the others are read here one after the other. What costs least; of two that do, the fewest.

    One exchange with the node takes `exchange_s`, and each expert that it runs in it `run_s`. Some of what was run away
    is read in the background, which takes `AWAY_SHARE` of the time of reading it from other reads.
    """
    read = [0.0, *accumulate(read_s)]

    def seconds(away: int) -> float:
        here_s = read[len(read_s) - away]
        away_s = exchange_s + away * run_s if away else 0.0
        return max(here_s, away_s) + AWAY_SHARE * (read[-1] - here_s)

    return min(range(len(read_s) + 1), key=seconds)


def needs_help(in_a_row: int, served_s: float) -> bool:
    """Whether the node before is asked the same: of a node that serves for so long, and answered so often in a row from
    memory."""
    return in_a_row < WARM and served_s <= HELP_S
