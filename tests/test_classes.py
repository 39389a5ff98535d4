"""Kinds of devices: real processes under a quota of processors, a throttled disk and a limit of memory."""

import sys
from pathlib import Path

import pytest

from comoe.testbed.classes import CLASSES, PERIOD_US, Device, DeviceClass, disk_of, writable

KIND = DeviceClass(cores=0.25, read_bps=3 << 20, memory=64 << 20)
SHOW = "cat /proc/self/cgroup"


def test_classes_go_from_slow_to_fast() -> None:
    kinds = list(CLASSES.values())
    for name in DeviceClass.__dataclass_fields__:
        values = [getattr(kind, name) for kind in kinds]
        assert values == sorted(values) and len({*values}) == len(kinds) == 3


@pytest.mark.cgroup
@pytest.mark.skipif(not writable(Path.cwd()), reason="needs a writable memory cgroup, and those of cpu and blkio")
class TestRealDevices:
    def test_a_process_joins_all_groups_before_it_runs_and_they_go_when_it_is_left(self, tmp_path: Path) -> None:
        with Device(KIND, tmp_path) as device:
            shown = device.run(["/bin/sh", "-c", SHOW], 30).stdout
            folders = [*device._groups, device.memory.folder]
            assert all(f"/{folder.name}\n" in shown for folder in folders)
            quota = (device._groups[0] / "cpu.cfs_quota_us").read_text()
            assert int(quota) == KIND.cores * PERIOD_US
            throttle = (device._groups[1] / "blkio.throttle.read_bps_device").read_text()
            assert throttle.split() == [disk_of(tmp_path), str(KIND.read_bps)]
            sleeping = device.start(["/bin/sleep", "60"])
        assert sleeping.wait(10) < 0
        assert not any(folder.exists() for folder in folders)

    def test_the_processor_is_really_rationed(self, tmp_path: Path) -> None:
        with Device(KIND, tmp_path) as device:
            busy = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
            device.run([sys.executable, "-S", "-c", busy], 60)
            stat = dict(line.split() for line in (device._groups[0] / "cpu.stat").read_text().splitlines())
            assert int(stat["nr_throttled"]) > 0

    def test_memory_beyond_the_limit_is_not_to_be_had(self, tmp_path: Path) -> None:
        with Device(KIND, tmp_path) as device:
            device.run([sys.executable, "-S", "-c", f"bytearray({2 * KIND.memory})"], 60)
            assert device.memory.oom_kills == 1

    def test_a_group_that_cannot_be_set_leaves_none_behind(self, tmp_path: Path) -> None:
        before = {folder for top in ("cpu", "blkio") for folder in Path("/sys/fs/cgroup", top).glob("comoe-*")}
        with pytest.raises(OSError, match="Invalid argument"), Device(DeviceClass(0.25, -1, 64 << 20), tmp_path):
            pass
        assert {f for top in ("cpu", "blkio") for f in Path("/sys/fs/cgroup", top).glob("comoe-*")} <= before
