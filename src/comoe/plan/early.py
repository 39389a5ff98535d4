"""Plans for a pack whose bytes are still to come: answer at once from a coarse floor, refine as they arrive. Pure."""

from math import inf

from comoe.plan.ladder import Ladder
from comoe.plan.pin import Pin

SHARE = 0.08
"""Of the experts' bytes, what the first answer may wait for."""


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
    finer = [rung for rung in within if rung.nbytes > floor.nbytes and rung.price <= floor.price]
    targets = [rung for rung in finer if floor.nbytes + rung.beside(floor) <= budget]
    if not targets:
        return None
    return Pin(floor.name, max(targets, key=lambda rung: rung.nbytes).name, inf)
