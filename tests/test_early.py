"""Plans for packs whose bytes are still to come: a small floor, the finest target that fits beside it, or none."""

from dataclasses import replace
from math import inf

from hypothesis import given
from hypothesis import strategies as st
from ladders import ladder, ladders

from comoe.plan.early import MOST_STEPS, SHARE, early, steps
from comoe.plan.ladder import Ladder
from comoe.plan.pin import Pin, pinned, smallest

BLOBS = {"merged": 4096, "high": 16384, "low": 16384, "exact": 65536}
USE = [[0.5, 0.5], [0.5, 0.5]]


def small() -> Ladder:
    found = ladder(BLOBS, {"merged": 0.1, "q4": 0.01, "q8": 0.001}, USE, clusters=1)
    found = replace(found, expert_bytes_bf16=found.exact.nbytes)
    assert found.rung("merged").nbytes <= SHARE * found.expert_bytes_bf16
    return found


def test_the_first_answer_waits_for_a_small_floor_and_refines_to_what_fits() -> None:
    found = small()
    assert early(found, 1 << 20, 0.2) == Pin("merged", "exact", inf)
    assert early(found, found.rung("merged").nbytes + found.rung("q4").nbytes, 0.2) == Pin("merged", "q4", inf)


def test_where_small_floors_lose_more_than_the_bound_the_smallest_that_does_not_is_waited_for() -> None:
    assert early(small(), 1 << 20, 0.05) == Pin("q4", "exact", inf)
    assert early(small(), 1 << 20, 0.0) is None


def test_an_exact_answer_takes_no_floor_though_one_was_measured_to_lose_nothing() -> None:
    found = ladder(BLOBS, {"merged": -0.01, "q4": 0.0, "q8": 0.0}, USE, clusters=1)
    assert found.rung("merged").price == 0.0
    assert early(found, 1 << 20, 0.0) is None and early(found, 1 << 20, 0.01) is not None


def test_where_no_target_fits_beside_the_floor_there_is_no_such_plan() -> None:
    assert early(small(), 8192, 0.2) is None


@given(ladders(), st.integers(0, 1 << 23), st.sampled_from([0.0, 0.01, 0.05, 0.5]))
def test_it_keeps_the_budget_and_the_bound(found: Ladder, budget: int, bound: float) -> None:
    pin = early(found, budget, bound)
    if pin is not None:
        assert pin.floor is not None
        floor, target = found.rung(pin.floor), found.rung(pin.target)
        smaller = [rung for rung in found.certified if rung.price <= bound and rung.nbytes < floor.nbytes]
        assert floor.nbytes <= SHARE * found.expert_bytes_bf16 or not smaller
        assert target.price <= floor.price <= bound and target.nbytes > floor.nbytes
        assert floor.nbytes + target.beside(floor) <= budget and smallest(found, pin) <= budget


@given(ladders(), st.integers(0, 1 << 23), st.sampled_from([0.01, 0.05, 0.5]))
def test_what_is_read_towards_goes_from_coarse_to_fine_within_bound_and_budget_and_has_the_target(
    found: Ladder, budget: int, max_loss: float
) -> None:
    pin = early(found, budget, max_loss)
    if pin is None or pin.floor is None:
        return
    floor = found.rung(pin.floor)
    rungs = steps(found, pinned(found, pin, budget), budget, max_loss)
    assert pin.target in [rung.name for rung in rungs] and len(rungs) <= MOST_STEPS + 1
    assert [rung.nbytes for rung in rungs] == sorted(rung.nbytes for rung in rungs)
    for rung in rungs:
        assert rung.price <= max_loss and floor.nbytes < rung.nbytes
        assert smallest(found, Pin(floor.name, rung.name)) <= budget
