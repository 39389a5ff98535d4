"""A served model on a virtual clock: it takes what the replay of its own trace takes, and answers as ever."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import CALIBRATION

from comoe.bench.staged import columns, staged
from comoe.make.protocol import Evaluation
from comoe.make.trace import Turn, record, turns
from comoe.memory.policy import POLICIES
from comoe.plan.pin import Pin
from comoe.runtime.generate import tokenizer_of
from comoe.runtime.load import Loader
from comoe.runtime.options import Options
from comoe.sim.reader import Times
from comoe.sim.replay import Cell, reading_ahead, replay
from comoe.store.foresight import read_foresight
from comoe.store.pack import Pack
from comoe.types import CorruptBlob, ExpertId

TEXTS = [CALIBRATION, "314159 " * 30]
TIMES = Times(lambda nbytes: 1e-6 * nbytes, 2e-4, 3e-3, wake_s=1e-4, ahead_s=5e-5)


def loader(packed: Path, target: str = "exact", floor: str | None = None, **options: Any) -> Loader:
    found = Loader(Pack(packed), Options(context=256, dtype="float32", **options))
    found.pin = Pin(floor, target, float("inf") if floor else 0.0)
    return found


@pytest.fixture(scope="module")
def read(packed: Path) -> tuple[Any, list[Turn], list[float]]:
    """The trace of both texts, what was read in it, and the nats of all of it, with every expert in memory."""
    model, tokenizer = loader(packed).resident("exact"), tokenizer_of(packed)
    with model.comoe:
        evaluation = Evaluation.for_model(model, tokenizer)
        found = turns(evaluation, TEXTS, 60)
        nats = [nats for turn in found for nats, _ in evaluation.forced(turn.prompt, turn.target, lambda: 0.0)]
        return record(model, tokenizer, TEXTS, 60), found, nats


@pytest.mark.parametrize("prefetch", ["off", "on"])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_it_takes_the_milliseconds_of_the_replay_and_loses_nothing(
    packed: Path, read: tuple[Any, list[Turn], list[float]], policy: str, prefetch: str
) -> None:
    trace, found, nats = read
    pack = Pack(packed)
    capacity = 3 * pack.manifest.expert_bytes_bf16 // 8
    of = loader(packed, policy=policy, prefetch=prefetch)
    answers = staged(of, capacity, TIMES, tokenizer_of(packed), found)
    cell = Cell(capacity, POLICIES[policy]())
    if prefetch == "on":
        sizes = [layer.num_experts for layer in pack.manifest.layers]
        cell = reading_ahead(cell, trace, read_foresight(packed, sizes), always=True)
    told = replay(trace, cell, lambda expert: pack.manifest.blobs(expert, "exact"), pack.nbytes, TIMES)
    decode = trace.tokens == 1
    assert np.concatenate([answer.ms for answer in answers]) == pytest.approx(told.ms[decode])
    assert [answer.prompt_ms for answer in answers] == pytest.approx(told.ms[~decode])
    assert np.concatenate([answer.nats for answer in answers]).tolist() == nats
    assert 0 < columns(answers)["hit_rate"] < 1 and told.ms[decode].std() > 0


def test_misses_take_the_floor_as_in_the_runtime(packed: Path, read: tuple[Any, list[Turn], list[float]]) -> None:
    _, found, nats = read
    step = min(loader(packed).pack.manifest.chain, key=lambda step: step.resident_bytes).name
    capacity = loader(packed).ladder.rung(step).nbytes + loader(packed).pack.manifest.expert_bytes_bf16 // 4
    bounded = loader(packed, "exact", step, max_loss=10.0, prefetch="off")
    row = columns(answers := staged(bounded, capacity, TIMES, tokenizer_of(packed), found))
    assert row["floor_rate"] > 0.1
    assert np.concatenate([answer.nats for answer in answers]).tolist() != nats


def test_a_read_that_fails_is_raised(packed: Path, read: tuple[Any, list[Turn], list[float]], monkeypatch: Any) -> None:
    def broken(self: Pack, blob: Any, into: memoryview) -> None:
        raise CorruptBlob(f"{ExpertId(*blob[::2])} is broken")

    monkeypatch.setattr(Pack, "read", broken)
    with pytest.raises(CorruptBlob, match="is broken"):
        staged(loader(packed), 1 << 20, TIMES, tokenizer_of(packed), read[1])
