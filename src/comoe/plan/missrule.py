"""The miss rule: what a use does whose wanted form is not in memory. Pure; the runtime and the simulator ask it."""

from typing import NamedTuple

from comoe.plan.ledger import Ledger
from comoe.plan.planner import Plan


class MissRule(NamedTuple):
    """Take the floor where the plan has one, the use is cheap and the ledger allows it; else wait."""

    plan: Plan
    ledger: Ledger

    def takes_floor(self, layer: int, gate: float, tokens: int, *, decode: bool = True) -> bool:
        """Whether so many tokens, whose gates sum to `gate`, take an expert's floor rather than wait for it."""
        cheap = self.plan.floor is not None and gate < self.plan.wait_threshold * tokens
        return cheap and self.ledger.allows_floor(layer, gate, decode=decode)
