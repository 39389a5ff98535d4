"""The offloading half of docs/analysis.md, from cache.json, predictors.json, bias.json and joint.json."""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean, median
from typing import Any

from comoe.bench.joint_figures import EXACT, JOINT, LIVE_KIND, NO_BIAS, SEPARABLE, SEPARABLE_BIAS, SHARE
from comoe.bench.losses import percent

WANTED = 0.92
"""Of the future's hits, what a policy should have."""

Row = dict[str, Any]
Lines = dict[str, list[str]]
Layers = Sequence[Sequence[float]]
METHODS = (EXACT, "exact, bias", SEPARABLE, SEPARABLE_BIAS, "joint static", NO_BIAS, JOINT, "clairvoyant")


def offloading_lines(cache: Row, predictors: Row, bias: Row, joint: Row) -> Iterator[str]:
    """Which policy, predictor and bias help where, and what deciding together with the forms adds."""
    prose: list[str] = []
    for line in [*_lines(cache, predictors, bias, joint), ""]:
        if line and line[0] not in "#|":
            prose.append(line)
            continue
        yield from textwrap.wrap(" ".join(prose), 110)
        prose.clear()
        yield line


def _lines(cache: Row, predictors: Row, bias: Row, joint: Row) -> Iterator[str]:
    yield "## Offloading: who leaves, who is read ahead, who is preferred"
    yield ""
    yield "From [cache.json](../benchmarks/cache.json), [bias.json](../benchmarks/bias.json) and"
    yield '[joint.json](../benchmarks/joint.json). "A read" is what'
    yield "reading an exact expert takes, over what a layer takes"
    yield "to compute: about 1 for a fast NVMe disk, 4 for a slow one, 16 and more for cards and networks."
    yield ""
    yield from _policies(cache)
    yield from _ahead(cache)
    yield from _predictors(cache)
    yield from _foretold(predictors)
    yield from _bias(bias)
    yield from _joint(joint)


def _policies(cache: Row) -> Iterator[str]:
    rows = [row for row in cache["rows"] if row["kind"] == "policy" and row["fits"] and row["policy"] != "belady"]
    cells = list(dict.fromkeys((row["model"], row["share"]) for row in rows))
    yield "### Who leaves"
    yield ""
    yield "Byte hits over those of the policy that knows the future and reads nothing ahead:"
    yield ""
    lines: Lines = {}
    for policy in dict.fromkeys(row["policy"] for row in rows):
        found = {(row["model"], row["share"]): row["belady_share"] for row in rows if row["policy"] == policy}
        lines[policy] = [f"{found[cell]:.0%}" for cell in cells]
    yield from _table([f"{model} {share:.0%}" for model, share in cells], lines)
    yield ""
    known = cache["belady_share_known"]
    enough = min((int(tokens) for tokens, share in known.items() if share >= WANTED), default=None)
    yield "LFU that forgets is best or nearly so in every cell, and the only one that survives a cache smaller than a"
    yield f"token's experts. None comes to {WANTED:.0%} of the future's hits everywhere, and what they"
    yield "lack nobody has: who is told exactly which experts the next tokens will use,"
    yield "and counts uses beyond, has in his worst cell"
    yield ", ".join(f"{share:.1%} with {tokens}" for tokens, share in known.items()) + " tokens."
    if enough is not None:
        yield f"So {WANTED:.0%} in every cell takes it {enough} tokens that nobody has sampled yet."
    yield ""


def _ahead(cache: Row) -> Iterator[str]:
    rows = {(r["model"], r["share"], r["ratio"], r["prefetch"]): r for r in cache["rows"] if r["kind"] == "ahead"}
    live = {(r["model"], r["ratio"]): r for r in cache["rows"] if r["kind"] == "live" and r["fits"]}
    yield "### Reading ahead"
    yield ""
    yield "Times with reading ahead (`auto`) over times without: the median of four budgets, and the worst."
    yield ""
    yield "| | a read | decoding | prompts | both | hits of the future's, at least | wasted at most | live, 16 % |"
    yield "|---|---|---|---|---|---|---|---|"
    for model, ratio in dict.fromkeys((model, ratio) for model, _, ratio, _ in rows):
        pairs = [
            (row, rows[model, share, ratio, "off"])
            for (of, share, at, prefetch), row in rows.items()
            if (of, at, prefetch) == (model, ratio, "auto") and row["fits"]
        ]
        times = " | ".join(_over(pairs, key) for key in ("decode_ms", "prefill_ms", "whole_ms"))
        hits = min(row["belady_share"] for row, _ in pairs)
        wasted = max(row["wasted_bytes"] / max(row["bytes_read"], 1) for row, _ in pairs)
        yield f"| {model} | {ratio:g} | {times} | {hits:.0%} | {wasted:.1%} | {_interval(live.get((model, ratio)))} |"
    yield ""
    yield "It helps most where a read takes about as long as a layer: there is time to hide it in. Faster reads cost"
    yield "little anyway; slower ones keep the disk busy with misses,"
    yield "and decoding gains nothing, prompts still do: their"
    yield "layers use sets of experts. The trial that switches it off costs a few tokens."
    yield "Live, no pair is slower beyond its interval."
    yield ""


