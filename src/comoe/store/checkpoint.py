"""The importer: any MoE checkpoint in hub layout, one expert at a time, through transformers' conversion tables.

Everything that rests on transformers' internals of weight conversion is in this file, and runs when a pack is made,
never when it is served. What a family's experts are is `store.families`'s business.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings, rename_source_key

from comoe.store.families import dequantised, quantizer_of, sites
from comoe.store.tensorfiles import find_folder, stored_tensors
from comoe.types import CheckpointError, Extent, MissingShard, NotFinite, Site, UnsupportedFamily, WrongShape

SCALE = "_scale_inv"
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
        self._quantizer = quantizer_of(self.config)
        self._model = skeleton_of(self.config)
        self._found: set[str] = set()
        self._leaf_pieces: dict[tuple[int, str], list[Piece]] = defaultdict(list)
        self.sites: tuple[Site, ...] = sites(self._model, "bfloat16")
        self.dense_names = tuple(self._assign())
        self._share_tied()
        self._narrow()
        self.dtype = self._dtype()
        self.sites = tuple(replace(site, dtype=self.dtype) for site in self.sites)
        self._check_complete()

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """The checkpoint in the folder `path`, or the hub repository of that name in the hub library's cache."""
        return cls(find_folder(path))

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
        """A tensor outside the experts, dequantised. Raises MissingShard or NotFinite."""
        tensor = self._read(name)
        if self._is_quantised(name):
            tensor = self._dequantised(name, tensor)
        _check_finite(tensor, f"{self.folder}: {name}")
        return tensor.contiguous()

    def expert(self, layer: int, index: int) -> dict[str, Tensor]:
        """The tensors of one expert by leaf, dequantised, in transformers' in-memory layout.

        Raises MissingShard, WrongShape, NotFinite or UnsupportedFamily.
        """
        site = self.sites[layer]
        tensors = {}
        for leaf in site.leaves:
            tensor = self._leaf(layer, leaf.name, index).contiguous()
            where = f"{self.folder}: {site.name}, expert {index}, {leaf.name}"
            if tuple(tensor.shape) != leaf.shape:
                raise WrongShape(f"{where} has shape {tuple(tensor.shape)}, the config implies {leaf.shape}.")
            if tensor.element_size() == 1:
                raise UnsupportedFamily(f"{where} is quantised in a way that comoe does not know: please report it.")
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
        for name in self.tensors:
            target, pattern = rename_source_key(name, renamings, converters, self._model.base_model_prefix, state)
            if target not in state and name in state:
                target, pattern = name, None
            targets = self._targets(target, pattern)
            leaves = [leaf for full in targets if (leaf := self._leaf_of(full))]
            self._add_pieces(leaves, name, pattern)
            if not leaves and not self._is_companion(name) and (known := [full for full in targets if full in state]):
                self._found.update(known)
                yield name

    def _targets(self, target: str, pattern: str | None) -> list[str]:
        """All tensors of the model that a stored one goes into: a converter may split it."""
        if pattern is None:
            return [target]
        converter = self._converter(pattern)
        first = converter.target_patterns[0]
        return [target.replace(first, other, 1) for other in converter.target_patterns]

    def _leaf_of(self, full: str) -> tuple[int, str] | None:
        """(layer, leaf) of a tensor of the model, None where it is not an expert's. Switch's leaf begins `expert_E.`"""
        layer = next((self._layers[prefix] for prefix in _prefixes(full) if prefix in self._layers), None)
        if layer is None:
            return None
        leaf = full[len(self.sites[layer].name) + 1 :]
        return (layer, leaf) if self._is_leaf(layer, leaf) else None

    @cached_property
    def _layers(self) -> dict[str, int]:
        return {site.name: layer for layer, site in enumerate(self.sites)}

    def _is_leaf(self, layer: int, leaf: str) -> bool:
        names = {leaf.name for leaf in self.sites[layer].leaves}
        return leaf in names or _expert_module(leaf)[1] in names

    def _add_pieces(self, leaves: list[tuple[int, str]], name: str, pattern: str | None) -> None:
        """Add a stored tensor to the leaves that it goes into.

        Several sites may share one list of experts, a range each (ERNIE-VL: text experts, then vision experts).
        """
        expert = self._stored_expert(name, pattern)
        ranges = list(dict.fromkeys(layer for layer, _ in leaves))
        for layer, leaf in leaves:
            own, rest = _expert_module(leaf)
            if expert is None:
                self._leaf_pieces[layer, rest].append(Piece(own, pattern, name))
                continue
            local = expert - sum(self.sites[before].num_experts for before in ranges[: ranges.index(layer)])
            if len(ranges) == 1 or 0 <= local < self.sites[layer].num_experts:
                self._leaf_pieces[layer, rest].append(Piece(local, pattern, name))

    def _stored_expert(self, name: str, pattern: str | None) -> int | None:
        """The number in a stored tensor's name, None where it holds all experts."""
        if pattern is None or "*" not in pattern:
            return None
        match = re.search(pattern.replace(".*.", r"\.(\d+)\."), self._renamed(name))
        assert match is not None, (pattern, name)
        return int(match.group(1))

    def _share_tied(self) -> None:
        """Leaves that transformers ties to another site's are read from there (DiffusionGemma's encoder)."""
        for target, source in self._model.all_tied_weights_keys.items():
            tied, owner = self._leaf_of(target), self._leaf_of(source)
            if tied and owner and tied not in self._leaf_pieces:
                self._leaf_pieces[tied] = self._leaf_pieces[owner]

    def _narrow(self) -> None:
        """Leave one expert in the skeleton's stacks, as in all that is converted: some conversions compare shapes."""
        for site in self.sites:
            module = self._model.get_submodule(site.name)
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.shape[:1] == (site.num_experts,):
                    setattr(module, name, nn.Parameter(parameter[:1], requires_grad=False))

    def _pieces(self, layer: int, leaf: str, index: int) -> list[Piece]:
        """The pieces of one expert's leaf, in the converter's order. Raises MissingShard."""
        found = self._leaf_index[layer, leaf]
        pieces = found.get(index, []) + found.get(None, [])
        if pieces and pieces[0].pattern is not None:
            order = self._converter(pieces[0].pattern).source_patterns
            by_pattern = {piece.pattern: piece for piece in pieces}
            if len(by_pattern) == len(pieces) and all(p in by_pattern or self._optional(p, by_pattern) for p in order):
                return [by_pattern[pattern] for pattern in order if pattern in by_pattern]
        elif len(pieces) == 1:
            return pieces
        raise MissingShard(
            f"{self.folder}: {self.sites[layer].name}, expert {index}: {leaf} is missing: download it again."
        )

    def _optional(self, pattern: str, pieces: dict[str | None, Piece]) -> bool:
        """Whether nothing needs the source of `pattern`: a plain tensor needs no scale."""
        scaled = pieces.get(pattern.removesuffix(SCALE))
        plain = pattern.endswith(SCALE) and scaled is not None and not self._is_quantised(scaled.name)
        return plain or pattern.endswith("activation_scale")

    def _is_quantised(self, name: str) -> bool:
        return self.tensors[name].dtype.startswith(("F8", "F4", "I8"))

    def _dequantised(self, name: str, tensor: Tensor) -> Tensor:
        scale_name = self._by_renamed.get(self._renamed(name) + SCALE)
        if scale_name is None or self._quantizer is None:
            raise MissingShard(f"{self.folder}: {name} lacks its scale, or the config its quantization_config.")
        return dequantised(self._quantizer, tensor, self._read(scale_name)).to(getattr(torch, self.dtype))

    @cached_property
    def _leaf_index(self) -> dict[tuple[int, str], dict[int | None, list[Piece]]]:
        index: dict[tuple[int, str], dict[int | None, list[Piece]]] = defaultdict(lambda: defaultdict(list))
        for key, pieces in self._leaf_pieces.items():
            for piece in pieces:
                index[key][piece.expert].append(piece)
        return index

    def _leaf(self, layer: int, leaf: str, index: int) -> Tensor:
        pieces = self._pieces(layer, leaf, index)
        raw = {str(piece.pattern): self._read_piece(layer, leaf, piece, index) for piece in pieces}
        dims = len(self._leaf_shape(layer, leaf))
        if pieces[0].pattern is None:
            (only,) = raw.values()
            return only if only.dim() == dims else only[0]
        for scale in [pattern for pattern in raw if pattern.endswith(SCALE)]:
            weight = scale.removesuffix(SCALE)
            raw[weight] = dequantised(self._quantizer, raw[weight], raw.pop(scale))
        converter = deepcopy(self._converter(pieces[0].pattern))
        # A converter that divides a list of experts among several targets must find one for each.
        copies = len(converter.target_patterns) if pieces[0].expert is not None else 1
        converter.collected_tensors.update((pattern, [tensor] * copies) for pattern, tensor in raw.items())
        full = f"{self.sites[layer].name}.{leaf}"
        try:
            converted = converter.convert(full, model=self._model, config=self._model.config)
        except (ValueError, RuntimeError) as error:
            message = f"{self.folder}: the tensors of {full}, expert {index}, have not the shapes of the config."
            raise WrongShape(message) from error
        tensor = converted[full] if full in converted else _only(converted)
        kept: Tensor = tensor[0] if isinstance(tensor, list) or tensor.dim() > dims else tensor
        return kept

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
        rows, stored = self._rows(layer, leaf, piece), self.tensors[piece.name]
        if stored.shape[:1] != (rows * self.sites[layer].num_experts,):
            raise WrongShape(f"{self.folder}: {piece.name} has shape {stored.shape}, not one row for each expert.")
        found: Tensor = self._handles[stored.extent.file].get_slice(piece.name)[index * rows : (index + 1) * rows]
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

    def _renamed(self, name: str) -> str:
        return str(apply_renamings(name, self._transforms[0]))

    @cached_property
    def _by_renamed(self) -> dict[str, str]:
        return {self._renamed(name): name for name in self.tensors}

    def _is_companion(self, name: str) -> bool:
        """Whether a stored tensor is only there to dequantise another."""
        return self._quantizer is not None and self._renamed(name).endswith((SCALE, "activation_scale"))

    def _dtype(self) -> str:
        """The dtype of the stored experts; of quantised ones, the config's."""
        for piece in (piece for pieces in self._leaf_pieces.values() for piece in pieces):
            stored = DTYPES.get(self.tensors[piece.name].dtype)
            if stored is not None and not self._is_companion(piece.name):
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
        tied = self._model.all_tied_weights_keys
        twins = tied | {source: target for target, source in tied.items()}
        for name, _ in self._model.named_parameters():
            if self._found.isdisjoint((name, twins.get(name))) and self._leaf_of(name) is None:
                raise MissingShard(f"{self.folder}: {name} is missing: download the checkpoint again.")
        state = self._model.state_dict()
        for name in self.dense_names:
            stored, implied = self.tensors[name].shape, tuple(state[name].shape) if name in state else None
            if implied not in (stored, None) and self._quantizer is None:
                raise WrongShape(f"{self.folder}: {name} has shape {stored}, the config implies {implied}.")


def skeleton_of(config: Any) -> Any:
    """The model that `config` names, without weights (on the meta device)."""
    with torch.device("meta"):
        model = model_class(config)(config)
    return model.eval()


def model_class(config: Any) -> Any:
    """The transformers class of the architecture that `config` names. Raises UnsupportedFamily."""
    names = getattr(config, "architectures", None) or ()
    for name in names:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    raise UnsupportedFamily(f"{config.model_type}: this transformers has no architecture {names}.")


def read_config(folder: Path) -> Any:
    """transformers' config of a checkpoint folder. Raises CheckpointError or UnsupportedFamily."""
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds no config.json: give the folder of a checkpoint in hub layout.")
    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise UnsupportedFamily(f"{folder}/config.json: {str(error).splitlines()[0]}") from error


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
