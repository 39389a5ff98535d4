"""The cache benchmark's rows on what reading ahead saves: on a virtual clock, and live.

Both are scale models: reading an expert takes a given multiple of what a layer takes to compute.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from operator import mul
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from comoe.bench.ratio import median_interval
from comoe.bench.rows import Row
from comoe.bench.turns import Side, decode_in_turns
from comoe.make.protocol import Evaluation
from comoe.runtime.load import Loader
from comoe.sim.reader import Times
from comoe.sim.replay import Cell, GroupOf, replay
from comoe.store.pack import Pack
from comoe.store.trace import Trace

LAYER_S = 1e-3
"""Of a layer in the virtual scale model: half of it beside its experts."""


def replayed(trace: Trace, cell: Cell, ratio: float, pack: Pack, group_of: GroupOf) -> Row:
    """What a trace comes to where reading an expert takes `ratio` times a layer."""
    experts = trace.experts.tolist()
    uses = max(1.0, len(trace.expert) / len(trace.layers))
    each = pack.manifest.expert_bytes_bf16 / sum(experts)
    times = Times(lambda nbytes: ratio * LAYER_S * nbytes / each, LAYER_S / 2 / uses, LAYER_S / 2 * len(experts))
    found, decode = replay(trace, cell, group_of, pack.nbytes, times), trace.tokens == 1
    return {
        "byte_hit_rate": found.byte_hit_rate,
        "decode_ms": float(found.ms[decode].mean()),
        "prefill_ms": float(found.ms[~decode].mean()),
        "whole_ms": float(found.ms.sum()),
        "bytes_read": int(found.bytes_read.sum()),
        "prefetched_bytes": found.tally.prefetched,
        "wasted_bytes": found.tally.prefetch_wasted,
    }


class Live(NamedTuple):
    """What is decoded live: so many `tokens` of every window, in a `share` of memory, a read `ratio` times a layer."""

    windows: Sequence[Sequence[int]]
    tokens: int
    share: float
    ratio: float


def live(loader: Callable[[str], Loader], tokenizer: Any, how: Live) -> Row:
    """Decoding with reading ahead (auto) over decoding without, in turns; `loader` makes one with that setting.

    The first window is for warming up and for the first trial. The interval is of the median of the other windows.
    """
    layer_s = _layer_s(loader("off"), tokenizer, how.windows[0])
    with ExitStack() as stack:
        sides = []
        for prefetch in ("auto", "off"):
            made = loader(prefetch)
            whole = made.pack.manifest.expert_bytes_bf16
            made.pace(partial(mul, how.ratio * layer_s * made.ladder.num_experts / whole))
            model = made.within_experts(int(how.share * whole))
            stack.enter_context(model.comoe)
            sides.append(Side(Evaluation.for_model(model, tokenizer)))
        ahead, plain = sides
        decode_in_turns((ahead, plain), how.windows, how.tokens, perf_counter)
        ratios = [float(a[1:].mean() / b[1:].mean()) for a, b in zip(ahead.ms[1:], plain.ms[1:], strict=True)]
        first = [float(a[0] / b[0]) for a, b in zip(ahead.ms[1:], plain.ms[1:], strict=True)]
        stats = ahead.evaluation.model.comoe.stats()
        return {
            "layer_ms": 1e3 * layer_s,
            "ms": float(np.mean([ms[1:].mean() for ms in ahead.ms[1:]])),
            "plain_ms": float(np.mean([ms[1:].mean() for ms in plain.ms[1:]])),
            "ratio_of_times": float(np.median(ratios)),
            "ratio_of_times_ci95": median_interval(ratios),
            "first_ratio": float(np.median(first)),
            "prefetching": stats["prefetching"],
            "prefetched_bytes": stats["prefetched_bytes"],
            "wasted_bytes": stats["prefetch_wasted_bytes"],
            "hit_rate": ahead.rate("hit"),
            "plain_hit_rate": plain.rate("hit"),
        }


def _layer_s(loader: Loader, tokenizer: Any, window: Sequence[int]) -> float:
    """Seconds of a sparse layer and of what is around it, everything in memory."""
    model = loader.resident("exact")
    with model.comoe as handle:
        side = Side(Evaluation.for_model(model, tokenizer))
        for _ in range(2):
            side.decode(window, 48, perf_counter)
        return float(np.median(side.ms[1])) / 1e3 / len(handle.pack.manifest.layers)
