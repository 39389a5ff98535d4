"""Remote runs of several devices, joined: those that ask for the same layer while others compute run together.

A device that is alone never waits. Where a thread is free while other requests are just arriving, it gives them
`window_s`.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from comoe.forms.plain import Floats
from comoe.net.wire import MAX_USES, RunRequest
from comoe.serve.expertruns import Key
from comoe.types import PackError, RemoteUnavailable

Run = Callable[[Key, Sequence[RunRequest]], list[Floats]]


class Item(NamedTuple):
    """A request that waits, and where its outputs go."""

    request: RunRequest
    outputs: "asyncio.Future[Floats]"


class Batcher:
    """Hands batches to `run` in `threads` threads. Lives in one event loop."""

    def __init__(self, run: Run, threads: int, window_s: float) -> None:
        self._run, self._window_s = run, window_s
        self._pool = ThreadPoolExecutor(threads, "comoe-run")
        self._free = threads
        self._waiting: dict[Key, list[Item]] = {}
        self._workers: set[asyncio.Task[None]] = set()
        self._arriving = 0

    @property
    def queue(self) -> int:
        """Requests that wait for a thread."""
        return sum(map(len, self._waiting.values()))

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """While a request's body comes in."""
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1

    async def outputs(self, key: Key, request: RunRequest) -> Floats:
        """What `run` returns for `request`, run with others that have the same key. Raises what `run` raises."""
        future: asyncio.Future[Floats] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, []).append(Item(request, future))
        if self._free:
            self._free -= 1
            worker = asyncio.create_task(self._work())
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)
        return await future

    def close(self) -> None:
        self._pool.shutdown()

    async def _work(self) -> None:
        """Run what waits, the longest waiting layer first, until nothing does."""
        try:
            while self._waiting:
                if self._arriving:
                    await asyncio.sleep(self._window_s)
                if self._waiting:
                    await self._run_next()
        finally:
            self._free += 1

    async def _run_next(self) -> None:
        key, items = next(iter(self._waiting.items()))
        batch = items[: _num_together(items)]
        del items[: len(batch)], self._waiting[key]
        if items:
            self._waiting[key] = items  # behind the other layers
        batch = [item for item in batch if not item.outputs.done()]
        try:
            await self._settle(key, batch)
        except Exception as error:
            for item in batch:
                if not item.outputs.done():
                    item.outputs.set_exception(error)

    async def _settle(self, key: Key, batch: Sequence[Item]) -> None:
        """Compute a batch; where a blob of it is broken, each request for itself."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._pool, self._run, key, [item.request for item in batch])
        except (PackError, RemoteUnavailable):
            if len(batch) == 1:
                raise
            for item in batch:
                await self._alone(key, item)
            return
        for item, outputs in zip(batch, found, strict=True):
            if not item.outputs.done():
                item.outputs.set_result(outputs)

    async def _alone(self, key: Key, item: Item) -> None:
        try:
            await self._settle(key, [item])
        except (PackError, RemoteUnavailable) as error:
            if not item.outputs.done():
                item.outputs.set_exception(error)


def _num_together(items: Sequence[Item]) -> int:
    """How many of the first requests run together: at least one, and at most `MAX_USES` uses."""
    uses = 0
    for at, item in enumerate(items):
        uses += len(item.request.uses)
        if uses > MAX_USES and at:
            return at
    return len(items)
