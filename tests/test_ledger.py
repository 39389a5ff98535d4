"""The ledger: what was spent adds up, and nothing that it allows breaks the bound."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ladders import ladder, ladders

from comoe.plan.ladder import Ladder, Prices
from comoe.plan.ledger import Ledger
from comoe.plan.likeness import LayerErrors, Likeness

PRICES = Prices(target=(0.0, 0.01), floor=(0.11, 0.33))

uses = st.tuples(st.sampled_from([0, 1]), st.booleans(), st.floats(0, 8))
Use = tuple[int, bool, float]
"""(layer, whether in the floor, gate)"""


def ledger(bound: float = 0.05) -> Ledger:
    return Ledger(PRICES, bound)


def added(found: Ledger, layer: int, floor: bool, gate: float) -> None:
    found.add(layer, "merged" if floor else "exact", gate, floor=floor)


def price(layer: int, floor: bool) -> float:
    return {(0, False): 0.0, (1, False): 0.01, (0, True): 0.11, (1, True): 0.33}[layer, floor]


def test_a_new_ledger_has_spent_nothing() -> None:
    assert (ledger().loss, ledger().shares()) == (0.0, {})


def test_the_loss_is_the_prices_weighted_by_gate() -> None:
    found = ledger()
    for (layer, floor), gate in {(0, True): 0.5, (1, True): 0.25, (1, False): 1.0, (0, False): 3.0}.items():
        added(found, layer, floor, gate)
    assert found.loss == pytest.approx((0.5 * 0.11 + 0.25 * 0.33 + 1.0 * 0.01) / 4.75)


def test_what_is_taken_back_costs_what_it_cost_whatever_prices_are_now() -> None:
    found = ledger()
    found.add(1, "exact", 3.0)
    spent = found.add(1, "exact", 2.0)
    found.prices = Prices(target=(0.5, 0.5), floor=(0.9, 0.9))
    found.take_back("exact", 2.0, spent)
    assert (found.answer.total, found.answer.spent) == (3.0, pytest.approx(0.03))
    assert found.gates == {"exact": 3.0}


@given(st.lists(uses, max_size=20))
def test_spent_and_total_are_the_sums_of_what_was_added(several: list[Use]) -> None:
    found = ledger()
    for use in several:
        added(found, *use)
    assert found.answer.total == pytest.approx(sum(gate for *_, gate in several))
    assert found.answer.spent == pytest.approx(sum(gate * price(at, floor) for at, floor, gate in several))
    by_form = {
        "merged" if coarse else "exact": sum(gate for _, floor, gate in several if floor == coarse)
        for _, coarse, _ in several
    }
    assert found.gates == pytest.approx(by_form)


@given(st.lists(uses, min_size=1, max_size=20))
def test_shares_are_of_all_gates_and_sum_to_one(several: list[Use]) -> None:
    found = ledger()
    for use in several:
        added(found, *use)
    assert sum(found.shares().values()) == pytest.approx(1.0 if found.answer.total else 0.0)


def test_a_use_is_counted_by_its_form_and_priced_by_what_it_took() -> None:
    """A step of the chain is certified as a whole, whichever of its experts is used."""
    found = ledger()
    found.add(0, "residual", 1.0, floor=True)
    found.add(1, "q4", 3.0, floor=True)
    assert found.shares() == {"residual": 0.25, "q4": 0.75}
    assert found.loss == pytest.approx((0.11 + 3 * 0.33) / 4)


def test_uses_whose_gates_are_zero_have_no_share() -> None:
    found = ledger()
    added(found, 0, True, 0.0)
    assert (found.shares(), found.loss) == ({"merged": 0.0}, 0.0)


@given(st.lists(uses, max_size=30), st.floats(0.01, 0.4))
def test_what_it_allows_never_breaks_the_bound(asked: list[Use], bound: float) -> None:
    """As the miss rule does: the wanted form where the floor is not allowed."""
    found = ledger(bound)
    for layer, floor, gate in asked:
        added(found, layer, floor and found.allows_floor(layer, gate), gate)
        assert found.loss <= bound + 1e-9


@given(st.lists(uses, max_size=10), uses)
def test_asking_changes_nothing_and_allows_just_what_keeps_the_bound(before: list[Use], asked: Use) -> None:
    found, after = ledger(0.03), ledger(0.03)
    for use in before:
        added(found, *use)
        added(after, *use)
    layer, _, gate = asked
    allowed = found.allows_floor(layer, gate)
    assert (found.gates, found.answer, found.prompt) == (after.gates, after.answer, after.prompt)
    added(after, layer, True, gate)
    if abs(after.loss - 0.03) > 1e-6:
        assert allowed == (after.loss < 0.03)


def test_a_bound_of_zero_allows_nothing_that_costs() -> None:
    assert not ledger(0.0).allows_floor(0, 1e-6)
    assert Ledger(Prices((0.0,), (0.0,)), 0.0).allows_floor(0, 1.0)


def test_uses_of_the_target_earn_room_for_those_of_the_floor() -> None:
    found = ledger(0.055)
    assert not found.allows_floor(0, 1.0)
    added(found, 0, False, 1.0)
    assert found.allows_floor(0, 0.99) and not found.allows_floor(0, 1.01)


def test_a_coarse_use_is_dearer_where_it_hurts_more() -> None:
    found = ledger(0.2)
    assert found.allows_floor(0, 1.0) and not found.allows_floor(1, 1.0)


def test_clearing_starts_a_request_from_nothing() -> None:
    found = ledger()
    added(found, 1, True, 5.0)
    found.clear()
    assert found == ledger()


def test_an_exact_prompt_earns_no_credit_for_the_answer() -> None:
    found = ledger(0.03)
    found.add(0, "exact", 1000.0, decode=False)
    assert not found.allows_floor(0, 1.0)
    assert found.loss == 0
    added(found, 0, True, 1.0)
    assert found.loss == pytest.approx(0.11)
    assert found.shares() == {"exact": pytest.approx(1000 / 1001), "merged": pytest.approx(1 / 1001)}


def test_a_prompt_in_a_coarse_form_is_accounted_until_there_is_an_answer() -> None:
    found = ledger()
    found.add(1, "q4", 2.0, decode=False)
    assert found.loss == pytest.approx(0.01)
    found.clear()
    assert (found.loss, found.shares()) == (0.0, {})


FORMS = ladder(
    {"merged": 4096, "high": 4096, "low": 4096, "exact": 8192},
    {"merged": 0.2, "q4": 0.04},  # certified upper ends: 0.22 and 0.044; q8 has no certificate
    [[1.0] * 4] * 2,
    errors={"merged": (0.1, 0.3), "q4": (0.01, 0.01)},
)


def test_prices_are_the_certified_losses_split_over_layers_by_their_errors() -> None:
    assert FORMS.prices("q4", "merged").target == pytest.approx((0.044, 0.044))
    assert FORMS.prices("q4", "merged").floor == pytest.approx((0.11, 0.33))
    assert FORMS.prices("exact") == ((0.0, 0.0), (0.0, 0.0))


def test_a_form_without_certificate_has_no_price() -> None:
    assert FORMS.prices("q8").target == (0.0, 0.0)


def test_a_form_that_the_pack_has_not_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        FORMS.prices("q2")


HALF_EXACT = ladder(
    {"high": 4096, "exact": 8192},
    {"half": 0.04},
    [[3.0, 1.0, 0.5, 0.5], [1.0] * 4],
    steps={"half": (["exact"] * 2 + ["q4"] * 2) * 2},
)


def test_where_all_coarse_uses_of_a_mixed_floor_take_it_the_loss_is_its_price() -> None:
    """Experts that the floor has exact are hits in the exact target: the answer is the floor's, use by use."""
    found = Ledger(HALF_EXACT.prices("exact", "half"), 0.05)
    for layer, exact, coarse in ((0, 4.0, 1.0), (1, 2.0, 2.0)):
        found.add(layer, "exact", exact)
        found.add(layer, "q4", coarse, floor=True)
    assert found.loss == pytest.approx(0.044)


