"""Who serves: one node or none, moves that pay and last, links that are lost, stalled and back."""

from itertools import pairwise
from math import inf

from hypothesis import given, settings
from hypothesis import strategies as st

from comoe.net.handover import LOGGED, Event, Handover, NextNode, Rule, Sight

RULE = Rule()
STEP_S = 0.1
GONE = Sight(inf, inf)


def there(expected_s: float, waiting_s: float = 0.0) -> Sight:
    return Sight(expected_s, 0.0, waiting_s)


def run(machine: Handover, sights: dict[str, Sight], seconds: float, start_s: float) -> list[Event]:
    events = []
    for at in range(round(seconds / STEP_S)):
        events += machine.tick(sights, start_s + STEP_S * at)
    return events


def kinds(events: list[Event]) -> list[str]:
    return [event.kind for event in events]


def attached(**more: Sight) -> Handover:
    machine = Handover()
    machine.tick({"a": there(1.0), **more}, 0.0)
    assert machine.serving == "a"
    return machine


def test_the_best_node_serves_at_once_at_the_beginning() -> None:
    machine = Handover()
    events = machine.tick({"a": there(2.0), "b": there(1.0), "c": GONE}, 5.0)
    assert events == [Event("attached", 5.0, "b")] and machine.serving == "b"


def test_a_better_node_must_be_better_by_a_margin() -> None:
    machine = attached()
    assert run(machine, {"a": there(1.0), "b": there(0.71)}, 10, 0.1) == []
    assert machine.serving == "a"


def test_a_better_node_serves_after_the_time_to_trigger() -> None:
    machine = attached()
    events = run(machine, {"a": there(1.0), "b": there(0.5)}, 2, 10.0)
    assert kinds(events) == ["announced", "handover"]
    assert events[1].before == "a" and events[1].node == machine.serving == "b"
    assert RULE.trigger_s <= events[1].at_s - 10.0 <= RULE.trigger_s + 2 * STEP_S


def test_a_node_that_is_better_for_a_moment_does_not_serve() -> None:
    machine = attached()
    for at in range(20):
        run(machine, {"a": there(1.0), "b": there(0.5)}, 0.8, 2.0 * at + 1)
        run(machine, {"a": there(1.0), "b": there(0.9)}, 0.2, 2.0 * at + 1.8)
    assert machine.serving == "a" and machine.counts["handover"] == 0


def test_who_may_serve_next_is_told_once_each_of_what_is_seen_and_of_what_history_says() -> None:
    machine = Handover(history=NextNode.from_history(["a", "c", "a", "c", "a", "b"]))
    machine.tick({"a": there(1.0)}, 0.0)
    better = {"a": there(1.0), "b": there(0.5), "c": there(1.0)}
    events = run(machine, better, 0.5, 1.0) + run(machine, {"a": there(1.0)}, 0.2, 1.5)
    assert [event.node for event in events] == ["b", "c"]
    assert run(machine, better, 0.5, 1.7) == []


def test_a_silent_link_is_lost_and_the_other_node_serves_in_the_same_moment() -> None:
    machine = attached()
    events = machine.tick({"a": Sight(1.0, RULE.lost_s + 0.1), "b": there(9.0)}, 3.0)
    assert kinds(events) == ["lost", "handover", "announced"] and machine.serving == "b"
    assert events[1].before == "a"


def test_without_any_other_there_is_no_link_until_one_has_been_back_a_while() -> None:
    machine = attached()
    assert kinds(machine.tick({"a": GONE}, 1.0)) == ["lost"] and machine.serving is None
    assert run(machine, {"a": GONE}, 30, 1.1) == []
    events = run(machine, {"a": there(1.0)}, 2, 31.1)
    assert kinds(events) == ["back"] and machine.serving == "a"
    assert RULE.back_s <= events[0].at_s - 31.1 <= RULE.back_s + 2 * STEP_S


def test_a_link_that_flickers_is_not_back() -> None:
    machine = attached()
    machine.tick({"a": GONE}, 1.0)
    for at in range(10):
        assert run(machine, {"a": there(1.0)}, 0.4, 2.0 + at) == []
        assert run(machine, {"a": GONE}, 0.6, 2.4 + at) == []
    assert machine.serving is None


def test_a_node_that_is_not_seen_at_all_is_lost() -> None:
    machine = attached()
    assert kinds(machine.tick({}, 1.0)) == ["lost"]


def test_a_stalled_node_is_left_and_avoided_longer_each_time() -> None:
    machine = attached()
    stalled = {"a": there(1.0, RULE.stalled_s + 0.1), "b": there(5.0)}
    assert kinds(machine.tick(stalled, 1.05)) == ["stalled", "handover", "announced"] and machine.serving == "b"
    alluring = {"a": there(0.1), "b": there(5.0)}
    assert run(machine, alluring, RULE.barred_s - 0.2, 1.1) == []
    assert kinds(run(machine, alluring, 2, 6.1)) == ["announced", "handover"]
    machine.tick(stalled, 10.0)
    assert run(machine, alluring, 2 * RULE.barred_s - 0.2, 10.1) == []
    run(machine, alluring, 10, 13.0)
    assert machine.serving == "a"
    later_s = 10.0 + 2 * RULE.barred_s + RULE.most_barred_s + 1.0
    machine.tick(stalled, later_s)
    run(machine, alluring, RULE.barred_s + RULE.trigger_s + 0.5, later_s + 0.1)
    assert machine.serving == "a"  # it was long ago


