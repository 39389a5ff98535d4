"""Settings that exclude each other: where they come from different sources, the stronger source's stay.

A flag is stronger than the environment, that than comoe.toml, and in the file a command's own table than the top. Two
from the same source are for the command to refuse.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def _given(value: Any) -> bool:
    return value is not None


RIVALS: tuple[dict[str, Callable[[Any], bool]], ...] = (
    {"memory": _given, "expert_memory": _given},
    {"exact": bool, "max_loss": _given},
    {"prompt": _given, "prompt_file": _given},
    {"calib": bool, "calibrate": lambda value: value == "none"},
    {"prompt": _given, "calib": bool},
    {"deterministic": bool, "replay": _given},
)
"""Parameters that exclude each other, each with the values by which it does: `--no-exact` excludes nothing."""


def displaced(sources: Sequence[Mapping[str, Any]]) -> set[str]:
    """The parameters that give way, of parameters by source, the strongest source first."""
    gone: set[str] = set()
    for rivals in RIVALS:
        claims = [{name for name, excludes in rivals.items() if excludes(found.get(name))} for found in sources]
        strongest: set[str] = next(filter(None, claims), set())
        gone |= set[str]().union(*claims) - strongest
    return gone
