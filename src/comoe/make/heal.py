"""Healing: the scales of coarse experts, trained end to end to give the exact model's distribution back.

Shared by all steps of a chain, a blob is trained for all coarse ones: each batch of text meets another. Levels stay, no
byte is added. The text is that which forms are fitted to; whether it helped is measured on text that none is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from comoe.defaults import SEED
from comoe.device.memory import memory_limit
from comoe.make.chain import Certify, certified
from comoe.make.dense import dense_entry
from comoe.make.protocol import DecoderEvaluation, Evaluation
from comoe.make.pupil import HEALED, Grid, PackedExperts, PupilLayer, heals
from comoe.make.study import Errors, Layer, blob_bytes, blob_fields
from comoe.runtime.hook import attach
from comoe.store.checkpoint import Checkpoint
from comoe.store.manifest import FORM_PARTS, ChainStep, LayerEntry, Manifest
from comoe.store.pack import Pack
from comoe.types import DTYPE_BYTES, BlobId, ExpertId, Site, UsageError
from comoe.units import format_size

UP_TO = 0.25
"""Of the experts' bytes, up to which size steps are healed: beyond, little is lost."""

RATE = 6e-3
"""Of Adam, on factors that begin at one; it falls to nothing."""

BATCH = 8
"""Windows that a step of training sees."""

PROBES = 3
"""Steps of the chain, spread over those healed, that are certified as they were: the two must be compared."""

LEAST = 1e-6
"""Divergence, in nats, that counts for nothing. What counts is which share of a step's own goes, not how many nats:
else those that lost most would be all that is learnt from."""

MEMORY_SHARE = 0.8
"""Of what is free, how much healing may take."""

EXPERT_BYTES = 13
"""Of memory for every weight of an expert: two as stored, a byte in each of about five forms, four while gradients
are on their way; factors, their gradients and Adam's means are less than two."""

Assignment = Sequence[Sequence[str]]
Scales = Mapping[BlobId, Mapping[str, Tensor]]
"""New scales (R, G) of blobs, by leaf."""


@dataclass(frozen=True, slots=True)
class Lessons:
    """How many steps of training, the same for the same `seed`; `heed` is told of each, and its divergence in nats."""

    number: int
    seed: int = SEED
    heed: Callable[[int, float], None] = lambda step, divergence: None


def bytes_to_heal(checkpoint: Checkpoint) -> int:
    """Memory that healing takes: an upper estimate."""
    sizes = dense_entry(checkpoint.config)
    weights = sum(site.num_experts * sum(leaf.size for leaf in site.leaves) for site in checkpoint.sites)
    outside = sum(checkpoint.tensors[name].extent.length for name in checkpoint.dense_names)
    tokens = BATCH * DecoderEvaluation.window_length
    kept = 16 * sizes.hidden + 4 * sizes.inner + 2 * sizes.eager_heads * DecoderEvaluation.window_length
    used = checkpoint.experts_per_token * max(sum(leaf.rows + leaf.cols for leaf in s.leaves) for s in checkpoint.sites)
    activations = 4 * tokens * (6 * sizes.vocab + 2 * sizes.num_layers * (kept + used))
    return EXPERT_BYTES * weights + 4 * outside // DTYPE_BYTES[checkpoint.dtype] + activations


def check_healable(checkpoint: Checkpoint, forms: Sequence[str], *, calibrated: bool) -> None:
    """Raise UsageError where healing has nothing to learn from, nothing to change, or no room."""
    if not calibrated:
        raise UsageError("healing learns from calibration text: leave out --heal or --calibrate none.")
    if not any(map(heals, forms)):
        raise UsageError(f"there is nothing to heal in {', '.join(forms)}: leave out --heal, or add q2 or q3.")
    needed, free = bytes_to_heal(checkpoint), int(MEMORY_SHARE * memory_limit().nbytes)
    if needed > free:
        raise UsageError(
            f"healing {checkpoint.folder} needs about {format_size(needed)} of memory, {format_size(free)} may be had: "
            "leave out --heal, or pack on a larger machine."
        )


def healed_steps(manifest: Manifest) -> tuple[ChainStep, ...]:
    """The chain's coarse steps in which some expert has scales that may change."""
    most = UP_TO * manifest.expert_bytes_bf16
    small = [step for step in manifest.chain if manifest.form_bytes(step.name) <= most]
    forms = {step.name: {form for layer in manifest.assignment(step.name) for form in layer} for step in small}
    return tuple(step for step in small if any(map(heals, forms[step.name])))


