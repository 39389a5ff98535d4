"""A running model that follows its device and its text: a thread that asks the scheduler again and again.

What to do is decided in `plan`; here it is done. The handle obeys between expert reads, experts for new room are read
in the background.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from comoe.memory.arena import held_size
from comoe.plan.planner import Plan
from comoe.plan.scheduler import Scheduler
from comoe.plan.shift import WINDOW_TOKENS, ShiftDetector
from comoe.plan.snapshot import Snapshot
from comoe.runtime.layer import Serving
from comoe.runtime.periodic import Periodic
from comoe.runtime.seen import copied, mean_tokens, profile_between, uses_between
from comoe.store.pack import Pack
from comoe.store.profile import Profile
from comoe.types import DoesNotFit

PERIOD_S = 0.05
"""So often the device is looked at: a snapshot takes a tenth of a millisecond."""

SESSION_TOKENS = 64
"""Of a domain that the plan is made for."""

FORGOTTEN_HALF_LIVES = 4.0
"""The uses of a domain age by so many half-lives at once when it ends."""


class Obeying(Protocol):
    """What is driven: the model's handle."""

    def obey(self, capacity: int, reason: str) -> None: ...

    def follow(self, plan: Plan, reason: str) -> None: ...


class Live(Periodic):
    """Drives `handle` from a thread of its own until `close`; `step` is one round of it.

    `replan` makes a plan for text like a profile's in so many bytes of experts; DoesNotFit is no news, as the plan
    that there is goes on. None where somebody else makes plans.
    """

    def __init__(
        self,
        handle: Obeying,
        serving: Serving,
        pack: Pack,
        snapshot: Callable[[], Snapshot],
        replan: Callable[[Profile, int], Plan] | None,
    ) -> None:
        self._handle, self._serving, self._pack = handle, serving, pack
        self._snapshot, self._replan = snapshot, replan
        self.scheduler = Scheduler(serving.cache.capacity, serving.cache.smallest)
        self.shifts = 0
        sizes = [layer.num_experts for layer in pack.manifest.layers]
        self._detector = ShiftDetector(np.cumsum([0, *sizes[:-1]]).tolist())
        self._window = self._domain = copied(serving.seen)
        self._planned = False
        super().__init__(PERIOD_S, "comoe-live")

    def step(self, now_s: float) -> None:
        """Look at the device, then at the text, and act where that is called for."""
        decision = self.scheduler.tick(self._snapshot(), self._serving.cache.resident_bytes, now_s)
        if decision is not None:
            self._handle.obey(decision.capacity, decision.reason)
            self._planned = False
            if decision.reason == "room":
                self._fill(decision.capacity)
        self._heed_text()

    def _heed_text(self) -> None:
        seen = copied(self._serving.seen)
        if mean_tokens(seen) - mean_tokens(self._window) >= WINDOW_TOKENS:
            if self._detector.add(uses_between(self._window, seen)):
                self.shifts += 1
                self._domain, self._planned = self._window, False
                self._serving.cache.age(FORGOTTEN_HALF_LIVES)
            self._window = seen
        if not self._planned and mean_tokens(seen) - mean_tokens(self._domain) >= SESSION_TOKENS:
            self._planned = True
            self._adapt(profile_between(self._domain, seen))

    def _adapt(self, profile: Profile) -> None:
        """Follow the best plan for this text if it keeps the floor and the target; others would need another floor."""
        plan = self._serving.plan
        if plan.floor is None or self._replan is None:
            return
        try:
            better = self._replan(profile, self._serving.cache.capacity)
        except DoesNotFit:
            return
        if (better.floor, better.target) == (plan.floor, plan.target):
            self._handle.follow(better, "domain")

    def _fill(self, capacity: int) -> None:
        """Read what this text uses most and is not there, as far as there is room."""
        uses = uses_between(self._domain, self._serving.seen)
        experts, cache, plan = self._pack.manifest.expert_ids, self._serving.cache, self._serving.plan
        room, wanted = capacity - cache.resident_bytes, []
        for at in np.argsort(-uses, kind="stable").tolist():
            layer, expert = experts[at]
            blobs = self._serving.way(layer, expert, plan.target).blobs
            nbytes = sum(held_size(self._pack.nbytes(blob)) for blob in blobs if not cache.resident((blob,)))
            if not uses[at] or nbytes > room:
                break
            room -= nbytes
            if nbytes:
                wanted.append(blobs)
        cache.prefetch(wanted)
