"""Distillation: the down projection against a slow ridge regression, training that learns and repeats itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from comoe.forms import distil
from comoe.forms.distil import RIDGE, Lessons, Weights, refit_down, train

HIDDEN, INNER = 6, 8
seeds = st.integers(0, 10_000)


def lessons(seed: int, tokens: int = 200, hidden: int = HIDDEN) -> Lessons:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, tokens, hidden, generator=generator)
    return Lessons(x, y, torch.rand(tokens, generator=generator) + 0.05)


def expert(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "up": torch.randn(INNER, HIDDEN, generator=generator) / HIDDEN**0.5,
        "down": torch.randn(HIDDEN, INNER, generator=generator) / INNER**0.5,
    }


def forward(x: Tensor, weights: Weights) -> Tensor:
    return F.linear(F.relu(F.linear(x, weights["up"])), weights["down"])


def taught_by(teacher: dict[str, Tensor], seed: int, tokens: int = 300) -> Lessons:
    """What `teacher` puts out on random inputs."""
    drawn = lessons(seed, tokens)
    return Lessons(drawn.x, forward(drawn.x, teacher), drawn.gate)


# --- the down projection in closed form ---


@given(seed=seeds, tokens=st.integers(1, 40), inner=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_refitting_is_ridge_regression_weighted_by_squared_gates(seed: int, tokens: int, inner: int) -> None:
    """As least squares over a token per row, scaled by its gate, and a row that wants zero for every weight."""
    wanted = lessons(seed, tokens)
    hidden = torch.randn(tokens, inner, generator=torch.Generator().manual_seed(seed + 1))
    rows = torch.stack([wanted.gate[at].double() * hidden[at].double() for at in range(tokens)])
    targets = torch.stack([wanted.gate[at].double() * wanted.y[at].double() for at in range(tokens)])
    damping = RIDGE * float((rows**2).sum()) / inner
    system = torch.cat([rows, damping**0.5 * torch.eye(inner, dtype=torch.float64)])
    slow = torch.linalg.lstsq(system, torch.cat([targets, torch.zeros(inner, HIDDEN, dtype=torch.float64)])).solution
    fitted = refit_down(hidden, wanted)
    assert (fitted.shape, fitted.dtype) == ((HIDDEN, inner), torch.float32)
    torch.testing.assert_close(fitted.double(), slow.t(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("ridge", "tolerance"), [(RIDGE, 0.03), (1e-9, 1e-5)])
def test_a_projection_that_gives_just_what_is_wanted_is_found(
    ridge: float, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what the ridge takes off."""
    monkeypatch.setattr(distil, "RIDGE", ridge)
    drawn, true = lessons(1, 400), expert(2)["down"]
    hidden = torch.randn(400, INNER, generator=torch.Generator().manual_seed(3))
    fitted = refit_down(hidden, Lessons(drawn.x, hidden @ true.t(), drawn.gate))
    assert float((fitted - true).norm() / true.norm()) < tolerance


def test_tokens_count_by_their_squared_gates() -> None:
    """Two tokens want 1 and 0 of one hidden unit; the first with a gate of 3 against 1."""
    wanted = Lessons(torch.zeros(2, 1), torch.tensor([[1.0], [0.0]]), torch.tensor([3.0, -1.0]))
    fitted = refit_down(torch.ones(2, 1), wanted)
    assert fitted.item() == pytest.approx(9 / (10 * (1 + RIDGE)))


def test_hidden_units_that_never_fire_get_no_weight_and_are_no_obstacle() -> None:
    wanted = lessons(4)
    hidden = torch.randn(200, INNER, generator=torch.Generator().manual_seed(5))
    hidden[:, 3] = 0
    fitted = refit_down(hidden, wanted)
    assert bool(fitted.isfinite().all()) and not fitted[:, 3].any()
    assert not refit_down(torch.zeros(200, INNER), wanted).any()


@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_refitting_loses_no_more_than_the_projection_there_was(seed: int) -> None:
    """The ridge takes a little where the teacher is matched already, never more than a hundredth."""
    wanted, pupil = taught_by(expert(seed), seed + 1), expert(seed + 2)
    hidden = F.relu(F.linear(wanted.x, pupil["up"]))
    refitted = {**pupil, "down": refit_down(hidden, wanted)}
    assert wanted.error(forward(wanted.x, refitted)) <= wanted.error(forward(wanted.x, pupil)) + 0.01


