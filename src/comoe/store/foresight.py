"""The foresight of a pack: from what the experts of one layer are given, which experts the next layer will use.

A logistic regression for every pair of layers that follow each other, fitted by `make.foresight`, in one file.
"""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from comoe.store.densefile import RawTensor, write_tensors
from comoe.store.tensorfiles import StoredTensor, read_file_header
from comoe.types import CheckpointError, HostileFile

Floats = npt.NDArray[np.float32]

FORESIGHT = "foresight.safetensors"
"""What a pack calls its own."""

NOW, LATER = "now", "later"


class Link(NamedTuple):
    """A layer, and the one that runs after it; `later` where that is the first one for the next token."""

    layer: int
    target: int
    later: bool = False


Foresight = Mapping[Link, Floats]
"""By link the weights (H + 1, E), the bias last, of the logits of E experts from an input (H,)."""


def write_foresight(path: Path, foresight: Foresight) -> None:
    """Write `foresight` in float16 to the file `path`, which is whole or as it was. OSError."""
    halves = {_name(link): weights.astype("<f2") for link, weights in sorted(foresight.items())}
    write_tensors(path, halves, (RawTensor(name, "F16", half.shape, half.tobytes()) for name, half in halves.items()))


def read_foresight(pack: Path, experts: Sequence[int]) -> Foresight:
    """The foresight of the pack in a folder, whose layers have so many `experts`; none where it has none.

    HostileFile for one that is damaged or of another model.
    """
    path = pack / FORESIGHT
    if not path.is_file():
        return {}
    try:
        return {
            _link(tensor.name): _weights(path, tensor, experts) for tensor in read_file_header(pack, FORESIGHT).values()
        }
    except (CheckpointError, ValueError, IndexError, OSError) as error:
        raise HostileFile(f"{path} holds no foresight of this model ({error}): pack again.") from error


def _name(link: Link) -> str:
    return f"{link.layer:03}/{link.target:03}/{LATER if link.later else NOW}"


def _link(name: str) -> Link:
    layer, target, when = name.split("/")
    if when not in (NOW, LATER):
        raise ValueError(name)
    return Link(int(layer), int(target), when == LATER)


def _weights(path: Path, tensor: StoredTensor, experts: Sequence[int]) -> Floats:
    link = _link(tensor.name)
    fits = len(tensor.shape) == 2 and 0 <= link.layer < len(experts) and tensor.shape[1] == experts[link.target]
    if tensor.dtype != "F16" or link.target < 0 or not fits:
        raise ValueError(f"{tensor.name} is {tensor.dtype} of {tensor.shape}")
    found = np.fromfile(path, "<f2", prod(tensor.shape), offset=tensor.extent.offset).reshape(tensor.shape)
    if not np.isfinite(found).all():
        raise ValueError(f"{tensor.name} holds what is no number")
    return found.astype(np.float32)
