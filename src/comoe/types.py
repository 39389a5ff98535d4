"""The nouns that every floor of comoe shares, and the tree of its errors.

Frozen values only: no I/O, no torch, nothing that can fail at import. Layout of a blob's bytes lives in
`store.layout`; what a form costs in quality lives in `plan`.

    ComoeError                     exit 1
    ├── UsageError                 exit 2   a flag, a setting or a path that cannot be right
    │   └── UnknownKey                      a key of comoe.toml or of a manifest that nobody defined
    ├── CheckpointError            exit 1   the source checkpoint cannot be packed
    │   ├── NotAMoE
    │   ├── UnsupportedFamily
    │   ├── MissingShard
    │   ├── TruncatedShard
    │   ├── WrongShape
    │   └── NotFinite
    ├── PackError                  exit 1   the pack cannot be used
    │   ├── NotAPack
    │   ├── HostileFile
    │   ├── CorruptBlob
    │   ├── SourceMissing
    │   └── SourceChanged
    ├── HostileMessage             exit 1   a message of the network breaks its format
    ├── StorageFull                exit 1
    ├── DoesNotFit                 exit 3   carries the smallest budget that would
    ├── VerificationFailed         exit 4
    └── RemoteUnavailable          exit 5
        ├── Otherwise                       a node computes otherwise
        └── Late                            a node did not answer in time
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import ClassVar, NamedTuple


class ComoeError(Exception):
    """Base of every error that comoe raises for its users; `exit_code` is the process's."""

    exit_code: ClassVar[int] = 1


class UsageError(ComoeError, ValueError):
    """A flag, setting or path that cannot be right."""

    exit_code = 2


class UnknownKey(UsageError):
    """A key that nobody defined, in comoe.toml or in a manifest."""


class CheckpointError(ComoeError):
    """The source checkpoint cannot be packed."""


class NotAMoE(CheckpointError):
    """The checkpoint has no experts."""


class UnsupportedFamily(CheckpointError):
    """The checkpoint's model family has no adapter, or is broken upstream."""


class MissingShard(CheckpointError):
    """A weight file or a tensor named by the checkpoint is not there."""


class TruncatedShard(CheckpointError):
    """A weight file ends before its header says."""


class WrongShape(CheckpointError):
    """A tensor has not the shape that the config implies."""


class NotFinite(CheckpointError):
    """A tensor holds NaN or infinity."""


class PackError(ComoeError):
    """The pack cannot be used."""


class NotAPack(PackError):
    """The folder holds no comoe.json."""


class HostileFile(PackError):
    """A file's header breaks the format: huge lengths, overlaps, paths that escape."""


class CorruptBlob(PackError):
    """A blob's bytes do not have the hash that the pack recorded."""


class SourceMissing(PackError):
    """The checkpoint that the pack refers to is gone."""


class SourceChanged(PackError):
    """The checkpoint that the pack refers to is not the one that was packed."""


class HostileMessage(ComoeError):
    """A message of the network breaks its format, or is larger than any may be."""


class StorageFull(ComoeError):
    """The disk is full; nothing was left half-written."""


class DoesNotFit(ComoeError):
    """No plan fits the budget; `smallest` is the smallest budget that would, in bytes."""

    exit_code = 3

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest


class VerificationFailed(ComoeError):
    """A measured property is not the promised one."""

    exit_code = 4


class RemoteUnavailable(ComoeError):
    """No node that holds the bytes answers."""

    exit_code = 5


class Otherwise(RemoteUnavailable):
    """An edge node computes experts otherwise than this device."""


class Late(RemoteUnavailable):
    """An edge node did not answer in time, and the floor of what it was to run is still to come."""


Progress = Callable[[str, float], None]
"""Told what is being done now, and which fraction of all work is."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class ExpertId(NamedTuple):
    """An expert: `layer` counts the model's sparse layers from 0, `expert` the experts in it."""

    layer: int
    expert: int


class BlobId(NamedTuple):
    """The bytes of one part for one expert or cluster: row `row` of the file of (`layer`, `part`)."""

    layer: int
    part: str
    row: int


class Extent(NamedTuple):
    """`length` bytes from `offset` of `file`, a path relative to the checkpoint's or the pack's folder."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor of one expert in transformers' in-memory layout.

    A matrix is (out, in), or (in, out) where `transposed`. A vector is a bias or a norm's scale.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def rows(self) -> int:
        """Output features of a matrix."""
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def cols(self) -> int:
        """Input features of a matrix."""
        return self.shape[0] if self.transposed else self.shape[1]


@dataclass(frozen=True, slots=True)
class Site:
    """A module of the model that owns experts: where it is and what one of its experts is made of.

    `dtype` is the checkpoint's (after dequantisation), a key of `DTYPE_BYTES`.
    """

    name: str
    num_experts: int
    leaves: tuple[Leaf, ...]
    dtype: str

    @property
    def expert_bytes_bf16(self) -> int:
        """Bytes of one expert as bf16: what percentages of expert memory are of."""
        return 2 * sum(leaf.size for leaf in self.leaves)
