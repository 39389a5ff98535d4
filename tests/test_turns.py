"""Two sides that decode in turns: who goes when, and what counts as decoding."""

from collections.abc import Iterator, Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from comoe.bench.turns import Side, decode_in_turns


class Handle:
    """Uses and reads that grow as the stub decodes: a prompt of 10 uses and 1000 bytes, then 2 uses and 3 bytes."""

    def __init__(self) -> None:
        self.begin_request()

    def begin_request(self) -> None:
        self.uses = self.hits = self.read = 0

    def step(self, uses: int, hits: int, read: int) -> None:
        self.uses, self.hits, self.read = self.uses + uses, self.hits + hits, self.read + read

    def stats(self) -> dict[str, Any]:
        rates = {"hit_rate": self.hits / self.uses, "floor_rate": 0.0}
        return {
            "uses": self.uses,
            **rates,
            "bytes_read": {"flash": self.read},
            "loss_ledger": self.uses / 1000,
            "expert_s": self.uses / 100,
        }


class StubEvaluation:
    """Stands for a model that always hits once a token's other expert missed; `log` notes whose turn it is."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.model = name, log, SimpleNamespace(comoe=Handle())

    def steps(self, window: Sequence[int], clock: Any) -> Iterator[tuple[float, float]]:
        self.log.append(self.name)
        self.model.comoe.step(10, 0, 1000)
        for token in window:
            self.model.comoe.step(2, 1, 3)
            yield float(token), clock()


def side(name: str, log: list[str]) -> Side:
    return Side(StubEvaluation(name, log))  # type: ignore[arg-type]


def test_the_first_step_and_its_prompt_are_no_decoding() -> None:
    ticks = count()
    found = side("a", [])
    found.decode([1, 2, 3, 4], 3, lambda: next(ticks))
    found.decode([5, 6, 7, 8], 3, lambda: next(ticks))
    assert [nats.tolist() for nats in found.nats] == [[1, 2, 3], [5, 6, 7]]
    assert [ms.tolist() for ms in found.ms] == [[0, 1, 2], [3, 4, 5]]
    assert found.rate("hit") == pytest.approx(0.5)
    assert dict(found.uses) == {"all": 8, "hit": 4, "floor": 0}
    assert dict(found.bytes_read) == {"flash": 12}
    assert dict(found.bytes_read_first) == {"flash": 2006}
    assert found.ledger == [0.016, 0.016]
    assert found.expert_s == pytest.approx(0.08)


def test_sides_take_turns_and_take_turns_in_going_first() -> None:
    log: list[str] = []
    sides = side("a", log), side("b", log)
    decode_in_turns(sides, [[1], [2], [3]], 1, lambda: 0.0)
    assert "".join(log) == "baabba"
    assert [len(one.nats) for one in sides] == [3, 3]
