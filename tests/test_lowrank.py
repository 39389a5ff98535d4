"""Low rank: factors against a slow whitened SVD, and never worse on what was seen than the plain one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from comoe.forms.compensate import DAMPING, Gram
from comoe.forms.lowrank import Factors, factorise

HALF = 2.0**-10
"""What rounding to float16 may change of a product, relatively."""

seeds = st.integers(0, 10_000)
sizes = st.integers(1, 9)


def random_matrix(seed: int, rows: int, cols: int) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def random_inputs(seed: int, tokens: int, cols: int) -> Tensor:
    """Inputs whose columns are correlated and of very different sizes."""
    mixing = random_matrix(seed + 1, cols, cols) / cols**0.5 + torch.eye(cols)
    return random_matrix(seed, tokens, cols) @ mixing * torch.logspace(-1, 1, cols)


def gram_of(x: Tensor) -> Gram:
    return Gram(x.t() @ x)


def product(factors: Factors) -> Tensor:
    return factors.out.double() @ factors.inner.double()


def slow(weight: Tensor, rank: int, gram: Tensor) -> Tensor:
    """The best product of `rank`, by a symmetric square root of the damped Gram matrix and its inverse."""
    matrix = gram.double().clone()
    mean = float(sum(matrix[at, at] for at in range(len(matrix)))) / len(matrix)
    for at in range(len(matrix)):
        matrix[at, at] += DAMPING * mean if matrix[at, at] > 0 else mean
    values, vectors = torch.linalg.eigh(matrix)
    root, inverse = (vectors @ torch.diag(values**power) @ vectors.t() for power in (0.5, -0.5))
    left, spread, right = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    best = torch.zeros_like(weight, dtype=torch.float64)
    for at in range(min(rank, len(spread))):
        best += spread[at] * torch.outer(left[:, at], right[at])
    return best @ inverse


def error(weight: Tensor, found: Tensor, x: Tensor) -> float:
    """Relative squared error of outputs on `x`."""
    return float(((found - weight.double()) @ x.double().t()).square().sum() / (weight @ x.t()).square().sum())


@given(seed=seeds, rows=sizes, cols=sizes, rank=st.integers(1, 9), tokens=st.integers(1, 40))
@settings(max_examples=80, deadline=None)
def test_outputs_are_those_of_a_slow_whitened_svd(seed: int, rows: int, cols: int, rank: int, tokens: int) -> None:
    weight, x = random_matrix(seed, rows, cols), random_inputs(seed + 9, tokens, cols)
    found = product(factorise(weight, rank, gram_of(x)))
    wanted = slow(weight, rank, x.t() @ x)
    assert float(((found - wanted) @ x.double().t()).norm()) <= 1e-2 * float((weight @ x.t()).norm()) + 1e-6
    assert error(weight, found, x) == pytest.approx(error(weight, wanted, x), abs=1e-3)


@given(seed=seeds, rank=st.integers(1, 15))
@settings(max_examples=40, deadline=None)
def test_on_inputs_seen_outputs_are_nearer_than_those_of_the_plain_svd(seed: int, rank: int) -> None:
    weight, x = random_matrix(seed, 20, 16), random_inputs(seed + 1, 60, 16)
    whitened, plain = (product(factorise(weight, rank, gram)) for gram in (gram_of(x), None))
    assert error(weight, whitened, x) < error(weight, plain, x)


@given(seed=seeds, rank=st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_without_inputs_it_is_the_plain_truncated_svd(seed: int, rank: int) -> None:
    weight = random_matrix(seed, 7, 9)
    left, values, right = torch.linalg.svd(weight)
    wanted = (left[:, :rank] * values[:rank]) @ right[:rank]
    torch.testing.assert_close(product(factorise(weight, rank)).float(), wanted, rtol=1e-2, atol=5e-3)


@given(seed=seeds, rank=st.integers(1, 4), whitened=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_matrix_of_that_rank_is_kept_but_for_float16(seed: int, rank: int, whitened: bool) -> None:
    weight = random_matrix(seed, 12, rank) @ random_matrix(seed + 1, rank, 10)
    x = random_inputs(seed + 2, 50, 10)
    found = product(factorise(weight, rank, gram_of(x) if whitened else None))
    assert float((found - weight).abs().max()) <= 30 * HALF * float(weight.abs().max())


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_factors_are_contiguous_float16_of_that_rank_at_most(rank: int) -> None:
    found = factorise(random_matrix(1, 8, 6), rank, gram_of(random_inputs(2, 30, 6)))
    kept = min(rank, 6)
    assert (found.out.shape, found.inner.shape) == ((8, kept), (kept, 6))
    for factor in (found.out, found.inner):
        assert factor.dtype is torch.float16 and factor.is_contiguous()


def test_inputs_that_are_always_zero_are_no_obstacle_and_cost_the_others_nothing() -> None:
    """Their weights count for nothing: outputs are as near as where those columns are not there at all."""
    weight, x = random_matrix(3, 10, 8), random_inputs(4, 50, 8)
    x[:, [2, 5]] = 0
    kept = [0, 1, 3, 4, 6, 7]
    found = product(factorise(weight, 3, gram_of(x)))
    fewer = product(factorise(weight[:, kept], 3, gram_of(x[:, kept])))
    assert bool(found.isfinite().all())
    assert error(weight, found, x) == pytest.approx(error(weight[:, kept], fewer, x[:, kept]), abs=0.02)


def test_where_no_input_was_ever_anything_but_zero_weights_are_still_numbers() -> None:
    weight = random_matrix(5, 6, 4)
    found = product(factorise(weight, 4, Gram(torch.zeros(4, 4))))
    torch.testing.assert_close(found.float(), weight, rtol=0, atol=0.02)


@pytest.mark.parametrize("power", [-20, -10, 10, 20])
def test_how_much_text_was_seen_and_how_large_its_inputs_are_hardly_matters(power: int) -> None:
    """The factors are halves: of inputs a thousand times as large they are another split of the same product."""
    weight, x = random_matrix(6, 10, 8), random_inputs(7, 50, 8)
    plain = error(weight, product(factorise(weight, 3, gram_of(x))), x)
    scaled = error(weight, product(factorise(weight, 3, Gram(2.0**power * (x.t() @ x)))), x)
    assert scaled == pytest.approx(plain, abs=1e-4)


def test_a_higher_rank_is_nearer() -> None:
    weight, x = random_matrix(8, 16, 12), random_inputs(9, 80, 12)
    errors = [error(weight, product(factorise(weight, rank, gram_of(x))), x) for rank in range(1, 13)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5 < errors[0]


def test_the_weight_and_the_gram_are_left_as_they_were() -> None:
    weight, x = random_matrix(10, 6, 6), random_inputs(11, 30, 6)
    gram = gram_of(x)
    kept, before = weight.clone(), gram.matrix.clone()
    factorise(weight, 2, gram)
    assert torch.equal(weight, kept) and torch.equal(gram.matrix, before)
