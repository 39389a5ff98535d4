"""Where a model family keeps its experts, what one expert is made of, and what dequantises its checkpoints.

A family that transformers decorates with its experts interface needs no line here; the others are a row of
`OWN_LAYOUTS`. How their experts compute is `runtime.hook`'s business.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from comoe.types import Leaf, NotAMoE, Site, UnsupportedFamily

REFUSED = {
    "nllb-moe": "transformers 5 runs only its experts 0 and 1, so no output could be trusted",
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


def quantizer_of(config: Any) -> Any:
    """What dequantises the tensors of the checkpoint of `config`, None for a plain one. Raises UnsupportedFamily."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = values.get("quant_method")
    if method == "fp8":
        block = {"weight_block_size": values["weight_block_size"]} if values.get("weight_block_size") else {}
        from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
        from transformers.utils.quantization_config import FineGrainedFP8Config

        return FineGrainedFP8HfQuantizer(FineGrainedFP8Config(dequantize=True, **block), pre_quantized=True)
    if method == "mxfp4":
        from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
        from transformers.utils.quantization_config import Mxfp4Config

        return Mxfp4HfQuantizer(Mxfp4Config(dequantize=True), pre_quantized=True)
    raise UnsupportedFamily(f"{config.model_type}: weights quantised by {method!r} cannot be packed; use the original.")


def dequantised(quantizer: Any, tensor: Tensor, scale: Tensor) -> Tensor:
    """An FP8 weight (..., out, in) times its scales (..., blocks, blocks).

    transformers takes blocks to be of equal size; those at the edges may be cut off, so they are completed first.
    """
    block, (rows, cols) = quantizer.quantization_config.weight_block_size, tensor.shape[-2:]
    cut = scale.dim() >= 2 and tuple(scale.shape[-2:]) == (-(-rows // block[0]), -(-cols // block[1]))
    if cut:
        sizes = (*tensor.shape[:-2], scale.shape[-2] * block[0], scale.shape[-1] * block[1])
        whole = torch.zeros(sizes, dtype=torch.uint8)
        whole[..., :rows, :cols] = tensor.view(torch.uint8)
        tensor = whole.view(tensor.dtype)
    operation = quantizer.get_load_operations()["dequantize"](quantizer)
    (found,) = operation.convert({"weight": [tensor], "weight_scale_inv": [scale]}).values()
    kept: Tensor = found[..., :rows, :cols] if cut else found
    return kept


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
