"""Plans that nothing measured has a part in: one that was logged, and one for outputs that depend on no device."""

from dataclasses import replace
from typing import NamedTuple

from comoe.plan.ladder import Ladder
from comoe.plan.pairs import MIN_GROUPS
from comoe.plan.planner import Plan, uniform
from comoe.types import DoesNotFit


class Pin(NamedTuple):
    """What a plan may not choose: its floor, its target, and the gate below which a miss takes the floor."""

    floor: str | None
    target: str
    wait_threshold: float = 0.0


def deterministic(ladder: Ladder, max_loss: float) -> Pin:
    """The smallest rung within the bound for every expert, and no floor: misses wait, whatever is cached.

    Of rungs that are as small, the one that loses least.
    """
    return Pin(None, min(ladder.within(max_loss), key=lambda rung: (rung.nbytes, rung.price)).name)


def smallest(ladder: Ladder, pin: Pin) -> int:
    """The least expert memory in which the pinned plan runs."""
    floor = ladder.rung(pin.floor) if pin.floor else None
    target = ladder.rung(pin.target)
    reserve = min(target.beside(floor), MIN_GROUPS * target.group_beside(floor))
    return (floor.nbytes if floor else 0) + reserve


def pinned(ladder: Ladder, pin: Pin, budget: int) -> Plan:
    """The pinned plan in `budget` bytes of expert memory; nothing is foretold of its time. Raises DoesNotFit."""
    least = smallest(ladder, pin)
    if budget < least:
        raise DoesNotFit(f"experts need at least {least} bytes of memory, {budget} were given.", least)
    floor = ladder.rung(pin.floor) if pin.floor else None
    room = budget - (floor.nbytes if floor else 0)
    return replace(
        uniform(ladder, pin.target),
        name="pinned",
        floor=pin.floor,
        floor_bytes=floor.nbytes if floor else 0,
        refinement_bytes=min(room, ladder.rung(pin.target).beside(floor)),
        wait_threshold=pin.wait_threshold,
    )
