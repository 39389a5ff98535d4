"""`comoe verify`: promises against facts."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from comoe.cli.options import Exact, ExpertMemory, Json, MaxLoss, PackPath, Threads, wish
from comoe.cli.terminal import print_json, print_pairs, progress_bar, say
from comoe.store.pack import Pack
from comoe.store.shipped import sample_files
from comoe.types import VerificationFailed
from comoe.units import parse_budget


def command(
    pack: PackPath,
    expert_memory: ExpertMemory = "30%",
    max_loss: MaxLoss = None,
    exact: Exact = False,
    text: Annotated[
        list[Path] | None,
        Option(metavar="FILE...", help="Text to measure on, one file or more; by default what comoe ships."),
    ] = None,
    source: Annotated[
        Path | None,
        Option(
            envvar="COMOE_SOURCE",
            metavar="FOLDER",
            help="Where the checkpoint is now, if it moved or the pack is self-contained.",
        ),
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Check a pack and what plans promise.

    \b
    comoe verify qwen.comoe --expert-memory 30%

    Hashes every blob, compares exact mode with more memory and with transformers, and prints what the plan predicted
    beside what was measured. Exit code 4 when something is off.
    """
    from comoe.make.verify import verify
    from comoe.runtime.generate import quiet_transformers
    from comoe.runtime.threads import use_threads

    quiet_transformers()
    use_threads(threads)
    wished = wish(None, expert_memory, max_loss, exact)
    opened = Pack(pack, source=source)
    budget = parse_budget(wished.expert_memory or "30%", opened.manifest.expert_bytes_bf16)
    with progress_bar() as progress:
        findings = verify(opened, budget, wished.max_loss, text or sample_files(), progress)
    document = {"ok": findings.ok, **asdict(findings)}
    if json:
        print_json(document)
    else:
        _show(document)
    if not findings.ok:
        raise VerificationFailed(f"{pack}: {findings.errors[0]}")


def _show(document: dict[str, Any]) -> None:
    held = {True: "yes", False: "NO", None: "not looked at"}
    print_pairs([(key.replace("_", " "), held[value]) for key, value in document["exact"].items()])
    for key, value in document["measured"].items():
        print(f"{key.replace('_', ' ')}: predicted {_brief(document['predicted'].get(key))}, measured {_brief(value)}")
    for sentence in document["skipped"]:
        say(f"skipped: {sentence}")
    for sentence in document["errors"]:
        print(f"- {sentence}")


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return " to ".join(map(_brief, value))
    return "nothing" if value is None else str(value)
