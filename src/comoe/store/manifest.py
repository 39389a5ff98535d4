"""What a pack says of itself: `comoe.json`.

The words of docs/format.md as strict structs: an unknown key or a wrong type is an error, never ignored. Reading
and writing of blobs is `store.blobfile`'s and `store.pack`'s business.
"""

from math import isfinite
from pathlib import Path
from typing import Any

import msgspec

from comoe.store.layout import layout
from comoe.store.untrusted import is_plain_name, parse_json
from comoe.types import DTYPE_BYTES, BlobId, ExpertId, HostileFile, Leaf, NotAPack, PackError, Site, UnknownKey

FORMAT_VERSION = 2
MANIFEST = "comoe.json"
DENSE = "dense.safetensors"
MAX_MANIFEST_BYTES = 100 * 1024 * 1024

FORM_PARTS: dict[str, tuple[str, ...]] = {
    "dropped": (),
    "merged": ("merged",),
    "lowrank": ("base", "factors"),
    "q2": ("q2",),
    "residual": ("base", "delta"),
    "q3": ("q3",),
    "q4": ("high",),
    "q8": ("high", "low"),
    "exact": ("exact",),
}
"""The parts of every form, coarse to exact, in the order in which a reader needs them.

A dropped expert puts out nothing; a low-rank and a residual one are their cluster's average and a delta of their own.
"""

SHARED_PARTS = ("merged", "base")
"""Parts whose rows are clusters, not experts: the expert that was taught to stand for them, and their average."""

DIGITS = "0123456789"
"""How a chain step writes an expert's form: its index in the manifest's `forms`."""


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

    `errors[form]` has what every expert in that form adds to the relative squared error of the layer's expert outputs
    on calibration text, weighted by gate; `frequency` is the share of routed tokens of every expert, `mass` its share
    of the gates. `tree` is the dendrogram of which `clusters` is a cut: pairs in the order in which they were joined,
    of experts and, from `num_experts` on, of earlier pairs.
    """

    site: str
    num_experts: int
    leaves: tuple[LeafEntry, ...]
    parts: dict[str, PartEntry]
    clusters: tuple[int, ...] = ()
    tree: tuple[tuple[int, int], ...] = ()
    errors: dict[str, tuple[float, ...]] = {}
    frequency: tuple[float, ...] = ()
    mass: tuple[float, ...] = ()


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Loss of a chain step against the exact model, on held-out calibration text.

    `loss_worst_domain` is the loss of `worst_domain`, in which it is largest, with its interval; `kl` is the mean of
    the exact model's Kullback-Leibler divergence to the step, in nats; `top1_agreement` says how often their likeliest
    tokens are the same.
    """

    loss: float
    loss_ci95: tuple[float, float]
    loss_worst_domain: float
    loss_worst_domain_ci95: tuple[float, float]
    worst_domain: str
    kl: float | None = None
    top1_agreement: float | None = None


class ChainStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A form for every expert: `assignment[layer]` has a digit each, an index into the manifest's `forms`.

    `resident_bytes` is the memory of all blobs that it needs; without a certificate no plan uses it.
    """

    name: str
    assignment: tuple[str, ...]
    resident_bytes: int
    certificate: Certificate | None = None


class DenseEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of the model outside its experts, in elements: what memory a run needs beside them follows from it.

    `kv` are keys and values of one token in all layers; `inner` the widest dense feed-forward; `eager_heads` the heads
    whose scores, of every token for every token, are in memory at once: none where attention is fused.
    """

    hidden: int = 0
    inner: int = 0
    vocab: int = 0
    kv: int = 0
    num_layers: int = 0
    eager_heads: int = 0


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the pack was made; no times, so that the same input gives the same bytes.

    `healing_steps` is how long scales were trained end to end: 0 where that was not asked for, or did not help.
    """

    comoe: str
    transformers: str
    calibration: str
    calibration_tokens: int
    seed: int
    healing_steps: int = 0


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A pack: `dtype` is the checkpoint's; `layers` are in the order of the model's modules.

    `dense_bytes` are those of the weights outside the experts; `gate_quantiles` are the 0, 10, ... 100 % quantiles of
    the gate of one use of an expert; `files` the BLAKE3 of every other file of the pack that serving reads.
    `routing_price` is the loss where a routing bias moves all gates: None where it may move none.
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
    dense: DenseEntry = DenseEntry()
    gate_quantiles: tuple[float, ...] = ()
    files: dict[str, str] = {}
    source: SourceEntry | None = None
    routing_price: float | None = None

    def site(self, layer: int) -> Site:
        entry = self.layers[layer]
        leaves = tuple(Leaf(leaf.name, leaf.shape, leaf.transposed) for leaf in entry.leaves)
        return Site(entry.site, entry.num_experts, leaves, self.dtype)

    def blobs(self, expert: ExpertId, form: str) -> tuple[BlobId, ...]:
        """The blobs that `expert` needs to run in `form`, in order."""
        return tuple(BlobId(expert.layer, part, self._row(expert, part)) for part in FORM_PARTS[form])

    def _row(self, expert: ExpertId, part: str) -> int:
        return self.layers[expert.layer].clusters[expert.expert] if part in SHARED_PARTS else expert.expert

    def assignment(self, name: str) -> tuple[tuple[str, ...], ...]:
        """Every expert's form by layer, in the chain step `name` or, for the name of a form, in that one alone.

        KeyError for another name.
        """
        for step in self.chain:
            if step.name == name:
                return tuple(tuple(self.forms[int(digit)] for digit in layer) for layer in step.assignment)
        if name not in self.forms:
            raise KeyError(name)
        return tuple((name,) * layer.num_experts for layer in self.layers)

    def layer_bytes(self, name: str) -> tuple[int, ...]:
        """Bytes by layer of all blobs that a form or a step of the chain needs, shared ones once."""
        found = []
        for at, forms in enumerate(self.assignment(name)):
            blobs = {blob for index, form in enumerate(forms) for blob in self.blobs(ExpertId(at, index), form)}
            found.append(sum(self.layers[at].parts[blob.part].nbytes for blob in blobs))
        return tuple(found)

    def form_bytes(self, name: str) -> int:
        """Bytes of all blobs that a form or a step of the chain needs, shared ones once."""
        return sum(self.layer_bytes(name))

    @property
    def expert_bytes_bf16(self) -> int:
        """Bytes of all experts as bf16: what percentages of expert memory are of."""
        return sum(self.site(layer).expert_bytes_bf16 * entry.num_experts for layer, entry in enumerate(self.layers))

    @property
    def expert_ids(self) -> list[ExpertId]:
        return [ExpertId(layer, index) for layer, entry in enumerate(self.layers) for index in range(entry.num_experts)]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the pack in `folder`. Raises NotAPack, PackError, UnknownKey or HostileFile."""
    path = folder / MANIFEST
    try:
        if not path.is_file():
            raise NotAPack(f"{folder} is not a pack: it has no {MANIFEST}; make one with `comoe pack`.")
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise PackError(f"{path} cannot be read: {error.strerror}.") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise HostileFile(f"{path} is larger than any manifest.")
    document = _document(data, path)
    _check_version(document, path)
    manifest: Manifest = _convert(document, Manifest, path)
    _check(manifest, path)
    return manifest


