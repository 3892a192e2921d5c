import gc
import time

import pytest

from engine.bench.timer import Timing, format_seconds, interleave


def test_rounds_alternate_their_direction_and_warm_up_is_not_counted():
    calls = []
    competitors = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    measured = interleave(competitors, repeats=2, warmup=1)
    assert "".join(calls) == "cba" + "abc" + "cba"
    assert [len(m.timing.seconds) for m in measured.values()] == [2, 2, 2]


def test_times_are_per_call_and_results_the_last():
    count = iter(range(100))

    def sleeper():
        time.sleep(0.01)
        return next(count)

    measured = interleave({"sleeper": sleeper}, repeats=3, warmup=0, calls=4)["sleeper"]
    assert measured.result == 11
    assert 0.01 <= measured.timing.median < 0.04


def test_hooks_run_outside_the_clock():
    log = []
    interleave(
        {"x": lambda: log.append("x")},
        repeats=2,
        warmup=1,
        before=lambda: (time.sleep(0.02), log.append("before")),
        after_each=lambda: log.append("after"),
    )
    assert log == ["before", "x", "after"] * 3
    slow_hook = interleave({"x": lambda: None}, repeats=1, before=lambda: time.sleep(0.05))["x"]
    assert slow_hook.timing.median < 0.04


def test_garbage_collection_is_off_while_timing_and_restored():
    seen = []

    def fails():
        seen.append(gc.isenabled())
        raise OSError("broken")

    assert gc.isenabled()
    with pytest.raises(OSError):
        interleave({"fails": fails})
    assert seen == [False] and gc.isenabled()


def test_percentiles():
    timing = Timing(tuple(float(x) for x in range(11)))
    assert (timing.p10, timing.median, timing.p90) == (1, 5, 9)
    assert timing.to_dict()["all_s"] == list(timing.seconds)
    with pytest.raises(ValueError, match="at least one"):
        Timing(())


@pytest.mark.parametrize("options", [{"repeats": 0}, {"warmup": -1}, {"calls": 0}, {"repeats": 1.5}, {"repeats": True}])
def test_refuses(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        interleave({"x": lambda: None}, **options)


@pytest.mark.parametrize(
    "seconds, text",
    [
        ((1.234,), "1.23 s"),
        ((75.0,), "75.0 s"),
        ((0.0123,), "12.3 ms"),
        ((0.001,), "1.00 ms"),
        ((4.2e-5,), "42.0 us"),
        ((0.009, 0.0123), "9.00 to 12.3 ms"),
        ((0.9, 1.2), "0.90 to 1.20 s"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(*seconds) == text
