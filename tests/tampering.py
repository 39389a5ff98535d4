"""Ways to damage a file of numbers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def bytes_of(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def tensors_of(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], object]:
    def rewritten(path: Path) -> None:
        found = dict(load_file(path))
        change(found)
        save_file(found, path)

    return rewritten
