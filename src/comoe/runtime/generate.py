"""Text from a served model: sampling through transformers' own `generate`, text as it comes, and what it took."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, TextStreamer
from transformers.utils import logging

from comoe.defaults import MAX_NEW_TOKENS, SEED, TEMPERATURE, TOP_K, TOP_P
from comoe.types import UsageError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 restrict nothing."""

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = TEMPERATURE
    top_k: int = TOP_K
    top_p: float = TOP_P
    seed: int = SEED
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError("--max-new-tokens must be at least 1.")
        if not (0 <= self.temperature < float("inf") and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise UsageError("temperature and top-k must not be negative, top-p lies above 0 and up to 1.")
        if "" in self.stop:
            raise UsageError("--stop needs some text: an empty one would stop at once.")


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated, and the time it took; `token_ids` without the prompt's. One token alone has no time each."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    prefill_ms: float
    ms_per_token: float | None
    framework_ms_per_token: float | None

    @property
    def tokens(self) -> int:
        return len(self.token_ids)


class Watch(TextStreamer):  # type: ignore[misc]
    """Passes text on as it comes and notes when each token came, and how long experts took until then."""

    def __init__(self, tokenizer: Any, emit: Callable[[str], None], expert_s: Callable[[], float]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._emit, self._expert_s = emit, expert_s
        self._prompt_passed = False
        self.ids: list[int] = []
        self.times: list[float] = []
        self.expert_times: list[float] = []

    def put(self, value: Tensor) -> None:
        if self._prompt_passed:
            self.ids += value.flatten().tolist()
            self.times.append(perf_counter())
            self.expert_times.append(self._expert_s())
        self._prompt_passed = True
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._emit(text)


@dataclass(slots=True)
class StopFilter:
    """Holds back text that may turn out to be the beginning of a stop string, which is never shown.

    Of several stop strings the one that is complete first counts, so that it does not matter in what pieces text comes.
    """

    stop: tuple[str, ...]
    emit: Callable[[str], None]
    held: str = ""
    stopped: bool = False
    shown: list[str] = field(default_factory=list)

    def __call__(self, text: str) -> None:
        if self.stopped:
            return
        self.held += text
        found = [(at + len(stop), at) for stop in self.stop if (at := self.held.find(stop)) >= 0]
        if found:
            self.held, self.stopped = self.held[: min(found)[1]], True
            self.flush()
            return
        keep = max((n for stop in self.stop for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        self._show(self.held[: len(self.held) - keep])
        self.held = self.held[len(self.held) - keep :]

    def flush(self) -> None:
        self._show(self.held)
        self.held = ""

    def _show(self, text: str) -> None:
        if text:
            self.shown.append(text)
            self.emit(text)


def quiet_transformers() -> None:
    """Leave stderr to comoe: transformers' own bars and advice would mix with it."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a pack. Raises UsageError where the checkpoint had none."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{folder} has no tokenizer that loads: add the checkpoint's tokenizer files to it."
        ) from error


def prompt_ids(tokenizer: Any, config: Any, prompt: str) -> Tensor:
    """Token ids (1, T) of a prompt as the model's tokenizer frames it. Raises UsageError for an empty one."""
    ids: list[int] = tokenizer(prompt).input_ids
    if config.is_encoder_decoder and config.eos_token_id is not None and ids[-1:] != [config.eos_token_id]:
        ids = [*ids, config.eos_token_id]
    if not ids:
        raise UsageError("the prompt is empty: give at least one word.")
    return torch.tensor([ids])


def generate(
    model: Any, tokenizer: Any, ids: Tensor, sampling: Sampling, emit: Callable[[str], None] = lambda text: None
) -> Answer:
    """Generate after the prompt `ids` (1, T); `emit` gets text as soon as it is certain."""
    model.comoe.begin_request(repr((ids.tolist(), sampling)))
    torch.manual_seed(sampling.seed)
    shown = StopFilter(sampling.stop, emit)
    watch = Watch(tokenizer, shown, lambda: model.comoe.expert_s)
    start_s = perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_config(model, sampling),
            streamer=watch,
            **({"tokenizer": tokenizer} if sampling.stop else {}),
        )
    shown.flush()
    steps = len(watch.times) - 1
    decode_s = watch.times[-1] - watch.times[0]
    expert_s = watch.expert_times[-1] - watch.expert_times[0]
    return Answer(
        text="".join(shown.shown),
        token_ids=tuple(watch.ids),
        prompt_tokens=ids.shape[1],
        prefill_ms=1e3 * (watch.times[0] - start_s),
        ms_per_token=1e3 * decode_s / steps if steps else None,
        framework_ms_per_token=1e3 * (decode_s - expert_s) / steps if steps else None,
    )


def _config(model: Any, sampling: Sampling) -> GenerationConfig:
    """The model's own generation config, with what was asked for."""
    own: dict[str, Any] = model.generation_config.to_dict()
    chosen: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens, "do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        chosen |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    else:
        chosen |= {"temperature": None, "top_k": None, "top_p": None}
    if sampling.stop:
        chosen["stop_strings"] = list(sampling.stop)
    if sampling.ignore_eos:
        chosen["eos_token_id"] = None
    own.pop("max_length", None)
    return GenerationConfig(**own | chosen)
