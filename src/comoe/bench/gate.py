"""The validity gate: a model whose experts could be exchanged at no cost proves nothing about methods for experts."""

from collections.abc import Callable, Sequence

import torch

from comoe.bench.bank import Approximation, Bank, Weights

NEEDED = {"shuffled": 0.5, "layer mean": 0.1}
"""Nats per token that a model must lose where experts are shuffled within layers, and where each is their mean."""


def shuffled(experts: Sequence[Weights]) -> Sequence[Weights]:
    """Every expert in the place of another one."""
    order = torch.randperm(len(experts), generator=torch.Generator().manual_seed(0)).tolist()
    place = {expert: order[at - 1] for at, expert in enumerate(order)}
    return [experts[place[at]] for at in range(len(experts))]


def layer_mean(experts: Sequence[Weights]) -> Sequence[Weights]:
    """The mean of all, for everyone."""
    mean = {name: torch.stack([expert[name] for expert in experts]).mean(0) for name in experts[0]}
    return [mean] * len(experts)


CHANGES: dict[str, Callable[[Sequence[Weights]], Sequence[Weights]]] = {"shuffled": shuffled, "layer mean": layer_mean}


def changed(bank: Bank, change: str) -> Approximation:
    """The model's experts after one of `CHANGES`."""
    return Approximation([CHANGES[change](experts) for experts in bank.experts], bank.nbytes)
