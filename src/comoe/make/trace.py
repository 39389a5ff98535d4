"""`comoe trace`: a served model reads text token by token, and what it uses is recorded."""

from collections.abc import Sequence
from time import perf_counter
from typing import Any, NamedTuple

from comoe.make.protocol import Evaluation
from comoe.make.text import token_ids, windows
from comoe.runtime.recorder import recording
from comoe.store.trace import Trace
from comoe.types import Progress, UsageError

PROMPT_TOKENS = 32
"""Of a window, what a decoder reads at once, as a prompt; of a short one at most half."""

CONTEXT = 256
"""Tokens that memory is for: no window holds more."""


class Turn(NamedTuple):
    """A window's tokens: of the text of this index, those that are read at once and those that are decoded."""

    text: int
    prompt: list[int]
    target: list[int]


def record(
    model: Any, tokenizer: Any, texts: Sequence[str], num_tokens: int, progress: Progress = lambda step, done: None
) -> Trace:
    """The trace of decoding about `num_tokens` tokens of `texts`, as many of each, window by window.

    A window's prompt is read at once, the rest token by token; texts take turns. UsageError where one has no tokens.
    """
    evaluation = Evaluation.for_model(model, tokenizer)
    found = turns(evaluation, texts, num_tokens)
    with recording(model) as recorder:
        for at, turn in enumerate(found):
            progress(f"decoding {len(turn.target)} tokens of each window", at / len(found))
            for _ in evaluation.forced(turn.prompt, turn.target, perf_counter):
                pass
    return recorder.trace()


def turns(evaluation: Evaluation, texts: Sequence[str], num_tokens: int) -> list[Turn]:
    """What `record` reads, in order."""
    longest = len(_split(evaluation, range(evaluation.window_length))[1])
    number = -(-num_tokens // (longest * len(texts)))
    each = -(-num_tokens // (number * len(texts)))
    cut = [_windows(evaluation, text, number) for text in texts]
    found = []
    for at in range(number):
        for text, mine in enumerate(cut):
            if at < len(mine):
                prompt, target = _split(evaluation, mine[at])
                found.append(Turn(text, prompt, target[:each]))
    return found


def _windows(evaluation: Evaluation, text: str, number: int) -> list[list[int]]:
    """The first `number` windows of a text; of one that fills none, all that there is."""
    found = windows(evaluation.tokenizer, text, evaluation.window_length, number)
    if not found:
        found = [token_ids(evaluation.tokenizer, text)]
    if len(found[0]) < 2:
        raise UsageError("there is nothing to read: give text of at least two tokens.")
    return found


def _split(evaluation: Evaluation, window: Sequence[int]) -> tuple[list[int], list[int]]:
    """A window's prompt and target: the protocol's, but that a decoder has a prompt."""
    prompt, target = evaluation.split(window)
    if not evaluation.model.config.is_encoder_decoder:
        more = min(PROMPT_TOKENS, len(window) // 2) - len(prompt)
        prompt, target = [*prompt, *target[:more]], target[more:]
    return prompt, target
