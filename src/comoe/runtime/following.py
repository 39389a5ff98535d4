"""A running model that follows its link: a thread that asks, twice a second, what to read towards and what a miss does.

What to do is decided in `plan.stream`; here it is done. The floor stays, and every expert is served in the finest form
that is there.
"""

from collections.abc import Callable, Sequence
from math import inf
from typing import NamedTuple, Protocol

import numpy as np

from comoe.plan.ladder import Array, Flags, Ladder, Prices
from comoe.plan.pin import Pin, pinned
from comoe.plan.planner import Plan
from comoe.plan.stream import LinkFollower, LinkPlan, Pace, Streaming, forms_of
from comoe.runtime.layer import Serving
from comoe.runtime.periodic import Periodic
from comoe.runtime.seen import copied, mean_tokens, nothing, uses_between
from comoe.store.pack import Pack
from comoe.types import BlobId, DoesNotFit

STEP_S = 0.5
"""Between two looks at the link: see docs/decisions/021."""

PRIOR_TOKENS = 16.0
"""As many tokens as the calibration's use of experts counts for, beside those of the session."""

HALF_LIFE_TOKENS = 128.0
"""So many tokens later, uses of a session count half: its text may be another."""

READER_S = 0.1
"""What a reader takes for a token: faster ones are worth no more."""

NATS = 3.0
"""Of a token by an exact model, about: what a share of them that is lost makes a text less likely by."""


NEVER_S = 1e6
"""What takes as long as this is not done."""


class LinkNow(NamedTuple):
    """Bytes per second, seconds of a round trip, and of a layer whose misses run elsewhere: `NEVER_S` where none do."""

    rate_bps: float
    rtt_s: float
    remote_s: float


class Obeying(Protocol):
    """What is driven: the model's handle."""

    def follow(self, plan: Plan, reason: str, prices: Prices | None = None) -> None: ...


class Following(Periodic):
    """Drives `handle` from a thread of its own until `close`; `step` is one round of it. `switches` counts plans.

    `blobs` (B,) are the pack's in the order of the ladder; `link` says what the link is like now.
    """

    def __init__(
        self,
        handle: Obeying,
        serving: Serving,
        ladder: Ladder,
        streaming: Streaming,
        *,
        blobs: Sequence[BlobId],
        link: Callable[[], LinkNow],
    ) -> None:
        self._handle, self._serving, self._ladder, self._streaming = handle, serving, ladder, streaming
        self._blobs, self._link = blobs, link
        self._number = {blob: at for at, blob in enumerate(blobs)}
        self._prior = np.concatenate(ladder.use)
        self._before, self._used, self._tokens = nothing(serving.seen), np.zeros(len(self._prior)), 0.0
        self._follower = LinkFollower(streaming)
        self.switches = 0
        super().__init__(STEP_S, "comoe-following")

    def step(self, now_s: float) -> None:
        """Look at the link and at what is there, follow another plan where one is worth more, and read towards it."""
        link, streaming = self._link(), self._streaming
        streaming.capacity = self._serving.cache.capacity
        streaming.pace = streaming.pace._replace(rtt_s=link.rtt_s, remote_s=link.remote_s)
        resident, use = self._resident(), self._use()
        before = self._follower.plan
        plan = self._follower.tick(resident, use, link.rate_bps, now_s)
        if plan is not None and not self._followed(plan):
            self._follower.plan = before
        if self._follower.plan is not None and not self._serving.laying:  # the floor comes first
            self._read(self._follower.plan, resident, use)

    def close(self) -> None:
        """Stop; what is there may leave again, and misses hint at what they want."""
        super().close()
        self._serving.cache.aim([], [])

    def _followed(self, plan: LinkPlan) -> bool:
        """Whether the model goes on by a plan: not where memory shrank so far that it has no room."""
        floor = self._serving.plan.floor
        pin = Pin(floor, plan.target, inf if plan.miss == "coarse" else 0.0)
        try:
            found = pinned(self._ladder, pin, self._serving.cache.capacity)
        except DoesNotFit:
            return False
        self.switches += 1
        self._handle.follow(found, "link", self._ladder.prices(plan.target, floor))
        return True

    def _read(self, plan: LinkPlan, resident: Flags, use: Array) -> None:
        """Read what is missing in the order of what bytes are worth, as far as there is room beside what stays."""
        missed, held = np.zeros(len(use), np.bool_), np.zeros_like(resident)
        if (floor := self._serving.plan.floor) is not None:
            held[self._ladder.rung(floor).needs] = True
        wanted, stays = self._streaming.towards(plan, resident, use, missed, held)
        groups = [tuple(self._blobs[at] for at in group.tolist()) for group in wanted]
        self._serving.cache.aim(groups, [self._blobs[at] for at in np.flatnonzero(stays[:-1]).tolist()])

    def _resident(self) -> Flags:
        """Which blobs (B + 1,) are in memory; the last stands for none."""
        found = np.zeros(len(self._blobs) + 1, np.bool_)
        found[[self._number[blob] for blob in self._serving.cache.resident_blobs()]] = True
        found[-1] = True
        return found

    def _use(self) -> Array:
        """Uses (N,) of a token: by calibration, and more and more by the session's last ones."""
        seen = copied(self._serving.seen)
        tokens = mean_tokens(seen) - mean_tokens(self._before)
        kept = 0.5 ** (tokens / HALF_LIFE_TOKENS)
        self._used = kept * self._used + uses_between(self._before, seen)
        self._tokens, self._before = kept * self._tokens + tokens, seen
        found: Array = (PRIOR_TOKENS * self._prior + self._used) / (PRIOR_TOKENS + self._tokens)
        return found


def following_of(handle: Obeying, serving: Serving, pack: Pack, ladder: Ladder, token_s: float) -> Following | None:
    """What follows the link of a pack, where a token takes `token_s` with everything in memory.

    None where there is but one thing to read towards, or the pack does not say what forms lose.
    """
    rungs = tuple(ladder.rung(step) for step in serving.steps)
    pace = Pace(token_s, READER_S, NEVER_S, 0.0, NATS, serving.ledger.bound)
    try:
        streaming = Streaming(forms_of(serving.manifest, ladder), rungs, serving.cache.capacity, pace)
    except ValueError:
        return None

    def link() -> LinkNow:
        return LinkNow(*pack.link_now(), min(serving.remote.layer_s if serving.remote is not None else inf, NEVER_S))

    blobs = pack.blob_ids()
    return Following(handle, serving, ladder, streaming, blobs=blobs, link=link) if len(rungs) > 1 else None
