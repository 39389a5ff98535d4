"""How much memory this process may use: the tightest of its cgroups' limits and what the machine has left.

Functions look below `root`, so that tests can show them another machine's `/proc` and `/sys`.
"""

from pathlib import Path
from typing import NamedTuple

UNLIMITED = 1 << 60
ROOT = Path("/")
CGROUPS = "sys/fs/cgroup"


class MemoryLimit(NamedTuple):
    """`nbytes` that the process may use, and which file or counter says so."""

    nbytes: int
    source: str


def memory_limit(root: Path = ROOT) -> MemoryLimit:
    """The tightest limit on this process: cgroup v2, cgroup v1 or MemAvailable."""
    return min([*cgroup_limits(root), machine_memory(root)])


def machine_memory(root: Path = ROOT) -> MemoryLimit:
    """MemAvailable of /proc/meminfo."""
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return MemoryLimit(int(line.split()[1]) * 1024, "MemAvailable")
    raise KeyError("MemAvailable")


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
