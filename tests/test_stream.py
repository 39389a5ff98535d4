"""Plans for a link: what is foretold, in which order bytes come, and when another plan is followed."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streams import BLOBS, COARSE, EXACT, NONE, USE, N, holding, needs, nothing, streaming

from comoe.plan.ladder import ladder_of
from comoe.plan.stream import HOLD_S, MISSES, LinkFollower, LinkPlan, Pace, forms_of
from comoe.store.manifest import read_manifest

RATES = (1e2, 1e4, 1e5, 1e6, 1e8)


def test_an_expert_is_in_its_best_form_that_is_there() -> None:
    forms = streaming().forms
    assert forms.errors(nothing()).tolist() == [1.0] * N
    some = nothing()
    some[needs("q4")[2]] = some[needs("exact")[3]] = True
    assert forms.errors(some).tolist() == [1, 1, 0.1, 0, 1, 1, 1, 1]
    assert forms.errors_at(some, np.array([3, 2, 0])).tolist() == [0, 0.1, 1]
    assert forms.best_needs(some, 2).tolist() == needs("q4")[2].tolist()
    assert forms.best_needs(some, 0).tolist() == [-1]


def test_losses_lie_between_certified_ones_and_go_on_beyond() -> None:
    forms = streaming().forms
    assert forms.loss(np.array([0.0, 0.05, 0.1, 1.0])) == pytest.approx([0, 0.02, 0.04, 1.0])
    assert forms.loss(np.array([1.9]))[0] == pytest.approx(1.96)


def test_a_token_is_worth_less_the_more_it_loses_and_nothing_beyond_the_bound() -> None:
    pace = Pace(0.02, 0.1, 0.2, 0.02, nats=3.0, max_loss=0.05)
    found = pace.worth(np.array([-0.01, 0.0, 0.05, 0.051]))
    assert found.tolist() == [1.0, 1.0, pytest.approx(np.exp(-0.15)), 0.0]


def test_what_is_used_most_comes_first_and_what_is_there_never() -> None:
    plans, use = streaming(), USE.copy()
    use[5], use[1] = 2.0, 1.0
    some = nothing()
    some[needs("q4")[0]] = True
    order = plans.order("coarse", some, use).tolist()
    assert order[:2] == [5, 1] and sorted(order) == [1, 2, 3, 4, 5, 6, 7]
    use[7] = 0.0
    assert 7 not in plans.order("coarse", some, use)
    assert not plans.complete("coarse", some, use) and plans.complete("coarse", holding("q4"), use)
    assert plans.complete("coarse", holding("exact"), use)


def test_a_floor_comes_before_what_was_missed() -> None:
    plans, missed = streaming(), np.zeros(N, np.bool_)
    missed[4] = True
    plan = LinkPlan("exact", "coarse", "coarse", reads="missed")
    groups = [BLOBS[int(blobs[0])] for blobs in plans.groups(plan, nothing(), USE, missed)]
    assert [blob.part for blob in groups] == ["q4"] * N + ["exact"]
    assert groups[-1] == BLOBS[int(needs("exact")[4][0])]
    assert len(list(plans.groups(LinkPlan("exact", "coarse"), nothing(), USE, missed))) == N
    assert not list(plans.groups(LinkPlan("exact", "coarse", reads="none"), nothing(), USE, missed))


def test_what_is_worth_most_stays_and_what_is_there_unless_another_is_worth_twice_as_much() -> None:
    plans, missed, use = streaming(), np.zeros(N, np.bool_), USE.copy()
    plans.capacity, plan, exact = 3 * EXACT, LinkPlan("exact", "coarse"), needs("exact")
    use[[1, 5, 6]], use[2] = 1.0, 0.4

    def towards(some: np.ndarray, held: np.ndarray) -> tuple[list[int], list[int]]:
        groups, stays = plans.towards(plan, some, use, missed, held)
        return [int(blobs[0]) for blobs in groups], [at for at in range(N) if stays[exact[at][0]]]

    assert towards(nothing(), nothing()) == (exact[[1, 5, 6], 0].tolist(), [1, 5, 6])
    some = nothing()
    some[exact[[1, 2, 5]]] = True
    assert towards(some, nothing()) == (exact[[6], 0].tolist(), [1, 5, 6])  # 2 is used less
    use[2] = 0.6
    assert towards(some, nothing()) == ([], [1, 2, 5])
    held = nothing()
    held[needs("q4")[:1]] = True  # and there is no room for three
    assert towards(some, held) == ([], [1, 5])


def test_nothing_is_worth_less_with_more_bytes() -> None:
    plans = streaming()
    found = plans.foretold(nothing(), USE, np.linspace(0, 2 * N * EXACT, 9), 1e5)
    assert found.shape == (2, len(MISSES), 9)
    assert (np.diff(found[:, : len(MISSES) - 1], axis=2) >= -1e-9).all()


def test_the_exact_form_everywhere_is_worth_the_readers_pace() -> None:
    found = streaming().foretold(holding("exact"), USE, np.zeros(1), 1e5)
    assert found == pytest.approx(10.0)


def test_bytes_beyond_the_capacity_bring_nothing() -> None:
    tight = streaming(capacity=COARSE)
    found = tight.foretold(nothing(), USE, np.array([0.0, COARSE, 1e9]), 1e9)
    assert found[0, 0, 1] == pytest.approx(found[0, 0, 2])


@pytest.mark.parametrize(("rate_bps", "target"), [(3e3, "coarse"), (1e6, "exact")])
def test_a_slow_link_is_for_coarse_forms_and_a_fast_one_for_exact(rate_bps: float, target: str) -> None:
    plan = LinkFollower(streaming()).tick(nothing(), USE, rate_bps, 0.0)
    assert plan is not None and plan.target == target


def test_what_is_not_there_runs_elsewhere_until_it_is() -> None:
    follower = LinkFollower(streaming())
    first = follower.tick(nothing(), USE, 3e3, 0.0)
    assert first is not None and first.miss == "remote"
    then = follower.tick(holding("q4"), USE, 3e3, 5.0)
    assert then is not None and then.miss == "coarse"


def test_a_plan_is_held_unless_the_rate_falls() -> None:
    follower = LinkFollower(streaming())
    follower.tick(nothing(), USE, 1e6, 0.0)
    assert follower.plan is not None and follower.plan.target == "exact"
    fell = follower.tick(nothing(), USE, 3e3, 0.1)
    assert fell is not None and fell.target == "coarse"
    follower.tick(nothing(), USE, 1e6, 0.1 + HOLD_S / 2)
    assert follower.plan.target == "coarse"
    rose = follower.tick(holding("q4"), USE, 1e6, 0.2 + HOLD_S)
    assert rose is not None and rose.target == "exact"


@given(st.lists(st.sampled_from(RATES), min_size=1, max_size=30))
def test_rungs_change_no_oftener_than_they_may(rates: list[float]) -> None:
    """Every half second: a rung for a higher rate is held for a second at least."""
    follower, changed, made_bps, target = LinkFollower(streaming()), 0.0, rates[0], None
    for at, rate_bps in enumerate(rates):
        plan = follower.tick(nothing(), USE, rate_bps, 0.5 * at)
        if plan is not None and plan.target != target:
            assert target is None or 0.5 * at - changed >= HOLD_S or rate_bps < made_bps
            changed, made_bps, target = 0.5 * at, rate_bps, plan.target


@given(st.sampled_from(RATES), st.integers(2, 20))
def test_a_steady_link_has_one_plan(rate_bps: float, times: int) -> None:
    follower = LinkFollower(streaming())
    follower.tick(nothing(), USE, rate_bps, 0.0)
    assert all(follower.tick(nothing(), USE, rate_bps, 0.5 * at) is None for at in range(1, times))


def test_a_packs_forms_have_errors_and_losses(packed: Path) -> None:
    manifest = read_manifest(packed)
    ladder = ladder_of(manifest)
    forms = forms_of(manifest, ladder)
    assert forms.needs.shape[:2] == forms.error.shape == (len(forms.error), ladder.num_experts)
    everything = np.ones(len(forms.sizes), np.bool_)
    assert forms.errors(everything).max() == 0 and forms.loss(np.array(0.0)) == 0
    assert (np.diff(forms.curve, axis=1) >= 0).all()
    assert len(forms.sizes) == sum(part.rows for layer in manifest.layers for part in layer.parts.values()) + 1


def test_none_is_the_last_blob() -> None:
    assert len(nothing()) == NONE + 1 and nothing()[-1]
