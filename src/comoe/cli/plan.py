"""`comoe plan`: what a pack could do in a budget, before anything is loaded."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

from typer import Option

from comoe.cli.options import (
    Context,
    Dtype,
    Exact,
    ExpertMemory,
    Json,
    MaxLoss,
    Memory,
    PackPath,
    ProfilePath,
    Source,
    Threads,
    Wish,
    wish,
)
from comoe.cli.terminal import print_json, print_table
from comoe.defaults import CONTEXT
from comoe.device import process
from comoe.device.costs import measured_costs
from comoe.device.memory import check_possible, default_memory
from comoe.plan.cost import Costs
from comoe.plan.footprint import INTERPRETER_BYTES, Workload, advised, beside_experts, dtype_of
from comoe.plan.ladder import ladder_of
from comoe.plan.planner import Plan, Planner, frontier
from comoe.store.pack import Pack, refuse_idle_source
from comoe.store.profile import read_profile
from comoe.types import DoesNotFit, UsageError
from comoe.units import format_size, parse_budget, parse_link, parse_size

OFFERED_LOSS = 0.02
"""The bound that is shown beside the exact plan where none was asked for."""


def command(
    pack: PackPath,
    memory: Memory = None,
    expert_memory: ExpertMemory = None,
    max_loss: MaxLoss = None,
    exact: Exact = False,
    context: Context = CONTEXT,
    dtype: Dtype = None,
    threads: Threads = None,
    link: Annotated[
        str | None,
        Option(envvar="COMOE_LINK", metavar="RATE,RTT", help="Read experts over a link such as 40Mbit,20ms."),
    ] = None,
    source: Source = None,
    profile: ProfilePath = None,
    json: Json = False,
) -> None:
    """Show what would run in a budget, and what it costs.

    \b
    comoe plan qwen.comoe --memory 4GiB --max-loss 2%

    Plans from exact to small, with what they cost. Times are predicted from rates measured here and now. Exit code 3
    where no plan within the bound fits, with the smallest memory that would do.
    """
    wished = wish(memory, expert_memory, max_loss, exact)
    opened = Pack(pack, source=source)
    refuse_idle_source(source, pack, opened.manifest)
    known = read_profile(profile) if profile is not None else None
    planner = Planner(ladder_of(opened.manifest, known), _costs(opened, dtype, threads, link))
    forms = planner.ladder.forms(wished.max_loss)
    work = Workload(context or CONTEXT, dtype_of(opened.manifest, dtype), forms)
    budget, beside = _expert_budget(wished, opened, work)
    offered = wished.max_loss if exact or max_loss is not None else OFFERED_LOSS
    plans = frontier(planner, budget, offered)
    smallest = planner.smallest(wished.max_loss)
    smallest = advised(smallest + beside) if wished.expert_memory is None else smallest
    fits = any(plan.loss.high <= wished.max_loss for plan in plans)
    if json:
        shown = [plan.document() for plan in plans]
        print_json({"fits": fits, "smallest_memory": smallest, "beside_experts_bytes": beside, "plans": shown})
    else:
        show_plans(plans)
    if not fits:
        flag = "--expert-memory" if wished.expert_memory else "--memory"
        bound = f"a loss of at most {wished.max_loss:.2%}" if wished.max_loss else "exact outputs"
        raise DoesNotFit(f"there is no plan for {bound} below {flag} {smallest} ({format_size(smallest)}).", smallest)


def show_plans(plans: Sequence[Plan]) -> None:
    """A table of plans, a line each."""
    columns = ("plan", "wanted form", "floor", "expert memory", "ms/token", "loss", "start", "first reads")
    print_table(columns, [_row(plan) for plan in plans])


def _row(plan: Plan) -> list[str]:
    low, high = plan.ms_per_token
    loss = "exact" if plan.target == "exact" and plan.floor is None else f"{plan.loss.low:.2%} to {plan.loss.high:.2%}"
    return [
        plan.name,
        plan.target,
        plan.floor or "none",
        format_size(plan.total_bytes),
        f"{low:.1f} to {high:.1f}",
        loss,
        f"{plan.start_seconds:.1f} s",
        format_size(plan.fetch_bytes),
    ]


def _costs(pack: Pack, dtype: str | None, threads: int | None, link: str | None) -> Costs:
    cores = len(os.sched_getaffinity(0))
    costs = measured_costs(pack, perf_counter, threads=min(threads or cores, cores), dtype=dtype)
    if link is not None:
        rate, latency = parse_link(link)
        costs = replace(costs, read_bps=rate, read_latency_s=latency)
    return costs


def _expert_budget(wished: Wish, pack: Pack, work: Workload) -> tuple[int, int]:
    """(bytes for experts, bytes that the process needs beside them)."""
    if wished.expert_memory is not None:
        return parse_budget(wished.expert_memory, pack.manifest.expert_bytes_bf16), 0
    beside = beside_experts(pack.manifest, work, _interpreter_bytes(pack.folder))
    if wished.memory is None:
        return default_memory() - beside, beside
    check_possible(parse_size(wished.memory))
    return parse_size(wished.memory) - beside, beside


def _interpreter_bytes(pack: Path) -> int:
    """What Python takes with all that a run imports, and the tokenizer, where that is installed."""
    try:
        import comoe.runtime.load  # noqa: F401
        from comoe.runtime.generate import tokenizer_of
    except ModuleNotFoundError:
        return INTERPRETER_BYTES
    held: Any = None
    with suppress(UsageError):  # without a tokenizer nothing could run
        held = tokenizer_of(pack)
    nbytes = process.resident_bytes()
    del held
    return nbytes
