"""What a device has: limits read from other machines' /proc and /sys, rates by a clock that only moves when told."""

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sources import MemorySource

from comoe.device import memory, probe, process
from comoe.device.costs import LAYER_MS, expected_framework_ms
from comoe.device.memory import MemoryLimit, cgroup_limits, cgroup_version, check_possible, machine_memory, memory_limit
from comoe.kernels.matrix import Code, Matrix
from comoe.types import BlobId, UsageError

GIB, MIB = 1 << 30, 1 << 20
V1_UNLIMITED = "9223372036854771712"
"""What cgroup v1 writes for no limit: the largest number of whole pages."""

Machine = Callable[..., Path]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Makes a root with the given cgroup lines, limits by file, and kB of memory available of 64 GiB."""

    def make(cgroup: str, limits: dict[str, str | int], available: int = 32 * MIB) -> Path:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(cgroup)
        lines = f"MemTotal: {64 * MIB} kB\nMemFree: 5 kB\nMemAvailable:   {available} kB\nCached: 1 kB\n"
        (tmp_path / "proc/meminfo").write_text(lines)
        for name, limit in limits.items():
            file = tmp_path / "sys/fs/cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{limit}\n")
        return tmp_path

    return make


def found(root: Path) -> dict[str, int]:
    """Limits by file below the cgroups' folder."""
    return {str(Path(limit.source).relative_to(root / "sys/fs/cgroup")): limit.nbytes for limit in cgroup_limits(root)}


def test_in_cgroup_v2_every_group_up_to_the_top_may_limit(machine: Machine) -> None:
    limits = {"a/b/c/memory.max": "max", "a/b/memory.max": GIB, "a/memory.max": 2 * GIB, "other/memory.max": 1}
    assert found(machine("0::/a/b/c\n", limits)) == {"a/b/memory.max": GIB, "a/memory.max": 2 * GIB}


def test_the_top_of_cgroup_v2_may_limit_as_it_does_in_containers(machine: Machine) -> None:
    assert found(machine("0::/\n", {"memory.max": GIB})) == {"memory.max": GIB}


def test_in_cgroup_v1_the_memory_controllers_line_counts_and_a_huge_number_is_no_limit(machine: Machine) -> None:
    lines = "5:cpu,cpuacct:/cpus\n4:hugetlb:/h\n3:memory:/a/b\n0::/c\n"
    limits = {
        "memory/a/b/memory.limit_in_bytes": GIB,
        "memory/a/memory.limit_in_bytes": V1_UNLIMITED,
        "memory/cpus/memory.limit_in_bytes": 1,
        "memory/memory.limit_in_bytes": V1_UNLIMITED,
    }
    assert found(machine(lines, limits)) == {"memory/a/b/memory.limit_in_bytes": GIB}


def test_a_memory_controller_that_shares_its_line_is_found(machine: Machine) -> None:
    limits = {"memory/a/memory.limit_in_bytes": GIB}
    assert found(machine("3:cpu,memory:/a\n", limits)) == {"memory/a/memory.limit_in_bytes": GIB}


def test_a_v1_container_that_names_its_hosts_group_is_limited_by_what_it_sees(machine: Machine) -> None:
    """The group's path is the host's, the file system's top is the container's."""
    limits = {"memory/memory.limit_in_bytes": GIB}
    assert found(machine("3:memory:/docker/0123\n", limits)) == {"memory/memory.limit_in_bytes": GIB}


def test_both_versions_side_by_side_count_together(machine: Machine) -> None:
    limits = {"memory/a/memory.limit_in_bytes": 2 * GIB, "b/memory.max": GIB}
    assert set(found(machine("3:memory:/a\n0::/b\n", limits)).values()) == {GIB, 2 * GIB}


def test_a_group_with_a_colon_in_its_name_is_found(machine: Machine) -> None:
    assert found(machine("0::/a:b/c\n", {"a:b/c/memory.max": GIB})) == {"a:b/c/memory.max": GIB}


def test_without_any_limit_there_is_none(machine: Machine) -> None:
    root = machine("0::/a\n5:cpu:/b\n", {"a/memory.max": "max"})
    assert cgroup_limits(root) == []
    assert memory_limit(root) == (32 * GIB, "MemAvailable")


@pytest.mark.parametrize(("available_gib", "wanted"), [(8, (4 * GIB, "memory.max")), (3, (3 * GIB, "MemAvailable"))])
def test_the_tightest_of_groups_and_machine_counts_and_is_named(
    machine: Machine, available_gib: int, wanted: tuple[int, str]
) -> None:
    root = machine("0::/a/b\n", {"a/memory.max": 4 * GIB, "a/b/memory.max": 5 * GIB}, available_gib * MIB)
    limit = memory_limit(root)
    assert (limit.nbytes, Path(limit.source).name) == wanted


