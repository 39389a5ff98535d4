"""Where a model family keeps its experts, and what one expert is made of.

A family that transformers decorates with its experts interface needs no line here; the others are a row of
`OWN_LAYOUTS`. How their experts compute is `runtime.hook`'s business.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from comoe.types import Leaf, NotAMoE, Site, UnsupportedFamily

REFUSED = {
    "nllb_moe": "transformers 5 runs only its experts 0 and 1, so no output could be trusted",
}


class Experts(NamedTuple):
    """An experts module's number of experts and the tensors of one."""

    num_experts: int
    leaves: tuple[Leaf, ...]


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every experts module, in the model's order. JetMoE's attention experts stay dense."""
    for name, module in model.named_modules():
        if is_decorated(module) or type(module).__name__ in OWN_LAYOUTS:
            yield name, module


def is_decorated(module: nn.Module) -> bool:
    """Whether transformers' experts interface runs this module."""
    return hasattr(module, "has_gate") and hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")


def experts_of(module: nn.Module) -> Experts:
    """What an experts module holds; its weights may be on the meta device."""
    return OWN_LAYOUTS.get(type(module).__name__, _stacked)(module)


def sites(model: Any, dtype: str) -> tuple[Site, ...]:
    """The sites of a model whose checkpoint is of `dtype`. Raises NotAMoE or UnsupportedFamily."""
    family = model.config.model_type
    if family in REFUSED:
        raise UnsupportedFamily(f"{family} is not supported: {REFUSED[family]}.")
    found = tuple(Site(name, *experts_of(module), dtype) for name, module in experts_modules(model))
    if found:
        return found
    if any("expert" in name.lower() for name, _ in model.named_modules()):
        raise UnsupportedFamily(f"{family} keeps its experts in a way that comoe does not know: please report it.")
    raise NotAMoE(f"{family} has no experts: this checkpoint is not a Mixture-of-Experts model.")


def _stacked(module: nn.Module) -> Experts:
    """Parameters (E, ...): all families with the experts interface, and Step3p7."""
    num_experts = int(getattr(module, "num_experts", 0)) or next(module.parameters(recurse=False)).shape[0]
    transposed = bool(getattr(module, "is_transposed", False))
    leaves = tuple(
        Leaf(name, tuple(parameter.shape[1:]), transposed and parameter.dim() == 3)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.shape[0] == num_experts
    )
    return Experts(num_experts, leaves)


def _switch(module: Any) -> Experts:
    expert = module["expert_0"]
    return Experts(len(module), tuple(Leaf(name, tuple(p.shape)) for name, p in expert.named_parameters()))


def _llama4(module: Any) -> Experts:
    names = ("gate_up_proj", "down_proj")
    return Experts(module.num_experts, tuple(Leaf(n, tuple(getattr(module, n).shape[1:]), True) for n in names))


def _longcat(module: Any) -> Experts:
    """The experts beyond the routed ones are identities and have no weights of use."""
    names = ("gate_up_proj", "down_proj")
    return Experts(module.num_routed_experts, tuple(Leaf(n, tuple(getattr(module, n).shape[1:])) for n in names))


def _dbrx(module: Any) -> Experts:
    shape = (module.ffn_hidden_size, module.hidden_size)
    leaves = (Leaf("mlp.w1", shape), Leaf("mlp.v1", shape), Leaf("mlp.w2", shape, True))
    return Experts(module.num_experts, leaves)


def _jetmoe(module: Any) -> Experts:
    names = ("input_linear", "output_linear")
    leaves = tuple(Leaf(f"{n}.weight", tuple(getattr(module, n).weight.shape[1:])) for n in names)
    return Experts(module.input_linear.num_experts, leaves)


OWN_LAYOUTS: dict[str, Callable[[Any], Experts]] = {
    "SwitchTransformersExperts": _switch,
    "Llama4TextExperts": _llama4,
    "LongcatFlashExperts": _longcat,
    "Step3p7Experts": _stacked,
    "DbrxExperts": _dbrx,
    "JetMoeMoE": _jetmoe,
}
"""Experts modules outside the interface, by class."""
