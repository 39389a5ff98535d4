"""How much memory this process may use: the tightest of its cgroups' limits and what the machine has left."""

from pathlib import Path
from typing import NamedTuple

UNLIMITED = 1 << 60
CGROUPS = Path("/sys/fs/cgroup")


class MemoryLimit(NamedTuple):
    """`nbytes` that the process may use, and which file or counter says so."""

    nbytes: int
    source: str


def memory_limit() -> MemoryLimit:
    """The tightest limit on this process: cgroup v2, cgroup v1 or MemAvailable."""
    return min([*cgroup_limits(), machine_memory()])


def machine_memory() -> MemoryLimit:
    """MemAvailable of /proc/meminfo."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return MemoryLimit(int(line.split()[1]) * 1024, "MemAvailable")
    raise KeyError("MemAvailable")


def cgroup_limits() -> list[MemoryLimit]:
    """Limits of this process's memory cgroup and of every cgroup above it, of both versions."""
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += _limits(CGROUPS, path, "memory.max")
        elif "memory" in controllers.split(","):
            found += _limits(CGROUPS / "memory", path, "memory.limit_in_bytes")
    return found


def cgroup_version() -> str:
    """`v2`, `v1` or `none`."""
    if (CGROUPS / "cgroup.controllers").exists():
        return "v2"
    return "v1" if (CGROUPS / "memory").is_dir() else "none"


def _limits(root: Path, path: str, name: str) -> list[MemoryLimit]:
    group = root / path.lstrip("/")
    limits = []
    for folder in [group, *group.parents]:
        if not folder.is_relative_to(root):
            break
        file = folder / name
        text = file.read_text().strip() if file.exists() else "max"
        if text != "max" and int(text) < UNLIMITED:
            limits.append(MemoryLimit(int(text), str(file)))
    return limits
