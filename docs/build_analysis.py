"""Write docs/analysis.md from raw results in benchmarks/: which form wins where, which offloading helps, and why."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from analysis_offloading import offloading_lines

from comoe.bench.ladder_figures import TARGETS
from comoe.bench.losses import percent, percents

Row = dict[str, Any]
SAID = {"shuffled": "shuffled within layers they cost", "layer mean": "replaced by their layer's mean"}
RESULTS = Path(__file__).parents[1] / "benchmarks"
FAMILIES = {
    "fewer bits": ("round to nearest", "gptq"),
    "fewer experts": ("plain average", "m-smoe", "hc-smoe", "reap", "reap + int4"),
    "a base and deltas": ("d2-moe", "resmoe"),
}


TOLD = """\
- **Fewer bits** do not care what experts have in common, and end at two bits, where rounding costs most. They give all
  experts the same, the ones that hardly count, too.
- **Fewer experts** pay only where experts are alike. Where they are not, no average of two computes what both do,
  however well hidden units are aligned; pruning keeps the busy ones whole and loses what the rare ones knew.
- **A base and deltas** lie between: the delta has to carry what experts do not share, so its rank or bits grow as
  they have less in common.
- **comoe's chain** takes from each what pays: bits by how much an expert counts, none for those that hardly do, a
  base and deltas where experts are alike. Certificates decide, per model, at packing time.

## If you must choose

"""


def main() -> None:
    """Print the page."""
    names = ("ladder", "healing", "cache", "predictors", "bias", "joint")
    ladder, healing, *offloading = (json.loads((RESULTS / f"{name}.json").read_text("utf-8")) for name in names)
    print("\n".join([*_lines(ladder, healing), "", *offloading_lines(*offloading)]).rstrip())


def _lines(document: dict[str, Any], healing: dict[str, Any]) -> Iterator[str]:
    rows, settings = document["rows"], document["settings"]
    yield "# Which form wins where, and why"
    yield ""
    yield "Generated from [ladder.json](../benchmarks/ladder.json) by `make docs`."
    yield f"{settings['windows_per_domain']} windows in each of {len(settings['domains'])} domains, all experts"
    yield "resident, transformers' own arithmetic, nothing fine-tuned but under Healing. Bytes are shares"
    yield "of the experts' bytes as bf16; losses are relative increases of nats per token, with 95 % intervals."
    yield ""
    yield from _short(document)
    for model in document["models"]:
        own = [row for row in rows if row["model"] == model]
        yield f"## {model}"
        yield ""
        yield from _gates([gate for gate in document["gates"] if gate["model"] == model])
        yield from _against(own)
        yield from _made_of(own)
        yield from _ablations(own)
    yield from _healing(healing)
    yield from _limits(document)


def _short(document: dict[str, Any]) -> Iterator[str]:
    rows = document["rows"]
    ours = [row for row in rows if row["kind"] == "comoe"]
    beaten = {(row["model"], row["share"]) for row in document["beaten_by"]}
    yield "## In short"
    yield ""
    yield f"- comoe's chain loses least, or ties, in {len(ours) - len(beaten)} of {len(ours)} cells of model and size."
    for row in document["beaten_by"]:
        yield f"- **{row['method']}** is better on {row['model']} at {row['share']:.0%}: comoe's nats are "
        yield f"  {row['comoe_over_it']:.2%} above its."
    for share, target in TARGETS.items():
        cells = [row for row in ours if row["share"] == share]
        kept = sum(row["loss"] <= target for row in cells)
        losses = ", ".join(f"{row['model']} {row['loss']:.2%}" for row in cells)
        yield f"- At {share:.0%} of the bytes a loss of at most {target:.1%} was the target:"
        yield f"  kept on {kept} of {len(cells)} models, {losses}."
    uneven = document["worst_domain_over_twice_mean"]
    yield f"- A worst domain loses more than twice the mean, beyond its interval, in {len(uneven)} cells."
    yield ""


def _gates(gates: Sequence[Row]) -> Iterator[str]:
    """What a model's experts have in common: little, where their mean costs much."""
    if gates:
        told = ", ".join(f"{SAID[gate['change']]} {gate['cost']:.2f}" for gate in gates)
        yield f"What its experts are worth, in nats per token: {told} more."
        yield ""


def _against(rows: Sequence[Row]) -> Iterator[str]:
    shares = sorted({row["share"] for row in rows if row["kind"] == "comoe"}, reverse=True)
    yield "| at equal bytes | " + " | ".join(f"{share:.0%}" for share in shares) + " |"
    yield "|---" * (len(shares) + 1) + "|"
    yield "| **comoe** | " + " | ".join(_cell(rows, "comoe", share) for share in shares) + " |"
    for family, methods in FAMILIES.items():
        for method in methods:
            yield f"| {method} ({family}) | " + " | ".join(_cell(rows, method, share) for share in shares) + " |"
    yield ""


