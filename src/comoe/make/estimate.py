"""What packing takes: bytes by the parts' layout; seconds by building an expert here, times the number of all."""

import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from math import exp
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from comoe.forms.distil import BATCH_TOKENS, Lessons, train
from comoe.forms.quantise import quantise
from comoe.make.calibrate import LayerInputs, fitted, held_out
from comoe.make.certify import CACHE_BYTES, MIN_HELD_OUT, Windows
from comoe.make.chain import PROBED, SHARES
from comoe.make.dense import dense_entry
from comoe.make.heal import PROBES
from comoe.make.layers import build
from comoe.make.price import PASSES
from comoe.make.protocol import BATCH, DecoderEvaluation, EncoderDecoderEvaluation
from comoe.make.pupil import HEALED, study_grids
from comoe.make.recipe import Recipe
from comoe.make.shared import EXPERTS_PER_CLUSTER, SHARING, Sharing
from comoe.make.study import Layer, arrays
from comoe.runtime.experts import SiteMath
from comoe.runtime.hook import expert_forward
from comoe.runtime.skeleton import strip
from comoe.store.checkpoint import Checkpoint, skeleton_of
from comoe.store.directfile import DirectFile
from comoe.store.families import experts_modules
from comoe.store.layout import layout
from comoe.store.manifest import FORM_PARTS, SHARED_PARTS
from comoe.types import Site

LONG_S = 0.5
"""What took so long once is not timed again, warm."""

TRAINED = 2
"""Steps of distillation that are timed."""

READS = 5
"""Experts that are read to tell how long one takes: a single first read may take several times that."""


@dataclass(frozen=True, slots=True)
class Left:
    """What a run has still to do: a killed one's steps are not done again.

    `num_experts` are to be built, `dense_bytes` to be copied. `text` are windows of calibration text by domain; what
    layers see of it may be `recorded` already, and scales `healed`.
    """

    num_experts: int
    dense_bytes: int
    text: Windows
    recorded: bool = False
    healed: bool = False


def blank(checkpoint: Checkpoint) -> Any:
    """The checkpoint's model without any weights: there before anything is packed, and enough to time one expert."""
    model = skeleton_of(checkpoint.config)
    strip(model)
    for _, module in experts_modules(model):
        for parameter in module.to_empty(device="cpu").parameters():  # norms, where an expert has some
            torch.nn.init.ones_(parameter)  # what lies in fresh memory may be no number
    return model


