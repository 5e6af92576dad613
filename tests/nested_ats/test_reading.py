"""Computations that read: what they are sent, in what order they compute, and what becomes of failures."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest

from nested_ats.reading import interleave, run


def total(*rounds):
    """Sum what all reads of all rounds return."""
    result = 0
    for reads in rounds:
        result += sum((yield reads))
    return result


def number(value):
    return lambda: value


def fail(error):
    raise error


@pytest.fixture
def readers():
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_reads_are_sent_in_their_order(readers):
    def computation():
        first = yield [number(1), number(2), number(3)]
        second = yield []
        third = yield [partial(sum, first)]
        return first, second, third

    for chosen in (None, readers):
        assert run(computation(), chosen) == ([1, 2, 3], [], [6])


def test_a_computation_that_reads_nothing_has_a_result_too():
    def computation():
        return 5
        yield

    assert list(interleave([computation(), computation()])) == [5, 5]


def test_a_failure_is_thrown_in_and_may_be_handled(readers):
    def computation():
        try:
            yield [number(1), partial(fail, OSError("disk"))]
        except OSError as error:
            return (yield [number(str(error))])

    for chosen in (None, readers):
        assert run(computation(), chosen) == ["disk"]


def test_an_unhandled_failure_is_raised_when_its_turn_comes(readers):
    readings = [total([number(1)]), total([partial(fail, OSError("disk"))]), total([number(3)])]
    results = interleave(readings, readers, ahead=3)
    assert next(results) == 1
    with pytest.raises(OSError, match="disk"):
        next(results)


@pytest.mark.parametrize("ahead", [1, 2, 5, 20])
def test_results_come_in_order_whatever_is_read_first(readers, ahead):
    later = threading.Event()

    def computation(i):
        reads = [later.wait] if i == 0 and ahead > 1 else []
        (yield reads)
        if i == 1:
            later.set()  # the first waits for the second: together they end only if both are under way
        return i

    assert list(interleave(map(computation, range(9)), readers, ahead=ahead)) == list(range(9))


def test_no_more_are_under_way_than_asked_for(readers):
    under_way, most = set(), []

    def computation(i):
        under_way.add(i)
        most.append(len(under_way))
        yield [number(i)]
        yield [number(i)]
        return i

    for i in interleave(map(computation, range(12)), readers, ahead=3):
        under_way.remove(i)
    assert max(most) == 3


def test_all_compute_in_the_callers_thread_and_read_in_others(readers):
    here, seen = threading.get_ident(), []

    def computation():
        for _ in range(3):
            assert threading.get_ident() == here
            seen.extend((yield [threading.get_ident, threading.get_ident]))

    list(interleave([computation() for _ in range(5)], readers, ahead=3))
    assert len(seen) == 30
    assert here not in seen


def test_those_that_have_read_least_go_first():
    """A computation that will read again starts its reads before another computes for long; the oldest ends then."""
    order = []

    def computation(name):
        for stage in range(2):
            yield []
            order.append(f"{name}{stage}")

    list(interleave(map(computation, "abc"), ahead=3))
    assert order == ["a0", "b0", "c0", "a1", "b1", "c1"]


def test_a_context_is_entered_around_computing_alone(readers):
    inside = []

    @contextmanager
    def context():
        inside.append(True)
        try:
            yield
        finally:
            inside.pop()

    def computation():
        assert inside
        yield [lambda: bool(inside)]
        assert inside
        return len(inside)

    for depth in interleave([computation() for _ in range(4)], readers, ahead=2, context=context):
        assert depth == 1
        assert not inside
