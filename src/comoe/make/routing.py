"""What calibration text says of routers: the pack's profile and its foresight, and the quantiles of its gates.

From what `make.calibrate` recorded, one layer at a time.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from comoe.make.calibrate import LayerInputs
from comoe.make.foresight import foresight
from comoe.store.foresight import FORESIGHT, write_foresight
from comoe.store.profile import PREFILL, PROFILE, Profile, Routed, write_profile


def write_routing(
    folder: Path, seen: Callable[[int], LayerInputs], experts: Sequence[int], windows: Mapping[str, list[list[int]]]
) -> None:
    """Write a pack's profile and foresight; `seen` answers what a layer saw of `windows`, by domain in order."""
    write_profile(folder / PROFILE, profiled(map(seen, range(len(experts))), experts, windows))
    write_foresight(folder / FORESIGHT, foresight(seen, experts))


def profiled(layers: Iterable[LayerInputs], experts: Sequence[int], windows: Mapping[str, list[list[int]]]) -> Profile:
    """The profile of what every layer saw of `windows`, which were recorded in the order of their domains.

    They are equally long, and a batch had those of one domain: each domain has its share of a layer's rows. All that a
    model reads at once is prefill, in an encoder and in a decoder.
    """
    ends = np.cumsum([0, *map(len, windows.values())])
    found: dict[str, list[tuple[int, Tensor, Tensor]]] = {domain: [] for domain in windows}
    for inputs, num_experts in zip(layers, experts, strict=True):
        rows = (len(inputs.index) * ends // ends[-1]).tolist()
        for of_domain, (start, end) in zip(found.values(), pairwise(rows), strict=True):
            part = inputs.rows(start, end)
            of_domain.append((end - start, part.uses(num_experts), part.gates(num_experts)))
    routed = {}
    for domain, of_domain in found.items():
        tokens, uses, gates = zip(*of_domain, strict=True)
        if any(tokens):
            routed[domain, PREFILL] = Routed(np.array(tokens), torch.cat(uses).numpy(), torch.cat(gates).numpy())
    return Profile(tuple(experts), routed)


def gate_quantiles(layers: Iterable[LayerInputs]) -> tuple[float, ...]:
    """The 0, 10, ... 100 % quantiles of the sizes of all gates."""
    gates = torch.cat([inputs.gate.abs().flatten() for inputs in layers])
    return tuple(np.quantile(gates.numpy(), np.linspace(0, 1, 11)).tolist())
