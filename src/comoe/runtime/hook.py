"""Where transformers meets comoe: every family's experts become one call of `ExpertLayer.forward`.

What is replaced, and nowhere else in comoe:

| families | replaced | how |
|---|---|---|
| all with the experts interface | nothing | a function registered as `comoe` (documented extension point) |
| Switch | `forward` of the experts module's instance | the one-hot mask becomes an index, or "no expert" when dropped |
| Llama4 | the same | rows that the router zeroed are skipped |
| LongCat | the same | identity experts are added here, after the routed ones |
| Step3p7, DBRX | the same | index and weights as they come |
| JetMoE | `forward` of the MoE module's instance | top-k taken from the router's logits |
"""

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ExpertsInterface

from comoe.store.families import experts_modules, is_decorated

IMPLEMENTATION = "comoe"


class ExpertLayer(Protocol):
    """What runs a site's experts."""

    def forward(self, module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Sum over each token's experts: `x` (N, H), `index` and `weight` (N, K) to (N, H).

        An index of `num_experts` or more means no expert.
        """
        ...


def attach(model: Any, layers: Sequence[ExpertLayer]) -> None:
    """Let `layers`, in the order of the model's sites, run its experts."""
    modules = list(experts_modules(model))
    for (_, module), layer in zip(modules, layers, strict=True):
        object.__setattr__(module, "comoe_layer", layer)  # not a submodule, not in the state dict
        forward = OWN_FORWARDS.get(type(module).__name__)
        if forward is not None:
            module.forward = MethodType(forward, module)
    if any(is_decorated(module) for _, module in modules):
        ExpertsInterface.register(IMPLEMENTATION, _interface_forward)
        model.set_experts_implementation(IMPLEMENTATION)


def expert_forward(module: Any, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """One expert's outputs (T, H) for `x` (T, H) by its family's arithmetic; `tensors` by leaf."""
    return OWN_EXPERTS.get(type(module).__name__, _stacked_expert)(module, x, tensors)


def plain_activation(module: Any) -> tuple[str, bool] | None:
    """(`relu`, `silu`, `gelu` or `gelu_tanh`; gated) where an expert is nothing but two linears around it, else None.

    Only then may a fused kernel stand in for `expert_forward`.
    """
    own = OWN_ACTIVATIONS.get(type(module).__name__)
    if own is not None:
        attribute, gated = own
        name = _activation_name(getattr(module, attribute))
        return (name, gated) if name else None
    if not is_decorated(module) or not getattr(module, "is_concatenated", True):
        return None
    special = module.has_bias or module.is_transposed or getattr(module, "has_post_expert_norm", False)
    own_gate = not type(module)._apply_gate.__module__.startswith("transformers.integrations")
    name = _activation_name(getattr(module, "act_fn", None))
    if special or (module.has_gate and own_gate) or name is None:
        return None
    return name, bool(module.has_gate)


ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "ReLU": "relu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
}


OWN_ACTIVATIONS = {
    "SwitchTransformersExperts": ("comoe_activation", False),
    "LongcatFlashExperts": ("act_fn", True),
    "JetMoeMoE": ("activation", True),
}
"""Modules outside the interface whose experts are two linears: where their activation is, and whether it gates."""


def _activation_name(activation: Any) -> str | None:
    return "silu" if activation is F.silu else ACTIVATIONS.get(type(activation).__name__)


def _interface_forward(self: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    output: Tensor = self.comoe_layer.forward(self, x, index, weight)
    return output


def _switch_forward(self: Any, x: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """`mask` (N, 1, E) is one-hot, all zero for a token beyond its expert's capacity."""
    index = torch.where(mask.sum(-1) > 0, mask.argmax(-1), mask.shape[-1])
    return _interface_forward(self, x, index, weight)


def _llama4_forward(self: Any, routed: Tensor) -> Tensor:
    """`routed` (E * N, H): every token once per expert, scaled by its gate, zero where it was not routed."""
    rows = routed.any(-1).nonzero()[:, 0]
    index = (rows // (len(routed) // self.num_experts))[:, None]
    out = torch.zeros_like(routed)
    out[rows] = _interface_forward(self, routed[rows], index, torch.ones_like(index, dtype=routed.dtype))
    return out


def _longcat_forward(self: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    out = _interface_forward(self, x, index, weight)
    for expert in range(self.num_routed_experts, self.total_experts):
        positions, tokens = torch.where(index.t() == expert)
        out.index_add_(0, tokens, (x[tokens] * weight[tokens, positions, None]).to(out.dtype))
    return out


def _dbrx_forward(self: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    flat = x.reshape(-1, int(self.hidden_size))
    out: Tensor = _interface_forward(self, flat, index, weight).view(x.shape)
    return out


def _jetmoe_forward(self: Any, x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    logits, index = self.router(flat)[-1].topk(self.router.top_k, dim=1)
    weight = torch.softmax(logits, dim=1).type_as(flat)
    out: Tensor = _interface_forward(self, flat, index, weight).view(x.shape) + self.bias
    return out


OWN_FORWARDS: dict[str, Callable[..., Tensor]] = {
    "SwitchTransformersExperts": _switch_forward,
    "Llama4TextExperts": _llama4_forward,
    "LongcatFlashExperts": _longcat_forward,
    "Step3p7Experts": _interface_forward,
    "DbrxExperts": _dbrx_forward,
    "JetMoeMoE": _jetmoe_forward,
}


def _stacked_expert(module: Any, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Families with the interface; the attributes are those that transformers' own backends use."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    linear = torch.matmul if module.is_transposed else F.linear
    hidden = linear(x, tensors[up])
    hidden = hidden + tensors[f"{up}_bias"] if module.has_bias else hidden
    y = linear(module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden), tensors["down_proj"])
    y = y + tensors["down_proj_bias"] if module.has_bias else y
    out: Tensor = module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y
    return out


def _switch_expert(module: Any, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    return F.linear(module.comoe_activation(F.linear(x, tensors["wi.weight"])), tensors["wo.weight"])


def _gated(activation: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    out: Tensor = activation(gate) * up
    return out


def _llama4_expert(module: Any, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.matmul(_gated(module.act_fn, torch.matmul(x, tensors["gate_up_proj"])), tensors["down_proj"])


def _longcat_expert(module: Any, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    return F.linear(_gated(module.act_fn, F.linear(x, tensors["gate_up_proj"])), tensors["down_proj"])


def _step3p7_expert(module: Any, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    return F.linear(module._apply_gate(F.linear(x, tensors["gate_up_proj"])), tensors["down_proj"])


def _dbrx_expert(module: Any, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    out: Tensor = module.mlp(x, tensors["mlp.w1"], tensors["mlp.v1"], tensors["mlp.w2"])
    return out


def _jetmoe_expert(module: Any, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    hidden = _gated(module.activation, F.linear(x, tensors["input_linear.weight"]))
    return F.linear(hidden, tensors["output_linear.weight"])


OWN_EXPERTS: dict[str, Callable[[Any, Tensor, Mapping[str, Tensor]], Tensor]] = {
    "SwitchTransformersExperts": _switch_expert,
    "Llama4TextExperts": _llama4_expert,
    "LongcatFlashExperts": _longcat_expert,
    "Step3p7Experts": _step3p7_expert,
    "DbrxExperts": _dbrx_expert,
    "JetMoeMoE": _jetmoe_expert,
}
