"""Ranks of threads, as the kernel tells them."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from worker_orcd.worker import priority

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads have ranks of their own on Linux")


def in_thread(work: Callable[[int], Any]) -> Any:
    """What `work` gives, on a thread that ends with it; it gets the thread's id."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work(threading.get_native_id())))
    thread.start()
    thread.join()
    return results[0]


def niceness(thread_id: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, thread_id)


def policy(thread_id: int) -> int:
    return os.sched_getscheduler(thread_id)


def test_a_thread_that_gives_way_is_nicer_and_so_are_those_it_starts():
    before = niceness(0)

    def work(me: int) -> tuple[int, int]:
        priority.give_way(me)
        return niceness(me), in_thread(niceness)

    assert in_thread(work) == (before + priority.COMPUTE_NICENESS,) * 2
    assert niceness(0) == before, "the caller's own rank changed"


def test_short_turns_are_asked_for_and_given_back():
    usual = in_thread(priority.slice_of)

    def work(me: int) -> tuple[int | None, int, int | None]:
        before = niceness(me)
        priority.answer_first()
        short, same = priority.slice_of(me), niceness(me)
        priority.give_way(me)
        assert same == before
        return short, niceness(me) - before, priority.slice_of(me)

    short, nicer, after = in_thread(work)
    assert short in (priority.LOOP_SLICE_NANOSECONDS, usual)  # before Linux 6.12 all turns are as usual
    assert (nicer, after) == (priority.COMPUTE_NICENESS, usual)


def test_niceness_ends_where_the_kernels_ends():
    def work(me: int) -> int:
        for _ in range(6):
            priority.give_way(me)
        return niceness(me)

    assert in_thread(work) == 19


def test_a_thread_under_another_policy_keeps_it():
    def work(me: int) -> tuple[int, int]:
        os.sched_setscheduler(me, os.SCHED_BATCH, os.sched_param(0))
        before = niceness(me)
        priority.answer_first(me)
        priority.give_way(me)
        return policy(me), niceness(me) - before

    assert in_thread(work) == (os.SCHED_BATCH, 0)


def test_where_the_calls_are_not_known_niceness_still_works(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(priority, "_CALLS", {})

    def work(me: int) -> tuple[int, int | None]:
        before = niceness(me)
        priority.answer_first(me)
        assert niceness(me) == before
        priority.give_way(me)
        return niceness(me) - before, priority.slice_of(me)

    assert in_thread(work) == (priority.COMPUTE_NICENESS, None)


def test_a_thread_that_is_gone_is_no_fault():
    gone = 2**30  # beyond the largest that Linux gives
    priority.answer_first(gone)
    priority.give_way(gone)
    assert priority.slice_of(gone) is None


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "other")

    def work(me: int) -> tuple[int, int | None]:
        before = niceness(me)
        priority.answer_first(me)
        priority.give_way(me)
        return niceness(me) - before, priority.slice_of(me)

    assert in_thread(work) == (0, None)
