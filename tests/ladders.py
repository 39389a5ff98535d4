"""Invented ladders: one to reckon with by hand, and a strategy for any."""

import numpy as np
from hypothesis import strategies as st

from comoe.plan.cost import Costs
from comoe.plan.ladder import Band, Ladder, Rung

PARTS = {"merged": ("merged",), "q4": ("high",), "q8": ("high", "low"), "exact": ("exact",)}


def ladder(
    blobs: dict[str, int],
    losses: dict[str, float | None],
    use: list[list[float]],
    *,
    errors: dict[str, tuple[float, ...]] | None = None,
    clusters: int | None = None,
) -> Ladder:
    """Blobs of `blobs[part]` bytes for every expert, `clusters` of them for `merged`; q8's parts are high and low."""
    num_experts = sum(map(len, use))
    rows = {part: clusters if part == "merged" and clusters else num_experts for part in blobs}
    forms = tuple(form for form, names in PARTS.items() if set(names) <= blobs.keys())
    sizes = np.array([nbytes for part, nbytes in blobs.items() for _ in range(rows[part])] + [0], np.int64)
    first = dict(zip(blobs, np.cumsum([0, *rows.values()]).tolist(), strict=False))
    experts = np.arange(num_experts)
    rungs = []
    for form, names in PARTS.items():
        if not set(names) <= blobs.keys():
            continue
        needs = np.full((num_experts, 2), -1, np.int64)
        for place, name in enumerate(names):
            needs[:, place] = first[name] + experts % rows[name]
        loss = 0.0 if form == "exact" else losses.get(form)
        interval = Band(0.9 * (loss or 0.0), 1.1 * (loss or 0.0))
        chosen = np.full(num_experts, forms.index(form))
        uses = np.concatenate([np.array(layer, np.float64) for layer in use])
        rungs.append(Rung(form, forms, chosen, needs, sizes, uses, loss, interval, (errors or {}).get(form, ())))
    quantiles = tuple(at / 10 for at in range(11))
    return Ladder(tuple(rungs), tuple(np.array(layer, np.float64) for layer in use), quantiles, 1000)


LOSSES = (0.0, 0.001, 0.003, 0.01, 0.04, 0.1, 0.2)


@st.composite
def ladders(draw: st.DrawFn) -> Ladder:
    """Any ladder of one to three layers; certificates may be missing, losses need not fall."""
    layer = st.lists(st.sampled_from([0.001, 0.03, 0.1, 0.25, 0.5, 1.0]), min_size=2, max_size=8)
    use = draw(st.lists(layer, min_size=1, max_size=3))
    names = draw(st.sampled_from([("merged", "high", "low"), ("high", "low"), ("high",), ("merged",), ()]))
    blobs = {name: 4096 * draw(st.integers(1, 50)) for name in (*names, "exact")}
    losses = {form: draw(st.sampled_from([*LOSSES, None])) for form in ("merged", "q4", "q8")}
    return ladder(blobs, losses, use, clusters=draw(st.integers(1, sum(map(len, use)))))


costs = st.builds(
    Costs,
    read_bps=st.floats(1e6, 1e10),
    read_latency_s=st.floats(0, 1e-2),
    memory_bps=st.floats(1e9, 1e11),
    framework_ms=st.builds(lambda low, more: Band(low, low + more), st.floats(0, 50), st.floats(0, 50)),
)
bounds = st.one_of(st.sampled_from([1.1 * loss for loss in LOSSES]), st.floats(0, 0.3))
"""Loss bounds, many of them just the price of a form."""