# --- the error ---


def test_the_error_is_relative_and_weighted_by_squared_gates() -> None:
    wanted = Lessons(torch.zeros(2, 1), torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([1.0, 2.0]))
    assert wanted.error(wanted.y) == 0
    assert wanted.error(torch.zeros(2, 2)) == 1
    assert wanted.error(torch.tensor([[3.0, 4.0], [0.0, 0.0]])) == pytest.approx(4 / 29)


def test_nothing_wanted_and_nothing_put_out_is_no_error() -> None:
    assert Lessons(torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(3)).error(torch.zeros(3, 2)) == 0


# --- training ---


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_lowers_the_error_on_its_lessons(seed: int) -> None:
    wanted, pupil = taught_by(expert(10 + seed), 20 + seed), expert(30 + seed)
    trained = train(pupil, forward, wanted, 60)
    assert trained.keys() == pupil.keys()
    assert wanted.error(forward(wanted.x, trained)) < 0.7 * wanted.error(forward(wanted.x, pupil))


def test_training_learns_where_gradients_are_off_and_leaves_none_behind() -> None:
    """As while packing."""
    wanted, pupil = taught_by(expert(6), 7), expert(8)
    with torch.no_grad():
        trained = train(pupil, forward, wanted, 30)
    assert wanted.error(forward(wanted.x, trained)) < wanted.error(forward(wanted.x, pupil))
    assert not any(tensor.requires_grad for tensor in trained.values())


def test_the_same_seed_gives_the_same_weights_and_another_one_others() -> None:
    wanted, pupil = taught_by(expert(9), 10), expert(11)
    first, again, other = (train(pupil, forward, wanted, 5, seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in pupil)
    assert not any(torch.equal(first[name], other[name]) for name in pupil)


def test_training_draws_from_nobody_elses_random_numbers() -> None:
    wanted, pupil = taught_by(expert(9), 10), expert(11)
    state = torch.get_rng_state()
    train(pupil, forward, wanted, 2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_leaves_weights_and_lessons_as_they_were(dtype: torch.dtype) -> None:
    wanted, pupil = taught_by(expert(12), 13), {name: tensor.to(dtype) for name, tensor in expert(14).items()}
    kept = {name: tensor.clone() for name, tensor in pupil.items()}
    before = [tensor.clone() for tensor in (wanted.x, wanted.y, wanted.gate)]
    trained = train(pupil, forward, wanted, 3)
    assert all(torch.equal(pupil[name], kept[name]) and pupil[name].dtype is dtype for name in pupil)
    assert not any(tensor.requires_grad for tensor in pupil.values())
    assert all(map(torch.equal, (wanted.x, wanted.y, wanted.gate), before))
    assert all(tensor.dtype is torch.float32 and tensor.data_ptr() != pupil[name].data_ptr()
               for name, tensor in trained.items())  # fmt: skip


def test_no_steps_change_nothing() -> None:
    pupil = expert(15)
    trained = train(pupil, forward, taught_by(expert(16), 17), 0)
    assert all(torch.equal(trained[name], pupil[name]) for name in pupil)


def test_steps_do_not_depend_on_the_scale_of_what_is_wanted_or_of_gates() -> None:
    """The loss is relative, and so is a step of Adam."""
    wanted, pupil = taught_by(expert(18), 19), expert(20)
    plain = train(pupil, forward, wanted, 4)
    gates = train(pupil, forward, Lessons(wanted.x, wanted.y, 64 * wanted.gate), 4)
    assert all(torch.allclose(plain[name], gates[name], rtol=1e-4, atol=1e-6) for name in pupil)


def test_weights_of_any_size_move_by_a_like_share_of_it() -> None:
    """Steps are in units of a matrix's weights, but for what Adam adds to a gradient's size."""
    wanted, pupil = taught_by(expert(21), 22), expert(23)
    other = {"up": pupil["up"] * 16, "down": pupil["down"] / 16}
    trained, scaled = (train(weights, forward, wanted, 4) for weights in (pupil, other))
    torch.testing.assert_close(scaled["up"] / 16, trained["up"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scaled["down"] * 16, trained["down"], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(trained["up"], pupil["up"], rtol=0, atol=0.01)
