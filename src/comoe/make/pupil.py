"""A model's coarse experts as functions of their scales, so that those can be trained through the whole model.

Levels stay as they are, a byte each; a group's scale is multiplied by a factor that gradients reach. What is trained,
and towards what, is `make.heal`'s business.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from comoe.forms.lowbit import dequantise_low, quantise_low
from comoe.forms.matrices import FACTORS, SUMS
from comoe.forms.quantise import Planes, dequantise
from comoe.make.study import Study, blob_fields
from comoe.runtime.experts import LOW_CODES
from comoe.runtime.hook import expert_forward
from comoe.store.checkpoint import Checkpoint
from comoe.store.layout import group_size, quantised
from comoe.store.manifest import FORM_PARTS
from comoe.store.pack import Pack
from comoe.types import BlobId, ExpertId, Leaf, Site

HEALED = ("base", "delta", "merged", "q2", "q3")
"""Parts whose scales may change: those of q4 are q8's too, which is nearly exact with them as they are."""

LOW_STEPS = 8
"""Steps of a two-plane form in one of its scale."""

Tensors = Mapping[str, Tensor]
Weights = Callable[[int, str], Tensors | None]
"""An expert's tensors by leaf, in float32, from its index and form; None for one that puts out nothing."""


class Grid:
    """A matrix (R, C) as `levels` (R, G, C / G) times `scales` (R, G) and a `factor` (R, G), which may be trained."""

    def __init__(self, levels: Tensor, scales: Tensor, *, trained: bool = True) -> None:
        self._levels, self._scales = levels, scales
        self.factor = nn.Parameter(torch.ones_like(scales), requires_grad=trained)

    @property
    def weight(self) -> Tensor:
        spread: Tensor = _Spread.apply(self._scales * self.factor, self._levels)  # type: ignore[no-untyped-call]
        return spread

    @property
    def healed(self) -> Tensor:
        """Scales (R, G) as float16 holds them, the factor in them."""
        most = torch.finfo(torch.float16).max
        return (self._scales * self.factor.detach()).clamp(-most, most).half()


Term = dict[str, Grid | Tensor]
"""What is added up for an expert, by leaf."""


class _Spread(torch.autograd.Function):
    """Scales (R, G) times levels (R, G, S) as (R, G * S); of the levels no copy in float32 is kept."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor, levels: Tensor) -> Tensor:
        ctx.save_for_backward(levels)
        return (levels * scales[..., None]).flatten(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (levels,) = ctx.saved_tensors
        return (grad.view(levels.shape) * levels).sum(-1), None


class PupilLayer:
    """The `ExpertLayer` whose outputs gradients flow through: experts take the `forms` that are set."""

    def __init__(self, weights: Weights, num_experts: int) -> None:
        self._weights, self._num_experts = weights, num_experts
        self.forms: Sequence[str] = ("exact",) * num_experts

    def forward(self, module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in torch.unique(index).tolist():
            tensors = self._weights(expert, self.forms[expert]) if expert < self._num_experts else None
            if tensors is not None:
                tokens, positions = torch.where(index == expert)
                y = expert_forward(module, x.index_select(0, tokens), tensors) * weight[tokens, positions, None]
                out.index_add_(0, tokens, y.to(out.dtype))
        return out


class PackedExperts:
    """The `Weights` of a pack's layer. What was asked for once stays in memory."""

    def __init__(self, opened: Pack, checkpoint: Checkpoint, layer: int) -> None:
        self._opened, self._checkpoint, self._layer = opened, checkpoint, layer
        self._exact: dict[int, dict[str, Tensor]] = {}
        self._terms: dict[tuple[BlobId, ...], Term] = {}

    @cached_property
    def _leaves(self) -> tuple[Leaf, ...]:
        return self._opened.manifest.site(self._layer).leaves

    def __call__(self, expert: int, form: str) -> Tensors | None:
        if form == "dropped":
            return None
        if form == "exact":
            if expert not in self._exact:
                self._exact[expert] = self._checkpoint.expert(self._layer, expert)
            return {name: tensor.float() for name, tensor in self._exact[expert].items()}
        terms = self._of(expert, form)
        return {leaf.name: _sum(leaf, terms) for leaf in self._leaves}

    def grids(self, expert: int, form: str) -> dict[BlobId, dict[str, Grid]]:
        """What of an expert's form is trained, by blob and leaf."""
        if form in ("dropped", "exact"):
            return {}
        self._of(expert, form)
        blobs = [blob for blob in self._blobs(expert, form) if blob.part in HEALED]
        found = {blob: self._terms[(blob,)] for blob in blobs}
        return {blob: {k: v for k, v in term.items() if isinstance(v, Grid)} for blob, term in found.items()}

    def _blobs(self, expert: int, form: str) -> tuple[BlobId, ...]:
        return self._opened.manifest.blobs(ExpertId(self._layer, expert), form)

    def _of(self, expert: int, form: str) -> list[Term]:
        """What is added up: one term of all the form's parts, or one of each where it is a sum."""
        blobs = self._blobs(expert, form)
        keys = [(blob,) for blob in blobs] if form in SUMS else [blobs]
        for code, key in zip(SUMS.get(form, (form,)), keys, strict=True):
            if key not in self._terms:
                self._terms[key] = self._term(code, key)
        return [self._terms[key] for key in keys]

    def _term(self, code: str, blobs: Sequence[BlobId]) -> Term:
        site = self._opened.manifest.site(self._layer)
        planes: dict[tuple[str, str], Tensor] = {}
        for blob in blobs:
            planes |= blob_fields(site, blob.part, self._opened.read_bytes(blob))
        return term_of(site, code, planes, trained=blobs[0].part in HEALED)


