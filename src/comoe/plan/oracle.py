"""The least that a pinned plan could cost: the whole integer problem, solved by HiGHS, offline.

For expert e and way o (a form it is served in, and which of its blobs are in memory) the binary z[e, o]; for every blob
b that several experts share the binary y[b], a fixed charge:

    minimise    sum over e, o of cost[e, o] z[e, o]            milliseconds of a token in its experts
    such that   sum over o of z[e, o] = 1                      for every e
                sum over o that keep b of z[e, o] <= y[b]      for every e that shares b
                sum of nbytes[e, o] z[e, o] + sum of size[b] y[b] <= budget
                sum of loss[e, o] z[e, o] <= bound

cost[e, o] = uses[e] x (bytes of the form / rate of computing + bytes not in memory / rate of reading + one latency, if
any is not in memory): the planner's cost model, of a cache that never changes. Losses add up over experts.
"""

from dataclasses import dataclass

import numpy as np

from comoe.plan.ladder import Indices
from comoe.plan.pinned import Options

GAP = 1e-4
"""Relative, at which the search ends."""


@dataclass(frozen=True, slots=True)
class Optimum:
    """The best ways (N,) found, their `ms`, and the `bound` in ms below which nothing is."""

    chosen: Indices
    ms: float
    bound: float


def optimum(ways: Options, budget: float, max_loss: float, time_limit_s: float = 60.0) -> Optimum | None:
    """None where nothing fits, or nothing was found in time. Needs scipy."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix, vstack

    expert, way = np.nonzero(np.isfinite(ways.cost))
    num, shared = len(expert), np.argwhere(ways.shared_nbytes > 0)
    width, at = num + len(shared), (expert, way)
    number = np.full(ways.shared_nbytes.shape, -1)
    number[tuple(shared.T)] = np.arange(len(shared))
    keeps = np.flatnonzero(ways.part[at] >= 0)
    blob = number[ways.part[at][keeps], ways.cluster[expert[keeps]]]
    pairs, row = np.unique(np.stack([expert[keeps], blob], axis=1), axis=0, return_inverse=True)
    linked = coo_matrix(
        (
            np.concatenate([np.ones(len(keeps)), -np.ones(len(pairs))]),
            (
                np.concatenate([row.ravel(), np.arange(len(pairs))]),
                np.concatenate([keeps, num + pairs[:, 1]]),
            ),
        ),
        (len(pairs), width),
    )
    one = coo_matrix((np.ones(num), (expert, np.arange(num))), (len(ways.cost), width))
    nbytes = np.concatenate([ways.nbytes[at], ways.shared_nbytes[tuple(shared.T)]])
    loss = np.concatenate([ways.loss[at], np.zeros(len(shared))])
    scale = max(budget, 1.0), max(max_loss, 1e-12)
    rows = vstack([one, linked, coo_matrix(np.stack([nbytes / scale[0], loss / scale[1]]))]).tocsr()
    low = np.concatenate([np.ones(len(ways.cost)), np.full(len(pairs) + 2, -np.inf)])
    high = np.concatenate([np.ones(len(ways.cost)), np.zeros(len(pairs)), [budget / scale[0], max_loss / scale[1]]])
    cost = np.concatenate([ways.cost[at], np.zeros(len(shared))])
    found = milp(
        cost / cost.max(),
        constraints=LinearConstraint(rows, low, high),
        bounds=Bounds(0, 1),
        integrality=np.ones(width),
        options={"mip_rel_gap": GAP, "time_limit": time_limit_s},
    )
    if found.x is None:
        return None
    taken = np.flatnonzero(found.x[:num] > 0.5)
    chosen = np.zeros(len(ways.cost), np.int64)
    chosen[expert[taken]] = way[taken]
    return Optimum(chosen, ways.total(chosen)[0], float(found.mip_dual_bound) * float(cost.max()))