def _cell(rows: Sequence[Row], method: str, share: float) -> str:
    found = [row for row in rows if row.get("method") == method and row["share"] == share and row["reaches"]]
    if not found:
        return "-"
    return f"{percent(found[0]['loss'])} ({percents(found[0]['loss_ci95'])})"


def _made_of(rows: Sequence[Row]) -> Iterator[str]:
    yield "What the chain is made of, share of experts:"
    yield ""
    yield "| size | experts in | worst domain, over the mean where that is a loss |"
    yield "|---|---|---|"
    for row in rows:
        if row["kind"] == "comoe":
            forms = ", ".join(f"{form} {share:.0%}" for form, share in row["forms"].items())
            worst = row["loss_worst_domain"]
            over = f", {worst / row['loss']:.1f} x" if row["loss"] > min(TARGETS.values()) else ""
            yield f"| {row['share']:.0%} | {forms} | {percent(worst)} ({row['worst_domain']}{over}) |"
    yield ""


def _ablations(rows: Sequence[Row]) -> Iterator[str]:
    found = [row for row in rows if row["kind"] == "ablation"]
    if not found:
        return
    shares = sorted({row["share"] for row in found}, reverse=True)
    yield "Chains of fewer ingredients, not certified: shared forms are taken wherever local errors speak for them."
    yield ""
    yield "| chain of | " + " | ".join(f"{share:.0%}" for share in shares) + " |"
    yield "|---" * (len(shares) + 1) + "|"
    yield "| (comoe's, certified) | " + " | ".join(_cell(rows, "comoe", share) for share in shares) + " |"
    for method in dict.fromkeys(row["method"] for row in found):
        yield f"| {method} | " + " | ".join(_cell(found, method, share) for share in shares) + " |"
    yield ""


def _healing(document: dict[str, Any]) -> Iterator[str]:
    settings = document["settings"]
    yield "## Healing"
    yield ""
    yield f"What training scales through the whole model for {settings['steps']} steps changes, no byte added"
    yield f"([healing.json](../benchmarks/healing.json), {settings['windows_per_domain']} windows per domain). One set"
    yield "of scales serves all of comoe's coarse steps (`comoe pack --heal`); a published method's is of its one size."
    yield ""
    yield "| | loss before | after | change of nats | |"
    yield "|---|---|---|---|---|"
    for row in document["rows"]:
        before, after, change = row["before"], row["after"], row["after_over_before"]
        low, high = change["loss_ci95"]
        told = "better" if high < 0 else "worse" if low > 0 else "within noise"
        if row.get("healing_steps") == 0:
            told = "undone when packed"
        moved = f"{percent(change['loss'])} ({percents(change['loss_ci95'])})"
        name = f"{row['model']}, {row['method']} at {row['share']:.0%}"
        yield f"| {name} | {percent(before['loss'])} | {percent(after['loss'])} | {moved} | {told} |"
    yield ""


def _limits(document: dict[str, Any]) -> Iterator[str]:
    """What the figures say of each family of methods."""
    models, shares = list(document["models"]), (0.16, 0.08)
    rows = [row for row in document["rows"] if row["kind"] in ("comoe", "published") and row["reaches"]]
    yield "## What each family can and cannot do"
    yield ""
    yield "The best of each, and what a model's experts have in common: how much their layer's mean costs."
    yield ""
    cells = [(model, share) for model in models for share in shares]
    yield "| | " + " | ".join(f"{model} at {share:.0%}" for model, share in cells) + " |"
    yield "|---" * (len(cells) + 1) + "|"
    for family, methods in (*FAMILIES.items(), ("**comoe's chain**", ("comoe",))):
        yield f"| {family} | " + " | ".join(_best(rows, methods, *cell) for cell in cells) + " |"
    means = {gate["model"]: f"{gate['cost']:.2f} nats" for gate in document["gates"] if gate["change"] == "layer mean"}
    yield "| mean instead of experts | " + " | ".join(means.get(model, "") for model, _ in cells) + " |"
    yield ""
    yield from TOLD.splitlines()
    for share in sorted({row["share"] for row in rows}, reverse=True):
        losses = [row["loss"] for row in rows if row["kind"] == "comoe" and row["share"] == share]
        least, most = percent(max(0.0, min(losses))), percent(max(losses))
        yield f"- At {share:.0%} of the bytes the chain loses {least} to {most} on these models."
    yield "- Pack with the defaults: all forms are tried, those that do not pay left out. `comoe inspect --plot` shows"
    yield "  what your model's chain loses at every size. Then give `--max-loss`, not a form: the planner takes a step."


def _best(rows: Sequence[Row], methods: Sequence[str], model: str, share: float) -> str:
    found = [row for row in rows if row["model"] == model and row["method"] in methods and row["share"] == share]
    if not found:
        return "-"
    best = min(found, key=lambda row: row["loss"])
    return percent(best["loss"]) + (f" ({best['method']})" if len(methods) > 1 else "")


if __name__ == "__main__":
    main()
