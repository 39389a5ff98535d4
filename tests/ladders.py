"""Invented ladders: one to reckon with by hand, and a strategy for any."""

from collections.abc import Sequence

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
    steps: dict[str, Sequence[str]] | None = None,
    calibrated: list[list[float]] | None = None,
    mass: list[list[float]] | None = None,
) -> Ladder:
    """Blobs of `blobs[part]` bytes for every expert, `clusters` of them for `merged`; q8's parts are high and low.

    `steps` come between the forms and exact: by name, the form of every expert of all layers. Losses were certified on
    text that used experts as in `calibrated`, by default as in `use`, with gates in proportion or as in `mass`.
    """
    num_experts = sum(map(len, use))
    rows = {part: clusters if part == "merged" and clusters else num_experts for part in blobs}
    forms = tuple(form for form, names in PARTS.items() if set(names) <= blobs.keys())
    sizes = np.array([nbytes for part, nbytes in blobs.items() for _ in range(rows[part])] + [0], np.int64)
    first = dict(zip(blobs, np.cumsum([0, *rows.values()]).tolist(), strict=False))
    uses = np.concatenate([np.array(layer, np.float64) for layer in use])
    assignments = {form: [form] * num_experts for form in forms if form != "exact"} | dict(steps or {})
    rungs = []
    for name, assigned in (assignments | {"exact": ["exact"] * num_experts}).items():
        needs = np.full((num_experts, 2), -1, np.int64)
        for expert, form in enumerate(assigned):
            for place, part in enumerate(PARTS[form]):
                needs[expert, place] = first[part] + expert % rows[part]
        loss = 0.0 if name == "exact" else losses.get(name)
        interval = Band(0.9 * (loss or 0.0), 1.1 * (loss or 0.0))
        chosen = np.array([forms.index(form) for form in assigned])
        rungs.append(Rung(name, forms, chosen, needs, sizes, uses, loss, interval, (errors or {}).get(name, ())))
    quantiles = tuple(at / 10 for at in range(11))
    by_layer, certified, gates = (
        tuple(np.array(layer, np.float64) for layer in found)
        for found in (use, calibrated or use, mass or calibrated or use)
    )
    return Ladder(tuple(rungs), by_layer, certified, gates, quantiles, 1000)


STEPS = ("10%", "20%")
LOSSES = (0.0, 0.001, 0.003, 0.01, 0.04, 0.1, 0.2)


@st.composite
def ladders(draw: st.DrawFn) -> Ladder:
    """Any ladder of one to three layers, with up to two mixed steps; not all are certified, losses need not fall.

    It is for a session that uses experts like the calibration text, or not.
    """
    each = st.sampled_from([0.001, 0.03, 0.1, 0.25, 0.5, 1.0])
    use = draw(st.lists(st.lists(each, min_size=2, max_size=8), min_size=1, max_size=3))
    other = st.tuples(*(st.lists(each, min_size=len(layer), max_size=len(layer)) for layer in use)).map(list)
    names = draw(st.sampled_from([("merged", "high", "low"), ("high", "low"), ("high",), ("merged",), ()]))
    blobs = {name: 4096 * draw(st.integers(1, 50)) for name in (*names, "exact")}
    losses = {form: draw(st.sampled_from([*LOSSES, None])) for form in ("merged", "q4", "q8", *STEPS)}
    num_experts = sum(map(len, use))
    forms = st.sampled_from([form for form, parts in PARTS.items() if {*parts} <= blobs.keys()])
    mixed = st.lists(forms, min_size=num_experts, max_size=num_experts)
    steps = {name: draw(mixed) for name in draw(st.sampled_from([(), STEPS[:1], STEPS]))}
    calibrated = draw(st.one_of(st.none(), other))
    return ladder(blobs, losses, use, clusters=draw(st.integers(1, num_experts)), steps=steps, calibrated=calibrated)


costs = st.builds(
    Costs,
    read_bps=st.floats(1e6, 1e10),
    read_latency_s=st.floats(0, 1e-2),
    memory_bps=st.floats(1e9, 1e11),
    framework_ms=st.builds(lambda low, more: Band(low, low + more), st.floats(0, 50), st.floats(0, 50)),
)
bounds = st.one_of(st.sampled_from([1.1 * loss for loss in LOSSES]), st.floats(0, 0.3))
"""Loss bounds, many of them just the price of a form."""
