"""Plans that nothing measured has a part in."""

import pytest
from packs import write_pack

from comoe.plan.ladder import Ladder, ladder_of
from comoe.plan.pairs import MIN_GROUPS
from comoe.plan.pin import Pin, deterministic, pinned, smallest
from comoe.store.manifest import read_manifest
from comoe.types import DoesNotFit


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Ladder:
    folder = tmp_path_factory.mktemp("pinned") / "pack"
    write_pack(folder, None)
    return ladder_of(read_manifest(folder))


def test_outputs_that_depend_on_no_device_take_the_smallest_rung_within_the_bound(ladder: Ladder) -> None:
    bounds = sorted({rung.price for rung in ladder.certified})
    assert len(bounds) > 2
    for bound in bounds:
        pin = deterministic(ladder, bound)
        assert pin.floor is None
        assert ladder.rung(pin.target).price <= bound
        assert all(rung.nbytes >= ladder.rung(pin.target).nbytes for rung in ladder.certified if rung.price <= bound)
    assert deterministic(ladder, 0.0) == Pin(None, "exact")


@pytest.mark.parametrize("floor", [None, "20%"])
def test_a_pinned_plan_fits_from_its_smallest_budget_on(ladder: Ladder, floor: str | None) -> None:
    pin = Pin(floor, "exact", 0.25)
    least = smallest(ladder, pin)
    plan = pinned(ladder, pin, least)
    assert (plan.floor, plan.target, plan.wait_threshold, plan.total_bytes) == (floor, "exact", 0.25, least)
    with pytest.raises(DoesNotFit) as error:
        pinned(ladder, pin, least - 1)
    assert error.value.smallest == least
    below = ladder.rung(floor) if floor else None
    assert plan.refinement_bytes == MIN_GROUPS * ladder.exact.group_beside(below)


def test_a_pinned_plan_takes_no_more_than_it_can_use(ladder: Ladder) -> None:
    assert pinned(ladder, Pin(None, "exact"), 1 << 40).total_bytes == ladder.exact.nbytes
