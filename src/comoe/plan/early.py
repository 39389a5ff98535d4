"""Plans for a pack whose bytes are still to come: answer at once from a coarse floor, refine as they arrive. Pure."""

from math import inf

import numpy as np

from comoe.plan.ladder import Ladder, Rung
from comoe.plan.pin import Pin, smallest
from comoe.plan.planner import Plan

SHARE = 0.08
"""Of the experts' bytes, what the first answer may wait for."""

MOST_STEPS = 8
"""So many targets are compared while a link is followed."""


def early(ladder: Ladder, budget: int, max_loss: float) -> Pin | None:
    """A floor within `SHARE` and the finest target that fits in `budget` bytes of experts beside it, both within the
    bound, where a miss takes the floor as long as the answer's loss allows it; None where there is no such pair.

    Where all that are so small lose too much, the floor is the smallest that does not.
    """
    within = ladder.within(max_loss)
    if not within:
        return None
    small = [rung for rung in within if rung.nbytes <= SHARE * ladder.expert_bytes_bf16]
    floor = max(small, key=lambda rung: rung.nbytes) if small else min(within, key=lambda rung: rung.nbytes)
    targets = [rung for rung in _finer(ladder, floor, max_loss) if floor.nbytes + rung.beside(floor) <= budget]
    if not targets:
        return None
    return Pin(floor.name, max(targets, key=lambda rung: rung.nbytes).name, inf)


def steps(ladder: Ladder, plan: Plan, budget: int, max_loss: float) -> list[Rung]:
    """What may be read towards beside a plan's floor in `budget` bytes of experts, from coarse to fine.

    The plan's target, and some rungs, spread over all that are within the bound and of which a few experts have room.
    """
    assert plan.floor is not None
    floor = ladder.rung(plan.floor)
    found = [rung for rung in _finer(ladder, floor, max_loss) if smallest(ladder, Pin(floor.name, rung.name)) <= budget]
    found.sort(key=lambda rung: rung.nbytes)
    spread = np.linspace(0, len(found) - 1, min(MOST_STEPS, len(found))).astype(int)
    some = {found[at].name for at in spread.tolist()} | {plan.target}
    rungs = [rung for rung in found if rung.name in some]
    return rungs if plan.target in [rung.name for rung in rungs] else []


def _finer(ladder: Ladder, floor: Rung, max_loss: float) -> list[Rung]:
    """The rungs within a bound that have more bytes than a floor and lose no more."""
    return [rung for rung in ladder.within(max_loss) if rung.nbytes > floor.nbytes and rung.price <= floor.price]
