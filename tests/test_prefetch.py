"""Reading ahead: tried on time, switched off where it does not pay, driven by what foretells best."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from commands import CALIBRATION

from comoe.memory.prefetch import BLOCK, LEAST_CHANCE, LONGEST_REST, PAIRS, REST, Prefetcher, Trial
from comoe.runtime.generate import tokenizer_of
from comoe.runtime.load import load
from comoe.store.foresight import Floats, Link
from comoe.types import ExpertId, UsageError

TRIED = 2 * PAIRS * BLOCK


def spend(trial: Trial, tokens: int, seconds: Callable[[bool], float]) -> list[bool]:
    """Whether each of so many tokens was decoded with it, if that decides what they take."""
    was = []
    for _ in range(tokens):
        was.append(trial.on)
        trial.token(seconds(trial.on))
    return was


def test_what_saves_time_stays_and_what_costs_time_goes() -> None:
    for saves in (True, False):
        trial = Trial()
        was = spend(trial, TRIED, lambda on, saves=saves: 1.0 if on == saves else 1.1)
        assert sum(was) == TRIED / 2 and not was[0]
        assert (trial.trying, trial.on) == (False, saves)


def test_what_makes_no_difference_stays_off() -> None:
    trial = Trial()
    noise = np.random.default_rng(0)
    spend(trial, TRIED, lambda on: 1.0)
    assert not trial.on
    verdicts = []
    for _ in range(200):
        trial = Trial()
        spend(trial, TRIED, lambda on: float(noise.normal(1.0, 0.1)))
        verdicts.append(trial.on)
    assert 0.05 < np.mean(verdicts) < 0.3  # one standard error: one in six or seven


def test_it_is_tried_again_ever_more_rarely_until_the_verdict_changes() -> None:
    trial, rests = Trial(), []
    costs = {True: 1.1, False: 1.0}
    for _ in range(7):
        spend(trial, TRIED, costs.__getitem__)
        rest = 0
        while not trial.trying:
            trial.token(1.0)
            rest += 1
        rests.append(rest)
    assert rests[:5] == [REST, 2 * REST, 4 * REST, 8 * REST, 16 * REST] and max(rests) == LONGEST_REST
    costs[True] = 0.9
    spend(trial, TRIED, costs.__getitem__)
    assert trial.on and spend(trial, REST, costs.__getitem__) == [True] * REST and trial.trying


class Says:
    """A predictor that is sure of some experts."""

    def __init__(self, *experts: int) -> None:
        self._chances = np.full(8, 0.1, np.float32)
        self._chances[list(experts)] = LEAST_CHANCE + 0.1
        self.seen: list[int] = []

    def chances(self, link: Link, x: Floats) -> Floats:
        self.seen.append(len(x))
        return self._chances

    def used(self, layer: int, experts: Sequence[int], tokens: int) -> None:
        return


LINKS = (Link(0, 1), Link(1, 0, later=True))


def steps(prefetcher: Prefetcher, tokens: int, seconds: Callable[[bool], float]) -> list[list[ExpertId]]:
    """What is said at every step of a model of two layers that decodes so many tokens, which use experts 1 and 2."""
    now_s, said = 0.0, []
    for _ in range(tokens):
        at_s = now_s
        said += [prefetcher.step(layer, 1, [1, 2], lambda: np.zeros((1, 0), np.float32), at_s) for layer in (0, 1)]
        now_s += seconds(bool(said[-1]))
    return said


def test_the_predictor_that_foretells_best_drives() -> None:
    prefetcher = Prefetcher({"wrong": Says(5, 6), "right": Says(1, 2)}, LINKS, always=True)
    said = steps(prefetcher, 3, lambda on: 1.0)
    assert said[0] == [ExpertId(1, 5), ExpertId(1, 6)]
    assert said[-2:] == [[ExpertId(1, 1), ExpertId(1, 2)], [ExpertId(0, 1), ExpertId(0, 2)]]
    assert prefetcher.recall["right"].value == 1 and prefetcher.recall["wrong"].value == 0


@pytest.mark.parametrize("pays", [True, False])
def test_it_goes_on_while_it_pays_and_asks_nobody_where_it_does_not(pays: bool) -> None:
    predictor = Says(1, 2)
    prefetcher = Prefetcher({"it": predictor}, LINKS)
    steps(prefetcher, TRIED + 1, lambda on: 1.0 if on == pays else 1.2)
    predictor.seen.clear()
    said = steps(prefetcher, 20, lambda on: 1.0)
    assert all(map(bool, said)) == pays and len(predictor.seen) == 40 * pays


def test_a_prompt_is_read_ahead_at_once_and_its_last_token_foretells_the_answer() -> None:
    predictor = Says(3)
    prefetcher = Prefetcher({"it": predictor}, LINKS)
    for layer in (0, 1):
        assert prefetcher.step(layer, 9, [1], lambda: np.zeros((9, 4), np.float32), 0.0) == [ExpertId(1 - layer, 3)]
    assert predictor.seen == [9, 1]


# Live


@pytest.mark.parametrize("prefetch", ["on", "auto", "off"])
def test_outputs_are_the_same_whatever_is_read_ahead(packed: Path, prefetch: str) -> None:
    tokenizer = tokenizer_of(packed)
    ids = tokenizer(CALIBRATION[:60], return_tensors="pt").input_ids
    answers = []
    for how in (prefetch, "off"):
        model = load(packed, expert_memory="30%", context=256, prefetch=how)
        with model.comoe as comoe:
            answers.append(model.generate(ids, max_new_tokens=40, do_sample=False).tolist())
            ahead = comoe.stats()["prefetched_bytes"]
            assert (ahead > 0) == (how == "on") or how == "auto"
    assert answers[0] == answers[1]


def test_an_unknown_way_to_prefetch_is_refused(packed: Path) -> None:
    with pytest.raises(UsageError, match="choose from auto, on, off"):
        load(packed, expert_memory="30%", prefetch="maybe")
