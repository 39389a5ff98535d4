"""From the ladder benchmark's rows to its figures: losses, who is best where, targets; and a page to read. Pure."""

from collections.abc import Iterator, Sequence
from math import inf
from typing import Any

from comoe.bench.gate import NEEDED
from comoe.bench.losses import loss_columns, percent, percents, score_of, without_raw
from comoe.bench.rows import Row
from comoe.make.score import Score, compare

TARGETS = {0.3: 0.001, 0.16: 0.02, 0.08: 0.1}
"""Losses to keep to at shares of the experts' bytes."""

WORST_OVER_MEAN = 2.0
"""What a worst domain may lose, in units of the mean."""


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """The document's figures and its rows without raw columns.

    `worst_excess_over_target` is the largest loss above its target, of comoe's in all cells; `beaten_by` the published
    rows that lose less than comoe's chain at the same share, with an interval of the paired difference above 0.
    """
    exact = {row["model"]: score_of(row) for row in rows if row["kind"] == "exact"}
    scores = {_key(row): score_of(row) for row in rows if row.get("reaches")}
    gates = [_gated(row, exact[row["model"]]) for row in rows if row["kind"] == "gate"]
    shown = [_finished(row, exact[row["model"]]) for row in rows if row["kind"] != "gate"]
    ours = [row for row in shown if row["kind"] == "comoe"]
    beaten = []
    for row in shown:
        if row["kind"] == "published" and row["reaches"]:
            against = scores["comoe", row["model"], "comoe", row["share"]]
            gain = compare(against, scores[_key(row)])
            row |= {"comoe_over_it": gain.mean, "comoe_over_it_ci95": list(gain.ci95)}
            if gain.ci95[0] > 0:
                beaten.append({key: row[key] for key in ("model", "method", "share", "bytes", "comoe_over_it")})
    excess = [row["loss"] - TARGETS[row["share"]] for row in ours if row["share"] in TARGETS]
    return {
        "worst_excess_over_target": max(excess, default=None),
        "over_target": [_cell(row) for row in ours if row["loss"] > TARGETS.get(row["share"], inf)],
        "worst_domain_over_twice_mean": [_cell(row) for row in ours if _is_uneven(row)],
        "beaten_by": beaten,
        "gates": gates,
        "rows": shown,
    }


def _gated(row: Row, exact: Score) -> Row:
    """The nats that a change of all experts costs, and whether that is enough for the model to prove anything."""
    cost = row["nats"] - exact.mean
    return {"model": row["model"], "change": row["change"], "cost": cost, "passes": cost >= NEEDED[row["change"]]}


def _key(row: Row) -> tuple[str, str, str, float]:
    return row["kind"], row["model"], row["method"], row["share"]


def _cell(row: Row) -> Row:
    return {key: row[key] for key in ("model", "share", "loss", "loss_ci95", "loss_worst_domain", "worst_domain")}


def _is_uneven(row: Row) -> bool:
    """Whether a worst domain loses more than twice the mean, its interval included, and more than the least target."""
    low = row["loss_worst_domain_ci95"][0]
    return bool(low > WORST_OVER_MEAN * row["loss_ci95"][1] and low > min(TARGETS.values()))


def _finished(row: Row, exact: Score) -> Row:
    shown = without_raw(row)
    if row["kind"] == "exact" or not row["reaches"]:
        return shown
    return shown | loss_columns(score_of(row), exact)


def page(document: dict[str, Any]) -> str:
    """The document as Markdown tables."""
    return "\n".join(_lines(document)) + "\n"


def _lines(document: dict[str, Any]) -> Iterator[str]:
    machine, settings, rows = document["machine"], document["settings"], document["rows"]
    yield "# Ladder\n"
    yield f"Made by `comoe bench ladder` {settings['comoe']} on {machine['cores']} cores of {machine['cpu']}, "
    yield f"torch {machine['torch']}; {settings['windows_per_domain']} windows in each of {len(settings['domains'])} "
    yield f"domains, {settings['calibration_tokens']} tokens of calibration text. Loss against the exact model, and "
    yield "its 95 % interval; nothing is fine-tuned.\n"
    for model in document["models"]:
        own = [row for row in rows if row["model"] == model]
        for title, kinds in (("", ("comoe", "published")), (": ablations", ("ablation",))):
            found = [row for row in own if row["kind"] in kinds]
            if found:
                yield f"## {model}{title}\n"
                yield from _table(found)
                yield ""
        for gate in document["gates"]:
            if gate["model"] == model:
                needed = f"{NEEDED[gate['change']]} are needed" + ("" if gate["passes"] else ": **it proves nothing**")
                yield f"Experts {gate['change']}: {gate['cost']:.2f} nats per token more; {needed}.\n"


def _table(rows: Sequence[Row]) -> Iterator[str]:
    shares = sorted({row["share"] for row in rows}, reverse=True)
    yield "| | " + " | ".join(f"{share:.0%} of bytes" for share in shares) + " |"
    yield "|---" * (len(shares) + 1) + "|"
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = {row["share"]: row for row in rows if row["method"] == method}
        yield f"| {method} | " + " | ".join(_shown(cells.get(share)) for share in shares) + " |"


def _shown(row: Row | None) -> str:
    if row is None or not row["reaches"]:
        return "-"
    return f"{percent(row['loss'])} ({percents(row['loss_ci95'])})"
