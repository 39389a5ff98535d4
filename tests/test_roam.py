"""Drives past edge nodes in virtual time: who serves, what tokens take, what announcements bring, faults."""

import numpy as np
import pytest

from comoe.net.handover import Rule
from comoe.sim.mobility import Stay
from comoe.sim.roam import (
    Costs,
    Fault,
    Policy,
    Roamed,
    Roamer,
    RoundTrip,
    Token,
    after,
    handovers,
    recovery_s,
    returns,
)
from comoe.sim.traces import LinkRate
from comoe.types import BlobId

COSTS = Costs(0.02, 0.1, 0.08, RoundTrip(0.03, 0.04), RoundTrip(0.1, 0.12))
MISSES = [[[BlobId(0, "exact", at % 8)], [BlobId(1, "exact", at % 8)]] for at in range(8)]
STAYS = [Stay("a", 0, 60), Stay("b", 60, 120)]
RADIO = LinkRate.steady(1e6, 120.0)


def roamed(policy: Policy, fault: Fault | None = None, rate: LinkRate = RADIO, **more: object) -> Roamed:
    return Roamer(STAYS, rate, MISSES, COSTS, policy, fault, **more).run()  # type: ignore[arg-type]


def test_a_token_takes_a_round_trip_for_each_layer_once_the_node_is_warm() -> None:
    found = roamed(Policy(rule=None))
    took_s = np.array([token.took_s for token in found.tokens])
    assert took_s[:8] == pytest.approx(0.02 + 2 * (0.03 + 0.08), rel=0.3)
    near = np.array([token.took_s for token in found.tokens if 10 < token.at_s < 55])
    far = np.array([token.took_s for token in found.tokens if token.at_s > 65])
    assert np.median(near) == pytest.approx(0.02 + 2 * 0.03, rel=0.1)
    assert np.median(far) == pytest.approx(0.02 + 2 * 0.1, rel=0.1)
    assert not handovers(found) and found.far_s == pytest.approx(60, abs=1)


def test_a_drive_is_handed_over_once_and_soon() -> None:
    found = roamed(Policy())
    assert len(handovers(found)) == 1 and 60 + Rule().trigger_s <= handovers(found)[0] < 65
    assert found.counts["handover"] == 1 and found.counts["lost"] == found.counts["stalled"] == 0
    assert returns(found) == 0 and found.far_s < 5
    at_once = roamed(Policy(at_once=True))
    assert handovers(at_once)[0] < 60.6


def test_announcements_warm_the_next_node() -> None:
    cold, told = roamed(Policy()), roamed(Policy(hot=16))
    assert told.announced == 16 and cold.announced == 0
    waited = [recovery_s(found.tokens, handovers(found)[0]) for found in (cold, told)]
    assert waited[0] is not None and waited[1] is not None and waited[1] < waited[0]
    took = [max(after(found, handovers(found), 5.0)) for found in (cold, told)]
    assert took[1] <= took[0]


def test_the_node_before_answers_what_the_next_one_has_not_yet() -> None:
    alone, both = roamed(Policy(rule=Rule(trigger_s=1.0))), roamed(Policy(both=True))
    assert handovers(alone) == handovers(both)
    moved_s = handovers(both)[0]
    assert recovery_s(both.tokens, moved_s) == 0.0 < recovery_s(alone.tokens, moved_s)
    assert max(after(both, [moved_s], 5.0)) < 0.02 + 2 * 0.15
    later = [np.median([token.took_s for token in found.tokens if token.at_s > 90]) for found in (alone, both)]
    assert later[1] == pytest.approx(later[0], rel=0.1)  # the near one alone, once it is warm


def test_a_cut_link_leaves_the_device_to_its_flash_and_comes_back() -> None:
    found = roamed(Policy(), Fault("cut", 20.0, 50.0))
    assert found.counts["lost"] == 1 and found.counts["back"] == 1
    during = [token for token in found.tokens if 22 < token.at_s < 50]
    assert len(during) > 50 and all(token.remote == 0 for token in during)
    assert max(token.took_s for token in found.tokens) < 2.0


@pytest.mark.parametrize(("kind", "event"), [("kill", "lost"), ("stall", "stalled")])
def test_a_node_that_dies_or_stalls_is_left_for_the_other(kind: str, event: str) -> None:
    found = roamed(Policy(), Fault(kind, 20.0, 40.0))
    assert found.counts[event] >= 1
    after_s = [(at_s, node) for at_s, node, _ in found.moves if at_s > 20]
    assert after_s[0][1] == "b" and after_s[0][0] < 23
    assert max(token.took_s for token in found.tokens) < 3.0
    assert sum(20 < token.at_s < 40 for token in found.tokens) > 50


def test_an_outage_of_the_radio_is_a_lost_link_and_no_stalled_node() -> None:
    rate = LinkRate.of(np.array([0.0, 30.0, 36.0]), np.array([1e6, 0.0, 1e6]), 120.0)
    found = roamed(Policy(), rate=rate)
    assert found.counts["lost"] == found.counts["back"] == 1 and found.counts["stalled"] == 0


def test_the_same_seed_is_the_same_drive() -> None:
    assert roamed(Policy(hot=8)).tokens == roamed(Policy(hot=8)).tokens
    assert roamed(Policy(hot=8)).tokens != roamed(Policy(hot=8), seed=1).tokens


def test_recovery_is_counted_from_the_move() -> None:
    def token(at_s: float, warm: int) -> Token:
        return Token(at_s, 0.1, 2, warm)

    before = [token(0.1 * at, 2) for at in range(1, 31)]
    later = [token(3.0 + 0.1 * at, 0 if at <= 10 else 2) for at in range(1, 61)]
    assert recovery_s([*before, *later], 3.0) == pytest.approx(0.8)
    assert recovery_s(before, 3.0) is None
    assert recovery_s([token(0.1 * at, 0) for at in range(1, 61)], 3.0) is None


def test_moves_that_are_undone_are_counted() -> None:
    moves = ((1.0, "a", "attached"), (2.0, "b", "handover"), (5.0, "a", "handover"), (60.0, "b", "handover"))
    found = Roamed((), moves, 0, {}, 0.0)
    assert returns(found) == 1 and handovers(found) == [2.0, 5.0, 60.0]
    assert after(Roamed((Token(1.5, 1, 0, 0), Token(3, 2, 0, 0), Token(20, 3, 0, 0)), moves, 0, {}, 0.0), [2.0], 5) == [
        2
    ]
