"""`comoe plan`: what a pack could do in a budget, before anything is loaded."""

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import typer

from comoe.cli.options import (
    CacheFolder,
    Context,
    Dtype,
    Exact,
    ExpertMemory,
    Json,
    Link,
    MaxLoss,
    Memory,
    PackPlace,
    PolicyName,
    ProfilePath,
    Source,
    Threads,
    TokenFile,
    Wish,
    access,
    wish,
)
from comoe.cli.terminal import print_json, print_table, say
from comoe.defaults import CONTEXT, POLICY
from comoe.device import process
from comoe.device.costs import device_costs, measured_costs
from comoe.device.doctor import disk_of
from comoe.device.memory import check_possible, default_memory
from comoe.device.probe import LEAST_LATENCY_S
from comoe.memory.policy import POLICIES
from comoe.net.place import folder_of, reading_of
from comoe.plan.cost import Costs
from comoe.plan.footprint import INTERPRETER_BYTES, Workload, advised, beside_experts, dtype_of
from comoe.plan.ladder import ladder_of
from comoe.plan.planner import Plan, Planner, frontier
from comoe.store.manifest import Manifest, read_manifest
from comoe.store.pack import Pack, is_downloaded, refuse_idle_source
from comoe.store.profile import Profile, read_profile
from comoe.types import DoesNotFit, UsageError
from comoe.units import format_size, parse_budget, parse_size

OFFERED_LOSS = 0.02
"""The bound that is shown beside the exact plan where none was asked for."""


def command(
    called: typer.Context,
    pack: PackPlace,
    memory: Memory = None,
    expert_memory: ExpertMemory = None,
    max_loss: MaxLoss = None,
    exact: Exact = False,
    context: Context = CONTEXT,
    dtype: Dtype = None,
    threads: Threads = None,
    link: Link = None,
    source: Source = None,
    cache: CacheFolder = None,
    token_file: TokenFile = None,
    profile: ProfilePath = None,
    policy: PolicyName = POLICY,
    json: Json = False,
) -> None:
    """Show what would run in a budget, and what it costs.

    \b
    comoe plan qwen.comoe --memory 4GiB --max-loss 2%

    Plans from exact to small, with what they cost. Times are predicted from rates measured here and now. Before a pack
    is downloaded, a folder with its comoe.json will do. Exit code 3 where no plan within the bound fits, with the
    smallest memory that would do.
    """
    wished = wish(memory, expert_memory, max_loss, exact)
    if policy not in POLICIES:
        raise UsageError(f"there is no policy {policy!r}: choose from {', '.join(POLICIES)}.")
    reach = access(cache, None, token_file, link)
    folder = folder_of(pack, reach)
    manifest = read_manifest(folder)
    refuse_idle_source(source, folder, manifest)
    from_flag = called.get_parameter_source("profile").name == "COMMANDLINE"  # type: ignore[union-attr]
    known = _known(profile, from_flag)
    reading = reading_of(pack, reach, manifest)
    costs = _costs(folder, manifest, source, dtype, threads, reading)
    planner = Planner(ladder_of(manifest, known), costs, policy)
    forms = planner.ladder.forms(wished.max_loss)
    work = Workload(context or CONTEXT, dtype_of(manifest, dtype), forms)
    budget, beside = _expert_budget(wished, folder, manifest, work)
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


def _known(profile: Path | None, from_flag: bool) -> Profile | None:
    """The profile to plan by. One that a setting names and no run made yet is none, as `comoe run` takes it."""
    if profile is None or (not from_flag and not profile.exists()):
        if profile is not None:
            say(f"there is no profile {profile} yet: planned as if any text came; `comoe run` makes it.")
        return None
    return read_profile(profile)


def _costs(
    folder: Path,
    manifest: Manifest,
    source: Path | None,
    dtype: str | None,
    threads: int | None,
    reading: tuple[float, float] | None,
) -> Costs:
    """Rates of this device; those of reading are of the link, of the pack, or of a disk to which it might come."""
    cores = len(os.sched_getaffinity(0))
    threads = min(threads or cores, cores)
    if is_downloaded(folder):
        opened = Pack(folder, source=source)  # refuses one that is not whole
        if reading is None:
            return measured_costs(opened, perf_counter, threads=threads, dtype=dtype)
    elif reading is None:
        say(
            f"{folder} holds a manifest and no weights yet: reads are timed by a scratch file on this disk; see --link."
        )
        reading = (disk_of(Path(tempfile.gettempdir()), perf_counter)[0], LEAST_LATENCY_S)
    else:
        say(f"{folder} holds a manifest and no weights yet: planned from what it says; reads go over the link.")
    return device_costs(manifest, reading, perf_counter, threads=threads, dtype=dtype)


def _expert_budget(wished: Wish, folder: Path, manifest: Manifest, work: Workload) -> tuple[int, int]:
    """(bytes for experts, bytes that the process needs beside them)."""
    if wished.expert_memory is not None:
        return parse_budget(wished.expert_memory, manifest.expert_bytes_bf16), 0
    beside = beside_experts(manifest, work, _interpreter_bytes(folder))
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
