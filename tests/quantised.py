"""Checkpoints as hubs hold them quantised, FP8 and MXFP4, and the plain ones that they stand for."""

import shutil
from pathlib import Path

import torch
from models import edit_config, save_random
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import dequantize_convertops

WEIGHTS = "model.safetensors"
FP8_BLOCK = 12


def quantise_fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(FP8 weight, scale by block, what they stand for in bf16); blocks at the edges are cut off."""
    rows, cols = (-(-n // FP8_BLOCK) for n in weight.shape)
    scale = torch.rand(rows, cols) * 0.01 + 0.001
    each = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)[: weight.shape[0], : weight.shape[1]]
    stored = (weight.float() / each).clamp(-448, 448).to(torch.float8_e4m3fn)
    return stored, scale, (stored.float() * each).bfloat16()


def save_fp8(family: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write an FP8 checkpoint of `family`; returns the plain tensors it stands for: all, and those quantised."""
    save_random(family, folder, torch.bfloat16)
    plain, stored, quantised = load_file(folder / WEIGHTS), {}, {}
    torch.manual_seed(1)
    for name, tensor in plain.items():
        if "_proj" in name and tensor.dim() == 2:
            stored[name], stored[f"{name}_scale_inv"], quantised[name] = quantise_fp8(tensor)
    save_file(plain | stored, folder / WEIGHTS)
    block = [FP8_BLOCK, FP8_BLOCK]
    method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}
    edit_config(folder, quantization_config=method)
    return plain | quantised, quantised


def save_mxfp4(family: str, folder: Path) -> dict[str, Tensor]:
    """Write an MXFP4 checkpoint of `family`, whose stacks are (E, in, out); returns the plain tensors it stands for."""
    save_random(family, folder, torch.bfloat16)
    plain, stored = load_file(folder / WEIGHTS), {}
    torch.manual_seed(1)
    for name in [name for name in plain if name.endswith("_proj") and "experts" in name]:
        experts, rows, cols = plain[name].shape
        blocks = torch.randint(0, 256, (experts, cols, rows // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 128, (experts, cols, rows // 32), dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = dequantize_convertops(blocks, scales, torch.bfloat16).contiguous()
    kept = {name: tensor for name, tensor in plain.items() if f"{name}_blocks" not in stored}
    save_file(kept | stored, folder / WEIGHTS)
    edit_config(folder, quantization_config={"quant_method": "mxfp4"})
    return plain


def save_plain(plain: dict[str, Tensor], quantised: Path, folder: Path) -> None:
    """Write the checkpoint that the one in `quantised` stands for: the same but for its weights."""
    shutil.copytree(quantised, folder)
    save_file(plain, folder / WEIGHTS)
    edit_config(folder, quantization_config=None)
