"""Sizes and shares as people write them: `4GiB`, `1.5GB`, `800M`, `30%`."""

import re
from decimal import Decimal

from comoe.types import UsageError

FACTORS = {
    "": 1, "B": 1,
    "K": 1 << 10, "KIB": 1 << 10, "KB": 10**3,
    "M": 1 << 20, "MIB": 1 << 20, "MB": 10**6,
    "G": 1 << 30, "GIB": 1 << 30, "GB": 10**9,
    "T": 1 << 40, "TIB": 1 << 40, "TB": 10**12,
}  # fmt: skip


def parse_size(text: str | int) -> int:
    """Bytes of a size such as `4GiB`, `4.7 GB` or `1500M` (K, M, G, T alone are binary). Raises UsageError."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = FACTORS.get(match.group(2).upper()) if match else None
    if match is None or factor is None:
        raise UsageError(f"{text!r} is not a size: write for example 4GiB, 1.5GB or 800M.")
    return int(Decimal(match.group(1)) * factor)


def parse_share(text: str | float) -> float:
    """A fraction of a percentage such as `2%` or `0.5 %`; a bare number is a percentage too. Raises UsageError.

    What is no text is a fraction already.
    """
    if not isinstance(text, str):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%?\s*", text)
    if match is None:
        raise UsageError(f"{text!r} is not a percentage: write for example 2%.")
    return float(match.group(1)) / 100


def parse_budget(text: str | int, whole: int) -> int:
    """Bytes of a size, or of a percentage of `whole`."""
    if isinstance(text, str) and text.strip().endswith("%"):
        return int(parse_share(text) * whole)
    return parse_size(text)


def parse_link(text: str) -> tuple[float, float]:
    """(bytes per second, seconds of round trip) of a link such as `40Mbit,20ms`. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMG])bit(?:/s)?\s*,\s*(\d+(?:\.\d+)?)\s*(ms|s)\s*", text)
    if match is None or not float(match.group(1)):
        raise UsageError(f"{text!r} is not a link: write its rate and round-trip time, for example 40Mbit,20ms.")
    rate = float(match.group(1)) * {"k": 1e3, "M": 1e6, "G": 1e9}[match.group(2)] / 8
    return rate, float(match.group(3)) * (1e-3 if match.group(4) == "ms" else 1.0)


def format_size(nbytes: float) -> str:
    """Three figures and a binary unit: `1.24 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(nbytes) < 999.5:  # more would be rounded to four figures
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.3g} PiB"


def format_loss(loss: float) -> str:
    """A fraction as a signed percentage with two decimals: `+0.16 %`."""
    return f"{100 * loss:+.2f} %"


def format_seconds(seconds: float) -> str:
    """Roughly: `12 s`, `3 min` or `2.5 h`."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
