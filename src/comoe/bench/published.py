"""Published methods of making experts smaller, written from their papers: what comoe's ladder is compared with.

Each is given a bank and a share of the experts' bytes as bf16, and answers with its best within it, or None where it
reaches no such size. None is fine-tuned afterwards, nor is comoe's.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from comoe.bench.bank import Approximation, Bank, Weights
from comoe.forms.compensate import Gram, compensated
from comoe.forms.lowrank import factorise
from comoe.forms.merge import align, clusters, dendrogram, merge, output_distances
from comoe.make.study import Layer, grams, oriented
from comoe.store.layout import group_size, quantised
from comoe.types import Leaf

PROBE_TOKENS = 512
MIN_TOKENS = 64
"""With fewer, published methods that use what an expert saw do without."""

HALF_BYTES = 2
"""Of a bf16 weight, and of a float16 scale."""

Method = Callable[[Bank, float], Approximation | None]


def round_to_nearest(bank: Bank, share: float) -> Approximation | None:
    """Int8, int4, int3 or int2 in groups, the scale from the largest weight."""
    return _uniform(bank, share, lambda leaf, weight, bits, gram: _nearest(weight, group_of(leaf), bits))


def gptq(bank: Bank, share: float) -> Approximation | None:
    """GPTQ (Frantar et al., 2023): the same grids, each column's error made up for by those to come."""

    def rounded(leaf: Leaf, weight: Tensor, bits: int, gram: Gram | None) -> Tensor:
        return _nearest(weight, group_of(leaf), bits) if gram is None else _gptq(weight, group_of(leaf), bits, gram)

    return _uniform(bank, share, rounded, calibrated=True)


def plain_average(bank: Bank, share: float) -> Approximation | None:
    """Neighbours by index averaged as they stand."""
    num = _num_kept(bank, share)
    if not num:
        return None
    return _merged(bank, [_even(len(experts), num) for experts in bank.experts], num, lambda at, members: None)


def m_smoe(bank: Bank, share: float) -> Approximation | None:
    """M-SMoE (Li et al., 2024, section 3): the busiest experts of all layers stay, and take in those whose router
    logits are most like theirs; hidden units are aligned, weights averaged by frequency."""
    num = _num_kept(bank, share)
    if not num:
        return None
    frequency = [np.array(bank.inputs(at).frequency(len(experts))) for at, experts in enumerate(bank.experts)]
    leading = _busiest(frequency, num * len(frequency))
    groups = []
    for at, leaders in enumerate(leading):
        logits = bank.inputs(at).x[:PROBE_TOKENS] @ bank.routers[at].float().t()
        alike = torch.corrcoef(logits.t())[:, leaders].argmax(1)
        alike[leaders] = torch.arange(len(leaders))
        groups.append(alike.tolist())
    return _merged(bank, groups, num, lambda at, members: max(members, key=lambda e: frequency[at][e]))