def test_what_the_machine_has_left_is_read_in_kibibytes(machine: Machine) -> None:
    assert machine_memory(machine("", {}, available=1234)) == MemoryLimit(1234 * 1024, "MemAvailable")


def test_a_machine_that_says_nothing_of_its_memory_is_a_key_error(machine: Machine) -> None:
    root = machine("", {})
    (root / "proc/meminfo").write_text("MemTotal: 5 kB\n")
    with pytest.raises(KeyError, match="MemAvailable"):
        machine_memory(root)


def test_a_budget_beyond_a_hard_limit_is_refused_with_what_sets_it(machine: Machine) -> None:
    root = machine("0::/a\n", {"a/memory.max": 4 * GIB}, available=MIB)
    check_possible(4 * GIB, root)  # what happens to be free now is no hard limit
    with pytest.raises(UsageError, match=rf"memory\.max allows: give at most {4 * GIB}"):
        check_possible(4 * GIB + 1, root)


def test_without_groups_a_budget_may_be_all_of_the_machines_memory(machine: Machine) -> None:
    root = machine("0::/\n", {})
    check_possible(64 * GIB, root)
    with pytest.raises(UsageError, match="MemTotal"):
        check_possible(64 * GIB + 1, root)


@pytest.mark.parametrize(
    ("files", "version"),
    [
        ({"cgroup.controllers": "memory"}, "v2"),
        ({"memory/tasks": "1"}, "v1"),
        ({"cpu/tasks": "1"}, "none"),
        ({}, "none"),
    ],
)
def test_the_version_of_cgroups_is_told_by_their_files(machine: Machine, files: dict[str, str], version: str) -> None:
    assert cgroup_version(machine("", dict(files))) == version


def test_this_machine_has_a_limit_too() -> None:
    limit = memory_limit()
    assert 0 < limit.nbytes <= memory.UNLIMITED and limit.source


class FakeClock:
    """A clock that stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_memory_bandwidth_is_bytes_by_the_median_time_of_a_pass() -> None:
    """Passes of 1, 1, 10, 1, 1 seconds: one that was disturbed does not count."""
    ticks = iter(np.cumsum([0, 1, 0, 1, 0, 10, 0, 1, 0, 1]).tolist())
    assert probe.memory_bps(lambda: next(ticks), nbytes=8000) == 8000


@pytest.mark.parametrize("threads", [1, 3])
def test_memory_is_read_by_so_many_threads_together(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    monkeypatch.setattr("numpy.sum", lambda part: lengths.append(len(part)) or 0.0)
    ticks = iter([0.0, 2.0])
    assert probe.memory_bps(lambda: next(ticks), threads=threads, nbytes=2400, repeats=1) == 1200
    assert lengths == [300 // threads] * threads


def test_a_token_outside_its_experts_is_a_band_from_all_threads_reading_to_one_working() -> None:
    one, four = (expected_framework_ms(4_000_000, 10, 1e9, bps) for bps in (1e9, 4e9))
    low, high = LAYER_MS
    assert one == pytest.approx((4 + 10 * low, 8 + 10 * high))
    assert four == pytest.approx((1 + 10 * low, 8 + 10 * high))


class SlowSource(MemorySource):
    """Every read moves the clock by a latency and the bytes' time."""

    def __init__(self, sizes: list[int], clock: FakeClock, latency_s: float, read_bps: float) -> None:
        super().__init__({BlobId(0, "exact", row): bytes(size) for row, size in enumerate(sizes)})
        self.clock, self.latency_s, self.read_bps = clock, latency_s, read_bps
        self.order: list[BlobId] = []

    def read(self, blob: BlobId, into: memoryview) -> str:
        self.order.append(blob)
        self.clock.now += self.latency_s + self.nbytes(blob) / self.read_bps
        return super().read(blob, into)


def rate_of(sizes: list[int], latency_s: float) -> tuple[float, float]:
    clock = FakeClock()
    source = SlowSource(sizes, clock, latency_s, 1e8)
    blobs = [BlobId(0, "exact", row) for row in range(len(sizes))]
    measured = probe.read_rate(source, blobs, clock)
    assert source.order == blobs  # once each: a second read might come from a cache
    return measured


def test_reads_of_several_sizes_tell_rate_and_latency_apart() -> None:
    rate, latency = rate_of([100_000, 300_000, 200_000], latency_s=0.002)
    assert (rate, latency) == (pytest.approx(1e8), pytest.approx(0.002))


def test_reads_of_one_size_say_nothing_of_latency_so_the_least_is_taken() -> None:
    rate, latency = rate_of([5000] * 4, latency_s=0.01)
    assert latency == 20e-6
    assert 5000 / rate + latency == pytest.approx(0.01 + 5000 / 1e8)


