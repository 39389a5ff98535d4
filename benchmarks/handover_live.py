"""A device that passes from one edge node's cells to another's, and faults with their end: one JSON document on stdout.

Real processes in network namespaces: a device in an exact session, or in one that may lose 2 %, two `comoe edge`
nodes that read through from an origin, and the origin, whose address is the pack's. Recorded drives are cut to a
minute around their first move from one node's cells to the other's; who is near has the shorter round trip. Wires
carry what the drive recorded, or a steady rate; those from the origin to nodes what makes an expert take as long as
the large model's over 1 Gbit/s. The device has decoded a while, near the first node, before a minute begins.

Faults, two nodes of which the first is near: it is killed; it stalls for 10 s; nothing gets through from either for 30
s. Packs must be self-contained. Needs root, and the extra comoe[edge]. Rows are kept in --rows. Raw results lie beside
it, in handover_live.json.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from comoe.bench.driven import reading
from comoe.bench.driven_figures import (
    Count,
    edge_counts,
    gaps_ms,
    hit_share,
    identical,
    moved_bytes,
    recovery_s,
    waits_s,
    window,
)
from comoe.bench.handover import CAPACITY_SHARE, COSTS, EDGES, STEADY_MBPS
from comoe.bench.handover_figures import recovery
from comoe.bench.network import LARGE
from comoe.bench.rows import Job, Row, RowFile, collect
from comoe.device.machine import machine
from comoe.make.trace import CONTEXT
from comoe.net.origin import CHUNK_BYTES
from comoe.plan.ladder import ladder_of
from comoe.plan.missrule import HELP_S, WARM
from comoe.sim.mobility import Drive, Stay, edges_of, read_drives, read_sites
from comoe.sim.traces import BPS_PER_MBPS, LinkRate, read_link_trace
from comoe.store.decisions import identity
from comoe.store.manifest import read_manifest
from comoe.testbed.driving import POLL, QUIET, Device, at_moments, serve
from comoe.testbed.namespaces import missing
from comoe.testbed.polled import samples
from comoe.testbed.shaping import shape
from comoe.testbed.site import SERVER_PORT, Site, Trip

DRIVE, FAULT = "drive", "fault"
FAULTS = ("kill", "stall", "cut")
EXACT, LOSSY = "exact", "lossy"
BOUNDS = {EXACT: 0.0, LOSSY: 0.02}
"""What sessions may lose."""

NEAR, FAR = Trip(COSTS.near.median_s), Trip(COSTS.far.median_s)
WARM_S, WINDOW_S, BEFORE_S = 20.0, 60.0, 25.0
"""Decoding before a minute begins; the minute; and so much of it before the move."""

FAULT_AT_S, STALL_S, CUT_S, FAULT_RUN_S = 30.0, 10.0, 30.0, 90.0
ORIGIN_BPS, BACKHAUL_BPS = 4.0 * BPS_PER_MBPS, 125e6
LATE_S = 5.0
"""So long after the end, wires still carry what they did: who is late ends by itself."""

POLL_S = 0.1
TOKENS = 480
MOVES = ("handover",)


class Moment(NamedTuple):
    """Something that happens so many seconds after the device began."""

    at_s: float
    act: Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path, nargs="+", help="Packs made with --self-contained.")
    parser.add_argument("--shared", type=Path, required=True, help="The folder of the shared texts, drives and traces.")
    parser.add_argument("--drives", type=int, help="Only so many of the drives.")
    parser.add_argument("--mbps", type=float, default=STEADY_MBPS, help="What wires carry where nothing was recorded.")
    parser.add_argument("--rows", type=Path, help="Finished rows, kept and taken from here.")
    asked = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    folder, file = asked.shared / "data" / "mobility", RowFile(asked.rows)
    edge_of = edges_of(read_sites(folder / "sites_cork_estimated.csv"), EDGES)
    drives = [drive for drive in read_drives(folder / "traj_cork_drive_cells.csv") if len(drive.stays(edge_of)) > 1]
    drivers = [Driver(pack.resolve(), asked.shared, edge_of, asked.mbps) for pack in asked.pack]
    jobs = [job for of in drivers for job in of.jobs(drives[: asked.drives])]
    rows = collect(jobs, file, lambda step, done: print(f"{done:4.0%} {step}", file=sys.stderr, flush=True))
    print(json.dumps(document(rows, asked.mbps), indent=1))


def document(rows: Sequence[Row], steady_mbps: float) -> dict[str, Any]:
    """The rows, and the figures of them."""
    settings = {
        "near_rtt_s": NEAR.rtt_s, "far_rtt_s": FAR.rtt_s, "steady_mbps": steady_mbps, "share": CAPACITY_SHARE,
        "warm_s": WARM_S, "window_s": WINDOW_S, "fault_at_s": FAULT_AT_S, "fault_run_s": FAULT_RUN_S,
        "stall_s": STALL_S, "cut_s": CUT_S, "max_loss": BOUNDS,
    }  # fmt: skip
    return {
        "name": "handover_live",
        "machine": machine(),
        "settings": settings,
        "sessions": {name: figures([row for row in rows if row["session"] == name]) for name in BOUNDS},
        "rows": list(rows),
    }


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Of sessions of one kind: `gap_p95_over_median_token` is of tokens within 5 s after a move, over the median of the
    drive's, and the median of drives that have any; `hit_rate_recovery_s` is of the edge tier, whichever node answered,
    the median of moves of which it can be told, of which `recovered` is the share that did; `node_recovery_s` and
    `node_recovered` are of the node that serves alone."""
    drives = [row for row in rows if row["kind"] == DRIVE]
    faults = [row for row in rows if row["kind"] == FAULT]
    gaps = [row["soon_p95_ms"] / row["median_ms"] for row in drives if row["soon_p95_ms"] is not None]
    tier, node = recovery(drives, "recovery_s"), recovery(drives, "node_recovery_s")
    return {
        "gap_p95_over_median_token": median(gaps) if gaps else None,
        "p95_over_median_token": median(row["p95_ms"] / row["median_ms"] for row in drives) if drives else None,
        "identical": all(row["identical"] for row in rows),
        "most_lost": max((row["loss"] for row in rows), default=None),
        "hit_rate_recovery_s": tier.seconds,
        "recovered": tier.share,
        "node_recovery_s": node.seconds,
        "node_recovered": node.share,
        "bytes_moved_share": max((share for row in drives for share in row["moved_share"]), default=None),
        "handovers": sum(len(row["moves"]) for row in drives),
        "moves_of_the_device": sum(len(row["stays"]) - 1 for row in drives),
        "failed": sum(row["failed"] is not None for row in rows),
        "longest_wait_s": {f"{row['model']}, {row['fault']}": row["longest_wait_s"] for row in faults},
    }