def _over(pairs: Sequence[tuple[Row, Row]], key: str) -> str:
    ratios = [row[key] / off[key] for row, off in pairs]
    return f"{median(ratios):.2f} ({max(ratios):.2f})"


def _interval(row: Row | None) -> str:
    if row is None:
        return "-"
    low, high = row["ratio_of_times_ci95"]
    return f"{row['ratio_of_times']:.2f} ({low:.2f} to {high:.2f})"


def _predictors(cache: Row) -> Iterator[str]:
    rows = [row for row in cache["rows"] if row["kind"] == "recall" and row["recall"]]
    yield "### Predictors"
    yield ""
    yield "Of the experts that a layer uses, the share among as many"
    yield "that were held likeliest one layer before (among twice"
    yield "as many): the mean of all layers, and the worst layer."
    yield ""
    found = {name: [[*row["recall"][name].values()] for row in rows] for name in rows[0]["recall"]}
    yield from _recalls([row["model"] for row in rows], found, {"mean": mean, "worst": min})
    yield ""
    yield "The learned map beats the next layer's own router on this layer's input, and both beat counting. The first"
    yield "layer is told by the token before, which says little."
    yield ""


def _recalls(
    models: Sequence[str],
    found: Mapping[str, Sequence[Layers]],
    shown: Mapping[str, Callable[[Sequence[float]], float]],
) -> Iterator[str]:
    """By predictor what it foretold in the layers of each model: of as many experts as are used (of twice as many)."""
    lines = {
        name: [
            "{:.2f} ({:.2f})".format(*map(of, zip(*layers, strict=True)))
            for layers in by_model
            for of in shown.values()
        ]
        for name, by_model in found.items()
    }
    first, *others = shown
    yield from _table([head for model in models for head in (f"{model}, {first}", *others)], lines)


def _table(heads: Sequence[str], lines: Lines) -> Iterator[str]:
    """A table whose lines have names."""
    yield f"| | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 1) + "|"
    yield from (f"| {name} | {' | '.join(cells)} |" for name, cells in lines.items())


def _foretold(predictors: Row) -> Iterator[str]:
    rows, settings = predictors["rows"], predictors["settings"]
    yield "Could it be foretold better? Predictors that are too slow to be used, on"
    yield f"{rows[0]['tokens']['fitted']:,} tokens of calibration text or a quarter of them, judged on all tokens of"
    yield "other text ([predictors.json](../benchmarks/predictors.json)). A network has"
    yield f"{settings['hidden']} hidden units; more of what is known are inputs of all layers before, this layer's"
    yield "experts, and those of the next layer that the token before used:"
    yield ""
    names = rows[0]["mean"]
    found = {name: [[layer["recall"][name] for layer in row["layers"]] for row in rows] for name in names}
    yield from _recalls([row["model"] for row in rows], found, {"mean": mean, "worst": min, "best": max})
    yield ""
    most = max(one for models in found.values() for layers in models for one, _ in layers)
    yield f"No layer comes to 0.95 with any of those that were tried (the best to {most:.2f}), and four times the text"
    yield "adds a few hundredths: between"
    yield "lie an attention and this layer's own experts, which nobody knows before they are computed."
    yield ""


def _bias(bias: Row) -> Iterator[str]:
    plain = bias["rows"][0]
    yield "### A routing bias"
    yield ""
    yield f"qwen3moe-mini, exact experts in {bias['expert_share']:.0%} of their bytes, {bias['policy']}; the bound is"
    yield "the answer's, which the ledger keeps with its own, higher estimate of the loss:"
    yield ""
    yield "| bias | bound | hits | read, over none | moved | loss | the ledger's |"
    yield "|---|---|---|---|---|---|---|"
    for row in bias["rows"]:
        bound = percent(row["bound"]) if row["bound"] < 1 else "-"
        yield (
            f"| {row['delta']:g} | {bound} | {row['hit_rate']:.0%} | {row['bytes_read'] / plain['bytes_read']:.2f} "
            f"| {percent(row['moved_share'])} | {percent(row['mean'])} | {percent(row['ledger'])} |"
        )
    yield ""
    yield "A mild bias is a good bargain for routers of several experts:"
    yield "swaps of near equals cost next to nothing. Switch"
    yield "routes to one expert, whose second choice is no near equal: a bias is refused there."
    yield ""


