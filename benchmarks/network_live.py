"""Plans that follow a recorded link, really: a device and an edge node on a shaped wire; one JSON document on stdout.

The windows, the text and the factor by which links are slowed down are those of `comoe bench network`, but time is
real: the device loads the pack behind the node's address and decodes at a reader's pace; a window begins with the
dense part on flash and no expert. Its worth is in tokens of the exact model: each that came counts as much as the text
is likely, by the window's geometric mean, over how likely the exact model finds it. Loading counts, and waiting for a
floor.

`static` is the plan that `comoe run` makes without an edge node that runs experts: an early floor from the same
server, then what is missed.

The node is 27 ms away. A token goes through the small model's layers, not the large one's, so that misses that run
elsewhere take fewer round trips than in virtual time; but what is sent there is slowed down as experts are, though it
is not as much smaller. Packs must be self-contained. Needs root, and the extra
comoe[edge]. Rows are kept in --rows. Raw results lie beside it, in network_live.json.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from comoe.bench.driven import reading
from comoe.bench.driven_figures import ratios, window
from comoe.bench.network import LARGE, MAX_LOSS, READER_S, RTT_S, SHARE
from comoe.bench.rows import Job, Row, RowFile, collect
from comoe.device.machine import machine
from comoe.make.trace import CONTEXT
from comoe.net.origin import CHUNK_BYTES
from comoe.plan.ladder import ladder_of
from comoe.sim.traces import BPS_PER_MBPS, WINDOW_S, LinkTrace, read_bench_list, read_link_trace
from comoe.store.decisions import identity
from comoe.store.manifest import read_manifest
from comoe.testbed.driving import QUIET, Device, serve
from comoe.testbed.namespaces import missing
from comoe.testbed.site import Site, Trip

JOINT, STATIC, FETCH, REMOTE = "joint", "static", "fetch", "remote"
POLICIES = (JOINT, STATIC, FETCH, REMOTE)
TOKENS = 480
SMALL_PACKETS = 576
"""Bytes, the least that every host must take: a slowed-down wire is not slowed down by its packets alone."""

FREE_BPS = 1e9
"""The wire before a window begins."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path, nargs="+", help="Packs made with --self-contained.")
    parser.add_argument("--shared", type=Path, required=True, help="The folder of the shared texts and traces.")
    parser.add_argument("--traces", type=int, help="Only so many of the traces.")
    parser.add_argument("--rows", type=Path, help="Finished rows, kept and taken from here.")
    asked = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    traces = [read_link_trace(path) for path in read_bench_list(asked.shared / "data" / "traces")[: asked.traces]]
    file = RowFile(asked.rows)
    with ExitStack() as stack:
        travellers = [stack.enter_context(Traveller(pack.resolve(), asked.shared)) for pack in asked.pack]
        jobs = [job for of in travellers for job in of.jobs(traces)]
        rows = collect(jobs, file, lambda step, done: print(f"{done:4.0%} {step}", file=sys.stderr, flush=True))
    print(json.dumps(document(rows), indent=1))


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows, a line for each window, and the figures of them."""
    keys = dict.fromkeys((row["model"], row["trace"]) for row in rows)
    windows = [
        {"model": model, "trace": trace, **{row["policy"]: row for row in rows if (row["model"], row["trace"]) == key}}
        for key in keys
        for model, trace in (key,)
    ]
    gains = {other: ratios(windows, JOINT, other) for other in (STATIC, FETCH, REMOTE)}
    return {
        "name": "network_live",
        "machine": machine(),
        "settings": {"max_loss": MAX_LOSS, "share": SHARE, "reader_s": READER_S, "rtt_s": RTT_S, "seconds": WINDOW_S},
        "gains_over": gains,
        "windows": len(windows),
        "rows": list(rows),
    }


class Traveller:
    """A pack at an edge node, and a device on one wire with it. A context manager."""

    def __init__(self, pack: Path, shared: Path) -> None:
        self._pack, self._stack = pack, ExitStack()
        self._manifest = read_manifest(pack)
        self._turns, self._known = reading(pack, shared, TOKENS)
        exact = ladder_of(self._manifest).exact.group_beside(None)
        self._scale = exact / LARGE[self._manifest.model_type].expert_nbytes
        self._env = {**os.environ, **QUIET}

    def __enter__(self) -> "Traveller":
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            self._node = stack.enter_context(Site([Trip(RTT_S)], Trip(), SMALL_PACKETS)).edges[0]
            serve(self._node, self._pack, folder, self._env)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def jobs(self, traces: Sequence[LinkTrace]) -> Iterator[Job]:
        depends = {"pack": identity(self._manifest), "machine": machine(), "tokens": TOKENS, "seconds": WINDOW_S}
        for trace in traces:
            for policy in POLICIES:
                name = {"model": self._pack.name, "trace": trace.name, "policy": policy}
                yield Job(name, depends, partial(self.row, trace, policy))

    def row(self, trace: LinkTrace, policy: str) -> Row:
        """One seeded window of a trace, by one policy."""
        begin_s, rate = trace.window(0)
        self._node.mend(FREE_BPS)
        with TemporaryDirectory() as folder:
            device = Device(self._node.device, self._orders(policy, Path(folder)), Path(folder), self._env)
            with self._node.shaped(rate.scaled(self._scale)):
                device.begin()
                lines = device.end()
        mean_mbps = rate.mean(0.0, WINDOW_S) / BPS_PER_MBPS
        return {"begin_s": begin_s, "mean_mbps": mean_mbps, "scale": self._scale, **window(lines, self._known)}

    def _orders(self, policy: str, folder: Path) -> dict[str, Any]:
        """What a device by a policy is told: with `STATIC` it has no node that runs experts, as if it knew of none."""
        how: dict[str, Any] = {"expert_memory": f"{SHARE:.0%}", "context": CONTEXT}
        if policy in (JOINT, STATIC):
            how["max_loss"] = MAX_LOSS
        else:
            how["prefetch"] = "off"
        if policy in (JOINT, REMOTE):
            how["edges"] = [self._node.url]
        return {
            "pack": f"{self._node.url}/packs/{self._pack.name}",
            "cache": str(folder / "cache"),
            "cache_bytes": None,
            "load": how,
            "remote_only": policy == REMOTE,
            "stays": policy == STATIC,
            "piece_nbytes": round(CHUNK_BYTES * self._scale),
            "turns": self._turns,
            "seconds": WINDOW_S,
            "reader_s": READER_S,
        }


if __name__ == "__main__":
    main()
