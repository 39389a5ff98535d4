"""Waiting for a link that is gone, on a clock of the test's own."""

from types import SimpleNamespace

import pytest
from clocks import Clock

from comoe.runtime import outage
from comoe.runtime.outage import Outage
from comoe.types import RemoteUnavailable

GONE = RemoteUnavailable("nothing comes")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    clock.now_s = 100.0
    monkeypatch.setattr(outage, "monotonic", clock)
    monkeypatch.setattr(outage, "sleep", clock.sleep)
    return clock


def test_who_has_no_patience_does_not_wait(clock: Clock) -> None:
    counts = SimpleNamespace(link_wait_s=0.0)
    with pytest.raises(RemoteUnavailable):
        Outage(0.0, counts).wait(GONE, 0)
    assert (clock.now_s, counts.link_wait_s) == (100.0, 0.0)


def test_patience_is_for_pauses_and_for_what_was_tried_between_them_and_all_of_it_is_counted(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    counts = SimpleNamespace(link_wait_s=0.0)
    gone = Outage(60.0, counts)
    with pytest.raises(RemoteUnavailable):
        while True:
            gone.wait(GONE, 7)
            clock.now_s += 19.0
    assert 60 <= clock.now_s - 100 < 60 + 19 + outage.AGAIN_S
    assert counts.link_wait_s == pytest.approx(clock.now_s - 100)
    assert caplog.messages == ["waiting for a link: nothing comes"]


def test_patience_begins_anew_whenever_something_came(clock: Clock) -> None:
    counts = SimpleNamespace(link_wait_s=0.0)
    gone = Outage(60.0, counts)
    for had in range(5):
        gone.wait(GONE, had)
        clock.now_s += 59.0
    with pytest.raises(RemoteUnavailable):
        for _ in range(3):
            gone.wait(GONE, 4)
            clock.now_s += 59.0
