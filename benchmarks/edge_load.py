"""What one edge node bears, and what a remote run costs beside the round trip: one JSON document on stdout.

A pack of experts as large as Switch-Base's (768 to 3,072, bf16, random weights) is served by `comoe edge` in a process
of its own, everything in memory. Ever more clients, tasks of this process with a connection each, ask as fast as they
are answered; a refused one waits as it is told. The overhead is the median exchange over that of an echo of the same
bytes. All of it shares this machine's cores, so trust ratios more than numbers. Raw results lie beside it, in
edge_load.json.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np

from comoe.device.machine import machine
from comoe.forms.plain import PlainMath
from comoe.net.remote_run import manifest_hash
from comoe.net.wire import IDENTITY_BYTES, RunRequest, Uses, encode_request
from comoe.store.blobfile import BlobWriter
from comoe.store.layout import layout
from comoe.store.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    LayerEntry,
    LeafEntry,
    Manifest,
    PartEntry,
    Provenance,
    encode,
)
from comoe.types import Leaf, Site

HIDDEN, INNER, LAYERS, EXPERTS = 768, 3072, 2, 16
LEAVES = (Leaf("wi", (INNER, HIDDEN)), Leaf("wo", (HIDDEN, INNER)))
SITE = Site("experts", EXPERTS, LEAVES, "bfloat16")
CLIENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SECONDS, PROBES, SEED = 4.0, 400, 0
RANGE_BYTES = 256 << 10
NODE_MEMORY = "1GiB"
ECHO = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
asked, answered = map(int, sys.argv[1:])
while True:
    left = asked
    while left:
        data = connection.recv(left)
        if not data:
            sys.exit()
        left -= len(data)
    connection.sendall(bytes(answered))
"""


@dataclass(slots=True)
class Seen:
    """What clients saw: seconds of answers, refusals, and anything else."""

    seconds: list[float] = field(default_factory=list)
    refused: int = 0
    errors: int = 0


def make_pack(folder: Path) -> Path:
    """A pack of random exact experts and nothing else."""
    rng = np.random.default_rng(SEED)
    folder.mkdir()
    layers = []
    for at in range(LAYERS):
        writer = BlobWriter(folder, f"{at:03}-exact", layout(SITE, "exact"), EXPERTS)
        for _ in range(EXPERTS):
            weights = rng.standard_normal(2 * HIDDEN * INNER, np.float32) / 32
            writer.add((weights.view(np.uint32) >> 16).astype(np.uint16).tobytes())
        part = PartEntry(rows=EXPERTS, nbytes=layout(SITE, "exact").nbytes, file=writer.commit().name)
        layers.append(
            LayerEntry("experts", EXPERTS, tuple(LeafEntry(x.name, x.shape) for x in LEAVES), {"exact": part})
        )
    made = Provenance("0", "0", "none", 0, SEED)
    manifest = Manifest(FORMAT_VERSION, "switch", "bfloat16", 1, ("exact",), tuple(layers), (), made, 0)
    (folder / MANIFEST).write_bytes(encode(manifest))
    return folder


def asked(folder: Path, layer: int, expert: int) -> bytes:
    """One expert on one row."""
    one = np.zeros(1, np.uint16)
    uses = Uses(np.array([expert], np.uint16), one, np.ones(1, np.float32), np.zeros(1, np.uint8))
    x = np.random.default_rng(SEED).standard_normal((1, HIDDEN), np.float32)
    identity = bytes.fromhex(manifest_hash(folder))[:IDENTITY_BYTES]
    return encode_request(RunRequest(identity, layer, "float32", "relu", False, uses, x))