@torch.no_grad()
def seconds_to_pack(
    checkpoint: Checkpoint, model: Any, recipe: Recipe, forms: Sequence[str], left: Left, folder: Path
) -> float:
    """Seconds for what is `left` of packing `checkpoint` in `forms` by `recipe`; `model` is its `blank`.

    The largest expert stands for all, and text is taken to be spread evenly over them. `folder` is made and removed.
    """
    sites = checkpoint.sites
    at = max(range(len(sites)), key=lambda at: sites[at].expert_bytes_bf16)
    layer = Layer(checkpoint, at, list(experts_modules(model))[at][1], None, folder, compensated=recipe.compensated)
    read_s = _read_s(layer)
    seconds = 2 * left.dense_bytes * read_s / layer.site.expert_bytes_bf16
    length = _site_tokens(checkpoint)
    if left.num_experts:
        seen = len(fitted(left.text)) * length * _uses_of_one(layer)
        built_s = _built_s(layer, recipe, forms, max(1, round(seen)))
        seconds += left.num_experts * (read_s + built_s)  # those that are timed are read from memory
    if left.text:
        sizes = [share for share in SHARES if share >= _least_share(layer.site, forms)]
        recorded_s, judged_s = _pass_s(layer, length * BATCH, read_s, sizes)
        judged = held_out(left.text).values()
        if not left.recorded:
            together = [len(fitted({domain: windows})) for domain, windows in left.text.items()]
            together.append(sum(map(len, judged)))
            seconds += sum(-(-number // BATCH) for number in together) * recorded_s
        if sizes and recipe.certified and sum(map(len, judged)) >= MIN_HELD_OUT:
            steps = len(sizes) + 1 + 2 * (len(PROBED) + 1) * _sharing(forms) + PROBES * bool(recipe.heal)
            steps += PASSES * (checkpoint.experts_per_token > 1)
            seconds += steps * sum(-(-len(windows) // BATCH) for windows in judged) * judged_s
        if recipe.heal and sizes and not left.healed:
            seconds += recipe.heal * _healing_s(layer, length * BATCH)
    return seconds


def _built_s(layer: Layer, recipe: Recipe, forms: Sequence[str], seen: int) -> float:
    """Seconds for an expert's blobs and errors, and for its part in its cluster's; it has `seen` so many tokens.

    What twice as many experts take beyond a few is their own; the rest of what the few take is their cluster's.
    """
    experts, how = layer.site.num_experts, recipe.sharing
    members = min(EXPERTS_PER_CLUSTER, experts)
    short = replace(how, distil_steps=min(how.distil_steps, TRAINED))

    def build_s(number: int) -> float:
        some = replace(layer, only=number, inputs=_noise(layer, number, seen) if recipe.texts else None)
        return _timed(partial(_build, some, forms, short, recipe.self_contained))

    few, few_s = 1, build_s(1)
    if experts == 1:
        return few_s
    if few_s < LONG_S:  # a small expert takes hardly more than its files
        few = members // 2
        few_s = build_s(few)
    own_s = max((build_s(2 * few) - few_s) / few, few_s / few / 3)
    together_s = max(0.0, few_s - few * own_s)
    if recipe.texts and "merged" in forms:
        together_s += (how.distil_steps - short.distil_steps) * _step_s(layer, seen * members)
    return own_s + together_s / members


def _build(layer: Layer, forms: Sequence[str], how: Sharing, self_contained: bool) -> None:
    shutil.rmtree(layer.folder, ignore_errors=True)  # a killed run's
    layer.folder.mkdir()
    build(layer, forms, how, self_contained=self_contained)
    shutil.rmtree(layer.folder)


def _step_s(layer: Layer, num_tokens: int) -> float:
    """Seconds of a step of distillation, whose lessons have so many tokens at most."""
    floats = {name: tensor.float() for name, tensor in layer.checkpoint.expert(layer.index, 0).items()}
    x = torch.randn(min(BATCH_TOKENS, num_tokens), _width(layer.site))
    lessons = Lessons(x, layer.run(x, floats), torch.ones(len(x)))
    return _timed(lambda: train(floats, partial(expert_forward, layer.module), lessons, TRAINED)) / TRAINED


def _pass_s(layer: Layer, num_tokens: int, read_s: float, sizes: Sequence[float]) -> tuple[float, float]:
    """Seconds of a pass of `num_tokens` through the checkpoint, and through one of its chain's steps of `sizes`."""
    checkpoint, site, expert = layer.checkpoint, layer.site, layer.site.expert_bytes_bf16
    tensors = checkpoint.expert(layer.index, 0)
    dense_s = _dense_s(layer, num_tokens)
    uses = num_tokens * _uses_of_one(layer)
    used = (1 - exp(-uses)) * sum(found.num_experts for found in checkpoint.sites)
    x = torch.randn(max(1, round(uses)), _width(site))
    run_s = _timed(lambda: layer.run(x, tensors))
    blobs = arrays([layer.study(0).blob("high", quantise)])
    coarse_s = _timed(lambda: SiteMath(layer.module, site, torch.float32).run("q4", blobs, x))
    whole = sum(found.num_experts * found.expert_bytes_bf16 for found in checkpoint.sites)
    streamed = sum(share * whole for share in sizes if share * whole > CACHE_BYTES) / max(len(sizes), 1)
    return dense_s + used * (read_s + run_s), dense_s + used * coarse_s + streamed * _streamed_s(layer, read_s) / expert


def _read_s(layer: Layer) -> float:
    """Seconds to read an expert that was not read before, but follows one that was: files are read ahead."""
    some = range(max(0, layer.site.num_experts - READS), layer.site.num_experts)
    return median(_timed(partial(layer.checkpoint.expert, layer.index, index), warm=False) for index in some)


def _streamed_s(layer: Layer, read_s: float) -> float:
    """Seconds to read an expert's bytes as blobs are, past the page cache; `read_s` where they are not in one piece."""
    extents = layer.checkpoint.extents(layer.index, 0)
    if extents is None:
        return read_s
    with ExitStack() as files:
        calls = []
        for extent in extents:
            file = files.enter_context(closing(DirectFile(layer.checkpoint.folder / extent.file)))
            into = memoryview(bytearray(extent.length))
            calls.append(partial(file.read, extent.offset, into, extent.length))
        return min(_timed(lambda: [call() for call in calls], warm=False) for _ in range(READS))


def _healing_s(layer: Layer, num_tokens: int) -> float:
    """Seconds of a step of healing: the exact model's pass, and there and back through a coarse one's."""
    x = torch.randn(max(1, round(num_tokens * _uses_of_one(layer))), _width(layer.site))
    tensors = layer.checkpoint.expert(layer.index, 0)
    grids = study_grids(layer.study(0))

    def step() -> None:
        layer.run(x, tensors)
        with torch.enable_grad():
            put_out = expert_forward(layer.module, x.requires_grad_(), grids())
            torch.autograd.backward(put_out.sum())

    logits = torch.randn(num_tokens, dense_entry(layer.checkpoint.config).vocab)
    told_s = _timed(lambda: logits.log_softmax(-1).exp().sum())
    experts = sum(site.num_experts for site in layer.checkpoint.sites)
    return 3 * (_dense_s(layer, num_tokens) + told_s) + experts * _timed(step)


def _dense_s(layer: Layer, num_tokens: int) -> float:
    """Seconds of a pass of `num_tokens` outside the experts."""
    many, tensors = torch.randn(BATCH_TOKENS, _width(layer.site)), layer.checkpoint.expert(layer.index, 0)
    share = bytes_outside_experts(layer.checkpoint) / layer.site.expert_bytes_bf16
    return _timed(lambda: layer.run(many, tensors)) * num_tokens / len(many) * share


def _noise(layer: Layer, num_experts: int, num_tokens: int) -> LayerInputs:
    """Inputs of which each of the first `num_experts` experts saw `num_tokens`."""
    x = torch.randn(num_experts * num_tokens, _width(layer.site), generator=torch.Generator().manual_seed(0))
    return LayerInputs(x, torch.arange(len(x))[:, None] % num_experts, torch.ones(len(x), 1))


def _least_share(site: Site, forms: Sequence[str]) -> float:
    """Of an expert's bytes as bf16, what the smallest form takes: there is no step below."""
    own = [[part for part in FORM_PARTS[form] if part not in SHARED_PARTS] for form in forms]
    return min(sum(layout(site, part).nbytes for part in parts) for parts in own) / site.expert_bytes_bf16


def _sharing(forms: Sequence[str]) -> bool:
    return bool({*SHARING} & {*forms})


def _width(site: Site) -> int:
    """Of an expert's inputs."""
    return next(leaf.cols for leaf in site.leaves if leaf.is_matrix)


def _uses_of_one(layer: Layer) -> float:
    """Share of tokens that use an expert of the layer."""
    return layer.checkpoint.experts_per_token / layer.site.num_experts


def _site_tokens(checkpoint: Checkpoint) -> int:
    """Tokens of a window that come by a layer: an encoder and a decoder have about half of it each."""
    encodes = checkpoint.config.is_encoder_decoder
    return EncoderDecoderEvaluation.window_length // 2 if encodes else DecoderEvaluation.window_length


def bytes_to_pack(checkpoint: Checkpoint, forms: Sequence[str], *, self_contained: bool) -> int:
    """Bytes that a pack in `forms` will take on disk, but for small files."""
    parts = {part for form in forms for part in FORM_PARTS[form]} - (set() if self_contained else {"exact"})
    return _part_bytes(checkpoint, parts) + bytes_outside_experts(checkpoint)


def healing_bytes(checkpoint: Checkpoint, forms: Sequence[str]) -> int:
    """Bytes of healed parts, on disk beside those that were until the pack is whole."""
    return _part_bytes(checkpoint, {part for form in forms for part in FORM_PARTS[form]} & {*HEALED})


def _part_bytes(checkpoint: Checkpoint, parts: Collection[str]) -> int:
    rows = {part: 1 / EXPERTS_PER_CLUSTER if part in SHARED_PARTS else 1.0 for part in parts}
    sizes = ((site, part, layout(site, part).stride) for site in checkpoint.sites for part in parts)
    return int(sum(site.num_experts * rows[part] * stride for site, part, stride in sizes))


def bytes_outside_experts(checkpoint: Checkpoint) -> int:
    """Bytes of the checkpoint's tensors outside its experts."""
    return sum(checkpoint.tensors[name].extent.length for name in checkpoint.dense_names)


def recording_bytes(checkpoint: Checkpoint, num_tokens: int) -> int:
    """Bytes of what layers see of calibration text, on disk until the pack is whole."""
    widths = [next(leaf.cols for leaf in site.leaves if leaf.is_matrix) for site in checkpoint.sites]
    return num_tokens * sum(4 * width + 12 * checkpoint.experts_per_token for width in widths)


def _timed(call: Callable[[], object], *, warm: bool = True) -> float:
    """Seconds of a call; of a second one, where the first took so little that warming up counts."""
    start_s = perf_counter()
    call()
    took_s = perf_counter() - start_s
    return _timed(call, warm=False) if warm and took_s < LONG_S else took_s
