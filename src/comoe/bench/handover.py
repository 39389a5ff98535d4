"""`comoe bench handover`: recorded drives past two edge nodes, by several policies, in virtual time.

The session is exact: what misses in the device's memory runs on the node that serves. Drives are those that pass from
one node's cells to the other's; rates are recorded ones where the drive has them, else steady. And faults: the serving
node dies, stalls, or the link is cut for 30 s. What sockets do is not measured here.
"""

from collections.abc import Iterator
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from comoe.bench.document import Document, checkpoints, published, settings, workplace
from comoe.bench.handover_figures import (
    ANNOUNCED,
    BOTH,
    DRIVE,
    FAULT,
    NEAREST,
    POLICIES,
    RULE,
    SLOW,
    STAY,
    figures,
    page,
)
from comoe.bench.material import read_material
from comoe.bench.network import Scope, Traveller
from comoe.bench.rows import Job, Row, RowFile, collect
from comoe.memory.policy import LFU
from comoe.memory.residency import Residency
from comoe.net.handover import NextNode, Rule
from comoe.plan.missrule import HELP_S, WARM
from comoe.sim.mobility import Drive, edges_of, read_drives, read_sites
from comoe.sim.network import decoded
from comoe.sim.roam import (
    Costs,
    Fault,
    Policy,
    Roamed,
    Roamer,
    RoundTrip,
    after,
    handovers,
    recovery_s,
    returns,
)
from comoe.sim.traces import BPS_PER_MBPS, LinkRate, read_link_trace
from comoe.types import BlobId, ExpertId, Progress

NAME = "handover_policy"
EDGES = 2
CAPACITY_SHARE = 0.3
HOT_SHARE = 0.15
"""Of the experts, what is announced before a handover, at most."""

STEADY_MBPS = 20.0
"""Where a drive has no record of its rate."""

EXPERT_NBYTES = 9_437_184
COSTS = Costs(
    token_s=0.022,
    flash_s=EXPERT_NBYTES / 100e6,
    origin_s=EXPERT_NBYTES / 125e6,
    near=RoundTrip(0.027, 0.043),
    far=RoundTrip(0.064, 0.100),
)
"""Round trips, driving: to an edge node, and to a cloud, which stands for a node that is not near. Flash of 100 MB/s, a
wire between nodes and origin of 1 Gbit/s, experts as large as Qwen3-30B-A3B's."""

SOON_S = 5.0
"""So long after a handover, tokens count as near it."""

FAULT_AT_S, FAULT_S, FAULT_DRIVE_S = 60.0, 30.0, 180.0
FULL, QUICK = Scope(None, None, 480, 24576, 6), Scope(2, 3, 96, 5120, 3)


def run(models: Path, shared: Path, *, quick: bool, out: Path | None, progress: Progress) -> Document:
    """The benchmark's document, of every model in a folder of `models`; texts, drives and traces come from `shared`.

    In `out`, finished rows are kept and gone on with, as are packs; the document is left there as JSON and as a page.
    Raises UsageError.
    """
    scope = QUICK if quick else FULL
    material = read_material(shared, scope.domains, 0)
    folder_of = shared / "data" / "mobility"
    edge_of = edges_of(read_sites(folder_of / "sites_cork_estimated.csv"), EDGES)
    drives = [drive for drive in read_drives(folder_of / "traj_cork_drive_cells.csv") if len(drive.stays(edge_of)) > 1][
        : scope.traces
    ]
    with workplace(out) as folder:
        conditions = settings(material, quick=quick, edges=EDGES, hot_share=HOT_SHARE, capacity_share=CAPACITY_SHARE)
        drivers = [
            Driver(Traveller(path, material, scope, folder / "work"), drives, edge_of, shared / "data" / "traces")
            for path in checkpoints(models)
        ]
        jobs = [job for of in drivers for job in _jobs(of, conditions)]
        rows = collect(jobs, RowFile(folder / f"{NAME}.rows.jsonl"), progress)
        hashes = {of.traveller.name: of.traveller.hash for of in drivers}
        return published(folder, NAME, conditions, hashes, figures(rows), page)


def _jobs(of: "Driver", conditions: Document) -> Iterator[Job]:
    depends = {"model": of.traveller.hash, "policies": POLICIES, "help": [WARM, HELP_S], **conditions}
    named = {"model": of.traveller.name}
    for drive in of.drives:
        yield Job({"kind": DRIVE, **named, "drive": drive.name}, depends, partial(drive_row, of, drive))
    for kind in ("kill", "stall", "cut"):
        yield Job({"kind": FAULT, **named, "fault": kind}, depends, partial(fault_row, of, kind))


