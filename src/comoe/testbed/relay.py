"""A relay of TCP connections that adds what a wire on one machine has not: a round trip, and losses as delays.

`python -m comoe.testbed.relay LISTEN_PORT HOST PORT RTT_MS LOSS [SEED]`; each line `RTT_MS LOSS` on stdin changes both.
Every piece is passed on half a round trip late, in order; with the chance that a packet of it was lost, a round trip
later still, as sent again. How fast is the wire's matter: see `testbed.shaping`.
"""

import asyncio
import random
import sys
from asyncio import StreamReader, StreamWriter
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from typing import TextIO

PIECE = 16384
PACKET = 1448
WAITING = 256
"""Pieces under way in one direction: as much as a window of some megabytes."""


@dataclass(slots=True)
class Way:
    """Where connections go, and what happens to them on the way, which may change meanwhile."""

    host: str
    port: int
    rtt_s: float
    loss: float
    seed: int = 0


async def relay(listen: int, way: Way) -> asyncio.Server:
    """The relay at a port of all addresses, running."""
    chance = random.Random(way.seed)
    meeting = set[asyncio.Task[None] | None]()  # asyncio itself keeps none whose device has gone

    async def meet(reader: StreamReader, writer: StreamWriter) -> None:
        meeting.add(task := asyncio.current_task())
        try:
            far_reader, far_writer = await asyncio.open_connection(way.host, way.port)
        except OSError:
            writer.close()
            meeting.discard(task)
            return
        try:
            await asyncio.sleep(way.rtt_s)  # the handshake beyond the relay
            await asyncio.gather(_pass(reader, far_writer, way, chance), _pass(far_reader, writer, way, chance))
        finally:
            far_writer.close()
            writer.close()
            meeting.discard(task)

    return await asyncio.start_server(meet, "0.0.0.0", listen, limit=4 * PIECE)


async def _pass(reader: StreamReader, writer: StreamWriter, way: Way, chance: random.Random) -> None:
    """Pass bytes on, late, until one side ends."""
    pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(WAITING)
    sending = asyncio.create_task(_send(pieces, writer))
    clock = asyncio.get_running_loop().time
    with suppress(ConnectionError):
        while piece := await reader.read(PIECE):
            lost = chance.random() < 1 - (1 - way.loss) ** -(-len(piece) // PACKET)
            await pieces.put((clock() + way.rtt_s * (1.5 if lost else 0.5), piece))
    await pieces.put((clock() + way.rtt_s / 2, b""))
    await sending


async def _send(pieces: "asyncio.Queue[tuple[float, bytes]]", writer: StreamWriter) -> None:
    broken = False
    while True:
        due_s, piece = await pieces.get()
        if not piece:
            break
        if broken:
            continue
        await asyncio.sleep(max(0.0, due_s - asyncio.get_running_loop().time()))
        try:
            writer.write(piece)
            await writer.drain()
        except ConnectionError:
            broken = True
    with suppress(OSError):
        writer.write_eof()


def follow(way: Way, lines: TextIO) -> None:
    """Change the way whenever a line tells another one, to their end."""
    for line in lines:
        rtt_ms, loss = map(float, line.split())
        way.rtt_s, way.loss = rtt_ms / 1e3, loss


async def _main(words: list[str]) -> None:
    listen, host, port, rtt_ms, loss = words[:5]
    way = Way(host, int(port), float(rtt_ms) / 1e3, float(loss), int(words[5]) if len(words) > 5 else 0)
    Thread(target=follow, args=(way, sys.stdin), daemon=True).start()
    async with await relay(int(listen), way) as server:
        await server.serve_forever()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(_main(sys.argv[1:]))
