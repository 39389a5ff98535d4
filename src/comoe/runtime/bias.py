"""A routing bias: in decoding, routers prefer experts that are in memory, as far as the ledger allows it.

A router is supported that answers (logits, gates, index) by softmax and top-k of several, its gates renormalised or
not. That is told by asking it, not by its name. The likeliest expert is always kept, so that of one nothing could move.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from comoe.runtime.layer import DECODE_TOKENS, Serving
from comoe.store.families import experts_modules
from comoe.types import UsageError

KNOWN_TOKENS = 64
"""Random inputs for which a router's answer must be its logits' softmax and top-k."""

KNOWN_SCALES = (0.1, 1.0)
"""Of those inputs. Peaked gates sum to one, renormalised or not; flat ones tell the two apart."""

Answer = tuple[Tensor, Tensor, Tensor]


class Router(NamedTuple):
    """A supported router: its module, and whether it renormalises the gates of the chosen."""

    module: Any
    renormalised: bool


class Moved(NamedTuple):
    """Another choice of as many experts: `gates` and `experts` (N, K), and the `share` (N,) of a token's gates moved.

    That is what the chosen have less of the router's probability than those that it wanted, over what these have.
    """

    gates: Tensor
    experts: Tensor
    share: Tensor


def moved(answer: Answer, resident: Tensor, delta: float, *, renormalised: bool) -> Moved:
    """The choice by logits to which `delta` is added where `resident` (E,) is set, the likeliest kept.

    Gates are those that the router gives to the chosen: a bias says who is chosen, never by how much.
    """
    logits, _, wanted = answer
    shares = torch.softmax(logits.float(), -1)
    biased = logits.float() + delta * resident
    biased.scatter_(-1, shares.argmax(-1, keepdim=True), torch.inf)
    experts = biased.topk(wanted.shape[-1], -1).indices
    mine = shares.gather(-1, experts)
    gates = mine / mine.sum(-1, keepdim=True) if renormalised else mine
    theirs = shares.gather(-1, wanted).sum(-1)
    return Moved(gates, experts, (1 - mine.sum(-1) / theirs).clamp(min=0))


def routers(model: Any) -> list[Router]:
    """The router of every sparse layer, in order. Raises UsageError where one is not supported."""
    found = []
    for name, _ in experts_modules(model):
        block = model.get_submodule(name.rpartition(".")[0])
        router = getattr(block, "gate", None) or getattr(block, "router", None)
        renormalised = None if router is None else _renormalises(router)
        if renormalised is None:
            family = model.config.model_type
            raise UsageError(f"{family} routes in a way that a routing bias cannot move: leave out --routing-bias.")
        found.append(Router(router, renormalised))
    return found


def attach_bias(model: Any, serving: Serving, delta: float) -> None:
    """From now on decoding prefers, by `delta` logits, experts that are resident in the plan's target.

    Raises UsageError where the model's routers are not supported.
    """
    for layer, (module, renormalised) in enumerate(routers(model)):
        module.register_forward_hook(RoutingBias(layer, serving, delta, renormalised=renormalised))


class RoutingBias:
    """A forward hook of one layer's router. Answers of more than one token are left as they are."""

    def __init__(self, layer: int, serving: Serving, delta: float, *, renormalised: bool) -> None:
        self._layer, self._serving, self._delta, self._renormalised = layer, serving, delta, renormalised
        experts = range(serving.manifest.layers[layer].num_experts)
        self._groups = [serving.way(layer, expert, serving.plan.target).blobs for expert in experts]

    def __call__(self, module: Any, args: Any, answer: Answer) -> Answer | None:
        logits, gates, index = answer
        if len(index) > DECODE_TOKENS:
            return None
        resident = torch.tensor(self._serving.cache.residents(self._groups))
        if resident[index].all():
            return None
        found = moved(answer, resident, self._delta, renormalised=self._renormalised)
        share = float(found.share)
        if not share or not self._serving.ledger.move(self._layer, float(gates.abs().sum()), share):
            return None
        return logits, found.gates.to(gates.dtype), found.experts


@torch.no_grad()
def _renormalises(router: Any) -> bool | None:
    """Whether a router renormalises its gates; None where it is not softmax and top-k of several."""
    matrix = next((p for p in router.parameters() if p.dim() == 2), None)
    if matrix is None:
        return None
    noise = torch.randn(KNOWN_TOKENS, matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix.dtype)
    fits = [_fits(router, scale * noise) for scale in KNOWN_SCALES]
    ways = [way for way in (False, True) if all(way in found for found in fits)]
    return ways[0] if len(ways) == 1 else None


def _fits(router: Any, x: Tensor) -> set[bool]:
    """Whether an answer to `x` (N, H) is what its logits say, without renormalising and with it: both, or neither."""
    try:
        answer = router(x)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):  # it takes something else
        return set()
    if not _is_answer(answer, len(x)):
        return set()
    logits, gates, index = answer
    shares = torch.softmax(logits.float(), -1)
    best = shares.topk(index.shape[-1], -1).values
    if not torch.equal(shares.gather(-1, index).sort(-1, descending=True).values, best):
        return set()
    mine = shares.gather(-1, index)
    near = 4 * torch.finfo(gates.dtype).eps
    candidates = {False: mine, True: mine / mine.sum(-1, keepdim=True)}
    return {way for way, wanted in candidates.items() if torch.allclose(gates.float(), wanted, rtol=near, atol=near)}


def _is_answer(answer: Any, tokens: int) -> bool:
    """Whether it is logits (N, E), gates (N, K) and index (N, K), 1 < K < E."""
    if not (isinstance(answer, tuple) and len(answer) == 3 and all(isinstance(part, Tensor) for part in answer)):
        return False
    logits, gates, index = answer
    shaped = logits.dim() == 2 and gates.shape == index.shape and len(logits) == len(index) == tokens
    typed = gates.is_floating_point() and logits.is_floating_point() and index.dtype == torch.int64
    return bool(shaped and typed and 1 < index.shape[-1] < logits.shape[-1])
