"""Error compensation by few tokens: it must help on other tokens, too."""

import pytest
import torch
from torch import Tensor

from comoe.forms.compensate import DAMPING, SHRINKAGE, Gram
from comoe.forms.lowbit import dequantise_low, quantise_low

COLS = 96


def inputs(tokens: int, seed: int) -> Tensor:
    """Correlated, as hidden states are: a few directions carry most."""
    mixing = torch.randn(COLS, COLS, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, COLS)[:, None]
    return torch.randn(tokens, COLS, generator=torch.Generator().manual_seed(seed)) @ mixing


def error_elsewhere(gram: Gram | None) -> float:
    """Of outputs of a two-bit matrix, on inputs that it was not fitted to."""
    weight = torch.randn(64, COLS, generator=torch.Generator().manual_seed(2))
    x = inputs(2000, 3)
    missed = (dequantise_low(quantise_low(weight, 32, 2, gram), 32) - weight) @ x.t()
    return float(missed.square().sum() / (weight @ x.t()).square().sum())


@pytest.mark.parametrize("tokens", [16, 32, 64, 400])
def test_what_few_tokens_say_is_trusted_as_far_as_it_holds_on_others(tokens: int) -> None:
    x = inputs(tokens, 1)
    matrix = x.t() @ x
    trusting, wary = error_elsewhere(Gram(matrix)), error_elsewhere(Gram(matrix, tokens))
    assert wary < 1.01 * error_elsewhere(None)
    assert wary < 1.1 * trusting


def test_the_fewer_tokens_the_more_is_added_to_the_diagonal() -> None:
    matrix = torch.diag(torch.tensor([4.0, 2.0, 0.0]))
    for tokens in (1, 3, 300):
        share = DAMPING + SHRINKAGE * 3 / tokens
        wanted = torch.tensor([4.0 + 2 * share, 2.0 + 2 * share, 2.0], dtype=torch.float64)
        torch.testing.assert_close(Gram(matrix, tokens).damped.diagonal(), wanted)
    torch.testing.assert_close(Gram(matrix).damped.diagonal()[0], torch.tensor(4.02, dtype=torch.float64))
