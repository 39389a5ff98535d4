"""Nested planes: exact integers, levels in range, bounded errors, and compensation that earns its place."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from comoe.forms.compensate import Gram
from comoe.forms.quantise import STEPS, Planes, dequantise, quantise

SLACK = 1e-4
"""Steps by which float32 division may miss: bounds below are in steps of a group's scale."""

shapes = st.tuples(st.integers(1, 5), st.sampled_from([2, 8, 32]), st.integers(1, 5))
seeds = st.integers(0, 10_000)


def random_weight(seed: int, rows: int, cols: int) -> Tensor:
    """Rows of very different sizes, with outliers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator) * torch.logspace(-4, 2, rows)[:, None]
    return weight * (1 + 20 * (torch.rand(rows, cols, generator=generator) > 0.97))


def random_inputs(seed: int, tokens: int, cols: int) -> Tensor:
    """Inputs (tokens, cols) whose columns are correlated and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=generator) / cols**0.5
    return torch.randn(tokens, cols, generator=generator) @ (mixing + torch.eye(cols)) * torch.linspace(0.1, 3, cols)


def gram_of(x: Tensor) -> Gram:
    return Gram(x.T @ x)


def levels(plane: Tensor) -> Tensor:
    """Nibbles as levels, written unlike the code under test."""
    rows, halves = plane.shape
    out = torch.empty(rows, 2 * halves)
    out[:, 0::2] = (plane % 16).float() - 8
    out[:, 1::2] = (plane // 16).float() - 8
    return out


def spread(scales: Tensor, group: int) -> Tensor:
    """The scale of every weight, float64."""
    return scales.double().repeat_interleave(group, 1)


def in_steps(error: Tensor, scales: Tensor, group: int) -> Tensor:
    """|error| in steps of the group's scale; 0 where the scale is 0 and so must the error be."""
    step = spread(scales, group)
    assert (error[step == 0] == 0).all()
    return torch.where(step > 0, error.abs() / step, 0.0)


@given(shape=shapes, seed=seeds, data=st.data())
@settings(max_examples=60, deadline=None)
def test_planes_of_any_levels_recombine_to_exact_integers(
    shape: tuple[int, int, int], seed: int, data: st.DataObject
) -> None:
    rows, group, groups = shape
    nibbles = torch.randint(0, 256, (2, rows, group * groups // 2), generator=torch.Generator().manual_seed(seed))
    high, low = nibbles.to(torch.uint8)
    scales = torch.full((rows, groups), data.draw(st.sampled_from([2.0**-20, 0.125, 8.0, 1024.0]))).half()
    step = spread(scales, group)
    assert torch.equal(dequantise(Planes(scales, high, None), group).double(), step * levels(high))
    assert torch.equal(
        dequantise(Planes(scales, high, low), group).double(), step / 8 * (8 * levels(high) + levels(low))
    )


@given(shape=shapes, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_integers_that_the_planes_can_hold_survive_the_round_trip(shape: tuple[int, int, int], seed: int) -> None:
    """Weights that are 60 eighths of a step at most, the largest of each group just that: packed, then unpacked."""
    rows, group, groups = shape
    wanted = torch.randint(-60, 61, (rows, group * groups), generator=torch.Generator().manual_seed(seed)).float()
    wanted[:, ::group] = 60
    planes = quantise(wanted / 8, group)
    assert (planes.scales == 1).all()
    assert torch.equal(dequantise(planes, group), wanted / 8)


@given(shape=shapes, seed=seeds)
@settings(max_examples=60, deadline=None)
def test_rounding_to_nearest_is_half_a_step_off_at_most_and_a_sixteenth_with_the_low_plane(
    shape: tuple[int, int, int], seed: int
) -> None:
    rows, group, groups = shape
    weight = random_weight(seed, rows, group * groups)
    planes = quantise(weight, group)
    coarse = dequantise(Planes(planes.scales, planes.high, None), group).double() - weight.double()
    fine = dequantise(planes, group).double() - weight.double()
    assert in_steps(coarse, planes.scales, group).max() <= 1 / 2 + SLACK
    assert in_steps(fine, planes.scales, group).max() <= 1 / 16 + SLACK


@given(shape=shapes, seed=seeds, tokens=st.sampled_from([1, 3, 400]))
@settings(max_examples=40, deadline=None)
def test_compensated_levels_lie_between_floor_and_ceiling_of_the_original(
    shape: tuple[int, int, int], seed: int, tokens: int
) -> None:
    rows, group, groups = shape
    weight = random_weight(seed, rows, group * groups)
    x = random_inputs(seed, tokens, group * groups)
    planes = quantise(weight, group, gram_of(x))
    steps = torch.nan_to_num(weight / spread(planes.scales, group).float())
    high = levels(planes.high)
    assert (high >= steps.floor().clamp(-8, 7)).all() and (high <= steps.ceil().clamp(-8, 7)).all()


@given(shape=shapes, seed=seeds)
@settings(max_examples=40, deadline=None)
def test_the_low_plane_undoes_what_compensation_moved(shape: tuple[int, int, int], seed: int) -> None:
    """A whole step too high or too low, less a sixteenth, needs level 8, which a nibble has not: an eighth at most."""
    rows, group, groups = shape
    weight = random_weight(seed, rows, group * groups)
    x = random_inputs(seed, 50, group * groups)
    planes = quantise(weight, group, gram_of(x))
    off = in_steps(dequantise(planes, group).double() - weight.double(), planes.scales, group)
    assert off.max() <= 1 / 8 + SLACK
    reachable = (8 * (weight / spread(planes.scales, group).float() - levels(planes.high))) <= 7.5
    assert (off * reachable).max() <= 1 / 16 + SLACK


def test_scales_are_the_smallest_halves_that_keep_every_weight_within_reach() -> None:
    weight = random_weight(3, 8, 256)
    planes = quantise(weight, 32)
    largest = weight.double().abs().view(8, 8, 32).amax(-1)
    below = torch.nextafter(planes.scales, torch.zeros_like(planes.scales))
    assert (planes.scales.double() * STEPS >= largest * (1 - 1e-6)).all()
    assert (below.double() * STEPS < largest).all()


def test_the_planes_have_the_shapes_and_types_that_packs_store() -> None:
    planes = quantise(random_weight(0, 6, 96), 32)
    assert planes.low is not None
    assert (planes.scales.shape, planes.scales.dtype) == ((6, 3), torch.float16)
    assert {(plane.shape, plane.dtype) for plane in (planes.high, planes.low)} == {((6, 48), torch.uint8)}


@pytest.mark.parametrize("compensated", [False, True])
def test_a_group_of_zeros_stays_zero_and_leaves_its_neighbours_alone(compensated: bool) -> None:
    weight = random_weight(1, 4, 96)
    weight[1, 32:64] = 0
    weight[2] = weight[3, :32] = 0
    x = random_inputs(1, 200, 96)
    planes = quantise(weight, 32, gram_of(x) if compensated else None)
    restored = dequantise(planes, 32)
    assert torch.isfinite(restored).all()
    assert planes.low is not None and (restored[weight == 0] == 0).all()
    assert all((levels(plane)[weight == 0] == 0).all() for plane in (planes.high, planes.low))
    assert in_steps(restored.double() - weight.double(), planes.scales, 32).max() <= 1 / 8 + SLACK


def test_a_weight_too_small_for_a_scale_gets_the_smallest_and_not_zero() -> None:
    planes = quantise(torch.full((1, 32), 1e-9), 32)
    assert planes.scales.item() == 2.0**-24
    assert torch.equal(dequantise(planes, 32), torch.zeros(1, 32))


@pytest.mark.parametrize("value", [65504 * STEPS * 1.01, torch.inf, torch.nan])
def test_a_weight_too_large_for_a_scale_is_refused(value: float) -> None:
    weight = torch.zeros(2, 32)
    weight[1, 5] = value
    with pytest.raises(ValueError, match="too large"):
        quantise(weight, 32)


def test_the_largest_weight_that_has_a_scale_is_taken() -> None:
    weight = torch.full((1, 32), 65504 * STEPS)
    assert quantise(weight, 32).scales.item() == 65504


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_weight_is_quantised_as_its_float32_value(dtype: torch.dtype) -> None:
    weight = random_weight(2, 4, 64).to(dtype)
    narrow, wide = quantise(weight, 32), quantise(weight.float(), 32)
    assert torch.equal(narrow.scales, wide.scales) and torch.equal(narrow.high, wide.high)


def output_error(weight: Tensor, planes: Planes, x: Tensor, group: int) -> float:
    """Squared error of x @ weight.T with the high plane alone, relative to its square."""
    coarse = dequantise(Planes(planes.scales, planes.high, None), group)
    return float(((coarse - weight) @ x.T).square().sum() / (weight @ x.T).square().sum())


@pytest.mark.parametrize("cols", [96, 160, 320])
def test_compensation_beats_rounding_on_the_inputs_that_it_saw(cols: int) -> None:
    """Also across the blocks of columns in which errors are carried on."""
    weight = torch.randn(64, cols, generator=torch.Generator().manual_seed(7))
    x = random_inputs(7, 2 * cols, cols)
    rounded, compensated = quantise(weight, 32), quantise(weight, 32, gram_of(x))
    assert output_error(weight, compensated, x, 32) < 0.8 * output_error(weight, rounded, x, 32)


def test_compensation_also_beats_rounding_on_inputs_like_those_that_it_saw() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(8))
    both = random_inputs(8, 800, 96)
    x, unseen = both[:400], both[400:]
    compensated = output_error(weight, quantise(weight, 32, gram_of(x)), unseen, 32)
    assert compensated < 0.9 * output_error(weight, quantise(weight, 32), unseen, 32)


def test_independent_inputs_leave_nothing_to_compensate() -> None:
    weight = random_weight(9, 16, 160)
    assert torch.equal(quantise(weight, 32, Gram(torch.eye(160))).high, quantise(weight, 32).high)


def test_blocks_of_columns_do_not_change_the_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(10))
    x = random_inputs(10, 200, 96)
    whole = quantise(weight, 32, gram_of(x))
    monkeypatch.setattr("comoe.forms.compensate.BLOCK_COLUMNS", 20)
    differing = quantise(weight, 32, gram_of(x)).high != whole.high
    assert differing.float().mean() < 0.01  # sums in another order flip a rounding now and then


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_inputs_that_span_little_or_nothing_are_no_obstacle(tokens: int) -> None:
    weight = random_weight(11, 8, 64)
    x = random_inputs(11, tokens, 64)
    x[:, 10:20] = 0
    assert torch.isfinite(dequantise(quantise(weight, 32, gram_of(x)), 32)).all()


def test_neither_weight_nor_gram_is_changed() -> None:
    weight = random_weight(12, 4, 64)
    gram = gram_of(random_inputs(12, 100, 64))
    before = weight.clone(), gram.matrix.clone()
    quantise(weight, 32, gram)
    assert torch.equal(weight, before[0]) and torch.equal(gram.matrix, before[1])


def test_a_gram_that_was_used_before_gives_the_same_planes() -> None:
    """What follows from it is reckoned once, for all forms of an expert."""
    weight, x = random_weight(13, 8, 64), random_inputs(13, 100, 64)
    used = gram_of(x)
    first = quantise(weight, 32, used)
    again, fresh = quantise(weight, 32, used), quantise(weight, 32, gram_of(x))
    assert torch.equal(again.high, first.high) and torch.equal(first.high, fresh.high)