def hc_smoe(bank: Bank, share: float) -> Approximation | None:
    """HC-SMoE (Chen et al., 2024): average linkage on mean outputs, weights averaged by frequency."""
    num = _num_kept(bank, share)
    if not num:
        return None
    groups = []
    for layer, experts in zip(bank.layers, bank.experts, strict=True):
        x = bank.inputs(layer.index).x[:: max(1, len(bank.inputs(layer.index).x) // PROBE_TOKENS)]
        means = torch.stack([layer.run(x, dict(tensors)).mean(0, keepdim=True) for tensors in experts])
        groups.append(clusters(dendrogram(output_distances(means)), num))
    return _merged(bank, groups, num, lambda at, members: None)


def reap(bank: Bank, share: float) -> Approximation | None:
    """REAP (Lasby et al., 2025): experts of least mean gate x output norm are pruned, tokens go to those left."""
    num = _num_kept(bank, share)
    return None if not num else _pruned(bank, num, bank.experts, num * len(bank.experts) * bank.expert_nbytes)


def reap_int4(bank: Bank, share: float) -> Approximation | None:
    """REAP, and int4 by GPTQ of what is left: the usual pipeline of two steps."""
    whole = gptq(bank, 0.3)
    assert whole is not None
    each = whole.nbytes // sum(map(len, bank.experts))
    num = min(len(bank.experts[0]), int(share * bank.expert_nbytes * len(bank.experts[0]) / each))
    if not 0 < num < len(bank.experts[0]):
        return None  # with all experts kept it is int4 alone
    return _pruned(bank, num, whole.weights, num * len(bank.experts) * each)


def d2_moe(bank: Bank, share: float) -> Approximation | None:
    """D2-MoE (Gu et al., 2025): a base weighted by importance, deltas in low rank, whitened by what experts see."""
    return _base_and_delta(bank, share, aligned=False, whitened=True)


def res_moe(bank: Bank, share: float) -> Approximation | None:
    """ResMoE (Ai et al., 2025): a barycentre, for which hidden units are aligned, and residuals in low rank."""
    return _base_and_delta(bank, share, aligned=True, whitened=False)


METHODS: dict[str, Method] = {
    "round to nearest": round_to_nearest,
    "gptq": gptq,
    "plain average": plain_average,
    "m-smoe": m_smoe,
    "hc-smoe": hc_smoe,
    "reap": reap,
    "reap + int4": reap_int4,
    "d2-moe": d2_moe,
    "resmoe": res_moe,
}

Rounded = Callable[[Leaf, Tensor, int, Gram | None], Tensor]


def group_of(leaf: Leaf) -> int:
    """Weights that share a scale."""
    group = group_size(leaf.cols)
    assert group is not None
    return group


def _uniform(bank: Bank, share: float, rounded: Rounded, *, calibrated: bool = False) -> Approximation | None:
    """All experts in as many bits as fit."""
    leaves = bank.checkpoint.sites[0].leaves
    sizes = {bits: _quantised_bytes(leaves, bits) for bits in (8, 4, 3, 2)}
    bits = next((bits for bits, nbytes in sizes.items() if nbytes <= share * bank.expert_nbytes), None)
    if bits is None:
        return None
    weights = []
    for layer, experts in zip(bank.layers, bank.experts, strict=True):
        weights.append([_rounded_expert(layer, index, tensors, bits, rounded, calibrated=calibrated)
                        for index, tensors in enumerate(experts)])  # fmt: skip
    return Approximation(weights, sizes[bits] * sum(map(len, weights)))


def _rounded_expert(
    layer: Layer, index: int, tensors: Weights, bits: int, rounded: Rounded, *, calibrated: bool
) -> dict[str, Tensor]:
    found = layer.study(index).grams if calibrated else {}
    made = {}
    for leaf in layer.site.leaves:
        if not quantised(leaf):
            made[leaf.name] = tensors[leaf.name]
            continue
        weight = rounded(leaf, oriented(leaf, tensors[leaf.name]), bits, _plain(found.get(leaf.name)))
        made[leaf.name] = weight.t() if leaf.transposed else weight
    return made


def _quantised_bytes(leaves: Sequence[Leaf], bits: int) -> int:
    """Of an expert: levels, and a float16 scale for every group."""
    return sum(
        leaf.size * bits // 8 + HALF_BYTES * leaf.size // group_of(leaf) if quantised(leaf) else HALF_BYTES * leaf.size
        for leaf in leaves
    )


def _nearest(weight: Tensor, group: int, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    grouped = weight.reshape(weight.shape[0], -1, group)
    scale = (grouped.abs().amax(-1, keepdim=True) / (half - 0.5)).half().float().clamp(min=1e-8)
    return ((grouped / scale).round().clamp(-half, half - 1) * scale).reshape(weight.shape)


def _gptq(weight: Tensor, group: int, bits: int, gram: Gram) -> Tensor:
    half, scales = 1 << (bits - 1), torch.empty(weight.shape[0], weight.shape[1] // group)

    def rounding(column: int, current: Tensor) -> tuple[Tensor, Tensor]:
        if column % group == 0:
            largest = current[:, column : column + group].abs().amax(1)
            scales[:, column // group] = (largest / (half - 0.5)).half().float().clamp(min=1e-8)
        scale = scales[:, column // group]
        value = (current[:, column] / scale).round().clamp(-half, half - 1) * scale
        return value, value

    return compensated(weight.clone().contiguous(), gram, rounding)


def _num_kept(bank: Bank, share: float) -> int:
    """Whole experts per layer in bf16 that fit."""
    return int(share * len(bank.experts[0]))


def _even(num_experts: int, num_groups: int) -> list[int]:
    return [index * num_groups // num_experts for index in range(num_experts)]


def _busiest(frequency: Sequence[np.ndarray], number: int) -> list[list[int]]:
    """Experts of every layer, together `number`, by frequency within their layer; each layer keeps one at least."""
    ranked = sorted(((-found[e], at, e) for at, found in enumerate(frequency) for e in range(len(found))))
    chosen = {(at, int(found.argmax())) for at, found in enumerate(frequency)}
    for _, at, expert in ranked:
        if len(chosen) >= number:
            break
        chosen.add((at, expert))
    return [sorted(e for layer, e in chosen if layer == at) for at in range(len(frequency))]


def _merged(
    bank: Bank, groups: Sequence[Sequence[int]], num: int, leader: Callable[[int, list[int]], int | None]
) -> Approximation:
    """Every group's experts replaced by their average by frequency, aligned to a leader where there is one."""
    weights: list[list[Weights]] = []
    for layer, experts, group in zip(bank.layers, bank.experts, groups, strict=True):
        frequency = bank.inputs(layer.index).frequency(len(experts))
        made: dict[int, Weights] = {}
        for number in set(group):
            members = [e for e, found in enumerate(group) if found == number]
            first = leader(layer.index, members)
            units = layer.units if first is not None else None
            masses = [frequency[e] for e in members]
            if units is not None and first is not None:
                aligned = [experts[e] if e == first else align(experts[first], experts[e], units) for e in members]
                made[number] = merge(aligned, masses, None)
            else:
                made[number] = merge([experts[e] for e in members], masses, None)
        weights.append([made[number] for number in group])
    return Approximation(weights, num * len(weights) * bank.expert_nbytes)


def _pruned(bank: Bank, num: int, weights: Sequence[Sequence[Weights]], nbytes: int) -> Approximation:
    kept = []
    for layer, experts in zip(bank.layers, bank.experts, strict=True):
        scores = []
        for index, tensors in enumerate(experts):
            x, gate = bank.inputs(layer.index).of(index)
            norms = layer.run(x, dict(tensors)).norm(dim=1) if len(x) else torch.zeros(0)
            scores.append(float((gate.abs() * norms).mean()) if len(x) else 0.0)
        kept.append(sorted(np.argsort(scores)[::-1][:num].tolist()))
    return Approximation(weights, nbytes, kept)


def _base_and_delta(bank: Bank, share: float, *, aligned: bool, whitened: bool) -> Approximation | None:
    """A base of the layer in bf16 and for every expert a delta of the rank that fits."""
    weights = []
    nbytes = 0
    for layer, experts in zip(bank.layers, bank.experts, strict=True):
        leaves = layer.site.leaves
        kept = sum(HALF_BYTES * leaf.size for leaf in leaves if not quantised(leaf))
        room = share * bank.expert_nbytes - bank.expert_nbytes / len(experts) - kept
        per_rank = sum(HALF_BYTES * (leaf.rows + leaf.cols) for leaf in leaves if quantised(leaf))
        rank = int(room // per_rank)
        if rank < 1:
            return None
        masses = bank.inputs(layer.index).mass(len(experts)) if whitened else [1.0] * len(experts)
        base = merge(experts, masses, layer.units if aligned else None)
        weights.append([_with_delta(layer, index, base, rank, aligned=aligned, whitened=whitened)
                        for index in range(len(experts))])  # fmt: skip
        nbytes += bank.expert_nbytes + len(experts) * (rank * per_rank + kept)
    return Approximation(weights, nbytes)


def _plain(gram: Gram | None) -> Gram | None:
    """Damped as the papers do; None where there were too few tokens for that."""
    return None if gram is None or gram.num_tokens < MIN_TOKENS else Gram(gram.matrix)


def _with_delta(
    layer: Layer, index: int, base: dict[str, Tensor], rank: int, *, aligned: bool, whitened: bool
) -> dict[str, Tensor]:
    study = layer.study(index)
    own = {name: tensor.float() for name, tensor in study.tensors.items()}
    if aligned and layer.units is not None:
        own = align(base, own, layer.units)
    found = grams(layer, study.seen[0], own) if whitened and len(study.seen[0]) else {}
    made = {}
    for leaf in layer.site.leaves:
        if not quantised(leaf):
            made[leaf.name] = own[leaf.name]
            continue
        factors = factorise(oriented(leaf, own[leaf.name] - base[leaf.name]), rank, _plain(found.get(leaf.name)))
        product = factors.out.float() @ factors.inner.float()
        made[leaf.name] = base[leaf.name] + (product.t() if leaf.transposed else product)
    return made
