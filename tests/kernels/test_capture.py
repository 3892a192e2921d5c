"""How a graph is captured among other threads: who waits for whom, and what is tried again."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine.kernels import capture
from engine.kernels.graphs import AllocationError
from tests.captures import DISTURBED, NO_LUCK, Builder, Stream


@pytest.mark.parametrize("collecting", [True, False])
@pytest.mark.parametrize("busy", [0, 1, capture.CAPTURES - 1])
def test_a_capture_is_tried_again(others, busy, collecting):
    others.busy, builder = busy, Builder()
    before = gc.isenabled()
    try:
        (gc.enable if collecting else gc.disable)()
        assert capture.captured(builder, Stream(), lambda when: others.meddle(builder)) == "a graph"
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if before else gc.disable)()
    assert builder.calls == ["rehearse", *["capture", "abort"] * busy, "capture", "instantiate", "close"]


def test_a_capture_that_is_always_disturbed(others):
    others.busy, builder = 99, Builder()
    with pytest.raises(AllocationError, match="1 allocations"):
        capture.captured(builder, Stream(), lambda when: others.meddle(builder))
    assert builder.calls == ["rehearse", *["capture", "abort"] * capture.CAPTURES, "close"] and gc.isenabled()


@pytest.mark.parametrize("error", DISTURBED, ids=range(len(DISTURBED)))
@pytest.mark.parametrize("times", [1, capture.CAPTURES])
def test_a_capture_that_another_thread_ended_is_tried_again(others, times, error):
    builder = Builder()

    def record(when):
        if builder.capturing and builder.calls.count("capture") <= times:
            raise error

    if times == 1:
        assert capture.captured(builder, Stream(), record) == "a graph"
        assert builder.calls == ["rehearse", "capture", "abort", "capture", "instantiate", "close"]
    else:
        with pytest.raises(RuntimeError) as raised:
            capture.captured(builder, Stream(), record)
        assert raised.value is error and "disturbed, perhaps by another thread" in capture.passing(error)
        assert builder.calls == ["rehearse", *["capture", "abort"] * times, "close"]
    assert gc.isenabled()


def test_what_passes():
    coded = RuntimeError("in other words")
    coded.error_code = 901
    assert capture.passing(coded) and capture.passing(AllocationError("1")).startswith("other threads allocate")
    coded.error_code = 700
    for error in (coded, NO_LUCK, torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()):
        assert capture.passing(error) is None


@pytest.mark.parametrize("rehearsing", [True, False])
def test_nothing_runs_any_more_when_it_is_over(others, rehearsing):
    builder, stream, order = Builder(), Stream(), []
    stream.wait_stream = lambda other: order.append(("wait", other))
    stream.synchronize = lambda: order.append("synchronise")

    def record(when):
        order.append("record")
        if builder.capturing or rehearsing:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture.captured(builder, stream, record, after="theirs")
    assert order == [("wait", "theirs"), "record", "synchronise", *([] if rehearsing else ["record"])]
    assert builder.calls[-1] == "close" and gc.isenabled() and not capture._turn.locked()


def test_two_threads_take_turns_and_collections_are_on_again(others):
    """The second one's rehearsal, and its look at the collector, would meet the first one's capture, and outlast it."""
    meeting, capturing, was = threading.Barrier(2), threading.Event(), gc.isenabled()
    first_builder, second_builder = Builder(), Builder()

    def meet():
        try:
            meeting.wait(0.3)
        except threading.BrokenBarrierError:
            pass

    def record_first(when):
        if first_builder.capturing:
            capturing.set()
            meet()

    def record_second(when):
        if not second_builder.capturing:
            meet()
            first.join(10)

    first = threading.Thread(target=capture.captured, args=(first_builder, Stream(), record_first))
    second = threading.Thread(target=capture.captured, args=(second_builder, Stream(), record_second))
    try:
        gc.enable()
        first.start()
        assert capturing.wait(10)
        second.start()
        # Not joined by this thread first: the first one ends while the second waits, or rehearses.
        second.join(10)
        assert meeting.broken, "one rehearsed while the other captured"
        assert gc.isenabled(), "collections are off for good"
    finally:
        first.join(10)
        (gc.enable if was else gc.disable)()
    assert first_builder.calls == second_builder.calls == ["rehearse", "capture", "instantiate", "close"]


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as threads:
        yield threads


def allocate() -> str:
    with capture.allocating():
        return "done"


@pytest.mark.parametrize("fails", [False, True])
def test_who_allocates_waits_for_a_capture(others, pool, fails):
    builder, early, late = Builder(), [], []

    def record(when):
        (late if builder.capturing else early).append(pool.submit(allocate))
        if builder.capturing:
            with pytest.raises(TimeoutError):
                late[0].result(0.2)
            with capture.allocating():  # which this thread may: ``no_allocation`` tells it what that does
                pass
            if fails:
                raise NO_LUCK
        else:
            assert early[0].result(10) == "done", "there is no capture yet"

    if fails:
        with pytest.raises(RuntimeError, match="no luck"):
            capture.captured(builder, Stream(), record)
    else:
        assert capture.captured(builder, Stream(), record) == "a graph"
    assert late[0].result(10) == "done"


def test_a_capture_waits_for_who_allocates(others, pool, monkeypatch):
    monkeypatch.setattr(capture, "_PATIENCE", 60.0)
    builder, order, rehearsed, entered = Builder(), [], threading.Event(), threading.Event()

    def record(when):
        order.append("captured" if builder.capturing else "rehearsed")
        rehearsed.set()

    def hold():
        with capture.allocating():
            entered.set()
            assert rehearsed.wait(10)
            deadline = time.monotonic() + 10
            while capture._allocator._capturing is None:
                assert time.monotonic() < deadline
            later = pool.submit(allocate)  # does not get in between: there would always be somebody
            with pytest.raises(TimeoutError):
                later.result(0.2)
            with capture.allocating():
                order.append("left")
        return later

    holding = pool.submit(hold)
    assert entered.wait(10)
    assert pool.submit(capture.captured, builder, Stream(), record).result(20) == "a graph"
    assert holding.result(10).result(10) == "done"
    assert order == ["rehearsed", "left", "captured"]


def test_a_capture_does_not_wait_for_ever(others, pool, monkeypatch):
    """Whoever is inside may wait for the thread that captures: by a criterion, whose code is not ours."""
    monkeypatch.setattr(capture, "_PATIENCE", 0.1)
    entered, captured = threading.Event(), threading.Event()

    def hold():
        with capture.allocating():
            entered.set()
            return captured.wait(10)

    holding = pool.submit(hold)
    assert entered.wait(10)
    assert capture.captured(Builder(), Stream(), lambda when: None) == "a graph"
    captured.set()
    assert holding.result(10) and allocate() == "done"


def test_a_capture_among_what_its_own_thread_allocates(others):
    with capture.allocating():
        assert capture.captured(Builder(), Stream(), lambda when: None) == "a graph"
    assert allocate() == "done" and not capture._allocator._inside


def test_other_errors_are_not_tried_again(others):
    builder = Builder()

    def record(when):
        if builder.capturing:
            raise NO_LUCK

    with pytest.raises(RuntimeError, match="no luck"):
        capture.captured(builder, Stream(), record)
    assert builder.calls == ["rehearse", "capture", "close"] and gc.isenabled()
