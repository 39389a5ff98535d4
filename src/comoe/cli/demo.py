"""`comoe demo`: comoe at work on the small model that it brings along."""

from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import fill
from typing import TYPE_CHECKING, Annotated

from typer import Option

from comoe.cli.options import Json, Threads
from comoe.cli.plan import show_plans
from comoe.cli.terminal import print_json, print_table, progress_bar, say
from comoe.types import VerificationFailed
from comoe.units import format_size

if TYPE_CHECKING:
    from comoe.make.demo import Act, Demo


def command(
    keep: Annotated[Path | None, Option(metavar="FOLDER", help="Leave the demo's pack in this new folder.")] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Show comoe at work on the small model that it brings along.

    \b
    comoe demo

    Packs it, plans, generates with 30 % of the expert bytes in memory, compares with the model that has them all, and
    shows what a loss bound of 2 % buys. Needs no network and no other files.
    """
    from comoe.make.demo import demo
    from comoe.runtime.generate import quiet_transformers
    from comoe.runtime.threads import use_threads

    quiet_transformers()
    use_threads(threads)
    with TemporaryDirectory(prefix="comoe-demo-") as scratch, progress_bar() as progress:
        shown = demo(keep or Path(scratch) / "demo.comoe", progress, say)
    if json:
        print_json(shown.document())
    else:
        _show(shown)
        if keep is not None:
            print(f"\nThe pack is in {keep}: try comoe run {keep} --expert-memory 30%")
    if not shown.identical:
        raise VerificationFailed("the streamed model's outputs are not those of the resident one: please report it.")


def _show(shown: "Demo") -> None:
    from comoe.make.demo import BOUND, PROMPT

    total = shown.expert_bytes_total
    print(
        f"A Qwen3-MoE of {shown.report.layers} layers with {shown.report.experts_per_layer} experts each, "
        f"{format_size(total)} of experts in bf16, packed in {shown.report.seconds:.0f} s. Plans for 30 % of them:\n"
    )
    show_plans(shown.plans)
    print("\nWhat it writes with 30 % of its experts in memory (it is small, and speaks badly):\n")
    print(fill(PROMPT + shown.streamed.answer.text, 88, initial_indent="  ", subsequent_indent="  "))
    print()
    rows = [
        _row("all experts in memory", shown.resident, total, "exact"),
        _row("30 %, exact", shown.streamed, total, "exact" if shown.identical else "NOT exact"),
        _row(f"15 %, loss up to {BOUND:.0%}", shown.bounded, total, f"{shown.quality_loss:+.2%}"),
    ]
    print_table(("", "experts", "of bf16", "ms/token", "hit rate", "read/token", "loss measured"), rows)
    print(f"\nidentical to the resident model: {'yes' if shown.identical else 'NO'}")


def _row(name: str, act: "Act", total: int, loss: str) -> list[str]:
    got = act.measured
    return [
        name,
        format_size(got.resident_bytes),
        f"{got.resident_bytes / total:.0%}",
        f"{got.ms_per_token:.1f}",
        f"{got.hit_rate:.0%}",
        format_size(got.bytes_per_token),
        loss,
    ]
