"""Plans: never over the budget or the bound, as fast as any pair of rungs could be, really the smallest."""

import json
from collections.abc import Iterator
from math import inf
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ladders import bounds, costs, ladder, ladders

from comoe.defaults import POLICY
from comoe.memory.cache import BlobCache
from comoe.plan.cost import Costs
from comoe.plan.curve import hit_rate
from comoe.plan.ladder import Band, Ladder, Rung
from comoe.plan.planner import BACKGROUND_SHARE, TIE, Plan, Planner, frontier, mixed_loss, uniform
from comoe.types import DoesNotFit

MIB = 1 << 20
EXACTLY = 1e-5
"""Up to what tables leave out between two entries."""

COSTS = Costs(read_bps=1e9, read_latency_s=1e-4, memory_bps=1e10, framework_ms=Band(5.0, 8.0))
USE = [[0.5, 0.5, 0.25, 0.25, 0.25, 0.25], [1 / 3] * 6]
LADDER = ladder(
    {"merged": MIB // 4, "high": MIB // 4, "low": MIB // 4, "exact": MIB},
    {"merged": 0.15, "q4": 0.04, "q8": 0.003},
    USE,
    clusters=4,
)
WHOLE = 12 * MIB

planners = st.builds(Planner, ladders(), costs)
shares = st.floats(0, 1.2)


def budget_of(planner: Planner, share: float) -> int:
    """A share of what the largest rung takes."""
    return int(share * max(rung.nbytes for rung in planner.ladder.rungs))


def plan_of(planner: Planner, budget: int, bound: float) -> Plan | None:
    try:
        return planner.best(budget, bound)
    except DoesNotFit:
        return None


def pairs(found: Ladder, bound: float) -> Iterator[tuple[Rung | None, Rung]]:
    """Every pair that keeps the bound if the floor is used little enough, whatever it costs."""
    yield None, found.exact
    for i, target in enumerate(found.rungs):
        if bound > 0 and target.loss is not None and target.price <= bound:
            yield None, target
            yield from ((floor, target) for floor in found.rungs[:i] if floor.loss is not None)


def fastest_ms(planner: Planner, floor: Rung | None, target: Rung, budget: int, bound: float) -> float:
    """Upper end of the time of one pair, written from the definitions; infinite where it does not fit."""
    rates, use = planner.costs, np.concatenate(planner.ladder.use).tolist()
    held = blobs_of(floor) if floor else set()
    streamed = blobs_of(target) - held
    sizes = target.sizes.tolist()
    whole, room = sum(sizes[blob] for blob in streamed), budget - sum(sizes[blob] for blob in held)
    lacking = [sum(sizes[blob] for blob in expert if blob in streamed) for expert in target.needs.tolist()]
    if room < min(whole, 2 * max(lacking)):
        return inf
    partial = [uses for uses, nbytes in zip(use, lacking, strict=True) if nbytes]
    unit = whole / max(len(partial), 1)
    miss = 0.0 if room >= whole else 1 - hit_rate(np.array(partial), room / unit, planner.policy)
    waiting = miss
    if floor is not None:
        # of streamed uses, all of which make the floor's loss on certified text, the share c keeps
        # (1 - c) * target + c * floor <= bound, where c is of as many uses as that text had
        certified = [uses for uses, n in zip(np.concatenate(planner.ladder.calibrated), lacking, strict=True) if n]
        gap = (floor.price - target.price) * (sum(partial) / sum(certified) if certified else 1.0)
        coarse = min(miss, (bound - target.price) / gap if gap > 0 else miss)
        waiting = miss - coarse + BACKGROUND_SHARE * coarse
    read_s = sum(partial) * waiting * (unit / rates.read_bps + rates.read_latency_s)
    each = [sum(sizes[blob] for blob in expert) for expert in target.needs.tolist()]
    compute_s = sum(uses * nbytes for uses, nbytes in zip(use, each, strict=True)) / rates.memory_bps
    return float(rates.framework_ms.high + 1.5e3 * (read_s + compute_s))


def blobs_of(rung: Rung) -> set[int]:
    """Every blob that its experts need."""
    return {blob for expert in rung.needs.tolist() for blob in expert if blob >= 0}


@given(planners, shares, bounds)
@settings(deadline=None)
def test_neither_the_budget_nor_the_bound_is_ever_exceeded(planner: Planner, share: float, bound: float) -> None:
    budget = budget_of(planner, share)
    plan = plan_of(planner, budget, bound)
    assume(plan is not None)
    assert plan is not None
    assert min(plan.floor_bytes, plan.refinement_bytes) >= 0 and plan.total_bytes <= budget
    assert plan.loss.low <= plan.loss.high <= bound + 1e-9


@given(planners, shares, bounds)
@settings(deadline=None, max_examples=200)
def test_no_pair_of_rungs_is_faster_beyond_a_tie_and_some_fit_where_a_plan_is_found(
    planner: Planner, share: float, bound: float
) -> None:
    budget = budget_of(planner, share)
    best = min(fastest_ms(planner, floor, target, budget, bound) for floor, target in pairs(planner.ladder, bound))
    plan = plan_of(planner, budget, bound)
    if plan is None:
        assert best == inf
        return
    assert best * (1 - EXACTLY) <= plan.ms_per_token.high <= best * (1 + TIE) * (1 + EXACTLY)


@given(planners, shares, bounds)
@settings(deadline=None)
def test_of_plans_that_are_equally_fast_the_one_that_loses_least_is_taken(
    planner: Planner, share: float, bound: float
) -> None:
    budget = budget_of(planner, share)
    plan = plan_of(planner, budget, bound)
    assume(plan is not None and bound > 0)
    assert plan is not None
    exact = fastest_ms(planner, None, planner.ladder.exact, budget, bound)
    best = min(fastest_ms(planner, floor, target, budget, bound) for floor, target in pairs(planner.ladder, bound))
    if exact < best * (1 + TIE) * (1 - EXACTLY):
        assert plan.loss.high == 0


@given(planners, bounds)
@settings(deadline=None)
def test_the_smallest_budget_is_really_the_smallest(planner: Planner, bound: float) -> None:
    smallest = planner.smallest(bound)
    assert planner.best(smallest, bound).total_bytes <= smallest
    for budget in (smallest - 1, smallest // 2, 0, -1):
        with pytest.raises(DoesNotFit, match=str(smallest)) as caught:
            planner.best(budget, bound)
        assert caught.value.smallest == smallest


class NoSource:
    """A source of nothing: a cache asks it for nothing before something is served."""

    def nbytes(self, blob: object) -> int:
        raise KeyError(blob)

    def read(self, blob: object, into: memoryview) -> str:
        raise KeyError(blob)


@given(planners, bounds)
@settings(deadline=None)
def test_in_the_smallest_budget_a_cache_can_serve_the_largest_expert(planner: Planner, bound: float) -> None:
    """Also a merged form's, of which an expert's share is smaller than the blob that it needs."""
    plan = planner.best(planner.smallest(bound), bound)
    rung = planner.ladder.rung
    group = rung(plan.target).group_beside(rung(plan.floor) if plan.floor else None)
    BlobCache(NoSource(), plan.refinement_bytes, largest_group=group).close()


@given(planners, shares, shares, bounds)
@settings(deadline=None)
def test_more_memory_is_never_slower_beyond_a_tie(planner: Planner, one: float, other: float, bound: float) -> None:
    less, more = (plan_of(planner, budget_of(planner, share), bound) for share in sorted((one, other)))
    assume(less is not None)
    assert less is not None and more is not None
    assert more.ms_per_token.high <= less.ms_per_token.high * (1 + TIE)


@given(planners, shares, bounds, bounds)
@settings(deadline=None)
def test_a_looser_bound_is_never_slower_beyond_a_tie_and_fits_where_a_tighter_one_does(
    planner: Planner, share: float, one: float, other: float
) -> None:
    budget = budget_of(planner, share)
    tight, loose = (plan_of(planner, budget, bound) for bound in sorted((one, other)))
    assume(tight is not None)
    assert tight is not None and loose is not None
    assert loose.ms_per_token.high <= tight.ms_per_token.high * (1 + TIE)


@given(planners, shares, bounds)
@settings(deadline=None)
def test_a_plan_is_consistent_with_itself(planner: Planner, share: float, bound: float) -> None:
    plan = plan_of(planner, budget_of(planner, share), bound)
    assume(plan is not None)
    assert plan is not None
    rung = planner.ladder.rung
    assert sum(plan.shares.values()) == pytest.approx(1) and min(plan.shares.values()) >= 0
    served = {*rung(plan.target).shares}, {*rung(plan.floor).shares} if plan.floor else set()
    assert served[0] <= plan.shares.keys() <= served[0] | served[1]
    assert plan.floor_bytes == (rung(plan.floor).nbytes if plan.floor else 0)
    assert rung(plan.target).loss is not None and (plan.floor is None or rung(plan.floor).loss is not None)
    assert 0 <= plan.hit_rate <= 1
    assert sum(share for form, share in plan.shares.items() if form not in served[0]) <= 1 - plan.hit_rate + 1e-9
    assert plan.ms_per_token.low <= plan.ms_per_token.high and plan.wait_threshold >= 0


@given(planners, shares)
@settings(deadline=None)
def test_a_bound_of_zero_means_the_exact_form_and_no_other(planner: Planner, share: float) -> None:
    plan = plan_of(planner, budget_of(planner, share), 0.0)
    assume(plan is not None)
    assert plan is not None
    assert (plan.target, plan.floor, plan.loss) == ("exact", None, (0, 0))
    assert plan.shares == pytest.approx({"exact": 1.0})


def test_with_memory_for_everything_nothing_is_waited_for() -> None:
    plan = Planner(LADDER, COSTS).best(WHOLE, 0.0)
    assert (plan.refinement_bytes, plan.hit_rate) == (WHOLE, 1.0)
    compute_ms = 4 * MIB / 1e10 * 1e3  # four uses per token, two layers of top-2
    assert plan.ms_per_token == pytest.approx((5.0 + compute_ms, 8.0 + 1.5 * compute_ms))


def test_bytes_beyond_what_all_experts_take_are_left_alone() -> None:
    assert Planner(LADDER, COSTS).best(50 * WHOLE, 0.0).total_bytes == WHOLE


def test_an_exact_plan_by_hand() -> None:
    """Half of the experts cached under nearly uniform use: a bit more than half of the uses hit."""
    plan = Planner(LADDER, COSTS).best(WHOLE // 2, 0.0)
    miss = 1 - hit_rate(np.concatenate(LADDER.use), 6, POLICY)
    assert plan.hit_rate == pytest.approx(1 - miss) and 0.5 < 1 - miss < 0.6
    ms = 4 * MIB / 1e7 + 4 * miss * (MIB / 1e6 + 0.1)
    assert plan.ms_per_token == pytest.approx((5.0 + ms, 8.0 + 1.5 * ms))
    assert (plan.start_seconds, plan.wait_threshold) == (pytest.approx(1e-4), 0.0)
    assert plan.fetch_bytes == round(4 * miss * MIB)


def test_a_floor_takes_as_many_misses_as_the_bound_leaves_beside_the_target() -> None:
    found = ladder({"high": MIB // 8, "exact": MIB}, {"q4": 0.1}, [[0.5] * 8])
    slow = Costs(read_bps=1e7, read_latency_s=0.0, memory_bps=1e10, framework_ms=Band(0.0, 0.0))
    plan = Planner(found, slow).best(5 * MIB, 0.05)  # the floor takes 1 MiB, four of eight experts are cached
    assert (plan.floor, plan.target, plan.hit_rate) == ("q4", "exact", pytest.approx(4 / 8))
    assert plan.shares["q4"] == pytest.approx(0.05 / 0.11)  # the certified upper end is 0.11
    assert plan.loss.high == pytest.approx(0.05)
    assert plan.start_seconds == pytest.approx(MIB / 1e7)
    waited = 4 * (0.5 - plan.shares["q4"] + BACKGROUND_SHARE * plan.shares["q4"])
    assert plan.ms_per_token.low == pytest.approx(1e3 * (waited * MIB / 1e7 + 4 * MIB / 1e10))


MIDDLE = [(0.1, None), (0.2, None), (0.3, None), (0.4, "q4"), (0.5, "q4"), (0.7, None)]


@pytest.mark.parametrize(("read_bps", "share", "floor"), [(3e8, *row) for row in MIDDLE] + [(1.2e9, 0.5, None)])
def test_a_floor_enters_where_its_bytes_serve_better_than_a_larger_cache(
    read_bps: float, share: float, floor: str | None
) -> None:
    """The invented ladder of docs/decisions/003, under uniform use: q8 is streamed, in the middle above a q4 floor.

    From a fast disk a larger cache serves better everywhere.
    """
    sizes = {"merged": 280_000, "high": 280_000, "low": 250_000, "exact": 1_000_000}
    found = ladder(sizes, {"merged": 0.15, "q4": 0.04, "q8": 0.003}, [[4 / 32] * 32] * 6, clusters=82)
    flash = Costs(read_bps=read_bps, read_latency_s=1e-4, memory_bps=2e10, framework_ms=Band(10.0, 10.0))
    plan = Planner(found, flash).best(int(share * found.exact.nbytes), 0.01)
    assert (plan.target, plan.floor) == ("q8", floor)


def test_a_form_without_certificate_is_never_planned() -> None:
    found = ladder({"high": 4096, "exact": MIB}, {"q4": None}, USE)
    plan = Planner(found, COSTS).best(WHOLE, 1.0)
    assert (plan.floor, plan.target) == (None, "exact")


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_below_the_threshold_lies_the_share_of_gates_that_may_take_the_floor(share: float) -> None:
    """Gates spread evenly over 0 to 1: those below g have g * g of the mass."""
    assert Planner(LADDER, COSTS)._threshold(share) == pytest.approx(share**0.5, abs=0.02)


def test_a_floor_for_every_miss_has_no_threshold() -> None:
    """Fewer uses miss than the bound leaves room for."""
    slow = Costs(read_bps=1e6, read_latency_s=0.0, memory_bps=1e10, framework_ms=Band(0.0, 0.0))
    plan = Planner(ladder({"high": MIB // 16, "exact": MIB}, {"q4": 0.06}, [[0.5] * 9]), slow).best(8 * MIB, 0.05)
    assert (plan.floor, plan.target, plan.wait_threshold) == ("q4", "exact", inf)
    assert plan.shares["q4"] == pytest.approx(1 - plan.hit_rate) and plan.loss.high < 0.05
    assert plan.document()["wait_threshold"] is None


def test_without_a_profile_of_gates_they_are_taken_as_evenly_spread() -> None:
    bare = Ladder(LADDER.rungs, LADDER.use, LADDER.use, LADDER.use, (), 0)
    assert 0 < Planner(bare, COSTS)._threshold(0.5) < 1


def test_a_plans_document_is_json_and_complete() -> None:
    plan = Planner(LADDER, COSTS).best(WHOLE // 2, 0.05)
    document = json.loads(json.dumps(plan.document(), allow_nan=False))
    assert document["total_bytes"] == plan.total_bytes and set(Plan.__slots__) <= document.keys()


@given(planners, shares, bounds)
@settings(deadline=None)
def test_a_frontier_holds_plans_that_fit_and_is_empty_where_none_does(
    planner: Planner, share: float, bound: float
) -> None:
    budget, smallest = budget_of(planner, share), planner.smallest(bound)
    plans = {plan.name: plan for plan in frontier(planner, budget, bound)}
    assert all(plan.total_bytes <= budget and plan.loss.high <= bound + 1e-9 for plan in plans.values())
    assert ("smallest" in plans) == (budget >= smallest) == bool(plans)
    assert ("exact" in plans) == (budget >= planner.smallest(0.0))
    assert ("bounded" in plans) == (bound > 0 and budget >= smallest)
    if plans:
        assert plans["smallest"].total_bytes <= smallest


def test_uniform_keeps_every_expert_of_a_form_resident() -> None:
    plan = uniform(LADDER, "q8")
    assert (plan.target, plan.floor, plan.total_bytes, plan.hit_rate) == ("q8", None, 12 * MIB // 2, 1.0)
    assert (plan.shares, plan.loss) == (pytest.approx({"q8": 1.0}), LADDER.rung("q8").loss_ci95)


HALF_EXACT = ladder(
    {"high": MIB // 8, "exact": MIB}, {"half": 0.04}, [[0.5] * 8], steps={"half": ["exact"] * 4 + ["q4"] * 4}
)
"""Eight experts, of which the floor keeps four exact."""


def test_experts_that_a_mixed_floor_keeps_in_the_targets_form_are_never_streamed() -> None:
    slow = Costs(read_bps=1e7, read_latency_s=0.0, memory_bps=1e10, framework_ms=Band(0.0, 0.0))
    floor_bytes = 4 * MIB + 4 * MIB // 8
    plan = Planner(HALF_EXACT, slow).best(floor_bytes + 2 * MIB, 0.044)
    assert (plan.floor, plan.target, plan.floor_bytes) == ("half", "exact", floor_bytes)
    assert plan.hit_rate == pytest.approx(1 - 4 / 8 * 2 / 4)  # half of the uses are streamed, half of those cached
    assert plan.ms_per_token.low == pytest.approx(1e3 * (4 * 0.25 * BACKGROUND_SHARE * MIB / 1e7 + 4 * MIB / 1e10))


def test_only_uses_that_a_mixed_floor_serves_coarsely_carry_its_loss() -> None:
    """Served without any cache, the floor's four coarse experts are half of all uses, and the whole of its 4.4 %."""
    slow = Costs(read_bps=1e7, read_latency_s=0.0, memory_bps=1e10, framework_ms=Band(0.0, 0.0))
    plan = Planner(HALF_EXACT, slow).best(4 * MIB + 4 * MIB // 8 + 2 * MIB, 0.044)
    assert (plan.floor, plan.hit_rate) == ("half", pytest.approx(0.75))
    assert plan.shares == pytest.approx({"exact": 0.75, "q4": 0.25})
    assert plan.loss.high == pytest.approx(0.044 / 2)


def test_a_session_that_needs_coarse_experts_more_than_the_certified_text_loses_more_by_them() -> None:
    """Three of four of its uses, not two: each costs what it cost when the floor was certified."""
    session = ladder(
        {"high": MIB // 8, "exact": MIB},
        {"half": 0.04},
        [[0.25] * 4 + [0.75] * 4],
        steps={"half": ["exact"] * 4 + ["q4"] * 4},
        calibrated=[[0.5] * 8],
    )
    slow = Costs(read_bps=1e7, read_latency_s=0.0, memory_bps=1e10, framework_ms=Band(0.0, 0.0))
    room = 4 * MIB + 4 * MIB // 8 + 2 * MIB
    planner = Planner(session, slow)
    pairs, (half, exact) = planner.pairs, (0, 1)
    (pair,) = np.flatnonzero((pairs.floor == half) & (pairs.target == exact))
    loose, tight = (planner._plan("", planner.candidates(np.array([pair]), room, bound), 0) for bound in (0.044, 0.022))
    assert loose.hit_rate == pytest.approx(1 - 0.75 / 2)
    assert loose.loss.high == pytest.approx(1.5 * 0.044 / 2)
    assert tight.loss.high == pytest.approx(0.022)
    assert tight.shares["q4"] == pytest.approx(0.022 / (1.5 * 0.044) * 0.75)
    assert session.prices("exact", "half") == HALF_EXACT.prices("exact", "half")


@given(planners, shares, bounds, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_a_planner_for_another_session_plans_as_one_that_is_made_for_it(
    planner: Planner, share: float, bound: float, random: Random
) -> None:
    use = [np.array(random.sample(layer.tolist(), len(layer))) for layer in planner.ladder.use]
    other, budget = planner.using(use), budget_of(planner, share)
    assert other.pairs.streamed is planner.pairs.streamed
    anew = Planner(other.ladder, planner.costs)
    assert plan_of(other, budget, bound) == plan_of(anew, budget, bound)
    plan = plan_of(anew, budget, 0.0)
    if plan is not None and plan.refinement_bytes < planner.ladder.exact.nbytes:
        held = plan.refinement_bytes / planner.ladder.exact.nbytes * len(other.ladder.exact.use)
        assert plan.hit_rate == pytest.approx(hit_rate(np.concatenate(use), held, POLICY), abs=1e-4)


def test_a_cache_that_keeps_the_most_used_is_planned_to() -> None:
    plan = Planner(LADDER, COSTS, "lfu").best(WHOLE // 2, 0.0)
    assert plan.hit_rate == pytest.approx((2 * 0.5 + 4 / 3) / 4)  # two experts of a half, four of a third


def test_the_loss_of_more_coarse_uses_than_were_certified_is_still_a_band() -> None:
    ends = [(np.array([floor]), np.array([target])) for floor, target in ((0.02, 0.0), (0.02, 0.01))]
    assert mixed_loss(*ends, np.array([0.5])) == (pytest.approx([0.01]), pytest.approx([0.015]))
    assert mixed_loss(*ends, np.array([1.5])) == (pytest.approx([0.025]), pytest.approx([0.025]))


def test_with_room_for_what_a_mixed_floor_lacks_nothing_is_waited_for() -> None:
    plan = Planner(HALF_EXACT, COSTS).best(9 * MIB, 0.0)
    assert (plan.floor, plan.total_bytes) == (None, 8 * MIB)
    rung = HALF_EXACT.rung
    assert rung("exact").beside(rung("half")) == 4 * MIB


def test_uniform_keeps_every_blob_of_a_step_resident() -> None:
    plan = uniform(HALF_EXACT, "half")
    assert (plan.target, plan.total_bytes) == ("half", 4 * MIB + 4 * MIB // 8)
    assert plan.shares == pytest.approx({"q4": 0.5, "exact": 0.5})
