"""The profile: how text uses a model's experts, by domain and phase; and its file, in a pack or anywhere.

It holds sums alone, so that profiles of shards and of machines add up to that of all their text. Calibration and runs
record one; how plans go by it is `plan.ladder`'s business.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from comoe.store.numbers import read_numbers, write_numbers
from comoe.store.tensorfiles import StoredTensor, read_file_header
from comoe.types import ComoeError, UsageError

PROFILE = "profile.safetensors"
"""What a pack calls its own."""

PREFILL, DECODE = "prefill", "decode"
PHASES = (PREFILL, DECODE)
"""More than one token at once, as in a prompt and in an encoder; and one after the other."""

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Routed(NamedTuple):
    """What routers chose: of N experts, in a manifest's order, and L sparse layers.

    `tokens` (L,) came to each layer; `uses` (N,) says how often they took each expert, `gates` (N,) with which gates
    together. A gate counts by its size.
    """

    tokens: Counts
    uses: Counts
    gates: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """What routers chose by (domain, phase), for a model of `experts[layer]` experts in each sparse layer.

    What no text came by is not there: no zeros stand for it.
    """

    experts: tuple[int, ...]
    routed: Mapping[tuple[str, str], Routed] = field(default_factory=dict)

    def __add__(self, other: "Profile") -> "Profile":
        """The profile of both texts. UsageError where `other` is of another model."""
        self.check_experts(other.experts)
        found = dict(self.routed)
        for key, more in other.routed.items():
            found[key] = Routed(*map(np.add, found[key], more)) if key in found else more
        return Profile(self.experts, found)

    def uses(self, domains: Collection[str] | None = None, phase: str | None = None) -> Counts | None:
        """Uses (N,) of every expert in `domains` and in `phase`, by default in all; None where nothing was seen."""
        found = [
            routed.uses
            for (domain, of_phase), routed in self.routed.items()
            if (domains is None or domain in domains) and phase in (None, of_phase)
        ]
        return np.sum(found, axis=0) if found else None

    def by_layer(self, values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Values (N,) of every expert, cut into those of each layer."""
        return np.split(values, np.cumsum(self.experts)[:-1])

    def check_experts(self, experts: Sequence[int]) -> None:
        """Raise UsageError unless it is of a model with so many experts in its layers."""
        if self.experts != tuple(experts):
            raise UsageError(
                f"the profile is of another model: of {sum(self.experts)} experts in {len(self.experts)} layers, "
                f"not of {sum(experts)} in {len(experts)}."
            )


def write_profile(path: Path, profile: Profile) -> None:
    """Write `profile` to the file `path`, which is whole or as it was. OSError where that cannot be; ValueError for
    what is no count, such as the gates of a model that has lost its way.
    """
    arrays: dict[str, npt.NDArray[Any]] = {"experts": np.array(profile.experts, np.int64)}
    for key, routed in sorted(profile.routed.items()):
        arrays |= {_name(key, part): array for part, array in routed._asdict().items()}
    write_numbers(path, arrays)


def read_profile(path: Path) -> Profile:
    """The profile in the file `path`, or of the pack in that folder. Raises UsageError."""
    try:
        file = path / PROFILE if path.is_dir() else path
        if file.exists():
            return _parse(file, read_file_header(file.parent, file.name))
    except (ComoeError, OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path} holds no profile, or a damaged one: leave it out or make it again.") from error
    raise UsageError(f"there is no profile {file}: `comoe pack` and `comoe run --profile` make one.")


def _name(key: tuple[str, str], part: str) -> str:
    domain, phase = key
    return f"{phase}/{domain}/{part}"


def _key(name: str) -> tuple[str, str]:
    phase, _, rest = name.partition("/")
    return rest.rpartition("/")[0], phase


def _parse(file: Path, tensors: dict[str, StoredTensor]) -> Profile:
    """The profile of a file's tensors; KeyError or ValueError for those of anything else."""
    experts = tuple(read_numbers(file, tensors.pop("experts"), "I64").tolist())
    keys = {_key(name): None for name in tensors}
    names = {_name(key, part) for key in keys for part in Routed._fields}
    if not all(experts) or tensors.keys() != names or not {phase for _, phase in keys} <= {*PHASES}:
        raise ValueError("other tensors than a profile's")
    layers, all_experts = len(experts), sum(experts)
    routed = {
        key: Routed(
            tokens=read_numbers(file, tensors[_name(key, "tokens")], "I64", layers),
            uses=read_numbers(file, tensors[_name(key, "uses")], "I64", all_experts),
            gates=read_numbers(file, tensors[_name(key, "gates")], "F64", all_experts),
        )
        for key in keys
    }
    return Profile(experts, routed)