def term_of(site: Site, code: str, planes: Mapping[tuple[str, str], Tensor], *, trained: bool) -> Term:
    """What an expert's planes by (leaf, plane), written as `code` writes them, say of its leaves."""
    found: Term = {}
    for leaf in site.leaves:
        own = {plane: tensor for (name, plane), tensor in planes.items() if name == leaf.name}
        if "exact" in own:
            found[leaf.name] = own["exact"].float()
        elif code == FACTORS:
            found[leaf.name] = own["out"].float() @ own["inner"].float()
        else:
            found[leaf.name] = _grid(leaf, code, own, trained=trained)
    return found


def _grid(leaf: Leaf, code: str, planes: Tensors, *, trained: bool) -> Grid:
    group = group_size(leaf.cols)
    assert group is not None
    scales, low = planes["scales"], planes.get("low")
    steps = LOW_STEPS if low is not None and code not in LOW_CODES else 1
    levels = (dequantise_low if code in LOW_CODES else dequantise)(
        Planes(torch.full_like(scales, steps), planes["high"], low), group
    )
    return Grid(levels.to(torch.int8).view(*scales.shape, group), scales.float() / steps, trained=trained)


def _sum(leaf: Leaf, terms: Sequence[Term]) -> Tensor:
    """A matrix is the sum of its terms; what is not quantised is the last one's alone."""
    if not quantised(leaf):
        last = terms[-1][leaf.name]
        assert isinstance(last, Tensor)
        return last
    parts = [term[leaf.name] for term in terms]
    weight: Tensor = sum(part.weight if isinstance(part, Grid) else part for part in parts)  # type: ignore[assignment]
    return weight.t() if leaf.transposed else weight


def study_grids(study: Study) -> Callable[[], Tensors]:
    """An expert's tensors as healing makes them, in two bits, again with each call: to time it."""
    leaves, blob = study.layer.site.leaves, study.blob("q2", partial(quantise_low, bits=2))
    term = term_of(study.layer.site, "q2", blob_fields(study.layer.site, "q2", blob), trained=True)
    return lambda: {leaf.name: _sum(leaf, [term]) for leaf in leaves}


def heals(form: str) -> bool:
    """Whether a form has scales that may change."""
    return bool({*FORM_PARTS[form]} & {*HEALED})
