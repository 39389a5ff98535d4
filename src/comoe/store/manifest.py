"""What a pack says of itself: `comoe.json`.

The words of docs/format.md as strict structs: an unknown key or a wrong type is an error, never ignored. Reading
and writing of blobs is `store.blobfile`'s and `store.pack`'s business.
"""

from pathlib import Path
from typing import Any

import msgspec

from comoe.store.layout import layout
from comoe.types import BlobId, ExpertId, HostileFile, Leaf, NotAPack, Site, UnknownKey

FORMAT_VERSION = 1
MANIFEST = "comoe.json"
DENSE = "dense.safetensors"

FORM_PARTS: dict[str, tuple[str, ...]] = {
    "merged": ("merged",),
    "q4": ("high",),
    "q8": ("high", "low"),
    "exact": ("exact",),
}
"""The parts of every form, coarse to exact, in the order in which a reader needs them."""


class LeafEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    shape: tuple[int, ...]
    transposed: bool = False


class SourceFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the checkpoint: its size and the BLAKE3 of its header, checked when a pack is opened."""

    name: str
    size: int
    header: str


class SourceEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The checkpoint that exact blobs refer to."""

    folder: str
    files: tuple[SourceFile, ...]


class PartEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The blobs of one part of one layer: a blob file of the pack, or extents of the checkpoint.

    With `extents`, row r is the concatenation of `extents[r]` = (index into the source's files, offset, length)
    and has the BLAKE3 `hashes[r]`; with `file`, both are in the file's header.
    """

    rows: int
    nbytes: int
    file: str | None = None
    extents: tuple[tuple[tuple[int, int, int], ...], ...] = ()
    hashes: tuple[str, ...] = ()


class LayerEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One sparse layer: its site, its parts, which cluster each expert merged into, and what the forms cost.

    `errors[form]` is the relative squared error of the layer's expert outputs on calibration text, weighted by
    gate; `frequency` the share of routed tokens of every expert; `mass` its share of the gates.
    """

    site: str
    num_experts: int
    leaves: tuple[LeafEntry, ...]
    parts: dict[str, PartEntry]
    clusters: tuple[int, ...] = ()
    errors: dict[str, float] = {}
    frequency: tuple[float, ...] = ()
    mass: tuple[float, ...] = ()


class ChainStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A form for every expert and its certificate: loss against the exact model on held-out calibration text."""

    form: str
    resident_bytes: int
    loss: float
    loss_ci95: tuple[float, float]
    loss_worst_domain: float
    worst_domain: str


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the pack was made; no times, so that the same input gives the same bytes."""

    comoe: str
    transformers: str
    calibration: str
    calibration_tokens: int
    seed: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A pack: `dtype` is the checkpoint's; `layers` are in the order of the model's modules.

    `gate_quantiles` are the 0, 10, ... 100 % quantiles of the gate of one use of an expert.
    """

    format_version: int
    model_type: str
    dtype: str
    experts_per_token: int
    forms: tuple[str, ...]
    layers: tuple[LayerEntry, ...]
    chain: tuple[ChainStep, ...]
    provenance: Provenance
    dense_bytes: int
    gate_quantiles: tuple[float, ...] = ()
    source: SourceEntry | None = None

    def site(self, layer: int) -> Site:
        entry = self.layers[layer]
        leaves = tuple(Leaf(leaf.name, leaf.shape, leaf.transposed) for leaf in entry.leaves)
        return Site(entry.site, entry.num_experts, leaves, self.dtype)

    def blobs(self, expert: ExpertId, form: str) -> tuple[BlobId, ...]:
        """The blobs that `expert` needs to run in `form`, in order."""
        row = expert.expert
        if form == "merged":
            row = self.layers[expert.layer].clusters[expert.expert]
        return tuple(BlobId(expert.layer, part, row) for part in FORM_PARTS[form])

    def form_bytes(self, form: str) -> int:
        """Bytes of all blobs that `form` needs for every expert, shared ones once."""
        entries = [layer.parts[part] for layer in self.layers for part in FORM_PARTS[form]]
        return sum(entry.rows * entry.nbytes for entry in entries)

    @property
    def expert_bytes_bf16(self) -> int:
        """Bytes of all experts as bf16: what percentages of expert memory are of."""
        return sum(self.site(layer).expert_bytes_bf16 * entry.num_experts for layer, entry in enumerate(self.layers))

    @property
    def expert_ids(self) -> list[ExpertId]:
        return [ExpertId(layer, index) for layer, entry in enumerate(self.layers) for index in range(entry.num_experts)]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the pack in `folder`. Raises NotAPack, UnknownKey or HostileFile."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotAPack(f"{folder} is not a pack: it has no {MANIFEST}; make one with `comoe pack`.") from error
    manifest: Manifest = decode(data, Manifest, path)
    if manifest.format_version != FORMAT_VERSION:
        raise NotAPack(
            f"{path} has format version {manifest.format_version}; this comoe reads {FORMAT_VERSION}: "
            "pack the checkpoint again."
        )
    for index in range(len(manifest.layers)):
        _check_layer(manifest, index, path)
    return manifest


def decode(data: bytes, kind: type[Any], path: Path) -> Any:
    """`data` as `kind`. An unknown key raises UnknownKey, anything else wrong HostileFile; both name the key."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        named = UnknownKey if "unknown field" in str(error) else HostileFile
        raise named(f"{path}: {error}.") from error
    except msgspec.DecodeError as error:
        raise HostileFile(f"{path} is not JSON: {error}.") from error


def encode(value: msgspec.Struct) -> bytes:
    """`value` as JSON: the same bytes for the same value."""
    return msgspec.json.encode(value, order="deterministic")


def _check_layer(manifest: Manifest, index: int, path: Path) -> None:
    """Everything that a reader relies on without looking again."""
    layer = manifest.layers[index]
    site = manifest.site(index)
    for form in manifest.forms:
        for name in FORM_PARTS.get(form, ("",)):
            if name not in layer.parts:
                raise HostileFile(f"{path}: layer {index} lacks the blobs of form {form!r}.")
            part = layer.parts[name]
            if part.nbytes != layout(site, name).nbytes:
                raise HostileFile(f"{path}: layer {index}, part {name!r}: blobs have not the length of an expert.")
            if name != "merged" and part.rows != layer.num_experts:
                raise HostileFile(f"{path}: layer {index}, part {name!r}: not one blob for every expert.")
            _check_place(part, manifest, path)
    if "merged" in manifest.forms:
        clusters = layer.parts["merged"].rows
        if len(layer.clusters) != layer.num_experts or not all(0 <= c < clusters for c in layer.clusters):
            raise HostileFile(f"{path}: layer {index}: clusters do not match its experts.")


def _check_place(part: PartEntry, manifest: Manifest, path: Path) -> None:
    if part.file is not None:
        if Path(part.file).name != part.file:
            raise HostileFile(f"{path}: {part.file!r} leaves the pack's folder.")
        return
    files = manifest.source.files if manifest.source else ()
    sound = len(part.extents) == len(part.hashes) == part.rows and all(
        sum(length for _, _, length in row) == part.nbytes
        and all(0 <= i < len(files) and min(o, n - 1) >= 0 and o + n <= files[i].size for i, o, n in row)
        for row in part.extents
    )
    if not sound:
        raise HostileFile(f"{path}: extents point outside the checkpoint's files.")
