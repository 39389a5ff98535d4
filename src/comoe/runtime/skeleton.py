"""A transformers model without its experts: the ordinary `from_pretrained`, with expert weights never materialised.

Uses the extension point that transformers has for quantisers, whose purpose is to edit the model before weights load.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from comoe.device import process
from comoe.store.checkpoint import model_class, read_config
from comoe.store.families import experts_modules, experts_of

METHOD = "comoe"


@register_quantization_config(METHOD)
class StrippedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Asks transformers for a model whose experts comoe serves."""

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method = METHOD


@register_quantizer(METHOD)
class Stripper(HfQuantizer):  # type: ignore[misc]
    """Takes the experts' weights out of the model before transformers loads the others."""

    requires_calibration = False
    is_trainable = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        strip(model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.remove_quantization_config(model)

    def is_serializable(self) -> bool:
        return False


def load_skeleton(folder: Path, dtype: torch.dtype, **kwargs: Any) -> Any:
    """The model of the pack or checkpoint in `folder`, in `dtype`, in eval mode, without expert weights.

    Dense weights are anonymous memory: what is file-backed could be evicted and would not count as ours.
    """
    config = read_config(folder)
    model = model_class(config).from_pretrained(
        folder, config=config, dtype=dtype, quantization_config=StrippedConfig(), **kwargs
    )
    copy_out(model, folder)
    drop_cached(folder)
    return model.eval()


def strip(model: Any) -> None:
    """Delete the experts' weights from a model on the meta device and keep transformers from asking for them."""
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())  # private
    module: Any
    for name, module in list(experts_modules(model)):
        parent = model.get_submodule(name.rpartition(".")[0])
        if type(module).__name__ == "SwitchTransformersExperts":
            object.__setattr__(module, "comoe_activation", module["expert_0"].act)
            module.clear()
        else:
            for leaf in experts_of(module).leaves:
                _delete(module, leaf.name)
                model.all_tied_weights_keys.pop(f"{name}.{leaf.name}", None)
        module._is_hf_initialized = parent._is_hf_initialized = True  # private; keeps their weights from being made
        descendant: Any
        for descendant in module.modules():
            descendant._is_hf_initialized = True
        ignored.add(rf"^{re.escape(name)}\.")
    model._keys_to_ignore_on_load_unexpected = ignored


def copy_out(model: Any, folder: Path) -> None:
    """Give tensors that are pages of a file of `folder` memory of their own, and let the pages go, one by one."""
    mapped = process.mappings(folder)
    kept = []  # a file stays mapped, and its addresses are nothing else's, as long as a tensor of it lives
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.requires_grad_(False)
        if any(tensor.data_ptr() in addresses for addresses in mapped):
            kept.append(tensor.data)
            tensor.data = tensor.data.clone()
            process.unmap_pages(kept[-1].data_ptr(), kept[-1].nbytes)


def drop_cached(folder: Path) -> None:
    """Ask the kernel to forget the pages of the dense part's file: they were copied."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _delete(module: nn.Module, leaf: str) -> None:
    owner, _, name = leaf.rpartition(".")
    delattr(module.get_submodule(owner), name)