def _joint(joint: Row) -> Iterator[str]:
    yield "## Routing, forms and offloading together"
    yield ""
    ratio, over_all = joint["ratio_at_16"], joint["median_ratio"]
    no_worse, cells_all = joint["cells_no_worse"], joint["cells"]
    yield f"Deciding together takes {ratio:.2f} times as long per token as the best pair of a uniform form and an"
    yield "offloader, the median of both models and three rates in"
    yield f"16 % of the bytes ({over_all:.2f} of all cells); it is"
    yield f"no slower in {no_worse} of {cells_all}. At equal times its"
    yield f"loss is {joint['loss_ratio_at_16']:.2f} of the other's."
    yield "Milliseconds per token on the virtual clock in 16 %, and what was lost of a bound of 0.5 %:"
    yield ""
    cells = [row for row in joint["rows"] if row["kind"] == "cell" and row["share"] == SHARE]
    yield "| | " + " | ".join(f"{row['model']}, read {row['ratio']:g}" for row in cells) + " |"
    yield "|---" * (len(cells) + 1) + "|"
    for method in METHODS:
        yield f"| {method} | " + " | ".join(_timed(row["methods"].get(method)) for row in cells) + " |"
    yield ""
    yield from _all_cells(joint)
    yield from _meaning(joint)


def _timed(found: Row | None) -> str:
    if not found or not found["fits"]:
        return "-"
    loss = f", {percent(found['loss'])}" if "loss" in found else ""
    return f"{found['ms']:.2f}{loss}"


def _all_cells(joint: Row) -> Iterator[str]:
    rows = [row for row in joint["rows"] if row["kind"] == "cell"]
    live = {_key(row): row["methods"] for row in joint["rows"] if row["kind"] == LIVE_KIND}
    shares = sorted({row["share"] for row in rows})
    yield "The joint way's time over the best separable one's in every cell (live, where threads and reads were timed):"
    yield ""
    yield "| | a read | " + " | ".join(f"{share:.0%}" for share in shares) + " |"
    yield "|---" * (len(shares) + 2) + "|"
    for model, ratio in dict.fromkeys((row["model"], row["ratio"]) for row in rows):
        cells = {row["share"]: row for row in rows if (row["model"], row["ratio"]) == (model, ratio)}
        told = [_ratio(cells.get(share), live) for share in shares]
        yield f"| {model} | {ratio:g} | " + " | ".join(told) + " |"
    yield ""


def _ratio(row: Row | None, live: dict[tuple[str, float, float], Row]) -> str:
    methods = row["methods"] if row else {}
    if row is None or not all(methods.get(name, {}).get("fits") for name in (JOINT, SEPARABLE)):
        return "-"
    timed = live.get(_key(row), {}).get(JOINT)
    shown = f" ({timed['ratio_of_times']:.2f})" if timed else ""
    return f"{methods[JOINT]['ms'] / methods[SEPARABLE]['ms']:.2f}{shown}"


def _key(row: Row) -> tuple[str, float, float]:
    return row["model"], row["share"], row["ratio"]


def _meaning(joint: Row) -> Iterator[str]:
    found = joint["foretold"]
    yield f"Live, the median of the six cells at 16 % is {joint['ratio_at_16_live']:.2f}:"
    yield "the difference is within the noise of"
    yield "a shared machine. The virtual clock is off by"
    yield f"{found['median_error']:.0%} in the median of {found['ways']} ways that were timed live,"
    yield f"{found['p95_error']:.0%} at the 95th percentile: it knows nothing of threads that wait for each other."
    yield "More cannot be told here: half the 95 % interval of a way's time over that of another, in turns with it, is"
    yield f"{found['median_half_interval']:.0%} in the median,"
    yield f"{found['p95_half_interval']:.0%} at the 95th percentile."
    yield ""
    yield "**Why so little.** Low bits make reads small and hits many, LFU and reading ahead do the rest: what the best"
    yield "separable way still waits for is a tenth of a token's time"
    yield "where a read takes 4 layers, and a quarter where it"
    yield "takes 16, and only that can be won. The chain wins a third"
    yield "to a half of it, a bias another part of what is left."
    yield "Against exact experts with the best offloader the ladder is what counts: 2, 7 and 23 times as fast on"
    yield "qwen3moe-mini. For deciding together to pay, reads must take far more than 16 layers' time (networks), or"
    yield "budgets be below the smallest uniform form within the bound, or experts suffer more from low bits."
    yield ""
    yield "**How routing and offloading depend on each other.** A bias"
    yield "saves most reads where least is resident, and loses"
    yield "least where most is: with three quarters of the experts there,"
    yield "a strong bias moves half a percent of the gates for"
    yield "a tenth of a percent of loss, with an eighth there a fifth"
    yield "of them for 7 %. So it pays on top of low bits, which"
    yield "make more resident, and slow reads; where uniform low-bit"
    yield "experts nearly fit, it is the cheapest way to the rest."
    yield "What it moves makes resident experts more used and so more resident: LFU counts what was chosen."
    yield ""
    yield "**Presets**: `comoe --config faithful` (exact), `balanced`"
    yield "(0.5 %), `small` (2 %), `slow-reads` (1 %, a mild bias)."
    yield ""