class Driver:
    """A pack on drives between nodes that stand as `edge_of` has it; wires carry `steady_mbps` where none is known."""

    def __init__(self, pack: Path, shared: Path, edge_of: dict[str, str], steady_mbps: float) -> None:
        self._pack, self._traces, self._edge_of = pack, shared / "data" / "traces", edge_of
        self._steady_bps = steady_mbps * BPS_PER_MBPS
        self._manifest = read_manifest(pack)
        self._turns, self._known = reading(pack, shared, TOKENS)
        self._expert_nbytes = ladder_of(self._manifest).exact.group_beside(None)
        self._scale = self._expert_nbytes / LARGE[self._manifest.model_type].expert_nbytes

    def jobs(self, drives: Sequence[Drive]) -> Iterator[Job]:
        depends = {"pack": identity(self._manifest), "machine": machine(), "tokens": TOKENS, "bps": self._steady_bps}
        depends["help"] = [WARM, HELP_S]
        for session, bound in BOUNDS.items():
            of = {"model": self._pack.name, "session": session}
            on = {**depends, "bound": bound}
            for drive in drives:
                name = {"kind": DRIVE, **of, "drive": drive.name}
                yield Job(name, {**on, "seconds": [WARM_S, WINDOW_S]}, partial(self.drive_row, bound, drive))
            for fault in FAULTS:
                name = {"kind": FAULT, **of, "fault": fault}
                yield Job(name, {**on, "seconds": FAULT_RUN_S}, partial(self.fault_row, bound, fault))

    def drive_row(self, bound: float, drive: Drive) -> Row:
        """The minute around a drive's first move."""
        begin_s = drive.stays(self._edge_of)[1].begin_s - BEFORE_S
        stays = _cut(drive.stays(self._edge_of), begin_s, begin_s + WINDOW_S)
        recorded, rate = self._rate(drive, begin_s)
        nodes = [stay.node for stay in stays]
        names = [nodes[0], next(node for node in nodes if node != nodes[0])]
        moves_s = [(WARM_S + stay.begin_s, names.index(stay.node)) for stay in stays]
        with self._run(bound, WARM_S + WINDOW_S) as run, ExitStack() as wires:
            for node in (*run.site.edges, run.site.origin):
                wires.enter_context(node.shaped(rate))
            run.through([Moment(at_s, partial(run.near, node)) for at_s, node in moves_s])
        lines, counts, tier = run.lines, run.counts, edge_counts(run.lines)
        events = [event for event in lines[-1]["events"] if event[1] >= WARM_S]
        moves = [(at_s, run.number(before), run.number(node)) for kind, at_s, node, before in events if kind in MOVES]
        all_ms, soon_ms = gaps_ms(lines, [at_s for at_s, _, _ in moves], WARM_S)
        told = [(at_s, run.number(node)) for kind, at_s, node, _ in events if kind == "announced"]
        whole = self._manifest.expert_bytes_bf16
        return {
            "from_s": begin_s,
            "recorded": recorded,
            "stays": moves_s,
            "moves": moves,
            "failed": lines[-1]["failed"],
            "events": lines[-1]["events"],
            "links": lines[-1]["links"],
            "tokens": len(all_ms),
            "identical": identical(lines, self._known),
            "loss": window(lines, self._known)["loss"],
            "median_ms": median(all_ms),
            "p95_ms": float(np.quantile(all_ms, 0.95)),
            "soon_p95_ms": float(np.quantile(soon_ms, 0.95)) if soon_ms else None,
            "hit_share": [hit_share(of, WARM_S, WARM_S + WINDOW_S) for of in counts],
            "recovery_s": [recovery_s(tier, tier, at_s) for at_s, _, _ in moves],
            "node_recovery_s": [recovery_s(counts[before], counts[node], at_s) for at_s, before, node in moves],
            "moved_share": [moved_bytes(counts[node], at_s, self._expert_nbytes) / whole for at_s, node in told],
            "stats": lines[-1]["stats"],
        }

    def fault_row(self, bound: float, fault: str) -> Row:
        """A fault of the node that serves, or of the wires, and its end where it has one."""
        with self._run(bound, FAULT_RUN_S) as run:
            for edge in run.site.edges:
                edge.mend(self._steady_bps)
            run.site.origin.mend(ORIGIN_BPS)
            run.through(list(run.fault(fault, self._steady_bps)))
        lines = run.lines
        waits = {
            "before": waits_s(lines, lines[-1]["loaded_s"], FAULT_AT_S),
            "after": waits_s(lines, FAULT_AT_S, FAULT_RUN_S),
        }
        return {
            "identical": identical(lines, self._known),
            "loss": window(lines, self._known)["loss"],
            "tokens": len(lines) - 1,
            "median_ms": median(line["ms"] for line in lines[:-1]),
            "longest_wait_before_s": max(waits["before"]),
            "longest_wait_s": max(waits["after"]),
            "last_token_s": lines[-2]["at_s"],
            "failed": lines[-1]["failed"],
            "events": lines[-1]["events"],
            "links": lines[-1]["links"],
            "stats": lines[-1]["stats"],
        }

    def _rate(self, drive: Drive, begin_s: float) -> tuple[bool, LinkRate]:
        """Whether a drive's rate was recorded; and the rate, from when the device begins on."""
        path = self._traces / f"ucc5g_drive_{drive.name.partition('_')[2]}.csv"
        if not path.exists():
            return False, LinkRate.steady(self._steady_bps, WARM_S + WINDOW_S + LATE_S)
        rate = read_link_trace(path).rate.window(begin_s, WINDOW_S + LATE_S)
        start_s, bps = np.append(0.0, WARM_S + rate.start_s), np.append(self._steady_bps, rate.bps)
        return True, LinkRate.of(start_s, bps, WARM_S + WINDOW_S + LATE_S)

    def _run(self, bound: float, seconds: float) -> "Run":
        """With what the device is told, beside where things are. All that its memory has not comes from nodes."""
        orders = {
            "cache_bytes": 0,
            "load": {"expert_memory": f"{CAPACITY_SHARE:.0%}", "context": CONTEXT, "max_loss": bound},
            "remote_only": False,
            "stays": False,
            "piece_nbytes": CHUNK_BYTES,
            "turns": self._turns,
            "seconds": seconds,
            "reader_s": 0.0,
        }
        return Run(self._pack, orders, BACKHAUL_BPS * self._scale)


