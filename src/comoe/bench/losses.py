"""The loss of a benchmark's row: from the nats of its windows to columns, and to cells of a page."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from comoe.bench.rows import Row
from comoe.make.score import DomainScore, Score, compare

RAW = "windows"
"""The column of window-by-window values, which stays in the file of rows."""


def raw(score: Score) -> dict[str, dict[str, list[Any]]]:
    """What `RAW` holds of a score."""
    return {name: {"nats": d.nats.tolist(), "tokens": d.tokens.tolist()} for name, d in score.domains.items()}


def score_of(row: Row, column: str = "nats") -> Score:
    """The score that a row's raw column holds."""
    return Score({name: DomainScore(np.array(d[column]), np.array(d["tokens"])) for name, d in row[RAW].items()})


def without_raw(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != RAW}


def loss_columns(score: Score, exact: Score) -> Row:
    """The loss against the exact model, its intervals, and that of the worst domain."""
    loss = compare(score, exact)
    return {
        "loss": loss.mean,
        "loss_ci95": list(loss.ci95),
        "loss_worst_domain": loss.worst,
        "loss_worst_domain_ci95": list(loss.worst_ci95),
        "worst_domain": loss.worst_domain,
        "loss_per_domain": loss.per_domain,
    }


def percent(share: float) -> str:
    return f"{round(share, 4) + 0.0:.2%}"  # no "-0.00%"


def percents(ends: Sequence[float]) -> str:
    """An interval."""
    return " to ".join(map(percent, ends))
