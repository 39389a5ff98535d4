"""What experts see on calibration text: one forward pass whose experts are read one at a time, kept layer by layer.

The pass runs before anything is packed, straight from the checkpoint; memory is one expert and the activations.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationMixin

from comoe.make.protocol import Evaluation
from comoe.make.text import token_ids, windows
from comoe.runtime.hook import attach, expert_forward
from comoe.store.checkpoint import Checkpoint, model_class
from comoe.types import UsageError

HELD_OUT = 4
"""One window in so many is kept from fitting, to measure errors and to certify on."""


@dataclass(frozen=True, slots=True)
class Text:
    """Calibration text of one domain."""

    domain: str
    text: str


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What one layer's experts saw: `x` (N, H) float32, `index` and `gate` (N, K). No expert: index >= num_experts.

    N is 0 where text never comes by, as at experts for images.
    """

    x: Tensor
    index: Tensor
    gate: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """(inputs (T, H), gates (T,)) of one expert."""
        tokens, positions = torch.where(self.index == expert)
        return self.x[tokens], self.gate[tokens, positions]

    def rows(self, start: int, end: int) -> "LayerInputs":
        """What it saw from one token to another."""
        return LayerInputs(self.x[start:end], self.index[start:end], self.gate[start:end])

    def uses(self, num_experts: int) -> Tensor:
        """Uses by expert (E,)."""
        return torch.bincount(self.index[self.index < num_experts], minlength=num_experts)

    def gates(self, num_experts: int) -> Tensor:
        """Sum of the gates by expert (E,), float64; some families have negative ones, whose size counts."""
        kept = self.index < num_experts
        total = torch.zeros(num_experts, dtype=torch.float64)
        return total.index_add_(0, self.index[kept], self.gate[kept].abs().double())

    def frequency(self, num_experts: int) -> list[float]:
        """Share of all uses by expert."""
        uses = self.uses(num_experts)
        return (uses / uses.sum().clamp(min=1)).tolist()

    def mass(self, num_experts: int) -> list[float]:
        """Share of all gates by expert."""
        gates = self.gates(num_experts)
        return (gates / gates.sum().clamp(min=1e-12)).tolist()


class Recorder:
    """The `ExpertLayer` of calibration: computes from the checkpoint and appends what it saw to files of `folder`."""

    def __init__(self, checkpoint: Checkpoint, layer: int, folder: Path) -> None:
        self._checkpoint, self._layer, self._folder = checkpoint, layer, folder

    def forward(self, module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        for name, tensor in (("x", x.float()), ("index", index), ("gate", weight.float())):
            with (self._folder / f"{self._layer:03}.{name}").open("ab") as file:
                file.write(tensor.contiguous().numpy().tobytes())
        (self._folder / f"{self._layer:03}.widths").write_text(f"{x.shape[1]} {index.shape[1]}")
        out = torch.zeros_like(x)
        num_experts = self._checkpoint.sites[self._layer].num_experts
        for expert in torch.unique(index).tolist():
            if expert < num_experts:
                tokens, positions = torch.where(index == expert)
                tensors = {k: v.to(x.dtype) for k, v in self._checkpoint.expert(self._layer, expert).items()}
                y = expert_forward(module, x[tokens], tensors) * weight[tokens, positions, None]
                out.index_add_(0, tokens, y.to(out.dtype))
        return out


def check_calibratable(checkpoint: Checkpoint) -> None:
    """Raise UsageError where text cannot be scored: a model that does not go on with text, or no tokenizer."""
    remedy = "pack it without calibration (--calibrate none)"
    if not issubclass(model_class(checkpoint.config), GenerationMixin):
        raise UsageError(f"{checkpoint.model_type} does not generate text token by token: {remedy}.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
        ids = token_ids(tokenizer, "text")
        readable = bool(ids) and tokenizer.unk_token_id not in ids
    except (OSError, ValueError):
        readable = False
    if not readable:  # without its files, some families get a tokenizer that knows no word
        raise UsageError(f"{checkpoint.folder} holds no tokenizer that can be read: add it, or {remedy}.")


@torch.no_grad()
def record(
    model: Any, checkpoint: Checkpoint, batches: Sequence[list[list[int]]], evaluation: Evaluation, folder: Path
) -> Iterator[int]:
    """Run `batches` of windows through the skeleton `model`; what each layer saw goes to `folder`.

    Yields the number of batches done after each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    attach(model, [Recorder(checkpoint, layer, folder) for layer in range(len(checkpoint.sites))])
    for done, batch in enumerate(batches, 1):
        evaluation.nats(batch)
        yield done


def recorded(folder: Path, layer: int) -> LayerInputs:
    """What `record` kept of one layer: nothing where its experts were never asked."""
    widths = folder / f"{layer:03}.widths"
    if not widths.exists():
        return LayerInputs(torch.empty(0, 0), torch.empty(0, 1, dtype=torch.int64), torch.empty(0, 1))
    hidden, experts_per_token = map(int, widths.read_text().split())
    x, gate = (np.fromfile(folder / f"{layer:03}.{name}", np.float32) for name in ("x", "gate"))
    index = np.fromfile(folder / f"{layer:03}.index", np.int64)
    return LayerInputs(
        torch.from_numpy(x).view(-1, hidden),
        torch.from_numpy(index).view(-1, experts_per_token),
        torch.from_numpy(gate).view(-1, experts_per_token),
    )


def cut(tokenizer: Any, texts: Sequence[Text], length: int, num_tokens: int) -> dict[str, list[list[int]]]:
    """Windows of every domain, about `num_tokens` tokens together. UsageError where a text holds not one window."""
    per_domain = max(2, num_tokens // (length * len(texts)))
    found = {text.domain: windows(tokenizer, text.text, length, per_domain) for text in texts}
    short = [domain for domain, cut_windows in found.items() if len(cut_windows) < 2]
    if short:
        raise UsageError(f"calibration text {short[0]!r} is shorter than two windows of {length} tokens: give more.")
    return found


def fitted(windows: Mapping[str, list[list[int]]]) -> list[list[int]]:
    """The windows that forms are fitted to."""
    return [window for domain in windows.values() for at, window in enumerate(domain) if at % HELD_OUT]


def held_out(windows: Mapping[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """The windows that errors and losses are measured on."""
    return {name: domain[::HELD_OUT] for name, domain in windows.items()}


def texts_of(paths: Sequence[Path]) -> tuple[Text, ...]:
    """Each file's text as a domain of its own. Raises UsageError."""
    names = [path.name.split(".")[0] for path in paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two calibration files are called {twice[0]!r}: each is a domain, so name them apart.")
    try:
        return tuple(Text(name, path.read_text("utf-8")) for name, path in zip(names, paths, strict=True))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"calibration text cannot be read: {error}.") from error
