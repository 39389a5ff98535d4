"""The importer: any MoE checkpoint in hub layout, one expert at a time, through transformers' conversion tables.

Everything that rests on transformers' internals of weight conversion is in this file, and runs when a pack is made,
never when it is served. What a family's experts are is `store.families`'s business.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings, rename_source_key

from comoe.store.families import sites
from comoe.store.tensorfiles import stored_tensors
from comoe.types import (
    CheckpointError,
    Extent,
    MissingShard,
    NotFinite,
    Site,
    UnsupportedFamily,
    UsageError,
    WrongShape,
)

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True)
class Piece:
    """A stored tensor that goes into a leaf: of one `expert`, or of all of them, stacked, where None.

    `pattern` is the converter's source pattern that matched, None where the tensor is taken as it is.
    """

    expert: int | None
    pattern: str | None
    name: str


class Checkpoint:
    """A checkpoint folder opened for packing.

    `config` is transformers'; `sites` are in the model's order; `dense_names` are the stored tensors, by hub name,
    that belong to the model and not to an expert.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.model_type: str = self.config.model_type
        self.tensors = stored_tensors(folder)
        self._quantizer = _quantizer(self.config)
        self._model = skeleton_of(self.config)
        self._leaf_pieces: dict[tuple[int, str], list[Piece]] = defaultdict(list)
        self.sites: tuple[Site, ...] = sites(self._model, "bfloat16")
        self.dense_names = tuple(self._assign())
        self.dtype = self._dtype()
        self.sites = sites(self._model, self.dtype)
        self._check_complete()

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """The checkpoint in the folder `path`, or the hub repository of that name in the hub library's cache."""
        return cls(_resolve(path))

    @property
    def experts_per_token(self) -> int:
        """Experts that one token uses in one layer."""
        text = self.config.get_text_config(decoder=True)
        for config in (text, self.config, getattr(text, "ffn_config", None)):
            for name in ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "num_selected_experts"):
                value = getattr(config, name, None)
                if isinstance(value, int) and value > 0:
                    return value
        return 1

    @property
    def files(self) -> list[str]:
        """Names of the weight files, sorted."""
        return sorted({tensor.extent.file for tensor in self.tensors.values()})

    def dense_tensor(self, name: str) -> Tensor:
        """A tensor outside the experts, dequantised. Raises NotFinite."""
        tensor = self._read(name)
        if self._quantizer is not None and (companions := self._companions(name)):
            pattern, converter = self._dequantiser(name)
            converter.collected_tensors[pattern] = [tensor]
            for other, pattern in companions:
                converter.collected_tensors[pattern] = [self._read(other)]
            converted = converter.convert(name, model=self._model, config=self._model.config)
            tensor = _only(converted)
        _check_finite(tensor, name)
        return tensor.contiguous()

    def expert(self, layer: int, index: int) -> dict[str, Tensor]:
        """The tensors of one expert by leaf, dequantised, in transformers' in-memory layout.

        Raises MissingShard, WrongShape or NotFinite.
        """
        site = self.sites[layer]
        tensors = {}
        for leaf in site.leaves:
            tensor = self._leaf(layer, leaf.name, index).contiguous()
            where = f"{site.name}, expert {index}, {leaf.name}"
            if tuple(tensor.shape) != leaf.shape:
                raise WrongShape(
                    f"{self.folder}: {where} has shape {tuple(tensor.shape)}, the config implies {leaf.shape}."
                )
            _check_finite(tensor, where)
            tensors[leaf.name] = tensor.to(getattr(torch, self.dtype))
        return tensors

    def extents(self, layer: int, index: int) -> tuple[Extent, ...] | None:
        """Ranges of the files that, one after the other, may be the expert's bytes; the caller must compare.

        None where some tensor is of another dtype than the checkpoint's.
        """
        found = []
        for leaf in self.sites[layer].leaves:
            for piece in self._pieces(layer, leaf.name, index):
                tensor = self.tensors[piece.name]
                if DTYPES.get(tensor.dtype) != self.dtype:
                    return None
                found.append(self._piece_extent(layer, leaf.name, piece, index))
        return tuple(found)

    def _assign(self) -> Iterator[str]:
        """Sort stored tensors into leaves' pieces; yield those of the dense part."""
        renamings, converters = self._transforms
        state = self._model.state_dict()
        layers = {site.name: layer for layer, site in enumerate(self.sites)}
        known = set(state)
        for name in self.tensors:
            target, pattern = rename_source_key(name, renamings, converters, self._model.base_model_prefix, state)
            if target not in state and name in state:
                target, pattern = name, None
            for full in self._targets(target, pattern):
                layer = next((layers[s] for s in _prefixes(full) if s in layers), None)
                leaf = full[len(self.sites[layer].name) + 1 :] if layer is not None else ""
                if layer is not None and self._is_leaf(layer, leaf):
                    self._add_piece(layer, leaf, name, pattern)
                elif full in known or self._is_companion(name):
                    yield name
                    break

    def _targets(self, target: str, pattern: str | None) -> list[str]:
        """All tensors of the model that a stored one goes into: a converter may split it."""
        if pattern is None:
            return [target]
        converter = self._converter(pattern)
        first = converter.target_patterns[0]
        return [target.replace(first, other, 1) for other in converter.target_patterns]

    def _is_leaf(self, layer: int, leaf: str) -> bool:
        names = {leaf.name for leaf in self.sites[layer].leaves}
        return leaf in names or _expert_module(leaf)[1] in names

    def _add_piece(self, layer: int, leaf: str, name: str, pattern: str | None) -> None:
        expert, rest = _expert_module(leaf)
        if expert is None and pattern is not None and "*" in pattern:
            renamed = apply_renamings(name, self._transforms[0])
            match = re.search(pattern.replace(".*.", r"\.(\d+)\."), renamed)
            assert match is not None, (pattern, renamed)
            expert = int(match.group(1))
        self._leaf_pieces[layer, rest].append(Piece(expert, pattern, name))

    def _pieces(self, layer: int, leaf: str, index: int) -> list[Piece]:
        """The pieces of one expert's leaf, in the converter's order. Raises MissingShard."""
        found = self._leaf_index[layer, leaf]
        pieces = found.get(index, []) + found.get(None, [])
        if pieces and pieces[0].pattern is not None:
            order = self._converter(pieces[0].pattern).source_patterns
            pieces.sort(key=lambda piece: order.index(piece.pattern))
            if len(pieces) == len([p for p in order if not self._optional(p)]) or len(pieces) == len(order):
                return pieces
        elif len(pieces) == 1:
            return pieces
        raise MissingShard(
            f"{self.folder}: {self.sites[layer].name}, expert {index}: {leaf} is missing: download it again."
        )

    @staticmethod
    def _optional(pattern: str) -> bool:
        return pattern.endswith(("scale_inv", "_scales", "scale", "bias"))

    @cached_property
    def _leaf_index(self) -> dict[tuple[int, str], dict[int | None, list[Piece]]]:
        index: dict[tuple[int, str], dict[int | None, list[Piece]]] = defaultdict(lambda: defaultdict(list))
        for key, pieces in self._leaf_pieces.items():
            for piece in pieces:
                index[key][piece.expert].append(piece)
        return index

    def _leaf(self, layer: int, leaf: str, index: int) -> Tensor:
        pieces = self._pieces(layer, leaf, index)
        raw = [self._read_piece(layer, leaf, piece, index) for piece in pieces]
        dims = len(self._leaf_shape(layer, leaf))
        if pieces[0].pattern is None:
            return raw[0] if raw[0].dim() == dims else raw[0][0]
        converter = deepcopy(self._converter(pieces[0].pattern))
        for piece, tensor in zip(pieces, raw, strict=True):
            converter.collected_tensors[piece.pattern] = [tensor]
        full = f"{self.sites[layer].name}.{leaf}"
        converted = converter.convert(full, model=self._model, config=self._model.config)
        tensor = converted.get(full)
        if tensor is None:
            tensor = _only(converted)
        return tensor[0] if isinstance(tensor, list) or tensor.dim() > dims else tensor

    def _leaf_shape(self, layer: int, leaf: str) -> tuple[int, ...]:
        return next(found.shape for found in self.sites[layer].leaves if found.name == leaf)

    def _rows(self, layer: int, leaf: str, piece: Piece) -> int:
        """Rows of one expert in a stacked tensor: several where it has no dimension of experts (DBRX)."""
        shape = self.tensors[piece.name].shape
        flat = len(shape) == len(self._leaf_shape(layer, leaf))
        return shape[0] // self.sites[layer].num_experts if flat else 1

    def _read_piece(self, layer: int, leaf: str, piece: Piece, index: int) -> Tensor:
        """A piece's tensor for one expert: of a stacked one its rows, (1, ...) where it has a dimension of experts."""
        if piece.expert is not None:
            return self._read(piece.name)
        rows = self._rows(layer, leaf, piece)
        file = self.tensors[piece.name].extent.file
        found: Tensor = self._handles[file].get_slice(piece.name)[index * rows : (index + 1) * rows]
        return found

    def _piece_extent(self, layer: int, leaf: str, piece: Piece, index: int) -> Extent:
        stored = self.tensors[piece.name]
        if piece.expert is not None:
            return stored.extent
        length = stored.extent.length // stored.shape[0] * self._rows(layer, leaf, piece)
        return Extent(stored.extent.file, stored.extent.offset + index * length, length)

    def _read(self, name: str) -> Tensor:
        found: Tensor = self._handles[self.tensors[name].extent.file].get_tensor(name)
        return found

    @cached_property
    def _handles(self) -> dict[str, Any]:
        files = {tensor.extent.file for tensor in self.tensors.values()}
        return {file: safe_open(str(self.folder / file), framework="pt") for file in files}

    @cached_property
    def _transforms(self) -> tuple[list[Any], list[Any]]:
        transforms = get_model_conversion_mapping(self._model, hf_quantizer=self._quantizer)
        renamings = [found for found in transforms if isinstance(found, WeightRenaming)]
        return renamings, [found for found in transforms if isinstance(found, WeightConverter)]

    def _converter(self, pattern: str) -> Any:
        return next(found for found in self._transforms[1] if pattern in found.source_patterns)

    def _is_companion(self, name: str) -> bool:
        return False

    def _companions(self, name: str) -> list[tuple[str, str]]:
        """Scales that belong to a quantised dense tensor, with the converter's patterns."""
        return []

    def _dequantiser(self, name: str) -> tuple[str, Any]:
        raise UnsupportedFamily(f"{self.folder}: {name} is quantised in a way that comoe does not know.")

    def _dtype(self) -> str:
        """The dtype of the stored experts; of quantised ones, the config's."""
        for pieces in self._leaf_pieces.values():
            stored = DTYPES.get(self.tensors[pieces[0].name].dtype)
            if stored is not None:
                return stored
        configured = str(getattr(self.config, "dtype", None) or "bfloat16").removeprefix("torch.")
        return configured if configured in DTYPES.values() else "bfloat16"

    def _check_complete(self) -> None:
        """Every tensor of the model is there, and the dense ones have the config's shapes."""
        if not self._leaf_pieces:
            raise MissingShard(f"{self.folder} holds no expert's weights: download the checkpoint again.")
        for layer, site in enumerate(self.sites):
            for leaf in site.leaves:
                for index in range(site.num_experts):
                    self._pieces(layer, leaf.name, index)
        state = self._model.state_dict()
        for name in self.dense_names:
            if name in state and self._quantizer is None and tuple(state[name].shape) != self.tensors[name].shape:
                raise WrongShape(
                    f"{self.folder}: {name} has shape {self.tensors[name].shape}, "
                    f"the config implies {tuple(state[name].shape)}."
                )


