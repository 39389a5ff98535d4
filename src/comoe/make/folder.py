"""The files of a pack's folder while it is made."""

from pathlib import Path

from comoe.store.manifest import MANIFEST, Manifest
from comoe.store.pack import file_hash


def file_hashes(folder: Path) -> dict[str, str]:
    """Of everything but blobs and the manifest."""
    others = {path for path in folder.iterdir() if path.is_file()}
    others -= {*_blob_files(folder), folder / MANIFEST}
    return {path.name: file_hash(path) for path in sorted(others)}


def remove_unused(folder: Path, manifest: Manifest) -> None:
    """Remove blob files that the manifest does not name."""
    named = {part.file for layer in manifest.layers for part in layer.parts.values()}
    for path in _blob_files(folder):
        if path.name not in named:
            path.unlink()


def _blob_files(folder: Path) -> list[Path]:
    return list(folder.glob("[0-9][0-9][0-9]-*.safetensors"))
