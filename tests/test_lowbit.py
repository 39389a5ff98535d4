"""Two and three bits: levels in range, scales that no other float16 beats on the grid, compensation that pays."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from comoe.forms.compensate import Gram
from comoe.forms.lowbit import LEAST_SHARE, NUM_SHARES, dequantise_low, quantise_low, scale_shares, searched_scales
from comoe.forms.quantise import Planes
from comoe.kernels import native

HALF = {2: 2, 3: 4}
seeds = st.integers(0, 10_000)
bits = st.sampled_from([2, 3])


def random_weight(seed: int, rows: int, cols: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator) * torch.logspace(-3, 2, rows)[:, None]


def random_inputs(seed: int, tokens: int, cols: int) -> Tensor:
    """Inputs whose columns are correlated and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=generator) / cols**0.5
    return torch.randn(tokens, cols, generator=generator) @ (mixing + torch.eye(cols)) * torch.linspace(0.1, 3, cols)


def gram_of(x: Tensor) -> Gram:
    return Gram(x.T @ x)


def levels(planes: Planes) -> Tensor:
    """Levels bit by bit, written unlike the code under test."""
    rows, quarter = planes.high.shape
    out = torch.empty(rows, 4 * quarter)
    for column in range(4 * quarter):
        two = (planes.high[:, column // 4] // 4 ** (column % 4)) % 4
        if planes.low is None:
            out[:, column] = two.float() - 2
        else:
            half, place = divmod(column // 4, quarter // 2)
            one = (planes.low[:, place] // 2 ** (4 * half + column % 4)) % 2
            out[:, column] = 2 * two.float() + one.float() - 4
    return out


def cost(weight: Tensor, scale: Tensor, half: int) -> Tensor:
    """Squared error (rows,) of a group (rows, group) under scales (rows,), rounded to the nearest level."""
    steps = torch.nan_to_num(weight / scale[:, None]).round().clamp(-half, half - 1)
    return ((steps * scale[:, None] - weight) ** 2).sum(1)


@given(seed=seeds, bits=bits, groups=st.integers(1, 3), compensate=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_matrix_is_its_scales_times_its_levels(seed: int, bits: int, groups: int, compensate: bool) -> None:
    weight = random_weight(seed, 5, 32 * groups)
    x = random_inputs(seed, 80, 32 * groups)
    planes = quantise_low(weight, 32, bits, gram_of(x) if compensate else None)
    assert (planes.scales.shape, planes.scales.dtype) == ((5, groups), torch.float16)
    assert (planes.low is None) == (bits == 2)
    found = levels(planes)
    assert -HALF[bits] <= found.min() and found.max() <= HALF[bits] - 1
    assert torch.equal(dequantise_low(planes, 32), found * planes.scales.float().repeat_interleave(32, 1))


@given(seed=seeds, bits=bits)
@settings(max_examples=30, deadline=None)
def test_without_inputs_every_weight_takes_the_nearest_level_under_the_best_scale(seed: int, bits: int) -> None:
    weight, half = random_weight(seed, 6, 32), HALF[bits]
    planes = quantise_low(weight, 32, bits)
    scale = planes.scales.float()[:, 0]
    off = ((dequantise_low(planes, 32) - weight) ** 2).sum(1)
    torch.testing.assert_close(off, cost(weight, scale, half))
    reach = weight.abs().amax(1) / (half - 0.5)
    shares = [*torch.linspace(1, LEAST_SHARE, NUM_SHARES).tolist(), (half - 0.5) / half]
    tried = [sign * share * reach for share in shares for sign in (1, -1)]
    best = torch.stack([cost(weight, candidate.half().float(), half) for candidate in tried]).amin(0)
    torch.testing.assert_close(off, best)


@pytest.mark.parametrize("bits", [2, 3])
def test_the_sign_of_a_scale_follows_the_longer_side(bits: int) -> None:
    """Weights on the levels themselves, the outermost one included, survive; so does their mirror image."""
    half = HALF[bits]
    weight = torch.tensor([float(level) for level in range(-half, half)] * 8)[None]
    for mirrored in (weight, -weight):
        assert torch.equal(dequantise_low(quantise_low(mirrored, weight.shape[1], bits), weight.shape[1]), mirrored)


@pytest.mark.parametrize("bits", [2, 3])
def test_compensation_lowers_the_error_of_outputs(bits: int) -> None:
    weight, x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)), random_inputs(2, 500, 128)
    plain, compensated = (
        ((dequantise_low(quantise_low(weight, 32, bits, gram), 32) - weight) @ x.T).square().sum()
        for gram in (None, gram_of(x))
    )
    assert compensated < 0.9 * plain


@pytest.mark.parametrize("bits", [2, 3])
def test_more_bits_lose_less_and_both_less_than_the_largest_weights_scale(bits: int) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    off = (dequantise_low(quantise_low(weight, 32, bits), 32) - weight).square().sum()
    finer = (dequantise_low(quantise_low(weight, 32, 3), 32) - weight).square().sum()
    groups = weight.view(-1, 32)
    naive = cost(groups, groups.abs().amax(1) / (HALF[bits] - 0.5), HALF[bits]).sum()
    assert finer <= off < 0.75 * naive


@pytest.mark.parametrize("bits", [2, 3])
def test_zeros_stay_zero_and_what_float16_cannot_scale_is_refused(bits: int) -> None:
    weight = random_weight(4, 4, 64)
    weight[1] = 0
    x = random_inputs(5, 100, 64)
    assert torch.equal(dequantise_low(quantise_low(weight, 32, bits, gram_of(x)), 32)[1], torch.zeros(64))
    with pytest.raises(ValueError, match="too large"):
        quantise_low(torch.full((1, 32), 1e6), 32, bits)


@given(seed=seeds, bits=bits, group=st.sampled_from([1, 16, 32, 40, 64]))
@settings(max_examples=60, deadline=None)
def test_the_kernels_scales_are_those_of_the_search_in_torch(seed: int, bits: int, group: int) -> None:
    weight = random_weight(seed, 24, group)
    weight[::6] *= 1e-7  # scales that float16 holds as subnormal numbers, or as 0
    weight[3] = 0
    importance = random_inputs(seed, 1, group).abs()[0] + 0.1
    shares = np.array(scale_shares(HALF[bits]), np.float32)
    found = torch.from_numpy(native.scales(weight.numpy(), importance.numpy(), shares, HALF[bits]))
    wanted = searched_scales(weight, importance, HALF[bits])
    assert torch.equal(found, found.half().float())
    costs = [weighted_cost(weight, scale, importance, HALF[bits]) for scale in (found, wanted)]
    assert torch.allclose(*costs, rtol=1e-4, atol=0)
    assert (found == wanted).float().mean() > 0.8  # ties apart


def weighted_cost(weight: Tensor, scale: Tensor, importance: Tensor, half: int) -> Tensor:
    steps = torch.nan_to_num(weight / scale[:, None], posinf=0, neginf=0).round().clamp(-half, half - 1)
    return ((steps * scale[:, None] - weight) ** 2 * importance).sum(1)


@pytest.mark.parametrize("width", [2, 3])
def test_weights_that_compensation_makes_too_large_are_refused_or_have_finite_scales(width: int) -> None:
    """Rounding errors are spread over later columns, which may outgrow float16."""
    for seed in range(6):
        weight = random_weight(seed, 64, 64).sign() * 1e5 * HALF[width] / 2
        try:
            planes = quantise_low(weight, 32, width, gram_of(random_inputs(seed, 20, 64)))
        except ValueError:
            continue
        assert bool(planes.scales.isfinite().all())


def test_without_the_kernel_the_same_matrix_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(1, 16, 96)
    fast = dequantise_low(quantise_low(weight, 32, 2), 32)
    monkeypatch.setattr(native, "available", lambda: False)
    slow = dequantise_low(quantise_low(weight, 32, 2), 32)
    assert float((fast - weight).square().sum()) == pytest.approx(float((slow - weight).square().sum()), rel=1e-4)
