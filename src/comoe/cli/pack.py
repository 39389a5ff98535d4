"""`comoe pack`: make a pack of a checkpoint."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from comoe.cli.options import Json, Seed, Threads, switch
from comoe.cli.terminal import print_json, progress_bar, say
from comoe.defaults import CALIBRATION_TOKENS, FORMS, SEED
from comoe.store.shipped import calibration_files
from comoe.types import UsageError
from comoe.units import format_seconds, format_size


def command(
    checkpoint: Annotated[
        str, Argument(metavar="CHECKPOINT", help="A folder in hub layout, or a hub id: owner/name[@revision].")
    ],
    output: Annotated[Path, Option("--output", "-o", metavar="PACK", help="The pack's folder; it must not exist.")],
    calib: Annotated[
        list[Path] | None,
        Option(
            metavar="FILE...",
            help="Text to calibrate on, a file per domain; by default what comoe ships. Behind CHECKPOINT several may "
            "follow, and the flag may be repeated.",
        ),
    ] = None,
    calibrate: Annotated[
        str, Option(envvar="COMOE_CALIBRATE", metavar="text|none", help="Whether to calibrate.")
    ] = "text",
    calib_tokens: Annotated[
        int, Option(envvar="COMOE_CALIB_TOKENS", min=1024, metavar="N", help="Tokens to calibrate on.")
    ] = CALIBRATION_TOKENS,
    forms: Annotated[
        str | None,
        Option(
            envvar="COMOE_FORMS",
            metavar="FORM,FORM",
            help="Forms beside exact, by commas, all of them kept; by default those that turn out to be worth their "
            f"bytes, of {', '.join(FORMS)}.",
        ),
    ] = None,
    heal: Annotated[
        int,
        Option(
            envvar="COMOE_HEAL",
            min=0,
            metavar="STEPS",
            help="Train coarse experts' scales end to end for so many steps, where all experts fit in memory; no byte "
            "is added. 100 are a good number.",
        ),
    ] = 0,
    self_contained: Annotated[bool, switch("self-contained", "Copy the exact experts into the pack.")] = False,
    threads: Threads = None,
    seed: Seed = SEED,
    json: Json = False,
) -> None:
    """Make a pack of a checkpoint.

    \b
    comoe pack ./Qwen3-30B-A3B -o qwen.comoe

    Says first how long it will take. A killed run goes on where it stopped when the same command is given again; the
    pack appears under its name once it is whole.
    """
    from comoe.make.calibrate import texts_of
    from comoe.make.pack import pack
    from comoe.make.recipe import Recipe
    from comoe.runtime.generate import quiet_transformers

    quiet_transformers()
    recipe = Recipe(
        forms=FORMS if forms is None else tuple(form.strip() for form in forms.split(",") if form.strip()),
        pruned=forms is None,
        texts=texts_of(_texts(calib, calibrate)),
        num_tokens=calib_tokens,
        self_contained=self_contained,
        seed=seed,
        threads=threads,
        heal=heal,
    )
    with progress_bar() as progress:
        report = pack(checkpoint, output, recipe, progress, say)
    summary = {"pack": str(output), **asdict(report)}
    if json:
        print_json(summary)
        return
    print(
        f"{output}: {report.layers} layers of {report.experts_per_layer} experts in {', '.join(report.forms)}; "
        f"{format_size(report.pack_bytes)} on disk, made in {format_seconds(report.seconds)} "
        f"with at most {format_size(report.peak_bytes)} of memory."
    )


def _texts(calib: list[Path] | None, calibrate: str) -> list[Path]:
    if calibrate not in ("text", "none"):
        raise UsageError(f"--calibrate is text or none, not {calibrate!r}; files are given by --calib.")
    if calibrate == "none":
        if calib:
            raise UsageError("--calibrate none reads no text: leave out --calib or --calibrate.")
        return []
    return calib or calibration_files()
