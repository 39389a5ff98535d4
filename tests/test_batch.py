"""Runs of several devices together: the same outputs as alone, no waiting where nobody else asks."""

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from runs import request_of

from comoe.forms.plain import Floats
from comoe.net.wire import RunRequest
from comoe.serve.batch import Batcher
from comoe.serve.expertruns import Key
from comoe.types import CorruptBlob

KEYS = [Key("toy", layer, "silu", True) for layer in range(3)]


def asked(value: float, expert: int = 0) -> RunRequest:
    return request_of(np.full((1, 4), value), [expert], [0])


class Blocked:
    """Runs nothing before it is let go; says which batches it was given. Experts from 9 on are broken."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.batches: list[tuple[int, int]] = []

    def __call__(self, key: Key, requests: Sequence[RunRequest]) -> list[Floats]:
        self.batches.append((key.layer, len(requests)))
        assert self.go.wait(30)
        if any(int(request.uses.expert.max()) >= 9 for request in requests):
            raise CorruptBlob("a broken blob.")
        return [request.x * 2 for request in requests]


async def settled(work: list["asyncio.Task[Floats]"], go: threading.Event) -> list[Floats | BaseException]:
    await asyncio.sleep(0.05)
    go.set()
    return await asyncio.wait_for(asyncio.gather(*work, return_exceptions=True), 30)


def test_what_waits_for_one_layer_runs_together_and_everybody_gets_his_own() -> None:
    async def main() -> None:
        run = Blocked()
        batcher = Batcher(run, 1, 0.001)
        keys = [KEYS[0], KEYS[1], KEYS[2], KEYS[1], KEYS[2], KEYS[1]]
        work = [asyncio.create_task(batcher.outputs(key, asked(at))) for at, key in enumerate(keys)]
        await asyncio.sleep(0.02)
        assert batcher.queue == 5
        found = await settled(work, run.go)
        assert [float(np.asarray(y)[0, 0]) for y in found] == [0, 2, 4, 6, 8, 10]
        assert run.batches == [(0, 1), (1, 3), (2, 2)] and batcher.queue == 0
        batcher.close()

    asyncio.run(main())


def test_a_broken_expert_fails_those_that_asked_for_it_only() -> None:
    async def main() -> None:
        run = Blocked()
        batcher = Batcher(run, 1, 0.001)
        experts = [0, 1, 9, 2]
        work = [asyncio.create_task(batcher.outputs(KEYS[0], asked(1, expert))) for expert in experts]
        found = await settled(work, run.go)
        assert [isinstance(y, CorruptBlob) for y in found] == [False, False, True, False]
        assert float(np.asarray(await batcher.outputs(KEYS[0], asked(3)))[0, 0]) == 6
        batcher.close()

    asyncio.run(main())


def test_who_gave_up_waiting_costs_nothing() -> None:
    async def main() -> None:
        run = Blocked()
        batcher = Batcher(run, 1, 0.001)
        first = asyncio.create_task(batcher.outputs(KEYS[0], asked(1)))
        await asyncio.sleep(0.02)
        second = asyncio.create_task(batcher.outputs(KEYS[1], asked(2)))
        await asyncio.sleep(0.02)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        found = await settled([first], run.go)
        assert float(np.asarray(found[0])[0, 0]) == 2
        await asyncio.sleep(0.05)
        assert run.batches[0] == (0, 1) and sum(size for _, size in run.batches) == 1
        batcher.close()

    asyncio.run(main())
