"""`comoe verify`: promises against facts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from comoe.cli.options import Exact, ExpertMemory, Json, MaxLoss, PackPath, Threads, wish
from comoe.cli.terminal import print_json, print_pairs, progress_bar, say
from comoe.store.pack import Pack
from comoe.store.shipped import sample_files
from comoe.types import UsageError, VerificationFailed
from comoe.units import format_loss, format_size, parse_budget

EXPERT_MEMORY = "30%"
"""Of the experts' bytes, the memory that plans are looked at in where none is given."""


def command(
    pack: PackPath,
    expert_memory: ExpertMemory = EXPERT_MEMORY,
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
    beside what was measured, with a remark where that lies outside the prediction. Exit code 4 when something is off.
    """
    from comoe.make.verify import verify
    from comoe.runtime.generate import quiet_transformers
    from comoe.runtime.threads import use_threads

    quiet_transformers()
    use_threads(threads)
    _check_texts(text or ())
    wished = wish(None, expert_memory, max_loss, exact)
    opened = Pack(pack, source=source)
    budget = parse_budget(wished.expert_memory or EXPERT_MEMORY, opened.manifest.expert_bytes_bf16)
    with progress_bar() as progress:
        findings = verify(opened, budget, wished.max_loss, text or sample_files(), progress)
    found = asdict(findings)
    document = {"ok": findings.ok, **found, "outside": outside(found["predicted"], found["measured"])}
    if json:
        print_json(document)
    else:
        _show(document)
    if not findings.ok:
        raise VerificationFailed(f"{pack}: {findings.errors[0]}")


def _check_texts(paths: Sequence[Path]) -> None:
    """Raise UsageError for a file that holds no text, before anything takes its time."""
    for path in paths:
        try:
            empty = not path.read_text("utf-8").strip()
        except (OSError, UnicodeError) as error:
            raise UsageError(f"{path} cannot be read as UTF-8 text: {error}.") from error
        if empty:
            raise UsageError(f"{path} holds no text: give some, or leave out --text.")


def outside(predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, str]:
    """{figure: `above` or `below`} of figures that lie outside their band, (low, high). Bytes are predicted at most."""
    bands = {key: band for key, band in predicted.items() if isinstance(band, (list, tuple))}
    if "resident_bytes" in predicted:
        bands["resident_bytes"] = (0, predicted["resident_bytes"])
    sides = {key: _side(measured[key], *band) for key, band in bands.items()}
    return {key: side for key, side in sides.items() if side}


def _side(value: float, low: float, high: float) -> str:
    return "below" if value < low else "above" if value > high else ""


def _show(document: dict[str, Any]) -> None:
    held = {True: "yes", False: "NO", None: "not looked at"}
    exact = [(key.replace("_", " "), held[value]) for key, value in document["exact"].items()]
    print_pairs([*exact, *(_compared(key, document) for key in document["measured"])])
    for sentence in document["skipped"]:
        say(f"skipped: {sentence}")
    for sentence in document["errors"]:
        print(f"- {sentence}")


def _compared(key: str, document: Mapping[str, Any]) -> tuple[str, str]:
    """A figure's name, and what was predicted beside what was measured."""
    name, shown = FIGURES.get(key, (key.replace("_", " "), str))
    line = f"measured {shown(document['measured'][key])}"
    predicted, side = document["predicted"].get(key), document["outside"].get(key)
    if predicted is not None:
        band = predicted if isinstance(predicted, (list, tuple)) else [predicted]
        line = f"predicted {' to '.join(map(shown, band))}, {line}"
    return name, f"{line}: {side} what was predicted" if side else line


def _read(nbytes: Mapping[str, int]) -> str:
    return ", ".join(f"{format_size(found)} from {tier}" for tier, found in nbytes.items()) or "nothing"


FIGURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "ms_per_token": ("ms/token", "{:.1f}".format),
    "hit_rate": ("hit rate", "{:.0%}".format),
    "loss": ("loss", format_loss),
    "resident_bytes": ("expert memory", format_size),
    "bytes_read": ("read", _read),
    "loss_ledger": ("loss by the ledger", format_loss),
}
"""What figures are called, and how they are written."""