def decode(data: bytes, kind: type[Any], path: Path) -> Any:
    """`data` as `kind`. An unknown key raises UnknownKey, anything else wrong HostileFile; both name the key."""
    return _convert(_document(data, path), kind, path)


def _document(data: bytes, path: Path) -> Any:
    try:
        return parse_json(data)
    except ValueError as error:
        raise HostileFile(f"{path} is not JSON: {error}.") from error


def _convert(document: Any, kind: type[Any], path: Path) -> Any:
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        named = UnknownKey if "unknown field" in str(error) else HostileFile
        raise named(f"{path}: {error}.") from error


def _check_version(document: Any, path: Path) -> None:
    """Before anything else: another version may have other keys."""
    version = document.get("format_version") if isinstance(document, dict) else None
    if type(version) is int and version != FORMAT_VERSION:
        raise NotAPack(
            f"{path} has format version {version}; this comoe reads {FORMAT_VERSION}: pack the checkpoint again."
        )


def encode(value: msgspec.Struct) -> bytes:
    """`value` as JSON: the same bytes for the same value."""
    return msgspec.json.encode(value, order="deterministic")


MOST_EXPERTS = 1 << 20
"""No token uses more: a number that no float holds would be a reader's trouble."""


def _check(manifest: Manifest, path: Path) -> None:
    """Everything that a reader relies on without looking again."""
    forms = manifest.forms
    quantiles = manifest.gate_quantiles
    files = manifest.source.files if manifest.source else ()
    _refuse_unless(manifest.dtype in DTYPE_BYTES, path, f"there is no dtype {manifest.dtype!r}")
    ladder = tuple(form for form in FORM_PARTS if form in forms)
    _refuse_unless(forms == ladder and "exact" in forms, path, "its forms are no ladder that ends with exact")
    _refuse_unless(len(manifest.layers) > 0, path, "it has no layers")
    smallest = min(manifest.dense_bytes, *msgspec.structs.astuple(manifest.dense), *(file.size for file in files))
    _refuse_unless(
        0 < manifest.experts_per_token <= MOST_EXPERTS and smallest >= 0, path, "its sizes are negative or huge"
    )
    _refuse_unless(list(quantiles) == sorted(quantiles) and _are_finite(quantiles), path, "gate_quantiles do not rise")
    price = manifest.routing_price or 0.0
    _refuse_unless(isfinite(price) and price >= 0, path, "routing_price is no price")
    _check_chain(manifest, path)
    sound = manifest.source is None or "\0" not in manifest.source.folder
    _refuse_unless(sound, path, "the checkpoint's folder is no path")
    for file in files:
        _refuse_unless(is_plain_name(file.name), path, f"{file.name!r} leaves the checkpoint's folder")
    for name in manifest.files:
        _refuse_unless(is_plain_name(name), path, f"{name!r} leaves the pack's folder")
    for index in range(len(manifest.layers)):
        _check_layer(manifest, index, path)


