"""The kernel against `Matrix.dense()` in numpy: every code, every shape, to the bit where arithmetic is exact."""

from dataclasses import replace
from math import erf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comoe.kernels import native
from comoe.kernels.matrix import ELEMENT_BITS, GROUP_STEPS, LOW_BITS, Code, Matrix

pytestmark = pytest.mark.skipif(not native.available(), reason="the kernel was not built")

PLAIN = (Code.F32, Code.BF16, Code.F16)
EPSILON = 2.0**-23
MAX_TOKENS = 8

ACTIVATIONS = {
    "relu": lambda v: np.maximum(v, 0),
    "silu": lambda v: v / (1 + np.exp(-v)),
    "gelu": lambda v: 0.5 * v * (1 + np.vectorize(erf)(v / np.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))),
}


def matrix(code: Code, rows: int, cols: int, rng: np.random.Generator, group: int = 32) -> Matrix:
    """A random matrix whose weights are of order one."""
    weights = rng.standard_normal((rows, cols)).astype(np.float32)
    if code is Code.F32:
        return Matrix(code, rows, cols, weights.reshape(-1).view(np.uint8))
    if code is Code.F16:
        return Matrix(code, rows, cols, weights.astype(np.float16).reshape(-1).view(np.uint8))
    if code is Code.BF16:
        return Matrix(code, rows, cols, (weights.view(np.uint32) >> 16).astype(np.uint16).reshape(-1).view(np.uint8))
    high = rng.integers(0, 256, rows * cols * ELEMENT_BITS[code] // 8, np.uint8)
    low = rng.integers(0, 256, rows * cols * LOW_BITS.get(code, 0) // 8, np.uint8)
    scales = (rng.uniform(0.05, 0.2, rows * cols // group) * rng.choice([-1, 1])).astype(np.float16)
    return Matrix(code, rows, cols, high, group, scales, low if code in LOW_BITS else None)


def inputs(tokens: int, cols: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((tokens, cols)).astype(np.float32)


def run_linear(weights: Matrix, x: np.ndarray) -> np.ndarray:
    out = np.full((len(x), weights.rows), np.nan, np.float32)
    native.linear(weights, x, out)
    return out


def run_expert(up: Matrix, down: Matrix, activation: str, gated: bool, x: np.ndarray) -> np.ndarray:
    out = np.full((len(x), down.rows), np.nan, np.float32)
    native.expert(up, down, activation, gated, x, out)
    return out


def reference(up: Matrix, down: Matrix, activation: str, gated: bool, x: np.ndarray) -> np.ndarray:
    """The expert in float64."""
    hidden = x.astype(np.float64) @ up.dense().T
    gates, values = np.split(hidden, 2, 1) if gated else (hidden, 1.0)
    return (ACTIVATIONS[activation](gates) * values) @ down.dense().T


@pytest.mark.parametrize("tokens", [1, 2, 3, MAX_TOKENS])
@pytest.mark.parametrize("cols", [1, 31, 33, 65, 200])
@pytest.mark.parametrize("code", PLAIN)
def test_a_plain_linear_is_a_matrix_product_whatever_its_sizes(code: Code, cols: int, tokens: int) -> None:
    rng = np.random.default_rng(cols)
    weights, x = matrix(code, 7, cols, rng), inputs(tokens, cols, rng)
    off = np.abs(run_linear(weights, x) - x.astype(np.float64) @ weights.dense().T)
    assert (off <= cols * EPSILON * (np.abs(x) @ np.abs(weights.dense().T))).all()


@given(
    code=st.sampled_from([Code.Q4, Code.Q8, Code.Q2, Code.Q3]),
    rows=st.integers(1, 9),
    steps=st.sampled_from([1, 3, 4, 8]),
    groups=st.integers(1, 5),
    tokens=st.integers(1, MAX_TOKENS),
)
@settings(max_examples=60, deadline=None)
def test_a_quantised_linear_is_a_matrix_product_whatever_its_groups(
    code: Code, rows: int, steps: int, groups: int, tokens: int
) -> None:
    rng, group = np.random.default_rng(rows), steps * GROUP_STEPS[code]
    weights, x = matrix(code, rows, group * groups, rng, group), inputs(tokens, group * groups, rng)
    off = np.abs(run_linear(weights, x) - x.astype(np.float64) @ weights.dense().T)
    assert (off <= weights.cols * EPSILON * (np.abs(x) @ np.abs(weights.dense().T))).all()


@pytest.mark.parametrize("code", list(Code))
def test_the_weights_that_the_kernel_sees_are_the_dense_ones_to_the_bit(code: Code) -> None:
    weights = matrix(code, 9, 128, np.random.default_rng(0))
    seen = run_linear(weights, np.eye(128, dtype=np.float32)).T
    np.testing.assert_array_equal(seen, weights.dense())


@pytest.mark.parametrize("code", [Code.F16, Code.BF16])
def test_every_16_bit_number_is_read_exactly_subnormal_or_not(code: Code) -> None:
    weights = Matrix(code, 1 << 16, 1, np.arange(1 << 16, dtype=np.uint16).view(np.uint8))
    seen = run_linear(weights, np.ones((1, 1), np.float32))[0]
    np.testing.assert_array_equal(seen, weights.dense()[:, 0])


@pytest.mark.parametrize("code", [Code.Q4, Code.Q8])
def test_every_finite_scale_is_read_exactly_subnormal_or_not(code: Code) -> None:
    scales = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    nibbles = np.random.default_rng(0).integers(0, 256, (2, len(scales)), np.uint8)
    weights = Matrix(code, len(scales), 2, nibbles[0], 2, scales, nibbles[1] if code is Code.Q8 else None)
    np.testing.assert_array_equal(run_linear(weights, np.eye(2, dtype=np.float32)).T, weights.dense())


def test_dense_nibbles_are_read_low_nibble_first_and_eight_means_zero() -> None:
    weights = Matrix(Code.Q4, 1, 4, np.array([0x80, 0xF9], np.uint8), 4, np.array([2], np.float16))
    assert weights.dense().tolist() == [[-16, 0, 2, 14]]


def test_dense_q8_is_an_eighth_of_the_scale_times_eight_times_high_plus_low() -> None:
    high, low = np.array([0xF0], np.uint8), np.array([0x0F], np.uint8)
    weights = Matrix(Code.Q8, 1, 2, high, 2, np.array([8], np.float16), low)
    assert weights.dense().tolist() == [[8 * -8 + 7, 8 * 7 - 8]]


def test_dense_pairs_of_bits_are_read_from_the_lowest_on_and_two_means_zero() -> None:
    weights = Matrix(Code.Q2, 1, 4, np.array([0b11_10_01_00], np.uint8), 4, np.array([-3], np.float16))
    assert weights.dense().tolist() == [[6, 3, 0, -3]]


def test_dense_q3_has_its_last_bit_in_the_low_plane() -> None:
    high, low = np.array([0b11_10_01_00, 0b11_11_00_00], np.uint8), np.array([0b1010_1010], np.uint8)
    weights = Matrix(Code.Q3, 1, 8, high, 8, np.array([2], np.float16), low)
    assert weights.dense().tolist() == [[-8, -2, 0, 6, -8, -6, 4, 6]]


@pytest.mark.parametrize("tokens", range(1, MAX_TOKENS + 1))
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_expert_is_down_of_activated_up(activation: str, gated: bool, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    up, down = matrix(Code.F32, 34 if gated else 17, 45, rng), matrix(Code.F32, 45, 17, rng)
    x = inputs(tokens, 45, rng) / 4
    wanted = reference(up, down, activation, gated, x)
    np.testing.assert_allclose(run_expert(up, down, activation, gated, x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("code", list(Code))
def test_an_expert_of_every_code_agrees_with_its_dense_weights(code: Code, gated: bool) -> None:
    rng = np.random.default_rng(1)
    up, down = matrix(code, 128 if gated else 64, 96, rng), matrix(code, 33, 64, rng)
    x = inputs(5, 96, rng) / 4
    wanted = reference(up, down, "silu", gated, x)
    np.testing.assert_allclose(
        run_expert(up, down, "silu", gated, x), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max()
    )


def test_up_and_down_may_have_different_codes() -> None:
    rng = np.random.default_rng(2)
    up, down = matrix(Code.Q4, 64, 32, rng), matrix(Code.BF16, 5, 64, rng)
    x = inputs(3, 32, rng)
    wanted = reference(up, down, "relu", False, x)
    np.testing.assert_allclose(
        run_expert(up, down, "relu", False, x), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max()
    )


@given(code=st.sampled_from(list(Code)), gated=st.booleans(), tokens=st.integers(2, 40), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_tokens_result_does_not_depend_on_the_tokens_beside_it(
    code: Code, gated: bool, tokens: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    up, down = matrix(code, 192, 64, rng), matrix(code, 37, 96 if gated else 192, rng)
    x = inputs(tokens, 64, rng)
    together = run_expert(up, down, "silu", gated, x)
    alone = np.concatenate([run_expert(up, down, "silu", gated, x[t : t + 1]) for t in range(tokens)])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_input_that_is_not_a_number_spoils_its_own_token_only(activation: str) -> None:
    rng = np.random.default_rng(3)
    up, down = matrix(Code.F32, 16, 8, rng), matrix(Code.F32, 8, 16, rng)
    x = inputs(3, 8, rng)
    x[1, 4] = np.nan
    finite = np.isfinite(run_expert(up, down, activation, False, x)).all(1)
    assert finite.tolist() == [True, False, True]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_huge_values_neither_overflow_nor_vanish(activation: str) -> None:
    up, down = (Matrix(Code.F32, 2, 2, np.eye(2, dtype=np.float32).reshape(-1).view(np.uint8)) for _ in range(2))
    out = run_expert(up, down, activation, False, np.array([[1e4, -1e4]], np.float32))
    np.testing.assert_allclose(out, [[1e4, 0.0]], rtol=1e-6, atol=1e-6)


def test_no_tokens_are_no_work() -> None:
    rng = np.random.default_rng(4)
    assert (
        run_expert(matrix(Code.F32, 4, 8, rng), matrix(Code.F32, 8, 4, rng), "relu", False, inputs(0, 8, rng)).size == 0
    )


def sound() -> Matrix:
    return matrix(Code.Q8, 4, 64, np.random.default_rng(5))


def float_matrix(rows: int, cols: int) -> Matrix:
    return Matrix(Code.F32, rows, cols, np.zeros(rows * cols * 4, np.uint8))


BROKEN = {
    "too few bytes": {"weight": np.zeros(127, np.uint8)},
    "bytes of a view with gaps": {"weight": np.zeros(256, np.uint8)[::2]},
    "negative sizes": {"rows": -4, "cols": -64},
    "no columns": {"cols": 0, "weight": np.zeros(0, np.uint8), "scales": np.zeros(0, np.float16)},
    "groups that do not divide": {"group": 48},
    "an odd group": {"group": 1, "scales": np.zeros(256, np.float16)},
    "no group": {"group": 0},
    "no scales": {"scales": None},
    "a scale too few": {"scales": np.zeros(7, np.float16)},
    "scales of another type": {"scales": np.zeros(8, np.float32)},
    "scales with gaps": {"scales": np.zeros(16, np.float16)[::2]},
    "no low plane": {"low": None},
    "a short low plane": {"low": np.zeros(64, np.uint8)},
    "a low plane with gaps": {"low": np.zeros(256, np.uint8)[::2]},
}


@pytest.mark.parametrize(("code", "short"), [(Code.Q3, 31), (Code.Q8, 127)])
def test_a_low_plane_has_as_many_bits_as_its_code_needs(code: Code, short: int) -> None:
    with pytest.raises(ValueError, match="low plane"):
        replace(matrix(code, 4, 64, np.random.default_rng(5)), low=np.zeros(short, np.uint8))


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_a_matrix_that_the_kernel_would_overrun_cannot_be_made(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        replace(sound(), **change)


BAD_CALLS = {
    "x too narrow": ((3, 63), (3, 4)),
    "x too wide": ((3, 65), (3, 4)),
    "out too narrow": ((3, 64), (3, 3)),
    "out of other tokens": ((3, 64), (2, 4)),
}


@pytest.mark.parametrize(("x_shape", "out_shape"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_a_linear_on_arrays_of_the_wrong_shape_is_refused(x_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        native.linear(sound(), np.zeros(x_shape, np.float32), np.zeros(out_shape, np.float32))


def test_arrays_of_another_type_or_with_gaps_or_read_only_are_refused() -> None:
    x, out = np.zeros((2, 64), np.float32), np.zeros((2, 4), np.float32)
    frozen = out.copy()
    frozen.flags.writeable = False
    for bad_x, bad_out in [
        (x.astype(np.float64), out),
        (np.zeros((2, 128), np.float32)[:, ::2], out),
        (x, np.zeros((4, 2), np.float32).T),
        (x, frozen),
    ]:
        with pytest.raises(ValueError):
            native.linear(sound(), bad_x, bad_out)


@pytest.mark.parametrize(
    ("up", "down", "gated"),
    [((6, 8), (8, 5), False), ((6, 8), (8, 6), True), ((7, 8), (8, 3), True), ((6, 9), (8, 6), False)],
)
def test_matrices_that_do_not_chain_are_refused(up: tuple[int, int], down: tuple[int, int], gated: bool) -> None:
    with pytest.raises(ValueError):
        run_expert(float_matrix(*up), float_matrix(*down), "relu", gated, np.zeros((1, 8), np.float32))


def test_an_unknown_activation_is_refused_before_the_kernel_runs() -> None:
    with pytest.raises(KeyError):
        run_expert(float_matrix(4, 8), float_matrix(8, 4), "tanh", False, np.zeros((1, 8), np.float32))


def test_the_kernel_says_which_instructions_it_uses() -> None:
    assert native.kernel_name().startswith("native (")
