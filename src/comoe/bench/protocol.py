"""The evaluation protocol: text to windows, windows to nats, two scores to a loss with its interval.

Every published quality number comes through here, for decoder-only and for encoder-decoder models. Which
model is loaded, under which budget, and where the numbers are written, is the callers' matter.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from comoe.types import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
    from transformers import PreTrainedTokenizerBase as Tokenizer

DOCUMENT_TOKEN = "<|doc|>"
SPAN_TOKEN = "<extra_id_0>"
PREFIX_TOKENS = 160
NO_TARGET = -100
Floats = NDArray[np.float64]


class ChunkItem(NamedTuple):
    """A multiple-choice question: which of `choices` continues `prefix`; `answer` is an index into them."""

    domain: str
    prefix: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class DomainScore:
    """`nats` and `tokens`, each (windows,): the sum over a window's predicted tokens, and their number."""

    nats: Floats
    tokens: NDArray[np.int64]

    @property
    def nats_per_token(self) -> float:
        return float(self.nats.sum() / self.tokens.sum())


@dataclass(frozen=True, slots=True)
class Score:
    """One model's nats, window by window, per domain."""

    domains: Mapping[str, DomainScore]

    @property
    def nats_per_token(self) -> dict[str, float]:
        return {name: domain.nats_per_token for name, domain in self.domains.items()}

    @property
    def mean(self) -> float:
        """Nats per token, domains weighing the same."""
        return float(np.mean(list(self.nats_per_token.values())))


@dataclass(frozen=True, slots=True)
class Loss:
    """Relative increase of nats over the exact model's (0.02 = 2 %): mean over domains, and the worst."""

    mean: float
    ci95: tuple[float, float]
    worst_domain: str
    worst: float
    per_domain: Mapping[str, float]


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
    batch: int = 8
    window_length: ClassVar[int]
    tokens_argument: ClassVar[str]

    @staticmethod
    def for_model(model: "Model", tokenizer: "Tokenizer", *, batch: int = 8) -> "Evaluation":
        """The model's protocol. ValueError for a model in training mode: dropout and jitter would count."""
        if model.training:
            raise ValueError("The model is in training mode; call model.eval() first.")
        kind = EncoderDecoderEvaluation if model.config.is_encoder_decoder else DecoderEvaluation
        return kind(model, tokenizer, batch)

    @abstractmethod
    def split(self, window: Sequence[int]) -> tuple[list[int], list[int]]:
        """A window's prompt and target."""

    @abstractmethod
    def prompt(self, prefix: Sequence[int]) -> list[int]:
        """The prompt that asks for the continuation of `prefix`."""

    @abstractmethod
    def begin(self, prompts: Tensor, copies: int) -> tuple[Tensor, dict[str, Any]]:
        """Read prompts (B, P): tokens (B * copies, 1) that precede the targets, and the model's arguments."""

    def nats(self, text_windows: Sequence[Sequence[int]]) -> DomainScore:
        """Nats of every window, `batch` windows of equal length at a time."""
        nats, tokens = np.zeros(len(text_windows)), np.zeros(len(text_windows), np.int64)
        pairs = [self.split(window) for window in text_windows]
        for rows in _batches([(len(prompt), len(target)) for prompt, target in pairs], self.batch):
            targets = self._tensor([pairs[row][1] for row in rows])
            nats[rows] = self._score([pairs[row][0] for row in rows], targets).double().sum(1).numpy()
            tokens[rows] = targets.shape[1]
        return DomainScore(nats, tokens)

    def next_chunk(self, items: Sequence[ChunkItem]) -> list[bool]:
        """Per item: has the answer the highest mean log-likelihood per token of all choices?"""
        right = [False] * len(items)
        prompts = [self.prompt(_ids(self.tokenizer, item.prefix)) for item in items]
        keys = [(len(prompt), len(item.choices)) for prompt, item in zip(prompts, items, strict=True)]
        for rows in _batches(keys, self.batch):
            choices = [_ids(self.tokenizer, choice) for row in rows for choice in items[row].choices]
            targets = pad_sequence([self._tensor(choice) for choice in choices], True, NO_TARGET)
            nats = self._score([prompts[row] for row in rows], targets).double().sum(1)
            best = (nats / (targets != NO_TARGET).sum(1)).view(len(rows), -1).argmin(1)
            for row, choice in zip(rows, best.tolist(), strict=True):
                right[row] = choice == items[row].answer
        return right

    @torch.no_grad()
    def steps(self, window: Sequence[int], clock: Callable[[], float]) -> Iterator[tuple[float, float]]:
        """Nats and milliseconds of each target token: one model call each, keys and values kept between."""
        prompt, target = self.split(window)
        token, state = self.begin(self._tensor([prompt]), 1)
        for wanted in self._tensor([target])[0]:
            start_s = clock()
            output = self.model(**{self.tokens_argument: token}, **state, use_cache=True)
            ms = 1e3 * (clock() - start_s)
            yield float(cross_entropy(output.logits[0, -1].float(), wanted)), ms
            token, state = wanted.view(1, 1), {**state, "past_key_values": output.past_key_values}

    @torch.no_grad()
    def _score(self, prompts: Sequence[Sequence[int]], targets: Tensor) -> Tensor:
        """Nats (B * copies, T) of targets (B * copies, T); 0 where there is no target."""
        before, state = self.begin(self._tensor(prompts), len(targets) // len(prompts))
        given = torch.cat([before, targets[:, :-1].clamp(min=0)], 1)
        logits = self.model(**{self.tokens_argument: given}, **state, use_cache=False).logits
        flat = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NO_TARGET, reduction="none")
        return flat.view_as(targets).cpu()

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
        return [*source, _special(self.tokenizer, SPAN_TOKEN), self.model.config.eos_token_id]


