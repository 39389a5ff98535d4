"""Plans for links by hand: two layers of four experts, each nothing, coarse or exact; and traces of their use."""

from dataclasses import replace

import numpy as np
from test_trace import trace_of

from comoe.plan.ladder import Band, Rung
from comoe.plan.stream import Forms, Pace, Streaming
from comoe.store.trace import Chunk, Trace
from comoe.types import BlobId

LAYERS, EXPERTS = 2, 4
COARSE, EXACT = 4096, 40960
PARTS = (("q4", COARSE), ("exact", EXACT))
BLOBS = [BlobId(layer, part, row) for layer in range(LAYERS) for part, _ in PARTS for row in range(EXPERTS)]
NONE = len(BLOBS)
SIZES = np.array([dict(PARTS)[blob.part] for blob in BLOBS] + [0])
N = LAYERS * EXPERTS
USE = np.full(N, 2 / EXPERTS)
"""Uses of a token: two in each layer."""


def needs(part: str | None) -> np.ndarray:
    """(N, 1): the blob of every expert."""
    if part is None:
        return np.full((N, 1), -1)
    return np.array([[BLOBS.index(BlobId(layer, part, row))] for layer in range(LAYERS) for row in range(EXPERTS)])


def rung(name: str, part: str, form: int, loss: float) -> Rung:
    every = np.full(N, form)
    forms = ("dropped", "q4", "exact")
    return Rung(name, forms, every, needs(part), SIZES, USE, loss, Band(loss, loss), (loss, loss))


def forms() -> Forms:
    """Errors of 1, 0.1 and 0; losses of 100 %, 4 % and none."""
    return Forms(
        needs=np.stack([needs(None), needs("q4"), needs("exact")]),
        error=np.stack([np.full(N, 1.0), np.full(N, 0.1), np.zeros(N)]),
        sizes=SIZES,
        layer=np.repeat(np.arange(LAYERS), EXPERTS),
        curve=np.array([[0.0, 0.1, 1.0], [0.0, 0.04, 1.0]]),
    )


def streaming(capacity: int = 10**9, max_loss: float = 0.05, remote_s: float = 0.2) -> Streaming:
    """Two rungs; ten tokens a second at most."""
    pace = Pace(token_s=0.02, reader_s=0.1, remote_s=remote_s, rtt_s=0.02, nats=3.0, max_loss=max_loss)
    return Streaming(forms(), (rung("coarse", "q4", 1, 0.04), rung("exact", "exact", 2, 0.0)), capacity, pace)


def nothing() -> np.ndarray:
    """No blob is there; the last one stands for none."""
    found = np.zeros(NONE + 1, np.bool_)
    found[-1] = True
    return found


def holding(part: str) -> np.ndarray:
    """All blobs of a part are there."""
    found = nothing()
    found[needs(part)] = True
    return found


def decoding(tokens: int) -> Trace:
    """So many tokens, each with two experts of either layer, in turns."""
    passes = [
        [
            Chunk(0, layer, sorted({(at + layer) % EXPERTS, (at + layer + 1) % EXPERTS}), [1, 1], [0.5, 0.5])
            for layer in range(LAYERS)
        ]
        for at in range(tokens)
    ]
    return replace(trace_of(passes, (EXPERTS,) * LAYERS), tokens=np.ones(tokens, np.int64))
