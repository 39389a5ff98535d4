"""Plans for a pack whose bytes are still to come: answer at once from a coarse floor, refine as they arrive. Pure."""

from math import inf

from comoe.plan.ladder import Ladder
from comoe.plan.pin import Pin

SHARE = 0.08
"""Of the experts' bytes, what the first answer may wait for."""


def early(ladder: Ladder, budget: int, max_loss: float) -> Pin | None:
    """A floor within `SHARE` and the finest target that fits in `budget` bytes of experts beside it, both within the
    bound, where a miss takes the floor as long as the answer's loss allows it; None where there is no such pair.
    """
    within = [rung for rung in ladder.certified if rung.price <= max_loss]
    floors = [rung for rung in within if rung.nbytes <= SHARE * ladder.expert_bytes_bf16]
    if not floors:
        return None
    floor = max(floors, key=lambda rung: rung.nbytes)
    finer = [rung for rung in within if rung.nbytes > floor.nbytes and rung.price <= floor.price]
    targets = [rung for rung in finer if floor.nbytes + rung.beside(floor) <= budget]
    if not targets:
        return None
    return Pin(floor.name, max(targets, key=lambda rung: rung.nbytes).name, inf)