def documents(text: str) -> list[str]:
    """The documents of a corpus file, outer newlines stripped, empty ones left out."""
    return [document for part in text.split(DOCUMENT_TOKEN) if (document := part.strip("\n"))]


def windows(tokenizer: "Tokenizer", text: str, length: int, limit: int = 48) -> list[list[int]]:
    """The first `limit` consecutive full windows of `length` tokens; a mark follows each document."""
    mark, ids = _special(tokenizer, DOCUMENT_TOKEN), list[int]()
    for document in documents(text):
        ids += [*_ids(tokenizer, document), mark]
        if len(ids) >= limit * length:
            break
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:limit]


def evaluate(
    model: "Model",
    tokenizer: "Tokenizer",
    shared: Path,
    domains: Sequence[str] | None = None,
    windows_per_domain: int = 48,
) -> Score:
    """Nats of the model on `shared`/data/corpus/*.valid.txt: of `domains`, or of all that are there.

    UsageError where a domain's text is missing or shorter than one window.
    """
    evaluation = Evaluation.for_model(model, tokenizer)
    texts = _valid_texts(shared / "data" / "corpus", domains)
    length = evaluation.window_length
    cut = {name: windows(tokenizer, text, length, windows_per_domain) for name, text in texts.items()}
    if short := [name for name, found in cut.items() if not found]:
        raise UsageError(f"The texts of {short} are shorter than one window of {length} tokens.")
    return Score({name: evaluation.nats(found) for name, found in cut.items()})


def compare(score: Score, exact: Score, *, num_resamples: int = 10_000, seed: int = 0) -> Loss:
    """The loss of `score` against `exact`, paired window by window.

    A domain's loss is the mean over its windows of (nats - exact nats) / exact nats. The interval of the mean
    over domains is the percentile bootstrap (Efron 1979) over windows, resampled in each domain.
    ValueError where the two did not score the same windows.
    """
    increases = {name: _increase(score.domains.get(name), domain) for name, domain in exact.domains.items()}
    if not increases or score.domains.keys() != exact.domains.keys():
        raise ValueError("Only scores of the same domains can be compared, and of at least one.")
    rng = np.random.default_rng(seed)
    resampled = [x[rng.integers(len(x), size=(num_resamples, len(x)))].mean(1) for x in increases.values()]
    low, high = np.quantile(np.mean(resampled, axis=0), [0.025, 0.975])
    per_domain = {name: float(x.mean()) for name, x in increases.items()}
    worst = max(per_domain, key=per_domain.__getitem__)
    mean = float(np.mean(list(per_domain.values())))
    return Loss(mean, (float(low), float(high)), worst, per_domain[worst], per_domain)


def chunk_items(shared: Path) -> list[ChunkItem]:
    """All items of `shared`/data/tasks/next_chunk.jsonl."""
    path = shared / "data" / "tasks" / "next_chunk.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    return [ChunkItem(row["domain"], row["prefix"], tuple(row["choices"]), row["answer"]) for row in rows]


def next_chunk_accuracy(model: "Model", tokenizer: "Tokenizer", items: Sequence[ChunkItem]) -> float:
    """The share of items answered rightly."""
    return float(np.mean(Evaluation.for_model(model, tokenizer).next_chunk(items)))


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


def _increase(domain: DomainScore | None, exact: DomainScore) -> Floats:
    """Relative increase (windows,) of a domain's nats."""
    if domain is None or not np.array_equal(domain.tokens, exact.tokens) or not len(exact.nats):
        raise ValueError("Only scores of the same windows can be compared.")
    return domain.nats / exact.nats - 1.0


def _valid_texts(corpus: Path, domains: Sequence[str] | None) -> dict[str, str]:
    """Each domain's validation text."""
    found = {path.name.removesuffix(".valid.txt"): path for path in sorted(corpus.glob("*.valid.txt"))}
    names = list(found) if domains is None else list(domains)
    if not names or (missing := set(names) - set(found)):
        raise UsageError(f"{corpus} holds no validation text of {sorted(missing) if names else 'any domain'}.")
    return {name: found[name].read_text("utf-8") for name in names}


def _ids(tokenizer: "Tokenizer", text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _special(tokenizer: "Tokenizer", token: str) -> int:
    """The token's id. UsageError for a tokeniser that does not know it."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or found == tokenizer.unk_token_id:
        raise UsageError(f"The tokeniser has no token {token}: the evaluation protocol needs it.")
    return int(found)


def _batches(keys: Sequence[Hashable], size: int) -> Iterator[list[int]]:
    """Indices of equal keys, at most `size` together."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    for group in groups.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))