def _check_chain(manifest: Manifest, path: Path) -> None:
    names = [step.name for step in manifest.chain]
    distinct = len({*names}) == len(names) and not {*names} & ({*manifest.forms} - {"exact"})
    _refuse_unless(distinct, path, "two steps of its chain have one name")
    _refuse_unless("exact" not in names[:-1], path, "a step of its chain comes after exact")
    digits = {*DIGITS[: len(manifest.forms)]}
    experts = [layer.num_experts for layer in manifest.layers]
    for step in manifest.chain:
        used = {*"".join(step.assignment)}
        sound = [len(layer) for layer in step.assignment] == experts and used <= digits
        _refuse_unless(sound, path, f"the chain's step {step.name!r} does not give every expert a form")
        sound = step.name != "exact" or used == {DIGITS[len(manifest.forms) - 1]}
        _refuse_unless(sound, path, "the chain's exact step has experts that are not exact")
        _refuse_unless(
            step.resident_bytes >= 0 and _is_sound(step.certificate),
            path,
            f"the chain's step {step.name!r} has no sound numbers",
        )


def _is_sound(certificate: Certificate | None) -> bool:
    if certificate is None:
        return True
    intervals = (certificate.loss_ci95, certificate.loss_worst_domain_ci95)
    numbers = (certificate.loss, certificate.loss_worst_domain, *intervals[0], *intervals[1])
    shares = (certificate.kl or 0.0, certificate.top1_agreement or 0.0)
    return _are_finite((*numbers, *shares)) and all(low <= high for low, high in intervals)


def _check_layer(manifest: Manifest, index: int, path: Path) -> None:
    layer = manifest.layers[index]
    where = f"layer {index}"
    names = {leaf.name for leaf in layer.leaves}
    sizes = [size for leaf in layer.leaves for size in leaf.shape]
    _refuse_unless(0 < len(names) == len(layer.leaves) and min(sizes, default=1) > 0, path, f"{where}: no sound leaves")
    _check_parts(manifest, index, path)
    clusters = min((layer.parts[part].rows for part in SHARED_PARTS if part in layer.parts), default=0)
    sound = len(layer.clusters) == (layer.num_experts if clusters else 0)
    sound = sound and all(0 <= cluster < clusters for cluster in layer.clusters)
    _refuse_unless(sound, path, f"{where}: clusters do not match its experts")
    sound = all(0 <= child < layer.num_experts + at for at, pair in enumerate(layer.tree) for child in pair)
    _refuse_unless(sound, path, f"{where}: its tree joins what is not there yet")
    joined = sorted(child for pair in layer.tree for child in pair)
    sound = joined in ([], [*range(2 * layer.num_experts - 2)])
    _refuse_unless(sound, path, f"{where}: its tree does not join all experts, each of them once")
    for shares in (layer.frequency, layer.mass):
        sound = len(shares) in (0, layer.num_experts) and _are_finite(shares) and min(shares, default=0) >= 0
        _refuse_unless(sound, path, f"{where}: not one share for every expert")
    errors = layer.errors
    sound = errors.keys() <= set(manifest.forms) and all(len(found) == layer.num_experts for found in errors.values())
    sound = sound and all(_are_finite(found) and min(found) >= 0 for found in errors.values())
    _refuse_unless(sound, path, f"{where}: errors are of no form or not of every expert")


def _check_parts(manifest: Manifest, index: int, path: Path) -> None:
    layer, site = manifest.layers[index], manifest.site(index)
    wanted = {part for form in manifest.forms for part in FORM_PARTS[form]}
    _refuse_unless(layer.parts.keys() == wanted, path, f"layer {index}: its parts are not those of its forms")
    for name, part in layer.parts.items():
        where = f"layer {index}, part {name!r}"
        length = layout(site, name).nbytes
        _refuse_unless(0 < part.nbytes == length, path, f"{where}: blobs have not the length of an expert")
        most = layer.num_experts
        _refuse_unless(1 <= part.rows <= most, path, f"{where}: more blobs than experts, or none")
        _refuse_unless(name in SHARED_PARTS or part.rows == most, path, f"{where}: not one blob for every expert")
        _check_place(part, manifest, path)


def _check_place(part: PartEntry, manifest: Manifest, path: Path) -> None:
    if part.file is not None:
        _refuse_unless(is_plain_name(part.file), path, f"{part.file!r} leaves the pack's folder")
        _refuse_unless(not part.extents and not part.hashes, path, f"{part.file!r} and extents of the same blobs")
        return
    files = manifest.source.files if manifest.source else ()
    sound = len(part.extents) == len(part.hashes) == part.rows and all(
        sum(length for _, _, length in row) == part.nbytes
        and all(0 <= i < len(files) and min(o, n - 1) >= 0 and o + n <= files[i].size for i, o, n in row)
        for row in part.extents
    )
    _refuse_unless(sound, path, "extents point outside the checkpoint's files")


def _are_finite(numbers: tuple[float, ...]) -> bool:
    return all(map(isfinite, numbers))


def _refuse_unless(sound: bool, path: Path, what: str) -> None:
    if not sound:
        raise HostileFile(f"{path}: {what}.")