@given(ladders())
def test_where_every_layer_streams_and_all_of_it_takes_the_floor_the_loss_is_the_floors(found: Ladder) -> None:
    """On text like that it was certified on. Or more, where in one of the layers the floor is the better of the two."""
    for at, target in enumerate(found.certified):
        for floor in found.certified[:at]:
            ends = np.cumsum([len(use) for use in found.use])[:-1]
            partial = np.split(target.groups_beside(floor) > 0, ends)
            streamed = [float(use[flags].sum()) for use, flags in zip(found.calibrated, partial, strict=True)]
            if not all(streamed):
                continue
            spent = Ledger(found.prices(target.name, floor.name), 0.0)
            for layer, (use, moved) in enumerate(zip(found.calibrated, streamed, strict=True)):
                share = moved / float(use.sum())
                spent.add(layer, "fine", 1.0 - share)
                spent.add(layer, "coarse", share, floor=True)
            assert spent.loss >= floor.price - 1e-9
            if len(found.use) == 1 and floor.price >= target.price:
                assert spent.loss == pytest.approx(floor.price)


def test_gates_and_not_uses_say_what_a_mixed_floors_coarse_uses_bear() -> None:
    """A chain keeps experts of heavy gates fine: the others have half of the uses here, and a quarter of the gates."""
    found = ladder(
        {"high": 4096, "exact": 8192},
        {"half": 0.04},
        [[1.0] * 4],
        steps={"half": ["exact"] * 2 + ["q4"] * 2},
        mass=[[3.0, 3.0, 1.0, 1.0]],
    )
    spent = Ledger(found.prices("exact", "half"), 0.05)
    spent.add(0, "exact", 6.0)
    spent.add(0, "q4", 2.0, floor=True)
    assert spent.loss == pytest.approx(0.044)


