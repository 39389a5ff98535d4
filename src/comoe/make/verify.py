"""`comoe verify`: is every byte as it was packed, is exact mode exact, and did the plan promise what happened?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comoe.device.memory import memory_limit
from comoe.make.measure import Measured, measure, sample_windows
from comoe.memory.arena import page_buffer
from comoe.plan.planner import Plan
from comoe.runtime.generate import tokenizer_of
from comoe.runtime.load import Loader
from comoe.runtime.options import Options
from comoe.store.checkpoint import model_class, read_config
from comoe.store.families import experts_modules, is_decorated
from comoe.store.pack import Pack
from comoe.types import PackError, Progress
from comoe.units import format_size

TOLERANCE = 1e-4
NEW_TOKENS = 16
PROMPT_TOKENS = 48
MEASURED_TOKENS = 192


@dataclass(slots=True)
class Findings:
    """The contract's keys, and `skipped`: what could not be looked at, and why. None: not looked at."""

    exact: dict[str, bool | None] = field(
        default_factory=lambda: dict.fromkeys(("bit_equal", "allclose", "greedy_equal"))
    )
    predicted: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.errors


@dataclass(frozen=True, slots=True)
class Outputs:
    """What exact mode is judged by: logits (T, V) of a prompt, and greedy tokens after it."""

    logits: Tensor
    tokens: tuple[int, ...]


def verify(pack: Pack, budget: int, max_loss: float, texts: Sequence[Path], progress: Progress) -> Findings:
    """Look at `pack`; plans are for `budget` bytes of experts. Raises DoesNotFit.

    Broken blobs and broken promises are findings, not exceptions.
    """
    findings = Findings()
    progress("hashing blobs", 0.0)
    findings.errors += [*pack.broken_files(), *broken_blobs(pack)]
    if findings.errors:
        return findings
    tokenizer = tokenizer_of(pack.folder)
    progress("exact mode", 0.3)
    _check_exact(pack, tokenizer, findings, texts)
    progress("the plan", 0.7)
    _check_plan(pack, tokenizer, findings, budget, max_loss, texts)
    return findings


def broken_blobs(pack: Pack) -> Iterator[str]:
    """A sentence for every blob whose bytes are not those that were packed."""
    ids = pack.blob_ids()
    buffer = page_buffer(max(map(pack.nbytes, ids)))
    for blob in ids:
        try:
            pack.read(blob, buffer)
        except PackError as error:
            yield str(error)


def _check_exact(pack: Pack, tokenizer: Any, findings: Findings, texts: Sequence[Path]) -> None:
    """The streamed model against the one with more in memory, and against eager transformers."""
    loader = Loader(pack, Options(dtype="float32"))
    exact = loader.ladder.exact
    smallest = min(exact.nbytes, loader.planner().smallest(0.0))
    roomy = min(exact.nbytes, max(smallest, memory_limit().nbytes // 2))
    prompt = tokenizer(texts[0].read_text("utf-8")[:2000], add_special_tokens=False).input_ids[:PROMPT_TOKENS]
    ids = torch.tensor([prompt])
    streamed, resident = (_outputs_of(loader.streamed("exact", nbytes), ids) for nbytes in (smallest, roomy))
    findings.exact["bit_equal"] = torch.equal(streamed.logits, resident.logits) and streamed.tokens == resident.tokens
    reference = _reference(loader.pack, findings)
    if reference is not None:
        eager = _outputs(reference, ids)
        findings.exact["allclose"] = torch.allclose(streamed.logits, eager.logits, rtol=TOLERANCE, atol=TOLERANCE)
        findings.exact["greedy_equal"] = streamed.tokens == eager.tokens
    broken = [key for key, held in findings.exact.items() if held is False]
    findings.errors += [f"exact mode is not {key.replace('_', ' ')}." for key in broken]


def _outputs_of(model: Any, ids: Tensor) -> Outputs:
    with model.comoe:
        return _outputs(model, ids)


@torch.inference_mode()
def _outputs(model: Any, ids: Tensor) -> Outputs:
    given = {"decoder_input_ids": ids[:, :8]} if model.config.is_encoder_decoder else {}
    logits = model(input_ids=ids, **given).logits[0].float()
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    return Outputs(logits, tuple(tokens[0].tolist()))


def _reference(pack: Pack, findings: Findings) -> Any | None:
    """The checkpoint in transformers' eager mode and float32; None, with the reason, where that cannot be had."""
    if pack.checkpoint is None:
        findings.skipped.append("comparison with transformers: give the checkpoint by --source.")
        return None
    manifest = pack.manifest
    needed = 2 * manifest.expert_bytes_bf16 + 2 * manifest.dense_bytes
    if needed > memory_limit().nbytes * 0.8:
        findings.skipped.append(f"comparison with transformers: it needs {format_size(needed)} of memory.")
        return None
    return reference_model(pack.checkpoint)


def reference_model(checkpoint: Path) -> Any:
    """The checkpoint as transformers runs it itself, without comoe: eager experts, computed in float32."""
    config = read_config(checkpoint)
    model = model_class(config).from_pretrained(checkpoint, dtype=torch.float32).eval()
    if any(is_decorated(module) for _, module in experts_modules(model)):
        model.set_experts_implementation("eager")
    return model


def _check_plan(
    pack: Pack, tokenizer: Any, findings: Findings, budget: int, max_loss: float, texts: Sequence[Path]
) -> None:
    loader = Loader(pack, Options(max_loss=max_loss))
    served = loader.within_experts(budget)
    with served.comoe:
        text = sample_windows(served, tokenizer, texts, 2)
        if not text:
            findings.skipped.append("predicted against measured: the text is shorter than one window, give more.")
            return
        got = measure(served, tokenizer, text, MEASURED_TOKENS)
        plan: Plan = served.comoe.plan
        estimate = served.comoe.ledger.loss
    exact = loader.streamed("exact", budget)
    with exact.comoe:
        loss = got.loss(measure(exact, tokenizer, text, MEASURED_TOKENS))
    findings.predicted = {
        "ms_per_token": plan.ms_per_token,
        "hit_rate": plan.hit_rate,
        "loss": plan.loss,
        "resident_bytes": plan.total_bytes,
    }
    findings.measured = _measured(got, loss) | {"loss_ledger": estimate}
    if got.resident_bytes > budget:
        findings.errors.append(f"experts took {got.resident_bytes} bytes of memory, {budget} were given.")
    if max_loss == 0 and loss != 0:
        findings.errors.append(f"exact mode has a loss of {loss:.3%}.")


def _measured(got: Measured, loss: float) -> dict[str, Any]:
    return {
        "ms_per_token": got.ms_per_token,
        "hit_rate": got.hit_rate,
        "loss": loss,
        "resident_bytes": got.resident_bytes,
        "bytes_read": got.bytes_read,
    }