def runs(folder: Path) -> Callable[[random.Random], bytes]:
    """Draws a request to run a random expert."""
    bodies = [asked(folder, layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
    head = b"POST /packs/" + folder.name.encode() + b"/run HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    return lambda rng: head % len(bodies[0]) + rng.choice(bodies)


def ranges(folder: Path) -> Callable[[random.Random], bytes]:
    """Draws a request for a quarter of a MiB of a random blob."""
    paths = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    head = "GET /packs/{}/{} HTTP/1.1\r\nHost: x\r\nRange: bytes={}-{}\r\n\r\n"

    def draw(rng: random.Random) -> bytes:
        path = rng.choice(paths)
        start = rng.randrange(path.stat().st_size - RANGE_BYTES)
        return head.format(folder.name, path.name, start, start + RANGE_BYTES - 1).encode()

    return draw


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> int:
    """Status of the answer, which leaves the connection open."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    await reader.readexactly(int(length[1]) if length else 0)
    return int(head[9:12])


async def client(port: int, draw: Callable[[random.Random], bytes], until_s: float, seen: Seen, seed: int) -> None:
    rng, opened = random.Random(seed), None
    while perf_counter() < until_s:
        try:
            opened = opened or await asyncio.open_connection("127.0.0.1", port)
            start_s = perf_counter()
            status = await exchange(*opened, draw(rng))
        except (OSError, asyncio.IncompleteReadError):
            seen.errors, opened = seen.errors + 1, None
            await asyncio.sleep(0.1)
            continue
        end_s = perf_counter()
        if status in (200, 206):
            seen.seconds += [end_s - start_s] if end_s < until_s else []
            continue
        seen.refused += status == 429
        seen.errors += status != 429
        await asyncio.sleep(min(rng.uniform(0.5, 1.5), until_s - end_s))
    if opened is not None:
        opened[1].close()


async def loaded(port: int, draw: Callable[[random.Random], bytes], clients: int, seconds: float) -> dict[str, Any]:
    seen, until_s = Seen(), perf_counter() + seconds
    await asyncio.gather(*(client(port, draw, until_s, seen, seed) for seed in range(clients)))
    ms = 1e3 * np.array(seen.seconds or [np.nan])
    return {
        "clients": clients,
        "answers_per_s": len(seen.seconds) / seconds,
        "ms_p50": float(np.quantile(ms, 0.5)),
        "ms_p99": float(np.quantile(ms, 0.99)),
        "refused": seen.refused,
        "errors": seen.errors,
    }


async def echoed(request: bytes, answer_bytes: int) -> list[float]:
    """Seconds of exchanges of as many bytes with a process that computes nothing."""
    command = [sys.executable, "-S", "-c", ECHO, str(len(request)), str(answer_bytes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", int(process.stdout.readline()))
        found = []
        for _ in range(PROBES):
            start_s = perf_counter()
            writer.write(request)
            await reader.readexactly(answer_bytes)
            found.append(perf_counter() - start_s)
        writer.close()
        await writer.wait_closed()
    return found


async def overhead(port: int, folder: Path) -> dict[str, Any]:
    """One device alone: what a run takes beside the round trip of its bytes, and what the expert itself does."""
    draw, rng, seconds = runs(folder), random.Random(SEED), []
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(PROBES):
        request = draw(rng)
        start_s = perf_counter()
        assert await exchange(reader, writer, request) == 200
        seconds.append(perf_counter() - start_s)
    writer.close()
    echo = await echoed(draw(rng), 16 + 4 * HIDDEN + 150)
    run_ms, echo_ms, expert_ms = (1e3 * float(np.median(times)) for times in (seconds, echo, computed(folder)))
    return {
        "run_ms": run_ms,
        "run_ms_p99": 1e3 * float(np.quantile(seconds, 0.99)),
        "echo_ms": echo_ms,
        "overhead_ms": run_ms - echo_ms,
        "expert_alone_ms": expert_ms,
        "overhead_beside_expert_ms": run_ms - echo_ms - expert_ms,
    }


def computed(folder: Path) -> list[float]:
    """Seconds of the same experts in this process, each from memory that no cache holds."""
    path = next(path for path in folder.iterdir() if path.name.startswith("000"))
    blobs = np.fromfile(path, np.uint8, offset=path.stat().st_size - EXPERTS * layout(SITE, "exact").stride)
    rows, maths = blobs.reshape(EXPERTS, -1), PlainMath(SITE, "relu", False)
    x, rng, found = np.ones((1, HIDDEN), np.float32), random.Random(SEED), []
    for _ in range(PROBES):
        row = rng.choice(rows)[: layout(SITE, "exact").nbytes]
        start_s = perf_counter()
        maths.run("exact", [row], x)
        found.append(perf_counter() - start_s)
    return found


@asynccontextmanager
async def node(folder: Path) -> AsyncIterator[tuple[int, int]]:
    """A node's port and process; it must end well."""
    words = ("edge", folder, "--listen", "127.0.0.1:0", "--memory", NODE_MEMORY, "--threads", 1)
    process = subprocess.Popen([sys.executable, "-m", "comoe", *map(str, words)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    found = re.search(r":(\d+)$", process.stderr.readline().strip())
    assert found, "the node did not start"
    yield int(found[1]), process.pid
    process.terminate()
    assert process.wait(60) == 0, "the node did not end well"


def peak_bytes(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


async def measure(folder: Path, seconds: float) -> dict[str, Any]:
    rows = []
    async with node(folder) as (port, pid):
        for path in folder.iterdir():  # everything into memory
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await exchange(reader, writer, f"GET /packs/{folder.name}/{path.name} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            writer.close()
        alone = await overhead(port, folder)
        for kind, draw in (("run", runs(folder)), ("range", ranges(folder))):
            for clients in CLIENTS:
                rows.append({"kind": kind, **await loaded(port, draw, clients, seconds)})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        peak = peak_bytes(pid)
    return {**alone, "peak_bytes": peak, "errors": sum(row["errors"] for row in rows), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of every row")
    seconds = parser.parse_args().seconds
    with TemporaryDirectory() as folder:
        found = asyncio.run(measure(make_pack(Path(folder) / "switch.comoe"), seconds))
    settings = {
        "hidden": HIDDEN,
        "inner": INNER,
        "experts": LAYERS * EXPERTS,
        "range_bytes": RANGE_BYTES,
        "seconds_per_row": seconds,
        "node_memory": NODE_MEMORY,
        "node_threads": 1,
        "most_requests": 64,
    }
    print(json.dumps({"name": "edge_load", "machine": machine(), "settings": settings, **found}, indent=1))


if __name__ == "__main__":
    main()
