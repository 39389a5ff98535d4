"""Who decides in a session of `sim.network`: one plan for all time, plans that follow the link, or the future."""

from dataclasses import dataclass, field

import numpy as np

from comoe.plan.stream import MISSES, MOMENTS, LinkFollower, LinkPlan, Streaming
from comoe.sim.network import Told
from comoe.sim.traces import LinkRate

FETCH_ON_MISS = LinkPlan("exact", "wait", reads="none")
REMOTE_ONLY = LinkPlan("exact", "remote", reads="none")


@dataclass(slots=True)
class Static:
    """The same plan all the time."""

    plan: LinkPlan

    def tick(self, told: Told) -> LinkPlan | None:
        return self.plan


@dataclass(slots=True)
class Live:
    """What a device does: plans for the rate that it measures."""

    follower: LinkFollower

    def tick(self, told: Told) -> LinkPlan | None:
        return self.follower.tick(told.resident, told.use, told.rate_bps, told.now_s)


@dataclass(slots=True)
class Knowing:
    """Plans for what the link will bring in the next `horizon_s`, or until its end."""

    streaming: Streaming
    rate: LinkRate
    horizon_s: float
    _follower: LinkFollower = field(init=False)

    def __post_init__(self) -> None:
        self._follower = LinkFollower(self.streaming, hold_s=0.0)

    def tick(self, told: Told) -> LinkPlan | None:
        end_s = min(told.now_s + self.horizon_s, self.rate.end_s)
        moments = told.now_s + (end_s - told.now_s) * np.arange(MOMENTS) / (MOMENTS - 1)
        nbytes = np.array([self.rate.sent(at) for at in moments]) - self.rate.sent(told.now_s)
        rate_bps = self.rate.mean(told.now_s, min(told.now_s + 1.0, self.rate.end_s)) if end_s > told.now_s else 0.0
        return self._follower.foresee(told.resident, told.use, nbytes, rate_bps, told.now_s)


@dataclass(slots=True)
class Watched:
    """Notes when the plan of `live` was worth less than `enough` of the best one at the rate that there really is."""

    live: Live
    rate: LinkRate
    enough: float = 0.95
    poor_s: list[float] = field(default_factory=list)

    def tick(self, told: Told) -> LinkPlan | None:
        plan = self.live.tick(told)
        follower, bps = self.live.follower, self.rate.at(told.now_s)
        moments = follower.horizon_s * np.arange(MOMENTS) / (MOMENTS - 1)
        worth = follower.streaming.foretold(told.resident, told.use, bps * moments, bps)
        current = follower.plan
        assert current is not None
        at = [rung.name for rung in follower.streaming.rungs].index(current.target)
        rungs = worth.max(1).mean(1)
        now = worth[at, :, 0]
        if rungs[at] < self.enough * rungs.max() or now[MISSES.index(current.miss)] < self.enough * now.max():
            self.poor_s.append(told.now_s)
        return plan
