"""The evaluation protocol: text to windows, windows to nats, two scores to a loss with its interval.

Every published quality number comes through here, for decoder-only and for encoder-decoder models. Which
model is loaded, under which budget, and where the numbers are written, is the callers' matter.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from comoe.make.score import DomainScore, Floats
from comoe.make.text import special_id, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
    from transformers import PreTrainedTokenizerBase as Tokenizer

SPAN_TOKEN = "<extra_id_0>"
PREFIX_TOKENS = 160
NO_TARGET = -100

BATCH = 8
"""Windows that are scored at once."""


class ChunkItem(NamedTuple):
    """A multiple-choice question: which of `choices` continues `prefix`; `answer` is an index into them."""

    domain: str
    prefix: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """Teacher-forced decoding, one row per token: `nats` (tokens,) and the model call's `ms` (tokens,)."""

    nats: Floats
    ms: Floats


@dataclass(frozen=True, slots=True)
class Evaluation(ABC):
    """A model under the protocol; a subclass says how its architecture is asked.

    Everything asked is a prompt and a target: the prompt is read once, the target is scored given the prompt.
    Rows of one call have prompts of equal length, so that no padding stands ahead of what is scored.
    """

    model: "Model"
    tokenizer: "Tokenizer"
    batch: int = BATCH
    window_length: ClassVar[int]
    tokens_argument: ClassVar[str]

    @staticmethod
    def for_model(model: "Model", tokenizer: "Tokenizer", *, batch: int = BATCH) -> "Evaluation":
        """The model's protocol. ValueError for a model in training mode: dropout and jitter would count."""
        if model.training:
            raise ValueError("The model is in training mode; call model.eval() first.")
        return Evaluation.kind(model.config)(model, tokenizer, batch)

    @staticmethod
    def kind(config: Any) -> "type[Evaluation]":
        """The protocol of models with this config."""
        return EncoderDecoderEvaluation if config.is_encoder_decoder else DecoderEvaluation

    @abstractmethod
    def split(self, window: Sequence[int]) -> tuple[list[int], list[int]]:
        """A window's prompt and target."""

    @abstractmethod
    def prompt(self, prefix: Sequence[int]) -> list[int]:
        """The prompt that asks for the continuation of `prefix`."""

    @abstractmethod
    def begin(self, prompts: Tensor, copies: int) -> tuple[Tensor, dict[str, Any]]:
        """Read prompts (B, P): tokens (B * copies, 1) that precede the targets, and the model's arguments."""

    def nats(
        self, text_windows: Sequence[Sequence[int]], heed: Callable[[Tensor], None] = lambda logits: None
    ) -> DomainScore:
        """Nats of every window, `batch` windows of equal length at a time; `heed` gets the logits (B, T, V) of each."""
        nats, tokens = np.zeros(len(text_windows)), np.zeros(len(text_windows), np.int64)
        pairs = [self.split(window) for window in text_windows]
        for rows in _batches([(len(prompt), len(target)) for prompt, target in pairs], self.batch):
            targets = self._tensor([pairs[row][1] for row in rows])
            nats[rows] = self._score([pairs[row][0] for row in rows], targets, heed).double().sum(1).numpy()
            tokens[rows] = targets.shape[1]
        return DomainScore(nats, tokens)

    def next_chunk(self, items: Sequence[ChunkItem]) -> list[bool]:
        """Per item: has the answer the highest mean log-likelihood per token of all choices?"""
        right = [False] * len(items)
        prompts = [self.prompt(token_ids(self.tokenizer, item.prefix)) for item in items]
        keys = [(len(prompt), len(item.choices)) for prompt, item in zip(prompts, items, strict=True)]
        for rows in _batches(keys, self.batch):
            choices = [token_ids(self.tokenizer, choice) for row in rows for choice in items[row].choices]
            targets = pad_sequence([self._tensor(choice) for choice in choices], True, NO_TARGET)
            nats = self._score([prompts[row] for row in rows], targets).double().sum(1)
            best = (nats / (targets != NO_TARGET).sum(1)).view(len(rows), -1).argmin(1)
            for row, choice in zip(rows, best.tolist(), strict=True):
                right[row] = choice == items[row].answer
        return right

    def steps(self, window: Sequence[int], clock: Callable[[], float]) -> Iterator[tuple[float, float]]:
        """Nats and milliseconds of each target token of a window: see `forced`."""
        return self.forced(*self.split(window), clock)

    @torch.no_grad()
    def forced(
        self, prompt: Sequence[int], target: Sequence[int], clock: Callable[[], float]
    ) -> Iterator[tuple[float, float]]:
        """Nats and milliseconds of each target token: one model call each, keys and values kept between."""
        token, state = self.begin(self._tensor([prompt]), 1)
        for wanted in self._tensor([target])[0]:
            start_s = clock()
            output = self.model(**{self.tokens_argument: token}, **state, use_cache=True)
            ms = 1e3 * (clock() - start_s)
            yield float(cross_entropy(output.logits[0, -1].float(), wanted)), ms
            token, state = wanted.view(1, 1), {**state, "past_key_values": output.past_key_values}

    @torch.no_grad()
    def _score(
        self,
        prompts: Sequence[Sequence[int]],
        targets: Tensor,
        heed: Callable[[Tensor], None] = lambda logits: None,
    ) -> Tensor:
        """Nats (B * copies, T) of targets (B * copies, T); 0 where there is no target."""
        logits = self._logits(prompts, targets)
        heed(logits)
        flat = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NO_TARGET, reduction="none")
        return flat.view_as(targets).cpu()

    def logits(self, text_windows: Sequence[Sequence[int]]) -> Tensor:
        """Logits (B, T, V) of the targets of windows of equal length; gradients flow where they are asked for."""
        prompts, targets = zip(*map(self.split, text_windows), strict=True)
        return self._logits(prompts, self._tensor(targets))

    def _logits(self, prompts: Sequence[Sequence[int]], targets: Tensor) -> Tensor:
        """Logits (B * copies, T, V) of targets (B * copies, T)."""
        before, state = self.begin(self._tensor(prompts), len(targets) // len(prompts))
        given = torch.cat([before, targets[:, :-1].clamp(min=0)], 1)
        found: Tensor = self.model(**{self.tokens_argument: given}, **state, use_cache=False).logits
        return found

    def _tensor(self, ids: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(ids, device=self.model.device)


class DecoderEvaluation(Evaluation):
    """Decoder-only: positions 2..256 of a window; a choice, given the keys and values of its prefix."""

    __slots__ = ()
    window_length = 256
    tokens_argument = "input_ids"

    def split(self, window: Sequence[int]) -> tuple[list[int], list[int]]:
        return list(window[:1]), list(window[1:])

    def prompt(self, prefix: Sequence[int]) -> list[int]:
        return list(prefix[-PREFIX_TOKENS:])

    def begin(self, prompts: Tensor, copies: int) -> tuple[Tensor, dict[str, Any]]:
        last = prompts[:, -1:].repeat_interleave(copies, 0)
        if prompts.shape[1] == 1:
            return last, {}
        past = self.model(input_ids=prompts[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        if copies > 1:
            past.batch_repeat_interleave(copies)
        return last, {"past_key_values": past}


class EncoderDecoderEvaluation(Evaluation):
    """Encoder-decoder (Switch): the encoder reads 128 tokens and a span mark, the decoder fills the span."""

    __slots__ = ()
    window_length = 224
    source_length: ClassVar[int] = 128
    tokens_argument = "decoder_input_ids"

    def split(self, window: Sequence[int]) -> tuple[list[int], list[int]]:
        source, rest = window[: self.source_length], window[self.source_length : self.window_length - 1]
        return self._marked(source), [*rest, self.model.config.eos_token_id]

    def prompt(self, prefix: Sequence[int]) -> list[int]:
        return self._marked(prefix[-PREFIX_TOKENS:])

    def begin(self, prompts: Tensor, copies: int) -> tuple[Tensor, dict[str, Any]]:
        encoded = self.model.get_encoder()(input_ids=prompts)
        encoded.last_hidden_state = encoded.last_hidden_state.repeat_interleave(copies, 0)
        start = prompts.new_full((len(prompts) * copies, 1), self.model.config.decoder_start_token_id)
        return start, {"encoder_outputs": encoded}

    def _marked(self, source: Sequence[int]) -> list[int]:
        return [*source, special_id(self.tokenizer, SPAN_TOKEN), self.model.config.eos_token_id]


def decode(
    model: "Model",
    tokenizer: "Tokenizer",
    text_windows: Sequence[Sequence[int]],
    num_tokens: int = 512,
    clock: Callable[[], float] = perf_counter,
) -> Decoded:
    """Decode the windows' own targets token by token, so that a live expert cache is at work.

    `num_tokens` rows, fewer where the windows hold fewer. Each window begins afresh; an encoder-decoder reads
    its source first, outside `ms`. `clock` answers seconds.
    """
    evaluation = Evaluation.for_model(model, tokenizer)
    steps = (step for window in text_windows for step in evaluation.steps(window, clock))
    rows = np.array(list(islice(steps, num_tokens)), np.float64).reshape(-1, 2)
    return Decoded(rows[:, 0], rows[:, 1])


def _batches(keys: Sequence[Hashable], size: int) -> Iterator[list[int]]:
    """Indices of equal keys, at most `size` together."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    for group in groups.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))
