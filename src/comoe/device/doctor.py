"""`comoe doctor`: what this device offers, measured, and what stands in the way."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from comoe.device.machine import cpu_model, package_version
from comoe.device.memory import cgroup_version, memory_limit
from comoe.device.probe import Clock, disk_bps, memory_bps
from comoe.kernels import native
from comoe.types import UsageError
from comoe.units import format_size

SLOW_DISK_BPS = 100e6
LITTLE_MEMORY_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Findings:
    """The contract's keys. Rates in GB/s; `problems` are sentences that say what to do."""

    cpu: str
    threads: int
    kernel: str
    memory_limit: int
    memory_source: str
    memory_gbps: float
    disk_gbps: float
    direct_io: bool
    cgroup: str
    psi: bool
    torch: str | None
    transformers: str | None
    problems: tuple[str, ...]


def examine(folder: Path, clock: Clock) -> Findings:
    """Look at this device; `folder` is where packs are, whose disk is measured. Raises UsageError."""
    limit = memory_limit()
    kernel = native.kernel_name()
    disk, direct = disk_of(folder, clock)
    torch, transformers = package_version("torch"), package_version("transformers")
    problems = _problems(kernel, limit.nbytes, disk, direct, torch if transformers else None)
    return Findings(
        cpu=cpu_model(),
        threads=len(os.sched_getaffinity(0)),
        kernel=kernel,
        memory_limit=limit.nbytes,
        memory_source=limit.source,
        memory_gbps=memory_bps(clock) / 1e9,
        disk_gbps=disk / 1e9,
        direct_io=direct,
        cgroup=cgroup_version(),
        psi=Path("/proc/pressure/memory").exists(),
        torch=torch,
        transformers=transformers,
        problems=tuple(problems),
    )


def _problems(kernel: str, memory: int, disk: float, direct: bool, torch: str | None) -> list[str]:
    problems = []
    if torch is None:
        problems.append("torch or transformers is missing, so models cannot run: pip install 'comoe[run]'.")
    if kernel == "none":
        problems.append("the C kernel was not built, so torch computes, slower: install a C compiler, then comoe.")
    if not direct:
        problems.append("the file system has no direct I/O, so reads go through the page cache: put packs elsewhere.")
    if disk < SLOW_DISK_BPS:
        problems.append(f"the disk reads {format_size(disk)}/s: misses will be slow: allow a loss with --max-loss.")
    if memory < LITTLE_MEMORY_BYTES:
        problems.append(f"only {format_size(memory)} of memory may be used: torch alone takes about 400 MiB.")
    return problems


def disk_of(folder: Path, clock: Clock) -> tuple[float, bool]:
    """(bytes per second, whether directly) of the disk of `folder`. Raises UsageError."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".comoe-doctor-") as file:
            return disk_bps(Path(file.name), clock)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to ({error.strerror}): name another folder.") from error
