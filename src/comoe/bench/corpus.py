"""The texts and tasks of the evaluation protocol, read from the shared folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from comoe.make.protocol import ChunkItem, Evaluation
from comoe.make.score import Score
from comoe.make.text import windows
from comoe.types import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
    from transformers import PreTrainedTokenizerBase as Tokenizer


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
    texts = valid_texts(shared / "data" / "corpus", domains)
    length = evaluation.window_length
    cut = {name: windows(tokenizer, text, length, windows_per_domain) for name, text in texts.items()}
    if short := [name for name, found in cut.items() if not found]:
        raise UsageError(f"The texts of {short} are shorter than one window of {length} tokens.")
    return Score({name: evaluation.nats(found) for name, found in cut.items()})


def chunk_items(shared: Path) -> list[ChunkItem]:
    """All items of `shared`/data/tasks/next_chunk.jsonl."""
    path = shared / "data" / "tasks" / "next_chunk.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    return [ChunkItem(row["domain"], row["prefix"], tuple(row["choices"]), row["answer"]) for row in rows]


def next_chunk_accuracy(model: "Model", tokenizer: "Tokenizer", items: Sequence[ChunkItem]) -> float:
    """The share of items answered rightly."""
    return float(np.mean(Evaluation.for_model(model, tokenizer).next_chunk(items)))


def valid_texts(corpus: Path, domains: Sequence[str] | None) -> dict[str, str]:
    """Each domain's validation text."""
    found = {path.name.removesuffix(".valid.txt"): path for path in sorted(corpus.glob("*.valid.txt"))}
    names = list(found) if domains is None else list(domains)
    if not names or (missing := set(names) - set(found)):
        raise UsageError(f"{corpus} holds no validation text of {sorted(missing) if names else 'any domain'}.")
    return {name: found[name].read_text("utf-8") for name in names}
