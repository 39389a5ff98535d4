"""Small packs of random bytes, made by hand and without torch, and how to tamper with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from comoe.store.blobfile import BlobWriter
from comoe.store.layout import layout
from comoe.store.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Certificate,
    ChainStep,
    LayerEntry,
    LeafEntry,
    Manifest,
    PartEntry,
    Provenance,
    SourceEntry,
    SourceFile,
    encode,
)
from comoe.store.pack import header_hash
from comoe.types import BlobId, ComoeError, Leaf, Site

LEAVES = (Leaf("gate_up_proj", (64, 32)), Leaf("down_proj", (32, 32)), Leaf("norm", (32,)))
SITE = Site("model.layers.0.mlp.experts", 4, LEAVES, "bfloat16")
FORMS = ("merged", "q4", "q8", "exact")
NUM_LAYERS, NUM_CLUSTERS = 2, 2
CLUSTERS = (0, 1, 0, 1)
SHARDS = ("model-00001.safetensors", "model-00002.safetensors")

Blobs = dict[BlobId, bytes]


def write_pack(folder: Path, checkpoint: Path | None) -> Blobs:
    """A pack of two layers in every form in `folder`; its exact blobs are extents of `checkpoint`, else copies.

    Returns all blobs that it holds.
    """
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    blobs: Blobs = {}
    for layer in range(NUM_LAYERS):
        for part, rows in (("merged", NUM_CLUSTERS), ("high", 4), ("low", 4), ("exact", 4)):
            blobs |= {BlobId(layer, part, row): rng.bytes(layout(SITE, part).nbytes) for row in range(rows)}
    source, extents = write_checkpoint(checkpoint, blobs) if checkpoint else (None, {})
    layers = tuple(layer_entry(folder, layer, blobs, extents) for layer in range(NUM_LAYERS))
    (folder / MANIFEST).write_bytes(encode(manifest(layers, source)))
    return blobs


def write_checkpoint(folder: Path, blobs: Blobs) -> tuple[SourceEntry, dict[BlobId, list[tuple[int, int, int]]]]:
    """Two files that hold the exact blobs' leaves: the first leaf in one, the others in the other; odd offsets."""
    folder.mkdir(parents=True)
    exact = {blob: data for blob, data in blobs.items() if blob.part == "exact"}
    cut = LEAVES[0].size * 2
    halves = [b"".join(data[:cut] for data in exact.values()), b"".join(data[cut:] for data in exact.values())]
    starts = []
    for name, data in zip(SHARDS, halves, strict=True):
        header = json.dumps({name: {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
        (folder / name).write_bytes(len(header).to_bytes(8, "little") + header + data)
        starts.append(8 + len(header))
    lengths = [cut, layout(SITE, "exact").nbytes - cut]
    extents = {
        blob: [(file, starts[file] + at * lengths[file], lengths[file]) for file in (0, 1)]
        for at, blob in enumerate(exact)
    }
    files = tuple(SourceFile(name, (folder / name).stat().st_size, header_hash(folder / name)) for name in SHARDS)
    return SourceEntry(str(folder), files), extents


def layer_entry(
    folder: Path, layer: int, blobs: Blobs, extents: dict[BlobId, list[tuple[int, int, int]]]
) -> LayerEntry:
    parts = {}
    for part in ("merged", "high", "low", "exact"):
        rows = [data for blob, data in blobs.items() if (blob.layer, blob.part) == (layer, part)]
        nbytes = layout(SITE, part).nbytes
        if part == "exact" and extents:
            found = tuple(tuple(extents[BlobId(layer, part, row)]) for row in range(len(rows)))
            hashes = tuple(blake3(data).hexdigest() for data in rows)
            parts[part] = PartEntry(rows=len(rows), nbytes=nbytes, extents=found, hashes=hashes)
        else:
            path = write_blobs(folder, f"{layer:03}-{part}", part, rows)
            parts[part] = PartEntry(rows=len(rows), nbytes=nbytes, file=path.name)
    leaves = tuple(LeafEntry(leaf.name, leaf.shape, leaf.transposed) for leaf in LEAVES)
    errors = {form: (error / 4,) * 4 for form, error in (("merged", 0.3 + layer / 10), ("q4", 0.02), ("q8", 0.0001))}
    shares = (0.4, 0.3, 0.2, 0.1)
    tree = ((0, 2), (1, 3), (4, 5))
    return LayerEntry(f"model.layers.{layer}.mlp.experts", 4, leaves, parts, CLUSTERS, tree, errors, shares, shares)


def step(name: str, digits: str, nbytes: int, loss: float) -> ChainStep:
    interval = (0.9 * loss, 1.1 * loss)
    return ChainStep(name, (digits,) * NUM_LAYERS, nbytes, Certificate(loss, interval, 1.5 * loss, interval, "poems"))


def write_blobs(folder: Path, stem: str, part: str, rows: list[bytes]) -> Path:
    writer = BlobWriter(folder, stem, layout(SITE, part), len(rows))
    for data in rows:
        writer.add(data)
    return writer.commit()


def manifest(layers: tuple[LayerEntry, ...], source: SourceEntry | None) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        model_type="toy",
        dtype="bfloat16",
        experts_per_token=2,
        forms=FORMS,
        layers=layers,
        chain=(
            step("8%", "0000", 1, 0.15),
            step("20%", "0111", 2, 0.04),
            step("40%", "1122", 3, 0.003),
            ChainStep("exact", ("3333",) * NUM_LAYERS, 4, Certificate(0.0, (0.0, 0.0), 0.0, (0.0, 0.0), "poems")),
        ),
        provenance=Provenance("0", "0", "none", 0, 0),
        dense_bytes=1000,
        gate_quantiles=tuple(at / 10 for at in range(11)),
        source=source,
    )


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    """Rewrite the manifest as `change` leaves it."""
    document = json.loads((folder / MANIFEST).read_bytes())
    change(document)
    (folder / MANIFEST).write_text(json.dumps(document))


def refused(error: type[ComoeError], call: Callable[[], object], place: Path) -> str:
    """That `call` raises just `error`, in one clear sentence that names `place`; returns the sentence."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert caught.type is error, message
    assert str(place) in message and "\n" not in message and message.endswith("."), message
    return message
