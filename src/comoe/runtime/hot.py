"""What an edge node that may serve next is told: the experts that a session uses most and its device has not."""

import numpy as np

from comoe.net.remote_run import HotExpert
from comoe.runtime.layer import Serving
from comoe.runtime.seen import copied, nothing, uses_between

SHARE, MOST_NBYTES = 0.15, 1 << 30
"""Of the experts' bytes, what a node is told of at most, and of any pack's. See docs/decisions/021."""

MOST_EXPERTS = 4096
"""A node takes no more at once."""


def hot_experts(serving: Serving) -> list[HotExpert]:
    """Experts in the form that is wanted of them, the most used first, without those that are in memory here."""
    manifest, target = serving.manifest, serving.plan.target
    seen = copied(serving.seen)
    uses = uses_between(nothing(seen), seen)
    order = [manifest.expert_ids[at] for at in np.argsort(-uses, kind="stable").tolist() if uses[at]]
    ways = [serving.way(expert.layer, expert.expert, target) for expert in order]
    here = serving.cache.residents([way.blobs for way in ways])
    room = min(int(SHARE * manifest.expert_bytes_bf16), MOST_NBYTES)
    found: list[HotExpert] = []
    for expert, way, resident in zip(order, ways, here, strict=True):
        room -= 0 if resident else serving.nbytes(way)
        if room < 0 or len(found) == MOST_EXPERTS:
            break
        if not resident:
            found.append((*expert, way.form))
    return found
