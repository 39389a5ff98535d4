"""`comoe doctor`: is this machine fit, and how fast is it?"""

from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Annotated

from typer import Option

from comoe.cli.options import Json
from comoe.cli.terminal import print_json, print_pairs
from comoe.device.doctor import examine
from comoe.units import format_size


def command(
    folder: Annotated[Path, Option(metavar="FOLDER", help="Where packs are: the disk that is measured.")] = Path(),
    json: Json = False,
) -> None:
    """Examine this machine.

    \b
    comoe doctor
    """
    findings = asdict(examine(folder, perf_counter))
    if json:
        print_json(findings)
        return
    problems = findings.pop("problems")
    findings["memory_limit"] = format_size(findings["memory_limit"])
    shown = {key: f"{value:.3g}" if isinstance(value, float) else str(value) for key, value in findings.items()}
    print_pairs([(key.replace("_", " "), value) for key, value in shown.items()])
    for problem in problems:
        print(f"- {problem}")
    if not problems:
        print("No problems found.")
