"""Jobs in threads: their order, their failures, and the end before the end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest

from trivisor.machine.jobs import Jobs


def failing(text: str) -> Callable[[], int]:
    def fail() -> int:
        raise ValueError(text)

    return fail


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_the_order_of_the_jobs(threads: int) -> None:
    later = threading.Event()

    def first() -> int:
        assert threads == 1 or later.wait(10)
        return 0

    def last() -> int:
        later.set()
        return 9

    others = [partial(int, number) for number in range(1, 9)]
    assert Jobs([first, *others, last], threads).results() == list(range(10))


def test_there_may_be_nothing_to_do() -> None:
    assert Jobs([], 2).results() == []


@pytest.mark.parametrize("threads", [1, 2])
def test_the_first_failure_is_raised_and_ends_the_rest(threads: int) -> None:
    begun: list[int] = []
    work = [partial(begun.append, 1), failing("one"), failing("other"), partial(begun.append, 2)]
    with pytest.raises(ValueError, match="one"):
        Jobs(work, threads).results()
    assert begun == [1] or threads > 1


def test_both_run_at_once() -> None:
    meeting = threading.Barrier(2, timeout=10)
    Jobs([meeting.wait, meeting.wait], 2).results()


def test_what_is_cancelled_has_ended() -> None:
    begun, go_on = threading.Event(), threading.Event()
    done: list[int] = []

    def first() -> None:
        begun.set()
        go_on.wait(10)
        done.append(1)

    jobs = Jobs([first, partial(done.append, 2)])
    assert begun.wait(10)
    threading.Timer(0.05, go_on.set).start()
    assert jobs.cancel() == [None]
    assert done == [1]
    assert jobs.cancel() == [None]