class Driver:
    """A model on `drives`, between edge nodes that stand as `edge_of` has it; rates are in the folder `traces`."""

    def __init__(self, traveller: Traveller, drives: list[Drive], edge_of: dict[str, str], traces: Path) -> None:
        self.traveller, self.drives, self.edge_of, self._traces = traveller, drives, edge_of, traces

    @cached_property
    def num_hot(self) -> int:
        """Experts that are announced, at most."""
        return int(HOT_SHARE * self.traveller.ladder.num_experts)

    @cached_property
    def misses(self) -> list[list[list[BlobId]]]:
        """Of every decoded token and layer, the exact experts that an LFU cache of the device had not."""
        of = self.traveller
        sizes = dict(zip(of.blobs, of.ladder.exact.sizes.tolist(), strict=False))
        cache = Residency(int(CAPACITY_SHARE * of.packed.manifest.expert_bytes_bf16), sizes.__getitem__, LFU())
        found = []
        for chunks in decoded(of.recorded[0]):
            layers = []
            for chunk in chunks:
                experts = (ExpertId(chunk.layer, expert) for expert in chunk.experts)
                groups = [of.packed.manifest.blobs(expert, "exact") for expert in experts]
                layers.append([blob for group in groups for blob in group if not cache.resident([blob])])
                for group in groups:
                    ticket = cache.demand(group)
                    while (blob := cache.next_load()) is not None:
                        cache.loaded(blob)
                    cache.release(ticket)
                cache.take_evictions()
            found.append(layers)
        return found

    def rate(self, drive: Drive) -> tuple[bool, LinkRate]:
        """Whether a drive's rate was recorded, and the rate."""
        path = self._traces / f"ucc5g_drive_{drive.name.partition('_')[2]}.csv"
        if path.exists():
            return True, read_link_trace(path).rate
        return False, LinkRate.steady(STEADY_MBPS * BPS_PER_MBPS, drive.end_s)

    def history(self, without: Drive) -> NextNode:
        """Who came after whom on all other drives."""
        found = NextNode()
        for drive in self.drives:
            if drive is not without:
                stays = drive.stays(self.edge_of)
                for one, other in pairwise(stays):
                    found.moved(one.node, other.node)
        return found


def drive_row(of: Driver, drive: Drive) -> Row:
    """One drive, by every policy."""
    stays, (recorded, rate) = drive.stays(of.edge_of), of.rate(drive)
    policies = {
        STAY: Policy(rule=None),
        NEAREST: Policy(at_once=True),
        RULE: Policy(),
        SLOW: Policy(Rule(trigger_s=3.0)),
        ANNOUNCED: Policy(hot=of.num_hot),
        BOTH: Policy(hot=of.num_hot, both=True),
    }
    found = {
        name: Roamer(stays, rate, of.misses, COSTS, policy, history=of.history(drive)).run()
        for name, policy in policies.items()
    }
    told = {name: columns(of, roamed) for name, roamed in found.items()}
    return {"recorded": recorded, "seconds": drive.end_s, "stays": len(stays), "policies": told}


def fault_row(of: Driver, kind: str) -> Row:
    """The serving node dies for good, or stalls, or nothing gets through, for 30 s; two nodes, of which one is near."""
    drive = max(of.drives, key=lambda drive: max(stay.end_s - stay.begin_s for stay in drive.stays(of.edge_of)))
    stay = max(drive.stays(of.edge_of), key=lambda stay: stay.end_s - stay.begin_s)
    nodes = sorted({*of.edge_of.values()})
    end_s = FAULT_DRIVE_S if kind == "kill" else FAULT_AT_S + FAULT_S
    fault = Fault(kind, FAULT_AT_S, end_s)
    rate = LinkRate.steady(STEADY_MBPS * BPS_PER_MBPS, FAULT_DRIVE_S)
    stays = [stay._replace(begin_s=0.0, end_s=FAULT_DRIVE_S)]
    policy = Policy(hot=of.num_hot, both=True)
    roamer = Roamer(stays, rate, of.misses, COSTS, policy, fault, warm={node: {} for node in nodes})
    roamed = roamer.run()
    during = [token.took_s for token in roamed.tokens if FAULT_AT_S <= token.at_s <= FAULT_AT_S + FAULT_S]
    moves = [(at_s, node, event) for at_s, node, event in roamed.moves if at_s > FAULT_AT_S]
    return {
        "longest_gap_ms": 1e3 * max(during, default=FAULT_S),
        "tokens_during": len(during),
        "counts": roamed.counts,
        "moves": moves,
    }


def columns(of: Driver, roamed: Roamed) -> Row:
    """What a policy made of a drive."""
    took_s = np.array([token.took_s for token in roamed.tokens])
    moments = handovers(roamed)
    soon = after(roamed, moments, SOON_S)
    remote = sum(token.remote for token in roamed.tokens)
    return {
        "tokens": len(took_s),
        "median_ms": 1e3 * float(np.median(took_s)),
        "p95_ms": 1e3 * float(np.quantile(took_s, 0.95)),
        "soon_p95_ms": 1e3 * float(np.quantile(soon, 0.95)) if soon else None,
        "handovers": len(moments),
        "returns": returns(roamed),
        "counts": roamed.counts,
        "far_share": roamed.far_s / roamed.tokens[-1].at_s,
        "hit_rate": sum(token.warm for token in roamed.tokens) / max(1, remote),
        "recovery_s": [recovery_s(roamed.tokens, at_s) for at_s in moments],
        "node_recovery_s": [recovery_s(roamed.tokens, at_s, own=True) for at_s in moments],
        "announced_share": roamed.announced / of.traveller.ladder.num_experts / max(1, len(moments)),
    }
