"""The trace: which experts text used, call by call of a model and layer by layer, in order; and its file.

What a profile adds up, a trace keeps apart, so that caches can be compared on it without the model: `sim.replay`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from comoe.store.numbers import read_numbers, write_numbers
from comoe.store.tensorfiles import StoredTensor, read_file_header
from comoe.types import ComoeError, UsageError

Numbers = npt.NDArray[np.int64]

DTYPES = {
    "experts": "I64",
    "tokens": "I64",
    "chunks": "I64",
    "layers": "I32",
    "uses": "I64",
    "expert": "I32",
    "count": "I32",
    "gate": "F32",
}


FORESEEN = {"foreseen": "I64", "candidate": "I32", "chance": "F32"}
"""Only where the pack has a foresight."""


class Foreseen(NamedTuple):
    """What was foreseen at each of C chunks: with `chance` (V,) its next layer would use `candidate` (V,).

    Those of chunk c are `foreseen[c]` to `foreseen[c + 1]`; experts of hardly any chance are left out.
    """

    foreseen: Numbers
    candidate: npt.NDArray[np.int32]
    chance: npt.NDArray[np.float32]


class Chunk(NamedTuple):
    """What a layer's router chose for tokens that were computed together, and of which pass, counted from 0.

    Of U experts, ascending: `experts` (U,), the tokens `counts` (U,) that each of them got and the sums of their
    `gates` (U,). A gate counts by its size.
    """

    in_pass: int
    layer: int
    experts: list[int]
    counts: list[int]
    gates: list[float]


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """P passes, which are calls of a model, of C chunks with U uses of experts; a model of `experts[layer]` experts.

    Pass p had `tokens[p]` tokens, one in decoding, and its chunks are `chunks[p]` to `chunks[p + 1]`. Chunk c was in
    `layers[c]`, and its uses are `uses[c]` to `uses[c + 1]`: `expert`, `count` and `gate` as in `Chunk`. `ahead` is
    what the pack's foresight said meanwhile; None where it has none.
    """

    experts: Numbers
    tokens: Numbers
    chunks: Numbers
    layers: npt.NDArray[np.int32]
    uses: Numbers
    expert: npt.NDArray[np.int32]
    count: npt.NDArray[np.int32]
    gate: npt.NDArray[np.float32]
    ahead: Foreseen | None = None

    def __iter__(self) -> Iterator[Chunk]:
        """The chunks, in order."""
        passes = np.repeat(np.arange(len(self.tokens)), np.diff(self.chunks)).tolist()
        bounds, layers = self.uses.tolist(), self.layers.tolist()
        expert, count, gate = self.expert.tolist(), self.count.tolist(), self.gate.tolist()
        for at, (in_pass, layer) in enumerate(zip(passes, layers, strict=True)):
            of = slice(bounds[at], bounds[at + 1])
            yield Chunk(in_pass, layer, expert[of], count[of], gate[of])


def write_trace(path: Path, trace: Trace) -> None:
    """Write `trace` to the file `path`, which is whole or as it was. OSError where that cannot be."""
    ahead = trace.ahead._asdict() if trace.ahead is not None else {}
    write_numbers(path, {name: getattr(trace, name) for name in DTYPES} | ahead)


def read_trace(path: Path) -> Trace:
    """The trace in the file `path`. Raises UsageError."""
    try:
        if path.exists():
            return _parse(path, read_file_header(path.parent, path.name))
    except (ComoeError, OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path} holds no trace, or a damaged one: record it again.") from error
    raise UsageError(f"there is no trace {path}: `comoe trace` records one.")


def _parse(file: Path, tensors: dict[str, StoredTensor]) -> Trace:
    """The trace of a file's tensors; KeyError or ValueError for those of anything else."""
    parts = {name: read_numbers(file, tensors.pop(name), dtype) for name, dtype in DTYPES.items()}
    foreseen = FORESEEN if tensors else {}
    ahead = {name: read_numbers(file, tensors.pop(name), dtype) for name, dtype in foreseen.items()}
    trace = Trace(**parts, ahead=Foreseen(**ahead) if ahead else None)
    if tensors or not _is_sound(trace):
        raise ValueError("other tensors than a trace's")
    return trace


def _is_sound(trace: Trace) -> bool:
    """Whether all numbers fit each other."""
    if not (
        _are_bounds(trace.chunks, len(trace.tokens), len(trace.layers))
        and _are_bounds(trace.uses, len(trace.layers), len(trace.expert))
        and len(trace.expert) == len(trace.count) == len(trace.gate)
        and trace.layers.max() < len(trace.experts)
        and all(least.min() > 0 for least in (trace.experts, trace.tokens, trace.count))
    ):
        return False
    if trace.ahead is not None and not _is_foreseen(trace.ahead, trace):
        return False
    ascending = np.diff(trace.expert) > 0
    starts = trace.uses[1:-1]
    ascending[starts[(starts > 0) & (starts < len(trace.expert))] - 1] = True
    return bool(ascending.all() and (trace.expert < np.repeat(trace.experts[trace.layers], np.diff(trace.uses))).all())


def _is_foreseen(ahead: Foreseen, trace: Trace) -> bool:
    if not _are_bounds(ahead.foreseen, len(trace.layers), len(ahead.candidate)):
        return False
    likely = len(ahead.candidate) == len(ahead.chance) and ahead.chance.max() <= 1
    return bool(likely and ahead.candidate.max() < trace.experts.max())


def _are_bounds(bounds: Numbers, parts: int, length: int) -> bool:
    """Whether they cut so many numbers into so many parts."""
    ordered = len(bounds) == parts + 1 and bounds[0] == 0 and bounds[-1] == length
    return bool(ordered and (np.diff(bounds) >= 0).all())
