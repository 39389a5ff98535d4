"""Requests to run experts, for tests of both sides."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from comoe.net.wire import ACTS, DTYPES, RunRequest, Uses, from_wire

IDENTITY = bytes(range(8))


def request_of(x: Any, experts: list[int], forms: list[int], **changes: Any) -> RunRequest:
    """Every expert on every row of `x` (N, H), in a silu-gated layer."""
    pairs = [(row, expert, form) for row in range(len(x)) for expert, form in zip(experts, forms, strict=True)]
    columns = np.array(pairs).T
    uses = Uses(
        columns[1].astype(np.uint16),
        columns[0].astype(np.uint16),
        np.ones(len(pairs), np.float32),
        columns[2].astype(np.uint8),
    )
    given = {"identity": IDENTITY, "layer": 0, "dtype": "float32", "activation": "silu", "gated": True}
    return RunRequest(**{**given, **changes}, uses=uses, x=np.ascontiguousarray(x, np.float32))


@st.composite
def requests(draw: st.DrawFn) -> RunRequest:
    """Any request that may be sent."""
    dtype = draw(st.sampled_from(DTYPES))
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 17))
    num = draw(st.integers(rows, 9))
    uses = Uses(
        draw(arrays.arrays(np.uint16, num)),
        draw(arrays.arrays(np.uint16, num, elements=st.integers(0, rows - 1))),
        draw(arrays.arrays(np.float32, num, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))),
        draw(arrays.arrays(np.uint8, num)),
    )
    size = rows * width * (4 if dtype == "float32" else 2)
    x = from_wire(draw(st.binary(min_size=size, max_size=size)), 0, (rows, width), dtype)
    gated, act = draw(st.booleans()), draw(st.sampled_from(ACTS))
    identity, layer = draw(st.binary(min_size=8, max_size=8)), draw(st.integers(0, 65535))
    return RunRequest(identity, layer, dtype, act, gated, uses, x, draw(st.booleans()))
