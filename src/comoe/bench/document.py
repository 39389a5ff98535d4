"""What every benchmark of models has around its rows: a folder to work in, settings, the document."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from comoe.bench.material import Material
from comoe.device.machine import machine
from comoe.types import UsageError

Document = dict[str, Any]


@contextmanager
def workplace(out: Path | None) -> Iterator[Path]:
    """The folder `out`, made where it is not there; without one, a folder that is gone afterwards."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        yield out
        return
    with TemporaryDirectory(prefix="comoe-bench-") as folder:
        yield Path(folder)


def checkpoints(models: Path) -> list[Path]:
    """The checkpoints in folders of `models`. UsageError where there are none."""
    found = sorted(path.parent for path in models.glob("*/config.json"))
    if not found:
        raise UsageError(f"{models} holds no models: name a folder of checkpoints by --models or COMOE_SHARED.")
    return found


def settings(material: Material, *, quick: bool, **others: Any) -> Document:
    """What all rows depend on, beside their model."""
    return {
        "comoe": version("comoe"),
        "quick": quick,
        "domains": list(material.valid),
        "threads": torch.get_num_threads(),
        "texts": material.hash,
        **others,
    }


def published(
    folder: Path, name: str, conditions: Document, models: dict[str, str], figures: Document,
    page: Callable[[Document], str],
) -> Document:  # fmt: skip
    """The document of a benchmark, left in `folder` as JSON and as a page. `models` are hashes by name."""
    document = {"name": name, "machine": machine(), "settings": conditions, "models": models, **figures}
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
    (folder / f"{name}.md").write_text(page(document), "utf-8")
    return document
