"""A device that generates while its edge nodes die, stall or are cut off, really: one JSON document on stdout.

Hosts are network namespaces: a device, two edge nodes, an origin; wires have a rate, relays a round trip. The pack must
be self-contained: the device reads it from the origin, and nodes run what misses. Answers are compared with those of
the same pack read locally. Needs root, and the extra comoe[edge]. Raw results lie beside it, in edge_faults.json.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import numpy as np

from comoe.device.machine import machine
from comoe.sim.traces import BPS_PER_MBPS
from comoe.testbed.driving import COMOE, QUIET, serve
from comoe.testbed.namespaces import missing
from comoe.testbed.site import Site, Trip

EDGE_RTTS_S, ORIGIN_RTT_S = (0.010, 0.020), 0.064
EDGE_MBPS, ORIGIN_MBPS = 20.0, 4.0
PROMPT = "The history of the town"
FAULTS = ("none", "kill", "stall", "cut")

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path, help="a pack made with --self-contained")
    parser.add_argument("--tokens", type=int, default=80)
    asked = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    pack = asked.pack.resolve()
    wanted, _ = generated(Popen(run(str(pack), asked.tokens), env={**os.environ, **QUIET}, stdout=PIPE, stderr=PIPE))
    rows = [fault_row(pack, asked.tokens, fault, wanted) for fault in FAULTS]
    wires = {
        "edge_rtts_s": EDGE_RTTS_S,
        "origin_rtt_s": ORIGIN_RTT_S,
        "edge_mbps": EDGE_MBPS,
        "origin_mbps": ORIGIN_MBPS,
    }
    settings = {"pack": pack.name, "tokens": asked.tokens, **wires}
    print(json.dumps({"name": "edge_faults", "machine": machine(), "settings": settings, "rows": rows}, indent=1))


def run(pack: str, tokens: int, edges: Sequence[str] = ()) -> list[str]:
    """The command that generates."""
    words = [*COMOE, "run", pack, "--prompt", PROMPT, "--max-new-tokens", str(tokens), "--ignore-eos"]
    return [*words, "--threads", "1", "--expert-memory", "30%", *(word for url in edges for word in ("--edge", url))]


def fault_row(pack: Path, tokens: int, fault: str, wanted: str) -> Row:
    """What a fault after a quarter of the answer does to it. Times are between pieces of text as they are printed."""
    with Site([Trip(rtt_s) for rtt_s in EDGE_RTTS_S], Trip(ORIGIN_RTT_S)) as site, TemporaryDirectory() as cache:
        env = {**os.environ, **QUIET, "COMOE_CACHE": cache}
        for node in (*site.edges, site.origin):
            serve(node, pack, Path(cache), env)
            node.mend((ORIGIN_MBPS if node is site.origin else EDGE_MBPS) * BPS_PER_MBPS)
        command = run(f"{site.origin.url}/packs/{pack.name}", tokens, [edge.url for edge in site.edges])
        process = site.device.start(command, env=env, stdout=PIPE, stderr=PIPE)
        text, at_s = generated(process, tokens // 4, lambda: happen(site, fault))
        gaps_ms = 1e3 * np.diff(at_s)
        return {
            "fault": fault,
            "exit_code": process.returncode,
            "identical": text == wanted,
            "median_ms": float(np.median(gaps_ms)),
            "p95_ms": float(np.quantile(gaps_ms, 0.95)),
            "longest_ms": float(gaps_ms.max()),
        }


def happen(site: Site, fault: str) -> None:
    """Let a fault happen: to the first node, which is nearer, or to both wires."""
    first = site.edges[0]
    if fault == "kill":
        first.kill()
    elif fault == "stall":
        first.signal(signal.SIGSTOP)
    elif fault == "cut":
        for edge in site.edges:
            edge.cut()


def generated(
    process: "Popen[Any]", pieces: int = 0, then: Callable[[], None] = lambda: None
) -> tuple[str, list[float]]:
    """What a process prints, and when each piece of it came; `then` is done after so many pieces."""
    assert process.stdout is not None and process.stderr is not None
    found, at_s = b"", []
    while piece := os.read(process.stdout.fileno(), 4096):
        found += piece
        at_s.append(monotonic())
        if len(at_s) == pieces:
            then()
    process.stderr.read()
    process.wait()
    return found.decode(), at_s


if __name__ == "__main__":
    main()