class Run:
    """Two edge nodes that read `pack` through from an origin, the first near, and a device with `orders` that is ready.

    A context manager. Afterwards `lines` are the device's, `counts` what each node had counted, on its clock.
    """

    def __init__(self, pack: Path, orders: dict[str, Any], backhaul_bps: float) -> None:
        self._pack, self._orders, self._backhaul_bps = pack, orders, backhaul_bps
        self._stack, self._env = ExitStack(), {**os.environ, **QUIET}
        self.lines: list[Row] = []
        self.counts: list[list[Count]] = [[] for _ in range(EDGES)]

    def __enter__(self) -> "Run":
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            self.site = site = stack.enter_context(Site([NEAR, FAR], FAR))
            serve(site.origin, self._pack, folder / "origin", self._env)
            for at, edge in enumerate(site.edges):
                serve(edge, f"{site.origin_url(at)}/packs/{self._pack.name}", folder / f"edge{at}", self._env)
                shape(site.origin.host, site.backhaul[at].far_interface, self._backhaul_bps)
            urls = [edge.url for edge in site.edges]
            where = {"pack": f"{site.origin.url}/packs/{self._pack.name}", "cache": str(folder / "device")}
            orders = {**self._orders, **where, "load": {**self._orders["load"], "edges": urls}}
            self._polled = folder / "polled"
            watched = [f"http://{wire.near}:{SERVER_PORT}" for wire in site.backhaul]
            with self._polled.open("w") as file:
                site.origin.host.start([*POLL, POLL_S, *watched], stdout=file, env=self._env)
            self._device = Device(site.device, orders, folder, self._env)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def near(self, number: int) -> None:
        """Be near this node from now on, and no other."""
        for at, edge in enumerate(self.site.edges):
            edge.move(NEAR if at == number else FAR)

    def number(self, url: str) -> int:
        """Which node has this address."""
        return [edge.url for edge in self.site.edges].index(url)

    def through(self, moments: Sequence[Moment]) -> None:
        """Let the device begin, let happen what is to, and take what was written once it is gone."""
        begun_s = self._device.begin()
        at_moments(begun_s, moments)
        self.lines = self._device.end()
        for sample in samples(self._polled.read_text("utf-8")):
            self.counts[sample.node].append(Count(sample.at_s - begun_s, sample.counters))

    def fault(self, fault: str, bps: float) -> Iterator[Moment]:
        """A fault, of the first node or of both wires, and its end where it has one: they carry `bps` then."""
        first, edges = self.site.edges[0], self.site.edges
        if fault == "kill":
            yield Moment(FAULT_AT_S, first.kill)
        elif fault == "stall":
            yield Moment(FAULT_AT_S, partial(first.signal, signal.SIGSTOP))
            yield Moment(FAULT_AT_S + STALL_S, partial(first.signal, signal.SIGCONT))
        else:
            yield from (Moment(FAULT_AT_S, edge.cut) for edge in edges)
            yield from (Moment(FAULT_AT_S + CUT_S, partial(edge.mend, bps)) for edge in edges)


def _cut(stays: Sequence[Stay], begin_s: float, end_s: float) -> list[Stay]:
    """What of the stays lies between two moments, the first of which is 0 then."""
    inside = [stay for stay in stays if stay.end_s > begin_s and stay.begin_s < end_s]
    return [Stay(stay.node, max(stay.begin_s - begin_s, 0.0), stay.end_s - begin_s) for stay in inside]


if __name__ == "__main__":
    main()
