"""`comoe profile`: how text uses experts: profiles added up, and what is in one."""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from typer import Argument, Option

from comoe.cli.command import Command
from comoe.cli.options import Json
from comoe.cli.terminal import print_json, print_table
from comoe.store.manifest import MANIFEST
from comoe.store.profile import PHASES, Floats, Profile, Routed, read_profile, write_profile
from comoe.types import UsageError

QUARTER = 4
"""Of the experts of a layer, the busiest one in so many are told apart."""

app = typer.Typer(
    help="See how text uses experts, and add up what was seen.\n\n"
    "\b\ncomoe profile show qwen.comoe\ncomoe profile merge laptop.profile phone.profile -o both.profile\n\n"
    "A profile has counts alone: of calibration text in a pack, of prompts and answers by `comoe run --profile FILE`. "
    "`comoe plan` and `comoe run` plan for text like that.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command(cls=Command)
def show(
    profile: Annotated[Path, Argument(metavar="FILE", help="A profile, or a pack that has one.", show_default=False)],
    json: Json = False,
) -> None:
    """Show what is in a profile.

    \b
    comoe profile show session.profile

    By domain and phase: tokens, uses of experts, which share of these the busiest quarter of a layer's experts has, and
    how many experts there are in effect: so many, used evenly, would be as hard to foretell. Of the last two, the
    least and the most of all layers; --json has each.
    """
    _show(profile, read_profile(profile), json)


@app.command(cls=Command)
def merge(
    profiles: Annotated[
        list[Path], Argument(metavar="FILE", help="Profiles, or packs that have one.", show_default=False)
    ],
    output: Annotated[Path, Option("--output", "-o", metavar="FILE", help="The profile to write; it must not exist.")],
    json: Json = False,
) -> None:
    """Add profiles up: shards of a text, or machines that run one model.

    \b
    comoe profile merge laptop.profile phone.profile -o both.profile

    The sum is what one profile of all their text would be. Shows it.
    """
    check_new(output)
    merged = reduce(add, map(read_profile, profiles))
    keep(output, merged)
    _show(output, merged, json)


def check_new(path: Path) -> None:
    """Raise UsageError where a file cannot be made anew."""
    check_place(path)
    if path.exists():
        raise UsageError(f"{path} exists: choose another name or remove it first.")


def check_place(path: Path) -> None:
    """Raise UsageError where no profile of one's own can be kept."""
    parent = path.absolute().parent
    try:
        possible, packed = parent.is_dir() and not path.is_dir(), (parent / MANIFEST).exists()
        possible &= os.access(parent, os.W_OK)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error
    if not possible:
        raise UsageError(f"{path} cannot be written: choose a file in a folder that is there and yours.")
    if packed:
        raise UsageError(f"{path} would change a pack, which stays as it was packed: choose another place.")


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep others from adding to a profile meanwhile: its folder is locked."""
    descriptor = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def keep(path: Path, profile: Profile) -> None:
    """Write the file of a profile. Raises UsageError."""
    with writing(path):
        write_profile(path, profile)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What hinders the writing of numbers to a file, as a UsageError."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"{path} stays as it was: this run's gates are no numbers.") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error


def _show(path: Path, profile: Profile, json: bool) -> None:
    seen = described(profile)
    if json:
        print_json({"profile": str(path), "experts": profile.experts, "seen": seen})
        return
    columns = ("domain", "phase", "tokens", "uses", "busiest quarter", "effective experts")
    print_table(columns, map(_row, seen))


def _row(seen: dict[str, Any]) -> tuple[str, ...]:
    cells = (_band(seen["busiest_quarter"], "{:.0%}"), _band(seen["effective_experts"], "{:.1f}"))
    return seen["domain"], seen["phase"], f"{seen['tokens']:,}", f"{seen['uses']:,}", *cells


def _band(values: Sequence[float | None], shown: str) -> str:
    known = [value for value in values if value is not None]
    return f"{shown.format(min(known))} to {shown.format(max(known))}" if known else "-"


def described(profile: Profile) -> list[dict[str, Any]]:
    """What was seen by domain and phase: tokens of the layer that saw most, None of one whose experts saw none."""
    order = sorted(profile.routed, key=lambda key: (key[0], PHASES.index(key[1])))
    return [
        {"domain": domain, "phase": phase, **_described(profile, profile.routed[domain, phase])}
        for domain, phase in order
    ]


def _described(profile: Profile, routed: Routed) -> dict[str, Any]:
    layers = [uses.astype(np.float64) for uses in profile.by_layer(routed.uses)]
    return {
        "tokens": int(routed.tokens.max()),
        "uses": int(routed.uses.sum()),
        "busiest_quarter": [busiest_quarter(uses) if uses.any() else None for uses in layers],
        "effective_experts": [effective_experts(uses) if uses.any() else None for uses in layers],
    }


def busiest_quarter(uses: Floats) -> float:
    """Share of the uses (E,) that the busiest quarter of experts has."""
    return float(np.sort(uses)[-max(1, len(uses) // QUARTER) :].sum() / uses.sum())


def effective_experts(uses: Floats) -> float:
    """The exponential of the entropy of the uses (E,): as many experts, used evenly, are as hard to foretell."""
    shares = uses[uses > 0] / uses.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))