def test_a_stalled_node_without_another_leaves_no_link_until_it_may_be_tried_again() -> None:
    machine = attached()
    assert kinds(machine.tick({"a": there(1.0, 9.0)}, 1.05)) == ["stalled"] and machine.serving is None
    events = run(machine, {"a": there(1.0)}, 10, 1.1)
    assert kinds(events) == ["back"] and events[0].at_s >= 1.0 + RULE.barred_s


def test_a_request_that_waited_for_a_silent_link_is_given_the_time_to_go_on() -> None:
    """The link was gone for less than it takes to be lost, and probes came back before the bytes did."""
    machine = attached()
    machine.tick({"a": Sight(1.0, 0.9, 0.9)}, 2.0)
    assert machine.tick({"a": there(1.0, 1.2)}, 2.3) == []
    assert kinds(machine.tick({"a": there(1.0, 2.3)}, 3.3)) == ["stalled"]


def test_a_node_whose_request_hangs_is_stalled_and_not_merely_slow() -> None:
    machine, events = attached(), list[Event]()
    for at in range(1, 20):
        now_s = 0.1 * at
        if machine.serving == "a":
            events += machine.tick({"a": there(inf, now_s), "b": there(0.1)}, now_s)
    assert [kind for kind in kinds(events) if kind != "announced"] == ["stalled", "handover"]


def test_the_next_node_is_who_most_often_came_next() -> None:
    history = NextNode.from_history(["a", "b", "b", "a", "c", "a", "b"])
    assert history.guess("a") == "b" and history.guess("b") == "a" and history.guess("d") is None
    assert NextNode.from_history([]).guess("a") is None


def test_a_machine_learns_from_its_own_moves() -> None:
    machine = attached()
    machine.tick({"a": GONE, "b": there(1.0)}, 1.0)
    assert machine.history.guess("a") == "b"


def test_events_are_counted_and_the_log_is_bounded() -> None:
    machine = attached()
    for at in range(LOGGED):
        machine.tick({"a": GONE}, 10.0 * at + 1)
        run(machine, {"a": there(1.0)}, 1.0, 10.0 * at + 2)
    assert machine.counts["lost"] == machine.counts["back"] == LOGGED
    assert machine.counts["attached"] == 1 and len(machine.log) == LOGGED


sights = st.one_of(
    st.just(GONE),
    st.builds(Sight, st.floats(0.01, 10), st.sampled_from([0.0, 0.5, 1.5]), st.sampled_from([0.0, 0.0, 1.0, 3.0])),
)
worlds = st.lists(
    st.tuples(st.dictionaries(st.sampled_from("abc"), sights), st.floats(0.01, 1.5)), min_size=1, max_size=60
)


@given(worlds)
@settings(max_examples=300)
def test_whatever_happens_one_node_serves_or_none_and_moves_tell_of_it(
    world: list[tuple[dict[str, Sight], float]],
) -> None:
    """Events lead from each serving node to the next; none is left for a node that is not there."""
    machine, now_s, serving = Handover(), 0.0, None
    for seen, seconds in world:
        now_s += seconds
        for event in machine.tick(seen, now_s):
            if event.kind in ("lost", "stalled"):
                assert event.node == serving
                serving = None
            elif event.kind != "announced":
                assert event.before != event.node and (serving is None or event.before == serving)
                assert seen[event.node].silent_s <= RULE.lost_s
                serving = event.node
        assert machine.serving == serving
        if serving is not None:
            assert serving in seen and seen[serving].silent_s <= RULE.lost_s


@given(worlds)
@settings(max_examples=300)
def test_nobody_is_moved_twice_within_the_time_to_trigger_but_for_a_broken_link(
    world: list[tuple[dict[str, Sight], float]],
) -> None:
    machine, now_s = Handover(), 0.0
    for seen, seconds in world:
        now_s += seconds
        machine.tick(seen, now_s)
    moves = [event for event in machine.log if event.kind != "announced"]
    for one, other in pairwise(moves):
        if other.kind == "handover" and one.kind not in ("lost", "stalled"):
            assert other.at_s - one.at_s >= RULE.trigger_s - 1e-9


@given(st.lists(st.floats(0.05, 0.5), min_size=40, max_size=40))
def test_a_cut_link_leads_to_no_link_within_a_bound_and_back(steps: list[float]) -> None:
    """The node was last heard of at 0; looks are half a second apart at most."""
    machine = attached()
    now_s, lost_s = 0.0, None
    for seconds in steps:
        now_s += seconds
        machine.tick({"a": Sight(1.0, now_s)}, now_s)
        if lost_s is None and machine.serving is None:
            lost_s = now_s
    assert lost_s is not None and lost_s <= RULE.lost_s + 0.5
    back_s = now_s
    while machine.serving is None:
        now_s += 0.5
        machine.tick({"a": there(1.0)}, now_s)
        assert now_s - back_s <= RULE.back_s + 1.0
