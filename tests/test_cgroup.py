"""Memory groups: a limit that really kills, counters that really count, and nothing left behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from comoe.testbed import cgroup
from comoe.testbed.cgroup import Hierarchy, MemoryGroup, drop_caches, writable

LIMIT = 64 << 20
needs_groups = [pytest.mark.cgroup, pytest.mark.skipif(not writable(), reason="needs a writable memory cgroup")]


def python(statement: str) -> list[str]:
    return [sys.executable, "-S", "-c", statement]


class TestRealGroups:
    pytestmark = needs_groups

    def test_what_exceeds_the_limit_is_killed_and_counted(self) -> None:
        with MemoryGroup(LIMIT) as group:
            done = group.run(python(f"b'x' * {2 * LIMIT}"), timeout_s=30)
            assert done.returncode == -9
            assert group.oom_kills == 1

    def test_what_stays_below_the_limit_ends_as_it_wants_to(self) -> None:
        with MemoryGroup(LIMIT) as group:
            done = group.run(python("import sys; print(len(b'x' * (1 << 24))); sys.exit(7)"), timeout_s=30)
            assert (done.returncode, done.stdout) == (7, f"{1 << 24}\n")
            assert group.oom_kills == 0

    def test_memory_counts_from_the_first_instruction_on(self) -> None:
        statement = "import sys; b = b'x' * (1 << 24); print(flush=True); sys.stdin.read()"
        with MemoryGroup(LIMIT) as group:
            before = group.usage
            process = group.start(python(statement), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert process.stdout is not None
            process.stdout.readline()
            assert (group.folder / "cgroup.procs").read_text().split() == [str(process.pid)]
            assert group.usage - before >= 1 << 24
            process.communicate("")

    def test_a_file_larger_than_the_limit_read_twice_refaults(self, tmp_path: Path) -> None:
        file = tmp_path / "large"
        file.write_bytes(bytes(2 * LIMIT))
        drop_caches()
        with MemoryGroup(LIMIT) as group:
            group.run(["cat", file], timeout_s=60, stdin=subprocess.DEVNULL)
            group.run(["cat", file], timeout_s=60, stdin=subprocess.DEVNULL)
            assert group.refaults > LIMIT // 4096 // 4
            assert group.oom_kills == 0

    def test_leaving_kills_what_still_runs_and_removes_the_group(self) -> None:
        with MemoryGroup(LIMIT) as group:
            process = group.start(["sleep", "600"])
        assert process.wait(timeout=10) == -9
        assert not group.folder.exists()

    def test_what_takes_too_long_is_killed(self) -> None:
        with MemoryGroup(LIMIT) as group:
            with pytest.raises(subprocess.TimeoutExpired):
                group.run(["sleep", "600"], timeout_s=0.2)
            assert (group.folder / "cgroup.procs").read_text() == ""


@pytest.fixture
def v2(tmp_path: Path) -> Hierarchy:
    """A folder that looks like version 2, so far as a group is concerned."""
    for name, text in {"cgroup.procs": "", "cgroup.subtree_control": "cpu memory pids\n"}.items():
        (tmp_path / name).write_text(text)
    return Hierarchy(tmp_path, *[getattr(cgroup.HIERARCHIES[1], name) for name in Hierarchy.__slots__[1:]])


def test_version_2_is_told_the_limit_and_to_swap_nothing(v2: Hierarchy) -> None:
    group = MemoryGroup(LIMIT, [v2])
    group.folder = v2.root / "group"
    group.folder.mkdir()
    (group.folder / "memory.swap.max").write_text("max")
    group._set_limit()
    assert (group.folder / "memory.max").read_text() == str(LIMIT)
    assert (group.folder / "memory.swap.max").read_text() == "0"


def test_version_2_counts_in_files_of_its_own(v2: Hierarchy) -> None:
    group = MemoryGroup(LIMIT, [v2])
    (group.folder / "memory.current").write_text("12345\n")
    (group.folder / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 3\noom_kill 2\noom_group_kill 0\n")
    (group.folder / "memory.stat").write_text("anon 1\nworkingset_refault_anon 4\nworkingset_refault_file 5\n")
    assert (group.usage, group.oom_kills, group.refaults) == (12345, 2, 9)


def test_a_version_2_that_hands_no_memory_down_is_of_no_use(v2: Hierarchy) -> None:
    (v2.root / "cgroup.subtree_control").write_text("cpu pids\n")
    with pytest.raises(FileNotFoundError):
        MemoryGroup(LIMIT, [v2])
