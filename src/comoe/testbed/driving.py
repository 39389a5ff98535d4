"""A device process on a site's device: started with orders, told to begin, and what it wrote.

What it does is `comoe.bench.driven`'s, which knows nothing of namespaces. Nodes are `comoe edge` here.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comoe.testbed.namespaces import Host
from comoe.testbed.site import SERVER_PORT, Node, eventually

COMOE = (sys.executable, "-m", "comoe")
DEVICE = (sys.executable, "-m", "comoe.bench.driven")
POLL = (sys.executable, "-m", "comoe.testbed.polled")
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
"""One thread each: hosts of a testbed share the machine's processors."""

LATE_S = 30.0
"""After the end of its window, a device is gone."""


class Device:
    """A device in `folder`, where its orders and lines are kept, ready to begin. OSError where it ends before."""

    def __init__(self, host: Host, orders: Mapping[str, Any], folder: Path, env: Mapping[str, str]) -> None:
        self._seconds = float(orders["seconds"])
        self._lines, self._errors, told = folder / "lines", folder / "errors", folder / "orders.json"
        told.write_text(json.dumps(orders), "utf-8")
        with self._lines.open("w") as lines, self._errors.open("w") as errors:
            streams = {"stdin": subprocess.PIPE, "stdout": lines, "stderr": errors}
            self._process = host.start([*DEVICE, told], env=dict(env), **streams)
        eventually(lambda: bool(self.lines()) or self._process.poll() is not None)
        self._check()

    def begin(self) -> float:
        """Let the window begin; when it did, on the machine's clock."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.close()
        eventually(lambda: len(self.lines()) > 1 or self._process.poll() is not None)
        self._check()
        return float(self.lines()[1]["begun_s"])

    def end(self) -> list[dict[str, Any]]:
        """The lines of its tokens, and the last one, once the window is over. OSError where it failed."""
        try:
            self._process.wait(self._seconds + LATE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._check()
        return self.lines()[2:]

    def lines(self) -> list[dict[str, Any]]:
        """What it has written so far."""
        written = self._lines.read_text("utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in written if line.endswith("\n")]

    def _check(self) -> None:
        if code := self._process.poll():
            raise OSError(f"the device ended with {code}: {self._errors.read_text('utf-8')[-2000:]}")


def serve(node: Node, pack: str | Path, cache: Path, env: Mapping[str, str]) -> None:
    """Let a node be a `comoe edge` of a pack: a folder, or where it is published."""
    words = ["--listen", f"0.0.0.0:{SERVER_PORT}", "--memory", "2GiB", "--threads", "1", "--cache", str(cache)]
    node.serve([*COMOE, "edge", str(pack), *words], env=dict(env), stdout=-3, stderr=-3)


def at_moments(begun_s: float, moments: Sequence[tuple[float, Any]]) -> None:
    """Call each action so many seconds after the beginning, in their order."""
    for at_s, act in sorted(moments, key=lambda moment: moment[0]):
        time.sleep(max(0.0, begun_s + at_s - time.monotonic()))
        act()