def test_experts_that_the_certified_text_never_used_are_dear_and_not_free() -> None:
    never = ladder(
        {"high": 4096, "exact": 8192},
        {"half": 0.04},
        [[0.1, 0.1, 1.0, 1.0]],
        steps={"half": ["exact"] * 2 + ["q4"] * 2},
        calibrated=[[1.0, 1.0, 0.0, 0.0]],
    )
    assert not Ledger(never.prices("exact", "half"), 0.04).allows_floor(0, 1e-3)
    assert never.exposure(never.exact, never.rung("half")) > 100


def unlike() -> Likeness:
    """Of a request whose text has 4 times the error of the calibration, and more uses than any prior counts for."""
    found = Likeness([LayerErrors((1.0, 4.0), 1.0)] * 2)
    found.add(0, 1, 1e6, 10**6)
    return found


def test_all_that_a_request_spent_costs_more_where_its_text_is_unlike_the_calibration() -> None:
    found = Ledger(PRICES, 0.05, likeness=unlike())
    added(found, 1, False, 1.0)
    assert found.loss == pytest.approx(16 * 0.01, rel=1e-3)


def test_text_unlike_the_calibration_waits_sooner() -> None:
    careful, careless = Ledger(PRICES, 0.05, likeness=unlike()), ledger(0.05)
    for found in (careful, careless):
        added(found, 0, False, 10.0)
    assert careless.allows_floor(0, 1.0) and not careful.allows_floor(0, 1.0)
    assert careful.allows_floor(0, 0.25)


def test_a_bias_moves_less_where_text_is_unlike_the_calibration() -> None:
    careful, careless = Ledger(PRICES, 0.05, 0.4, unlike()), Ledger(PRICES, 0.05, 0.4)
    assert careless.move(0, 1.0, 0.1) and not careful.move(0, 1.0, 0.1)


def test_the_next_request_is_charged_for_its_own_text() -> None:
    found = Ledger(PRICES, 0.05, likeness=unlike())
    found.clear()
    added(found, 1, False, 1.0)
    assert found.loss == pytest.approx(0.01)
