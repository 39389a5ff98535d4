"""A hard memory limit around real processes: a memory cgroup, of version 1 or 2, as a context manager.

Page cache counts in it, and a page is charged to whoever read it first: `drop_caches` before, or what others have
read is free. What a process does inside its limit is its own business.
"""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

REMOVAL_S = 10.0
ENTER = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where a version's groups are, and what it calls their files. `no_swap` is what its `swap` file wants."""

    root: Path
    limit: str
    swap: str
    no_swap: str | None
    usage: str
    oom: str


HIERARCHIES = (
    Hierarchy(
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.memsw.limit_in_bytes",
        None,  # memory and swap together: as much as memory alone
        "memory.usage_in_bytes",
        "memory.oom_control",
    ),
    Hierarchy(
        Path("/sys/fs/cgroup"), "memory.max", "memory.swap.max", "0", "memory.current", "memory.events"
    ),
)  # fmt: skip


def remove(group: Path, before: Callable[[], None] = lambda: None) -> None:
    """Remove a group's folder, once those in it are gone; `before` every try. OSError where it will not go."""
    until_s = time.monotonic() + REMOVAL_S
    while True:
        before()
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.05)
        else:
            return


class MemoryGroup:
    """Processes that together have `limit` bytes of memory and no swap. Leaving the context kills what still runs.

    OSError where groups cannot be made: see `writable`.
    """

    def __init__(self, limit: int, hierarchies: Sequence[Hierarchy] = HIERARCHIES) -> None:
        self.limit = limit
        self._hierarchy = _usable(hierarchies)
        self.folder = self._hierarchy.root

    def __enter__(self) -> "MemoryGroup":
        self.folder = Path(tempfile.mkdtemp(prefix="comoe-", dir=self._hierarchy.root))
        try:
            self._set_limit()
        except OSError:
            self.folder.rmdir()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, command: Sequence[str | Path], **options: Any) -> "subprocess.Popen[str]":
        """Start `command` inside the group: it joins before it runs, so that all of its memory counts."""
        procs = self.folder / "cgroup.procs"
        process = subprocess.Popen(["/bin/sh", "-c", ENTER, str(procs), *map(str, command)], text=True, **options)
        while str(process.pid) not in procs.read_text().split() and process.poll() is None:
            time.sleep(0.001)
        return process

    def run(
        self, command: Sequence[str | Path], timeout_s: float, **options: Any
    ) -> "subprocess.CompletedProcess[str]":
        """Run `command` inside the group to its end and keep what it writes. subprocess.TimeoutExpired after that."""
        process = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        return subprocess.CompletedProcess(list(command), process.returncode, out, err)

    @property
    def usage(self) -> int:
        """Bytes charged now: anonymous memory, page cache and kernel memory."""
        return int((self.folder / self._hierarchy.usage).read_text())

    @property
    def stat(self) -> dict[str, int]:
        """memory.stat."""
        return self._pairs("memory.stat")

    @property
    def refaults(self) -> int:
        """Pages that were evicted and soon wanted back, since the group's start: what thrashing consists of."""
        stat = self.stat
        return stat.get("workingset_refault_file", 0) + stat.get("workingset_refault_anon", 0)

    @property
    def oom_kills(self) -> int:
        return self._pairs(self._hierarchy.oom)["oom_kill"]

    def close(self) -> None:
        """Kill what still runs in the group, by its process ids, and remove it. OSError where it will not go."""
        remove(self.folder, self._kill)

    def _kill(self) -> None:
        for pid in (self.folder / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def _set_limit(self) -> None:
        words, swap = self._hierarchy, self.folder / self._hierarchy.swap
        (self.folder / words.limit).write_text(str(self.limit))
        if swap.exists():  # a kernel without swap accounting has no such file
            swap.write_text(words.no_swap or str(self.limit))

    def _pairs(self, name: str) -> dict[str, int]:
        lines = (self.folder / name).read_text().splitlines()
        return {key: int(value) for key, value in (line.split() for line in lines)}


def writable() -> bool:
    """Whether memory groups can be made here. Otherwise a test says that it needs a writable memory cgroup."""
    try:
        with MemoryGroup(1 << 30):
            return True
    except OSError:
        return False


def drop_caches() -> None:
    """Make the kernel forget all page cache that nobody has mapped. OSError without the right to."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def _usable(hierarchies: Sequence[Hierarchy]) -> Hierarchy:
    for hierarchy in hierarchies:
        if (hierarchy.root / "cgroup.procs").exists() and _controls_memory(hierarchy):
            return hierarchy
    raise FileNotFoundError("no memory controller is mounted")


def _controls_memory(hierarchy: Hierarchy) -> bool:
    """Version 2 hands the controller down to groups only where its root says so."""
    control = hierarchy.root / "cgroup.subtree_control"
    return not control.exists() or "memory" in control.read_text().split()
