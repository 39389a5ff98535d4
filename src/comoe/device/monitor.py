"""The device, read again and again while a model runs: `/proc` and `/sys` to a `Snapshot`, in well under a millisecond.

Functions look below `root`, as `device.memory`'s do, on whose limits this builds.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from comoe.device.memory import CGROUPS, ROOT, cgroup_limits, machine_memory
from comoe.plan.snapshot import Snapshot

USAGE = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}
"""Where a cgroup says how much of its limit is taken, by the name of the limit's file."""

EASILY_DROPPED = ("total_inactive_file", "inactive_file")
"""Of what is taken, pages that the kernel drops first; version 1 has a line of its own that counts groups below."""

SYSFS_CHARGE, SYSFS_HEAT = 100, 1000
"""What a battery's charge and a sensor's degrees are multiplied by in /sys."""


class Monitor:
    """This process's view of its machine. `rate` answers the rate of reads since it was last asked."""

    def __init__(self, rate: Callable[[], float | None] = lambda: None, root: Path = ROOT) -> None:
        self._rate, self._root = rate, root
        self._cores = cores(root)
        self._sensors = sorted((root / "sys/class/thermal").glob("thermal_zone*/temp"))
        self._supplies = sorted((root / "sys/class/power_supply").glob("*/capacity"))

    def snapshot(self) -> Snapshot:
        """The device now."""
        limits = cgroup_limits(self._root)
        some, full = pressure(self._root)
        left = [limit.nbytes - taken(Path(limit.source)) for limit in limits]
        return Snapshot(
            limit=min([limit.nbytes for limit in limits] + [total_memory(self._root)]),
            available=min([machine_memory(self._root).nbytes, *left]),
            some=some,
            full=full,
            cores=self._cores,
            read_bps=self._rate(),
            battery=_least(_charge(file) for file in self._supplies),
            heat_c=_most(_number(file, SYSFS_HEAT) for file in self._sensors),
        )


def taken(limit: Path) -> int:
    """Bytes of a cgroup that are not easily dropped; `limit` is the file of its limit."""
    usage = int((limit.parent / USAGE[limit.name]).read_text())
    stat = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
    dropped = next((int(stat[name]) for name in EASILY_DROPPED if name in stat), 0)
    return usage - dropped


def total_memory(root: Path = ROOT) -> int:
    """MemTotal of /proc/meminfo."""
    first = (root / "proc/meminfo").read_text().split(maxsplit=2)
    assert first[0] == "MemTotal:"
    return int(first[1]) * 1024


def pressure(root: Path = ROOT) -> tuple[float | None, float | None]:
    """Shares of the last ten seconds in which some, or all, processes waited for memory; None without PSI."""
    try:
        lines = (root / "proc/pressure/memory").read_text().splitlines()
    except OSError:
        return None, None
    found = {words[0]: float(words[1].removeprefix("avg10=")) / 100 for words in map(str.split, lines)}
    return found.get("some"), found.get("full")


def cores(root: Path = ROOT) -> float:
    """Processors that this process may keep busy: those that it may run on, or less where a cgroup has a quota."""
    quotas = [quota for quota in _quotas(root) if quota is not None]
    return min([float(len(os.sched_getaffinity(0))), *quotas])


def _quotas(root: Path) -> Iterable[float | None]:
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, read = root / CGROUPS, _quota_v2
        elif "cpu" in controllers.split(","):
            top, read = root / CGROUPS / "cpu", _quota_v1
        else:
            continue
        group = top / path.lstrip("/")
        yield from (read(folder) for folder in [group, *group.parents] if folder.is_relative_to(top))


def _quota_v1(folder: Path) -> float | None:
    quota, period = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return quota / period if quota is not None and period and quota > 0 else None


def _quota_v2(folder: Path) -> float | None:
    file = folder / "cpu.max"
    quota, period = file.read_text().split() if file.exists() else ("max", "1")
    return float(quota) / float(period) if quota != "max" else None


def _charge(file: Path) -> float | None:
    """Of a battery that gives power: one that is charged, or full, does not count."""
    try:
        discharging = (file.parent / "status").read_text().strip() == "Discharging"
    except OSError:
        return None
    return _number(file, SYSFS_CHARGE) if discharging else None


def _number(file: Path, unit: float = 1) -> float | None:
    """Sensors come and go, and some cannot be read."""
    try:
        return int(file.read_text()) / unit
    except (OSError, ValueError):
        return None


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
