"""Text as it comes: stop strings never show, whatever the pieces; what was asked for is what transformers is told."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comoe.make.pack import pack
from comoe.make.recipe import Recipe
from comoe.runtime.generate import Sampling, StopFilter, generate, prompt_ids, tokenizer_of
from comoe.runtime.load import load
from comoe.types import UsageError

letters = st.text("abc", min_size=1, max_size=4)


@given(pieces=st.lists(letters, max_size=12), stop=st.lists(letters, max_size=3))
@settings(deadline=None)
def test_what_is_shown_ends_before_the_first_stop_string_however_it_comes(pieces: list[str], stop: list[str]) -> None:
    seen: list[str] = []
    shown = StopFilter(tuple(stop), seen.append)
    for piece in pieces:
        shown(piece)
    shown.flush()
    whole = "".join(pieces)
    complete = [(at + len(word), at) for word in stop if (at := whole.find(word)) >= 0]
    _, end = min(complete, default=(len(whole), len(whole)))
    assert "".join(seen) == "".join(shown.shown) == whole[:end]


def test_text_that_cannot_become_a_stop_string_is_shown_at_once() -> None:
    seen: list[str] = []
    shown = StopFilter(("END",), seen.append)
    shown("so E")
    assert seen == ["so "]
    shown("xtra")
    assert seen == ["so ", "Extra"]


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": 0}, {"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}],
)
def test_sampling_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**wrong)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def packed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("generate") / "tiny.comoe"
    pack(tiny_checkpoint, target, Recipe(), lambda step, done: None)
    return target


def test_the_seed_decides_sampled_text_and_the_budget_does_not(packed: Path) -> None:
    tokenizer = tokenizer_of(packed)
    answers = {}
    for budget in ("30%", "100%"):
        model = load(packed, expert_memory=budget)
        with model.comoe:
            ids = prompt_ids(tokenizer, model.config, "fox")
            for seed in (1, 2):
                sampling = Sampling(max_new_tokens=16, temperature=1.0, seed=seed, ignore_eos=True)
                answers[budget, seed] = generate(model, tokenizer, ids, sampling).token_ids
    assert answers["30%", 1] == answers["100%", 1]
    assert answers["30%", 1] != answers["30%", 2]
    assert all(len(found) == 16 for found in answers.values())


def test_greedy_text_is_that_of_plain_generate(packed: Path) -> None:
    tokenizer = tokenizer_of(packed)
    model = load(packed, expert_memory="50%")
    with model.comoe:
        ids = prompt_ids(tokenizer, model.config, "the fox")
        answer = generate(model, tokenizer, ids, Sampling(max_new_tokens=12))
        with torch.inference_mode():
            plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert list(answer.token_ids) == plain[0, ids.shape[1] :].tolist()
    assert answer.ms_per_token is not None and answer.framework_ms_per_token is not None
    assert 0 <= answer.framework_ms_per_token <= answer.ms_per_token