def skeleton_of(config: Any) -> Any:
    """The model that `config` names, without weights (on the meta device)."""
    with torch.device("meta"):
        model = model_class(config)(config)
    return model.eval()


def model_class(config: Any) -> Any:
    """The transformers class of the architecture that `config` names. Raises UnsupportedFamily."""
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    raise UnsupportedFamily(
        f"{config.model_type}: this transformers has no architecture {getattr(config, 'architectures', None)}."
    )


def _resolve(path: str | Path) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1:
        raise UsageError(f"{path} is not a folder: give a checkpoint's folder or a hub id (owner/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = str(path).partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is neither a folder nor a repository that the hub library finds.") from error


def read_config(folder: Path) -> Any:
    """transformers' config of a checkpoint folder. Raises CheckpointError or UnsupportedFamily."""
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds no config.json: give the folder of a checkpoint in hub layout.")
    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise UnsupportedFamily(f"{folder}/config.json: {str(error).splitlines()[0]}") from error


def _quantizer(config: Any) -> Any:
    """What dequantises a checkpoint's tensors, None for a plain one."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    if method == "fp8":
        from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
        from transformers.utils.quantization_config import FineGrainedFP8Config

        return FineGrainedFP8HfQuantizer(FineGrainedFP8Config(dequantize=True), pre_quantized=True)
    if method == "mxfp4":
        from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
        from transformers.utils.quantization_config import Mxfp4Config

        return Mxfp4HfQuantizer(Mxfp4Config(dequantize=True), pre_quantized=True)
    raise UnsupportedFamily(f"{config.model_type}: weights quantised by {method!r} cannot be packed; use the original.")


def _prefixes(name: str) -> Iterator[str]:
    """`a.b.c` -> `a.b`, `a`."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _expert_module(leaf: str) -> tuple[int | None, str]:
    """`expert_3.wi.weight` -> (3, `wi.weight`): Switch keeps a module per expert. Else (None, leaf)."""
    match = re.fullmatch(r"expert_(\d+)\.(.+)", leaf)
    return (int(match.group(1)), match.group(2)) if match else (None, leaf)


def _only(converted: dict[str, Any]) -> Tensor:
    (tensor,) = converted.values()
    only: Tensor = tensor[0] if isinstance(tensor, list) else tensor
    return only


def _check_finite(tensor: Tensor, where: str) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise NotFinite(f"{where} holds NaN or infinity: the checkpoint is damaged.")
