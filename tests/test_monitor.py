"""The device as a snapshot: trees of other machines' /proc and /sys, of both versions of cgroups."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from comoe.device.monitor import Monitor
from comoe.plan.snapshot import Snapshot

MIB = 1 << 20
V1 = "5:cpu,cpuacct:/a\n3:memory:/a/b\n0::/c\n"
V2 = "0::/a/b\n"
V1_FILES = {
    "memory/a/b/memory.limit_in_bytes": 800 * MIB,
    "memory/a/b/memory.usage_in_bytes": 500 * MIB,
    "memory/a/b/memory.stat": f"inactive_file 1\ntotal_inactive_file {100 * MIB}",
    "memory/a/memory.limit_in_bytes": 1000 * MIB,
    "memory/a/memory.usage_in_bytes": 900 * MIB,
    "memory/a/memory.stat": f"inactive_file 1\ntotal_inactive_file {50 * MIB}",
    "cpu/a/cpu.cfs_quota_us": 25_000,
    "cpu/a/cpu.cfs_period_us": 100_000,
    "cpu/cpu.cfs_quota_us": -1,
    "cpu/cpu.cfs_period_us": 100_000,
}
V2_FILES = {
    "a/b/memory.max": 800 * MIB,
    "a/b/memory.current": 500 * MIB,
    "a/b/memory.stat": f"anon 5\ninactive_file {100 * MIB}",
    "a/memory.max": "max",
    "a/b/cpu.max": "max 100000",
    "a/cpu.max": "30000 100000",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine of 4 GiB of which 2 are left, without anything that only some machines have."""
    write(tmp_path, {"proc/meminfo": f"MemTotal: {4 << 20} kB\nMemFree: 5 kB\nMemAvailable: {2 << 20} kB"})
    write(tmp_path, {"proc/self/cgroup": "0::/"})
    return tmp_path


def write(root: Path, files: Mapping[str, object], below: str = "") -> None:
    for name, content in files.items():
        file = root / below / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")


def look(root: Path) -> Snapshot:
    return Monitor(root=root).snapshot()


def test_a_bare_machine_tells_its_memory_and_nothing_else(root: Path) -> None:
    found = look(root)
    assert (found.limit, found.available) == (4 << 30, 2 << 30)
    assert found.cores is not None and found.cores >= 1
    others = (found.some, found.full, found.read_bps, found.battery, found.heat_c)
    assert others == (None,) * 5


def test_in_cgroup_v1_the_group_with_least_left_counts_and_pages_that_drop_easily_are_left(root: Path) -> None:
    write(root, {"proc/self/cgroup": V1.strip()})
    write(root, V1_FILES, "sys/fs/cgroup")
    found = look(root)
    assert (found.limit, found.available, found.cores) == (800 * MIB, 150 * MIB, 0.25)


def test_in_cgroup_v2_too(root: Path) -> None:
    write(root, {"proc/self/cgroup": V2.strip()})
    write(root, V2_FILES, "sys/fs/cgroup")
    found = look(root)
    assert (found.limit, found.available, found.cores) == (800 * MIB, 400 * MIB, 0.3)


def test_a_machine_with_less_left_than_its_groups_counts(root: Path) -> None:
    write(root, {"proc/self/cgroup": V2.strip()})
    write(root, V2_FILES | {"a/b/memory.max": 64 << 30}, "sys/fs/cgroup")
    found = look(root)
    assert (found.limit, found.available) == (4 << 30, 2 << 30)


def test_a_limit_that_changes_is_seen(root: Path) -> None:
    write(root, {"proc/self/cgroup": V2.strip()})
    write(root, V2_FILES, "sys/fs/cgroup")
    monitor = Monitor(root=root)
    monitor.snapshot()
    write(root, {"a/b/memory.max": 600 * MIB}, "sys/fs/cgroup")
    assert monitor.snapshot().available == 200 * MIB


def test_pressure_is_a_share(root: Path) -> None:
    lines = "some avg10=12.50 avg60=0.00 avg300=0.00 total=1\nfull avg10=1.00 avg60=0.00 avg300=0.00 total=1"
    write(root, {"proc/pressure/memory": lines})
    found = look(root)
    assert (found.some, found.full) == (0.125, 0.01)


@pytest.mark.parametrize(("status", "charge"), [("Discharging", 0.4), ("Charging", None), ("Full", None)])
def test_a_battery_counts_while_it_gives_power(root: Path, status: str, charge: float | None) -> None:
    write(root, {"BAT0/capacity": 40, "BAT0/status": status}, "sys/class/power_supply")
    assert look(root).battery == charge


def test_the_hottest_sensor_counts_and_one_that_cannot_be_read_does_not(root: Path) -> None:
    sensors = {"thermal_zone0/temp": 40_000, "thermal_zone1/temp": 61_500, "thermal_zone2/temp": "N/A"}
    write(root, sensors, "sys/class/thermal")
    assert look(root).heat_c == 61.5


def test_this_machine_can_be_read() -> None:
    found = Monitor(lambda: 5.0).snapshot()
    assert 0 < found.available <= found.limit
    assert found.read_bps == 5.0
