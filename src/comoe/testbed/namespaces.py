"""Hosts of a small network on one machine: network namespaces, joined by veth pairs. Needs root and iproute2.

How fast a wire is, is `testbed.shaping`'s; what runs on a host is the caller's.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

SUBNET = "10.213"
GONE_S = 10.0
NUMBERS = count()


class Host:
    """A namespace of its own, in which processes see their own network. Leaving the context kills what still runs.

    OSError where it cannot be made: see `missing`.
    """

    def __init__(self, role: str) -> None:
        self.name = f"comoe-{os.getpid()}-{next(NUMBERS)}-{role}"

    def __enter__(self) -> "Host":
        tool("ip", "netns", "add", self.name)
        self.tool("ip", "link", "set", "lo", "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        until_s = time.monotonic() + GONE_S
        while (pids := self.pids()) and time.monotonic() < until_s:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        tool("ip", "netns", "del", self.name)

    def pids(self) -> list[int]:
        """Those of the processes that run here, zombies left out."""
        found = map(int, tool("ip", "netns", "pids", self.name).split())
        return [pid for pid in found if _runs(pid)]

    def tool(self, *words: str) -> str:
        """What a tool of the network answers here. OSError where it fails."""
        return tool("ip", "netns", "exec", self.name, *words)

    def start(self, command: Sequence[str | Path], **options: Any) -> "subprocess.Popen[str]":
        """Start `command` here."""
        return subprocess.Popen(["ip", "netns", "exec", self.name, *map(str, command)], text=True, **options)

    def run(
        self, command: Sequence[str | Path], timeout_s: float, **options: Any
    ) -> "subprocess.CompletedProcess[str]":
        """Run `command` here to its end and keep what it writes. subprocess.TimeoutExpired after that."""
        words = ["ip", "netns", "exec", self.name, *map(str, command)]
        return subprocess.run(words, text=True, capture_output=True, timeout=timeout_s, check=False, **options)


class Wire:
    """A wire between two hosts, with an address and an interface at either end: `near` and `far`. It goes with them.

    Single packets pass, of `mtu` bytes at most, not the bundles of up to 64 KiB that the kernel makes of them, which no
    slow wire has room for.
    """

    def __init__(self, near: Host, far: Host, mtu: int = 1500) -> None:
        number = next(NUMBERS)
        self.near_host, self.far_host = near, far
        self.near_interface, self.far_interface = f"cn{number}", f"cf{number}"
        self.near, self.far = (f"{SUBNET}.{number % 256}.{end}" for end in (1, 2))
        ends = (near, self.near_interface, self.near), (far, self.far_interface, self.far)
        peer = ("peer", "name", self.far_interface, "netns", far.name)
        tool("ip", "link", "add", self.near_interface, "netns", near.name, "type", "veth", *peer)
        for host, interface, address in ends:
            host.tool("ip", "addr", "add", f"{address}/24", "dev", interface)
            host.tool("ip", "link", "set", interface, "mtu", str(mtu), "gso_max_segs", "1", "up")


def tool(*words: str) -> str:
    """What a tool answers. OSError where it fails or is not there."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout
    except subprocess.CalledProcessError as error:
        raise OSError(f"{' '.join(words)}: {error.stderr.strip()}") from error


def missing() -> str | None:
    """What namespaces and shaped wires need and this machine has not; None where it has all."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    for name in ("ip", "tc"):
        if shutil.which(name) is None:
            return f"needs {name} of iproute2 for network namespaces"
    try:
        with Host("try") as one, Host("try") as other:
            wire = Wire(one, other)
            bucket = ("tbf", "rate", "1mbit", "burst", "32k", "latency", "50ms")
            one.tool("tc", "qdisc", "add", "dev", wire.near_interface, "root", *bucket)
    except OSError as error:
        return f"needs network namespaces, veth and tbf: {error}"
    return None


def _runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
