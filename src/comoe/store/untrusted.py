"""What a file says, before it is believed: JSON that means one thing, names that stay in their folder.

Used for every header and manifest. What the values must be is each format's own business.
"""

import json
from pathlib import Path
from typing import Any


def parse_json(data: bytes) -> Any:
    """`data` as JSON. ValueError where it is not, repeats a key, nests too deeply or holds NaN or an infinity."""
    try:
        return json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def is_plain_name(name: str) -> bool:
    """Whether `name` can only be a file directly in the folder that it is joined to."""
    return Path(name).name == name and name not in ("", "..") and "\0" not in name


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")
