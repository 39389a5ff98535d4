"""Sizes and shares as people write them: `4GiB`, `1.5GB`, `800M`, `30%`."""

import re

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
    return int(float(match.group(1)) * factor)


def parse_share(text: str | float) -> float:
    """A fraction of a percentage such as `2%` or `0.5 %`; a bare number is a percentage too. Raises UsageError."""
    if isinstance(text, float):
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


def format_size(nbytes: float) -> str:
    """Three figures and a binary unit: `1.24 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.3g} TiB"
