"""From the quality benchmark's rows to its figures: losses with their intervals, what held, a page to read.

Pure: no model is asked, so that figures can be made again from kept rows.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from comoe.bench.losses import loss_columns, percent, percents, score_of, without_raw
from comoe.bench.rows import Row
from comoe.units import format_size


def with_losses(rows: Sequence[Row]) -> list[Row]:
    """The rows without raw columns; forms and plans with their loss.

    A form's is against eager transformers, a plan's against the exact model decoding beside it.
    """
    references = {row["model"]: row for row in rows if row["kind"] == "reference"}
    return [_finished(row, references[row["model"]]) for row in rows]


def _finished(row: Row, reference: Row) -> Row:
    shown = without_raw(row)
    if row["kind"] == "form":
        return shown | loss_columns(score_of(row), score_of(reference))
    if row["kind"] == "plan" and row["fits"]:
        shown |= loss_columns(score_of(row), score_of(row, "exact_nats"))
        high, bound = max(shown["loss_ci95"]), row["bound"]
        return shown | {"within_bound": shown["loss"] <= bound, "within_bound_ci95": high <= bound}
    if row["kind"] == "reference":
        return shown | {"max_difference": _difference(row)}
    return shown


def _difference(row: Row) -> dict[str, float] | None:
    """The largest difference from the figures that the model carries; None where it carries none for as much text."""
    expected = row["expected"]
    if expected is None:
        return None
    pairs = {
        "nats": (row["nats_per_domain"] | {"mean": row["nats"]}, expected["nats_per_token"]),
        "next_chunk": (row["next_chunk_per_domain"] | {"all": row["next_chunk"]}, expected["next_chunk"]),
    }
    return {key: max(abs(got[name] - wanted[name]) for name in got) for key, (got, wanted) in pairs.items()}


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """The document's top-level figures, by model and form; `exceeded` names the plans whose mean loss is over."""
    plans = [row for row in rows if row["kind"] == "plan" and row["fits"]]
    over = [{key: row[key] for key in ("model", "bound", "share", "loss")} for row in plans if not row["within_bound"]]
    return {
        "reference_max_difference": {row["model"]: row["max_difference"] for row in _of(rows, "reference")},
        "next_chunk_reference": {row["model"]: row["next_chunk"] for row in _of(rows, "reference")},
        **{key: _by_form(rows, key) for key in ("nats", "loss", "loss_ci95", "next_chunk", "resident_bytes")},
        "identical": all(row["identical"] for row in plans if row["bound"] == 0),
        "within_bound": not over,
        "within_bound_ci95": all(row["within_bound_ci95"] for row in plans),
        "exceeded": over,
    }


def _of(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def _by_form(rows: Sequence[Row], key: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in _of(rows, "form"):
        found.setdefault(row["model"], {})[row["form"]] = row[key]
    return found


def page(document: dict[str, Any]) -> str:
    """The document as Markdown tables."""
    return "\n".join(_lines(document)) + "\n"


def _lines(document: dict[str, Any]) -> Iterator[str]:
    machine, settings, rows = document["machine"], document["settings"], document["rows"]
    yield "# Quality\n"
    yield f"Made by `comoe bench quality` {settings['comoe']} on {machine['cores']} cores of {machine['cpu']}, "
    yield f"torch {machine['torch']}, transformers {machine['transformers']}, kernel {machine['kernel']}.\n"
    for name in document["models"]:
        own = [row for row in rows if row["model"] == name]
        yield f"## {name}\n"
        yield from _forms_table(own)
        yield ""
        yield from _plans_table(own)
        yield ""


def _forms_table(rows: Sequence[Row]) -> Iterator[str]:
    yield "| all experts in | bytes | nats/token | loss | 95 % | worst domain | next chunk |"
    yield "|---|---|---|---|---|---|---|"
    for row in _of(rows, "reference"):
        yield f"| (eager transformers) | | {row['nats']:.4f} | | | | {row['next_chunk']:.1%} |"
    for row in _of(rows, "form"):
        yield (
            f"| {row['form']} | {format_size(row['resident_bytes'])} | {row['nats']:.4f} | {percent(row['loss'])} "
            f"| {percents(row['loss_ci95'])} | {percent(row['loss_worst_domain'])} ({row['worst_domain']}) "
            f"| {row['next_chunk']:.1%} |"
        )


def _plans_table(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        "| bound | memory | plan | loss | 95 % | worst domain | ms/token (95th) | over exact resident | 95 % | hits "
        "| floor | read per token |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for row in _of(rows, "plan"):
        head = f"| {row['bound']:.1%} | {row['share']:.0%} "
        if not row["fits"]:
            yield head + f"| does not fit below {format_size(row['smallest_bytes'])} |" + " |" * 9
            continue
        plan, per_token = row["plan"], sum(row["bytes_read"].values()) / row["tokens"]
        loss = "identical" if row["identical"] else percent(row["loss"])
        floor = f" over {plan['floor']}" if plan["floor"] else ""
        low, high = row["ms_over_exact_ci95"]
        yield head + (
            f"| {plan['target']}{floor} | {loss} | {percents(row['loss_ci95'])} "
            f"| {percent(row['loss_worst_domain'])} ({row['worst_domain']}) "
            f"| {row['ms_per_token']:.1f} ({row['ms_per_token_p95']:.1f}) "
            f"| {row['ms_over_exact']:.2f} | {low:.2f} to {high:.2f} | {row['hit_rate']:.1%} "
            f"| {row['floor_rate']:.1%} | {format_size(round(per_token))} |"
        )
