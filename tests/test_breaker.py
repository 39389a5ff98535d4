"""A circuit breaker and a token bucket, on a clock of the test's own."""

from clocks import Clock

from comoe.net.breaker import COOL_S, FAILURES, LONGEST_S, Breaker, Throttle


def broken(clock: Clock) -> Breaker:
    breaker = Breaker(clock)
    for _ in range(FAILURES):
        assert breaker.admits()
        breaker.failed()
    return breaker


def test_a_few_failures_in_a_row_open_it_and_then_one_may_try() -> None:
    clock = Clock()
    breaker = broken(clock)
    assert breaker.open and not breaker.admits()
    clock.now_s += COOL_S
    assert breaker.admits() and not breaker.admits()
    breaker.succeeded()
    assert not breaker.open and breaker.admits() and breaker.admits()


def test_it_stays_open_longer_after_each_trial_that_fails() -> None:
    clock = Clock()
    breaker = broken(clock)
    waits = []
    for _ in range(8):
        start_s = clock.now_s
        while not breaker.admits():
            clock.now_s += 0.5
        waits.append(clock.now_s - start_s)
        breaker.failed()
    assert waits == sorted(waits) and waits[0] == COOL_S and waits[-1] == LONGEST_S


def test_a_success_between_failures_starts_the_count_again() -> None:
    breaker = Breaker(Clock())
    for _ in range(3 * FAILURES):
        breaker.failed()
        breaker.succeeded()
    assert breaker.admits()


def test_a_bucket_lets_through_its_rate_on_average_and_a_little_at_once() -> None:
    clock = Clock()
    throttle = Throttle(1000.0, clock, clock.sleep)
    for _ in range(50):
        throttle.take(100)
    assert 4.8 <= clock.now_s <= 5.0
    clock.now_s += 100
    before_s = clock.now_s
    throttle.take(100)
    assert clock.now_s == before_s
