"""Rows of the quality benchmark at a budget: what the planner chose, decoding beside the exact model in turns."""

from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from comoe.bench.ratio import median_interval
from comoe.bench.rows import Row
from comoe.bench.served import Served
from comoe.bench.turns import Side, decode_in_turns
from comoe.make.protocol import Evaluation
from comoe.make.text import windows
from comoe.types import DoesNotFit

MIN_WINDOWS = 2
WARM_UP_TOKENS = 32


def plan_row(subject: Served, bound: float, share: float) -> Row:
    """The plan for `share` of the experts' bytes at a loss of at most `bound`, in the checkpoint's dtype.

    Beside it the exact model decodes, with everything in memory, in the same way and with the same kernel settings.
    """
    loader = subject.loader(max_loss=bound)
    budget = int(share * loader.pack.manifest.expert_bytes_bf16)
    try:
        model = loader.within_experts(budget)
    except DoesNotFit as error:
        return {"fits": False, "budget_bytes": budget, "smallest_bytes": error.smallest}
    with model.comoe:
        planned, exact = Side(subject.evaluation(model)), Side(subject.evaluation(subject.exact))
        domains, num_tokens = decode_windows(subject, planned.evaluation)
        texts = [window for found in domains.values() for window in found]
        for side in (planned, exact):
            Side(side.evaluation).decode(texts[-1], WARM_UP_TOKENS, perf_counter)
        decode_in_turns((planned, exact), texts, num_tokens, perf_counter)
        return {
            "fits": True,
            "budget_bytes": budget,
            "dtype": loader.pack.manifest.dtype,
            "plan": model.comoe.plan.document(),
            "resident_bytes": model.comoe.cache.resident_bytes,
            **_traffic(planned),
            **_times(planned, exact),
            **_nats(planned, exact),
            "windows": _windows(planned, exact, domains),
        }


def decode_windows(subject: Served, evaluation: Evaluation) -> tuple[dict[str, list[list[int]]], int]:
    """The windows of every domain that are decoded, and how many tokens of each.

    As few windows as hold the scope's tokens, and at least two. They are decoded to their ends, since a window's
    beginning loses more than its end; short ones in a scope that is not whole.
    """
    length, tokens = evaluation.window_length, subject.scope.decode_tokens
    targets = len(evaluation.split(range(length))[1])
    number = max(MIN_WINDOWS, -(-tokens // targets))
    cut = {name: windows(subject.tokenizer, text, length, number) for name, text in subject.material.valid.items()}
    return cut, targets if subject.scope.is_whole else tokens // number


def _traffic(side: Side) -> Row:
    """How the cache fared, in decode steps unless the name says otherwise."""
    return {
        "hit_rate": side.rate("hit"),
        "floor_rate": side.rate("floor"),
        "bytes_read": dict(side.bytes_read),
        "bytes_read_first": dict(side.bytes_read_first),
        "loss_ledger": float(np.mean(side.ledger)),
        "loss_ledger_max": max(side.ledger),
    }


def _times(planned: Side, exact: Side) -> Row:
    """Milliseconds of all tokens; the ratio is the median over windows of planned over exact medians."""
    ratios = [float(np.median(a) / np.median(b)) for a, b in zip(planned.ms, exact.ms, strict=True)]
    ms, exact_ms = (np.concatenate(side.ms) for side in (planned, exact))
    return {
        "ms_per_token": float(np.median(ms)),
        "ms_per_token_p95": float(np.quantile(ms, 0.95)),
        "exact_ms_per_token": float(np.median(exact_ms)),
        "exact_ms_per_token_p95": float(np.quantile(exact_ms, 0.95)),
        "ms_over_exact": median(ratios),
        "ms_over_exact_ci95": median_interval(ratios),
    }


def _nats(planned: Side, exact: Side) -> Row:
    """Nats per token of all tokens, and whether every token's are the same to the bit."""
    nats, exact_nats = (np.concatenate(side.nats) for side in (planned, exact))
    return {
        "tokens": len(nats),
        "nats": float(nats.mean()),
        "exact_nats": float(exact_nats.mean()),
        "identical": bool(np.array_equal(nats, exact_nats)),
    }


def _windows(planned: Side, exact: Side, domains: dict[str, list[list[int]]]) -> dict[str, dict[str, list[Any]]]:
    """Window by window: nats and number of tokens, and the median milliseconds of a token."""
    sums = {"nats": planned.nats, "exact_nats": exact.nats}
    medians = {"ms": planned.ms, "exact_ms": exact.ms}
    found: dict[str, dict[str, list[Any]]] = {}
    start = 0
    for name, texts in domains.items():
        of = slice(start, start := start + len(texts))
        found[name] = {
            **{key: [float(x.sum()) for x in column[of]] for key, column in sums.items()},
            **{key: [float(np.median(x)) for x in column[of]] for key, column in medians.items()},
            "tokens": [len(x) for x in planned.nats[of]],
        }
    return found
