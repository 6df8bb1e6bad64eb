"""Guest time's timers, against a host clock that the test moves."""

from trivisor.machine.clock import Clock


class Host:
    """A host clock, in nanoseconds."""

    def __init__(self) -> None:
        self.time = 1000

    def __call__(self) -> int:
        return self.time


def test_timers_fire_in_order_of_deadline_and_once() -> None:
    host = Host()
    clock = Clock(host)
    fired: list[int] = []
    for deadline in (30, 10, 20, 10):
        clock.at(deadline, lambda deadline=deadline: fired.append(deadline))  # type: ignore[misc]
    host.time += 20
    clock.run_due()
    assert fired == [10, 10, 20]
    assert clock.next_deadline() == 30
    host.time += 20
    clock.run_due()
    clock.run_due()
    assert fired == [10, 10, 20, 30]
    assert clock.next_deadline() is None


def test_a_cancelled_timer_never_fires() -> None:
    host = Host()
    clock = Clock(host)
    fired: list[str] = []
    first = clock.at(10, lambda: fired.append("first"))
    clock.at(20, lambda: fired.append("second"))
    first.cancel()
    first.cancel()
    assert clock.next_deadline() == 20
    host.time += 50
    clock.run_due()
    assert fired == ["second"]


def test_a_timer_that_fired_may_be_cancelled() -> None:
    host = Host()
    clock = Clock(host)
    timer = clock.at(0, lambda: None)
    clock.run_due()
    timer.cancel()
    assert clock.next_deadline() is None


def test_timers_set_and_cancelled_forever_take_no_memory() -> None:
    clock = Clock(Host())
    kept = [clock.at(5_000 + index, lambda: None) for index in range(100)]
    for index in range(10_000):
        clock.at(1_000_000 + index, lambda: None).cancel()
    assert len(clock._queue) <= 2 * len(kept) + 64
    assert clock.next_deadline() == 5_000
    for timer in kept:
        timer.cancel()
    assert clock.next_deadline() is None
    assert len(clock._queue) <= 64


def test_an_earlier_deadline_is_told() -> None:
    clock = Clock(Host())
    told: list[int] = []
    clock.on_earlier = told.append
    for deadline in (50, 60, 40):
        clock.at(deadline, lambda: None)
    assert told == [50, 40]


def test_what_is_posted_is_called_by_run_due_in_order() -> None:
    clock = Clock(Host())
    told: list[str] = []
    clock.on_posted = lambda: told.append("posted")
    clock.post(lambda: told.append("first"))
    clock.post(lambda: clock.post(lambda: told.append("third")))
    assert told == ["posted", "posted"]
    clock.run_due()
    assert told == ["posted", "posted", "first", "posted", "third"]
    clock.run_due()
    assert len(told) == 5


def test_a_timer_that_is_kept_elsewhere_is_set_before_anybody_looks() -> None:
    host = Host()
    clock = Clock(host)
    told: list[int] = []
    fired: list[int] = []
    waits = [30, 10]
    clock.on_earlier = told.append

    def set_now() -> None:
        while waits:
            clock.at(waits.pop(), lambda: fired.append(1), quietly=True)

    clock.on_look = set_now
    assert clock.next_deadline() == 10
    waits.append(5)
    host.time += 10
    clock.run_due()
    assert len(fired) == 2 and clock.next_deadline() == 30
    assert not told
