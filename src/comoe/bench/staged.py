"""A model that is really served, on a virtual clock: what it answers, and what that would take a device.

Nothing here depends on how busy the machine is. Routers may choose by what is in memory, misses may take a floor, and
what that loses is measured in the same run.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from comoe.bench.rows import Row
from comoe.make.protocol import Evaluation
from comoe.make.score import DomainScore, Floats, Score
from comoe.make.trace import Turn
from comoe.runtime.load import Loader
from comoe.sim.clocked import ClockedCache
from comoe.sim.reader import Times
from comoe.store.families import experts_modules


class Answer(NamedTuple):
    """One turn: nats and milliseconds (T,) of its tokens, milliseconds of its prompt, and the handle's counters after
    the prompt with the first token, and at the end."""

    nats: Floats
    ms: Floats
    prompt_ms: float
    before: dict[str, Any]
    after: dict[str, Any]


def staged(loader: Loader, capacity: int, times: Times, tokenizer: Any, turns: Sequence[Turn]) -> list[Answer]:
    """What a model, served by the loader's pin in `capacity` bytes on a device of these times, makes of `turns`.

    Raises DoesNotFit.
    """
    loader.new_cache = partial(ClockedCache, times=times)
    model = loader.as_pinned(capacity)
    with model.comoe as handle:
        cache, evaluation = handle.cache, Evaluation.for_model(model, tokenizer)
        stacks = [name.partition(".")[0] for name, _ in experts_modules(model)]
        depth = Counter(stacks)

        def heed(layer: int, x: Any, uses: Any) -> None:
            cache.advance(len(x) * times.token_s / depth[stacks[layer]])

        with handle.heeded(heed):
            return [_answer(evaluation, turn) for turn in turns]


def _answer(evaluation: Evaluation, turn: Turn) -> Answer:
    handle = evaluation.model.comoe
    handle.begin_request()
    start_s = handle.cache.now_s()
    steps = evaluation.forced(turn.prompt, turn.target, handle.cache.now_s)
    first = next(steps)
    prompt_ms = 1e3 * (handle.cache.now_s() - start_s) - first[1]
    before = handle.stats()
    nats, ms = np.array([first, *steps]).T
    return Answer(nats, ms, prompt_ms, before, handle.stats())


def columns(answers: Sequence[Answer]) -> Row:
    """A row's columns of time and bytes, and of what the ledger made of it. Rates leave out every first token."""
    ms = np.concatenate([answer.ms for answer in answers])
    uses = sum(_more(answer, "uses") for answer in answers)
    read = sum(_read(answer.after) - _read(answer.before) for answer in answers)
    return {
        "ms": float(ms.mean()),
        "ms_p50_p95": np.quantile(ms, (0.5, 0.95)).tolist(),
        "prefill_ms": float(np.mean([answer.prompt_ms for answer in answers])),
        "bytes_per_token": read / sum(len(answer.ms) - 1 for answer in answers),
        "hit_rate": sum(_counted(answer, "hit_rate") for answer in answers) / max(uses, 1),
        "floor_rate": sum(_counted(answer, "floor_rate") for answer in answers) / max(uses, 1),
        "loss_ledger": float(np.mean([answer.after["loss_ledger"] for answer in answers])),
        "moved_share": float(np.mean([answer.after["moved_share"] for answer in answers])),
    }


def score(answers: Sequence[Answer], turns: Sequence[Turn], domains: Sequence[str]) -> Score:
    """Nats by domain; `domains` are those of the texts."""
    found: dict[str, list[Floats]] = {}
    for answer, turn in zip(answers, turns, strict=True):
        found.setdefault(domains[turn.text], []).append(answer.nats)
    return Score({
        name: DomainScore(np.array([nats.sum() for nats in each]), np.array([len(nats) for nats in each]))
        for name, each in found.items()
    })  # fmt: skip


def _more(answer: Answer, key: str) -> float:
    return float(answer.after[key] - answer.before[key])


def _counted(answer: Answer, rate: str) -> float:
    """So many uses, between the two counts, that a rate is of."""
    return float(answer.after[rate] * answer.after["uses"] - answer.before[rate] * answer.before["uses"])


def _read(stats: dict[str, Any]) -> int:
    return sum(stats["bytes_read"].values())