def heal(
    opened: Pack,
    checkpoint: Checkpoint,
    evaluation: Evaluation,
    text: Sequence[list[int]],
    lessons: Lessons,
) -> Scales:
    """Train the scales of a pack's coarse steps on windows of `text`.

    `evaluation`'s model is a skeleton: its experts are replaced.
    """
    assignments = [opened.manifest.assignment(step.name) for step in healed_steps(opened.manifest)]
    experts = [PackedExperts(opened, checkpoint, at) for at in range(len(checkpoint.sites))]
    grids: dict[BlobId, dict[str, Grid]] = {}
    for assignment in assignments:
        for layer, forms in zip(experts, assignment, strict=True):
            for expert, form in enumerate(forms):
                grids |= layer.grids(expert, form)
    if grids:
        factors = [grid.factor for found in grids.values() for grid in found.values()]
        layers = [PupilLayer(found, site.num_experts) for found, site in zip(experts, checkpoint.sites, strict=True)]
        train(evaluation, layers, assignments, factors, text, lessons)
    return {blob: {leaf: grid.healed for leaf, grid in found.items()} for blob, found in grids.items()}


def train(
    evaluation: Evaluation,
    layers: Sequence[PupilLayer],
    assignments: Sequence[Assignment],
    factors: Sequence[nn.Parameter],
    text: Sequence[list[int]],
    lessons: Lessons,
) -> None:
    """Adam (Kingma and Ba, 2015) on KL(exact || assignment), of random windows and one of `assignments` at a time."""
    attach(evaluation.model, layers)
    exact = [["exact"] * len(forms) for forms in assignments[0]]
    optimizer = torch.optim.Adam(factors, lr=RATE)
    generator = torch.Generator().manual_seed(lessons.seed)
    for step in range(lessons.number):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / lessons.number)
        windows = [text[at] for at in torch.randint(len(text), (BATCH,), generator=generator).tolist()]
        assignment = assignments[int(torch.randint(len(assignments), (1,), generator=generator))]
        with torch.no_grad():
            wanted = log_probabilities(evaluation, layers, exact, windows)
        with torch.enable_grad():
            got = log_probabilities(evaluation, layers, assignment, windows)
            divergence = kl_div(got, wanted, reduction="sum", log_target=True) / (got.shape[0] * got.shape[1])
            optimizer.zero_grad()
            if divergence.requires_grad:  # else no token came by an expert that is trained
                torch.autograd.backward(divergence / divergence.detach().clamp(min=LEAST))
        optimizer.step()
        lessons.heed(step, float(divergence.detach()))


def log_probabilities(
    evaluation: Evaluation, layers: Sequence[PupilLayer], assignment: Assignment, windows: Sequence[list[int]]
) -> Tensor:
    """Log probabilities (B, T, V) of the targets of `windows` with every expert in its form of `assignment`."""
    for layer, forms in zip(layers, assignment, strict=True):
        layer.forms = forms
    return evaluation.logits(windows).float().log_softmax(-1)


def rewritten(layer: Layer, opened: Pack, scales: Scales) -> LayerEntry:
    """Write a layer's parts with new scales, and measure its forms' errors again."""
    entry, site = opened.manifest.layers[layer.index], layer.site
    changed: dict[BlobId, bytes] = {}
    parts = dict(entry.parts)
    for part in [part for part in HEALED if any(blob[:2] == (layer.index, part) for blob in scales)]:
        writer = layer.writer(part, parts[part].rows)
        for row in range(parts[part].rows):
            blob = BlobId(layer.index, part, row)
            changed[blob] = _with_scales(site, part, opened.read_bytes(blob), scales.get(blob, {}))
            writer.add(changed[blob])
        parts[part] = layer.entry(part, writer.commit())
    forms = [form for form in entry.errors if {*FORM_PARTS[form]} & {blob.part for blob in changed}]
    errors = Errors(site.num_experts)
    for index in range(site.num_experts if forms else 0):
        study = layer.study(index)
        for form in forms:
            blobs = opened.manifest.blobs(ExpertId(layer.index, index), form)
            errors.add(study, form, [changed.get(blob) or opened.read_bytes(blob) for blob in blobs])
    return msgspec.structs.replace(entry, parts=parts, errors={**entry.errors, **errors.added()})


def _with_scales(site: Site, part: str, blob: bytes, scales: Mapping[str, Tensor]) -> bytes:
    new = {(leaf, "scales"): found for leaf, found in scales.items()}
    return blob_bytes(site, part, blob_fields(site, part, blob) | new)


def better(plain: Manifest, tried: Manifest, certify: Certify | None, say: Callable[[str], None]) -> Manifest:
    """Of a manifest and its healed one the better, certified: judged by the mean loss of a few coarse steps."""
    steps = healed_steps(plain)
    probes = [steps[round(at * (len(steps) - 1) / max(1, PROBES - 1))] for at in range(PROBES)] if steps else []
    chain = tuple({step.name: step for step in probes}.values())
    if certify is None or not chain:
        return tried
    before = [found.loss for found in certify(msgspec.structs.replace(plain, chain=chain)).values()]
    made = certified(tried, certify)
    certificates = {step.name: step.certificate for step in made.chain}
    after = [found.loss for step in chain if (found := certificates[step.name])]
    told = f"healing moved the mean loss of {len(chain)} coarse steps from {_mean(before):.2%} to {_mean(after):.2%}"
    if _mean(after) < _mean(before):
        say(f"{told}.")
        return made
    say(f"{told}, so it was undone.")
    return certified(plain, certify)


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)
