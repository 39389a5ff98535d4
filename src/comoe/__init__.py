"""comoe runs Mixture-of-Experts language models that do not fit, on edge devices that move."""

import typing as _typing

from comoe.types import ComoeError, DoesNotFit

if _typing.TYPE_CHECKING:
    from comoe.runtime.load import load

__version__ = "0.1.0"
__all__ = ["ComoeError", "DoesNotFit", "__version__", "load"]


def __getattr__(name: str) -> _typing.Any:
    """Import `load` only when asked for: planner, store and simulator need no torch."""
    if name == "load":
        from comoe.runtime.load import load

        return load
    raise AttributeError(f"module 'comoe' has no attribute {name!r}")