def test_reads_that_take_longer_the_shorter_they_are_still_give_rates_above_zero() -> None:
    blobs = {BlobId(0, "exact", row): bytes(size) for row, size in enumerate((1000, 100_000))}
    rate, latency = probe.read_rate(MemorySource(blobs), list(blobs), iter([0.0, 1.0, 1.0, 1.1]).__next__)
    assert rate > 0 <= latency


def test_waking_is_what_a_read_takes_beyond_its_own_time_and_a_hits() -> None:
    took = [probe.PROBED_READ_S + 0.003] * 4 + [0.001] * 4
    ticks = iter([tick for seconds in took for tick in (0.0, seconds)])
    assert probe.wake_s(lambda: next(ticks), repeats=4) == pytest.approx(0.002)


def test_compute_is_measured_on_matrices_that_take_turns() -> None:
    weights = Matrix(Code.BF16, 64, 64, np.zeros(64 * 64 * 2, np.uint8))
    ticks = iter(range(10**6))
    assert probe.kernel_bps(weights, lambda: next(ticks), nbytes=5 * 8192) == 8192


def test_a_disk_is_measured_by_reading_a_new_file_once(tmp_path: Path) -> None:
    ticks = iter(np.arange(0, 100, 0.5).tolist())
    rate, direct = probe.disk_bps(tmp_path / "probe", lambda: next(ticks), nbytes=64 << 10, block=16 << 10)
    assert rate == (64 << 10) / (4 * 0.5)
    assert isinstance(direct, bool) and (tmp_path / "probe").stat().st_size == 64 << 10
    data = (tmp_path / "probe").read_bytes()
    assert len(set(data)) == 256  # not zeros, which a disk may never store


TOUCHED = 48 * MIB


def touched(flags: int, fd: int = -1) -> mmap.mmap:
    """`TOUCHED` bytes of memory that are really there."""
    found = mmap.mmap(fd, TOUCHED, flags=flags)
    np.frombuffer(found, np.uint8)[::4096] = 1
    return found


def test_memory_that_is_touched_is_resident_and_anonymous_until_it_is_given_back() -> None:
    before = process.resident()
    block = touched(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held = process.resident()
    block.close()
    after = process.resident()
    assert held.anonymous - before.anonymous == pytest.approx(TOUCHED, rel=0.1)
    assert held.anonymous - after.anonymous == pytest.approx(TOUCHED, rel=0.1)
    assert abs(held.file_backed - before.file_backed) < 0.1 * TOUCHED


def test_pages_of_a_file_are_resident_and_not_anonymous(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(TOUCHED))
    before = process.resident()
    with (tmp_path / "data").open("r+b") as file:
        block = touched(mmap.MAP_SHARED, file.fileno())
    held = process.resident()
    block.close()
    assert held.file_backed - before.file_backed == pytest.approx(TOUCHED, rel=0.1)
    assert abs(held.anonymous - before.anonymous) < 0.1 * TOUCHED


def test_resident_bytes_are_anonymous_and_file_backed_together() -> None:
    assert process.resident_bytes() == pytest.approx(process.resident().total, rel=0.05)
    assert process.resident_bytes() == pytest.approx(process._status("VmRSS"), rel=0.05)


def test_pages_are_counted_in_the_machines_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Raspberry Pi 5 has pages of 16 KiB."""
    small = process.resident_bytes()
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4 * mmap.PAGESIZE}[name])
    assert process.resident_bytes() == pytest.approx(4 * small, rel=0.05)


def clear_refs_works() -> bool:
    try:
        process.reset_peak()
    except OSError:
        return False
    return True


def test_a_peak_is_remembered_until_it_is_reset() -> None:
    touched(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    high = process.peak_bytes()
    assert high >= process.resident_bytes() + 0.9 * TOUCHED
    if clear_refs_works():
        assert process.peak_bytes() <= high - 0.9 * TOUCHED


def test_an_unknown_figure_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        process._status("VmNothing")


def test_trimming_gives_freed_memory_back_even_below_what_is_still_used() -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return
    process.steady_malloc()
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(100_000) for _ in range(400)]
    for block in blocks:
        ctypes.memset(block, 1, 100_000)
    last = blocks.pop()
    for block in blocks:
        libc.free(block)
    held = process.resident().anonymous
    process.trim_malloc()
    freed = held - process.resident().anonymous
    libc.free(last)
    assert freed > 0.8 * 400 * 100_000


def test_the_environment_decides_how_much_compiled_code_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in process.KERNEL_CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(process.KERNEL_CACHES[0], "7")
    process.bound_kernel_caches()
    assert [os.environ[name] for name in process.KERNEL_CACHES] == ["7", str(process.KEPT_KERNELS)]
