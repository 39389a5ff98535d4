"""How much memory this process may use: the tightest of its cgroups' limits and what the machine has left.

Functions look below `root`, so that tests can show them another machine's `/proc` and `/sys`.
"""

from pathlib import Path
from typing import NamedTuple

from comoe.types import UsageError
from comoe.units import format_size

UNLIMITED = 1 << 60
DEFAULT_SHARE = 0.8
ROOT = Path("/")
CGROUPS = "sys/fs/cgroup"


class MemoryLimit(NamedTuple):
    """`nbytes` that the process may use, and which file or counter says so."""

    nbytes: int
    source: str


def memory_limit(root: Path = ROOT) -> MemoryLimit:
    """The tightest limit on this process: cgroup v2, cgroup v1 or MemAvailable."""
    return min([*cgroup_limits(root), machine_memory(root)])


def default_memory(root: Path = ROOT) -> int:
    """The budget where none is given: the larger part of what may be used."""
    return int(memory_limit(root).nbytes * DEFAULT_SHARE)


def check_possible(nbytes: int, root: Path = ROOT) -> None:
    """Raise UsageError where a budget of `nbytes` is more than a hard limit lets this process have, and which one."""
    limit = min([*cgroup_limits(root), _meminfo("MemTotal", root)])
    if nbytes > limit.nbytes:
        raise UsageError(
            f"a budget of {format_size(nbytes)} is more than {limit.source} allows: give at most {limit.nbytes} "
            f"({format_size(limit.nbytes)})."
        )


def machine_memory(root: Path = ROOT) -> MemoryLimit:
    """MemAvailable of /proc/meminfo."""
    return _meminfo("MemAvailable", root)


def cgroup_limits(root: Path = ROOT) -> list[MemoryLimit]:
    """Limits of this process's memory cgroup and of every cgroup above it, of both versions."""
    found = []
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += _limits(root / CGROUPS, path, "memory.max")
        elif "memory" in controllers.split(","):
            found += _limits(root / CGROUPS / "memory", path, "memory.limit_in_bytes")
    return found


def cgroup_version(root: Path = ROOT) -> str:
    """`v2`, `v1` or `none`."""
    if (root / CGROUPS / "cgroup.controllers").exists():
        return "v2"
    return "v1" if (root / CGROUPS / "memory").is_dir() else "none"


def _meminfo(key: str, root: Path) -> MemoryLimit:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return MemoryLimit(int(line.split()[1]) * 1024, key)
    raise KeyError(key)


def _limits(top: Path, path: str, name: str) -> list[MemoryLimit]:
    """Limits in the files `name` of the cgroup `path` and of those above it, up to `top`."""
    group = top / path.lstrip("/")
    limits = []
    for folder in [group, *group.parents]:
        if not folder.is_relative_to(top):
            break
        file = folder / name
        text = file.read_text().strip() if file.exists() else "max"
        if text != "max" and int(text) < UNLIMITED:
            limits.append(MemoryLimit(int(text), str(file)))
    return limits
