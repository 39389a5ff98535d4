"""Three kinds of device, as limits of cgroups of version 1: processors, the disk's reading, memory.

A context manager beside `testbed.cgroup`, whose memory group it makes. What a kind can do is nobody's real device: the
classes only span what slow, middling and fast ones differ in.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from comoe.testbed.cgroup import MemoryGroup, remove

TOP = Path("/sys/fs/cgroup")
PERIOD_US = 100_000
ENTER = 'for group in $0; do echo $$ > "$group/cgroup.procs"; done && exec "$@"'


@dataclass(frozen=True, slots=True)
class DeviceClass:
    """So many `cores`, a disk that reads `read_bps` bytes per second, and `memory` bytes without swap."""

    cores: float
    read_bps: int
    memory: int


CLASSES: Mapping[str, DeviceClass] = {
    "board": DeviceClass(cores=0.5, read_bps=40 << 20, memory=1 << 30),
    "phone": DeviceClass(cores=1.0, read_bps=400 << 20, memory=2 << 30),
    "laptop": DeviceClass(cores=2.0, read_bps=2000 << 20, memory=4 << 30),
}
"""By name, slow to fast. A disk is no faster than the machine's own."""


class Device:
    """Processes that have what `kind` gives, reading from the disk of `folder`. Leaving the context kills what runs.

    OSError where groups cannot be made: see `writable`.
    """

    def __init__(self, kind: DeviceClass, folder: Path, top: Path = TOP) -> None:
        self._kind, self._disk, self._top = kind, disk_of(folder), top
        self._groups: list[Path] = []
        self._closing = ExitStack()

    def __enter__(self) -> "Device":
        cpu = {"cpu.cfs_period_us": str(PERIOD_US), "cpu.cfs_quota_us": str(round(self._kind.cores * PERIOD_US))}
        blkio = {"blkio.throttle.read_bps_device": f"{self._disk} {self._kind.read_bps}"}
        with ExitStack() as stack:
            self._groups = [
                stack.enter_context(_group(self._top / "cpu", cpu)),
                stack.enter_context(_group(self._top / "blkio", blkio)),
            ]
            self.memory = stack.enter_context(MemoryGroup(self._kind.memory))  # the last, so that it kills first
            self._closing = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def start(self, command: Sequence[str | Path], **options: Any) -> "subprocess.Popen[str]":
        """Start `command` on the device: it joins before it runs. See `MemoryGroup.start`."""
        return self.memory.start(self._joining(command), **options)

    def run(
        self, command: Sequence[str | Path], timeout_s: float, **options: Any
    ) -> "subprocess.CompletedProcess[str]":
        """Run `command` on the device to its end. See `MemoryGroup.run`."""
        return self.memory.run(self._joining(command), timeout_s, **options)

    def _joining(self, command: Sequence[str | Path]) -> list[str | Path]:
        return ["/bin/sh", "-c", ENTER, " ".join(map(str, self._groups)), *command]


def disk_of(folder: Path) -> str:
    """The major and minor number of the whole disk that holds `folder`: a throttle takes no partition's."""
    number = folder.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    whole = block.parent if (block / "partition").exists() else block
    return (whole / "dev").read_text().strip()


def writable(folder: Path) -> bool:
    """Whether devices can be made here, with packs in `folder`."""
    try:
        with Device(CLASSES["laptop"], folder):
            return True
    except OSError:
        return False


@contextmanager
def _group(top: Path, settings: Mapping[str, str]) -> Iterator[Path]:
    """A group below `top` with such settings by file, removed when those in it are gone."""
    folder = Path(tempfile.mkdtemp(prefix="comoe-", dir=top))
    try:
        for name, value in settings.items():
            (folder / name).write_text(value)
        yield folder
    finally:
        remove(folder)
