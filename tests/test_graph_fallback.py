"""Where graphs cannot serve, for good or for one batch: packed does, with one warning that says why."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import engine
from engine.criteria import Policy
from engine.executors import graph as graph_module
from engine.kernels import capture
from engine.kernels.graphs import AllocationError
from tests.captures import DISTURBED, NO_LUCK
from tests.test_graph import both
from tests.tiny import Half, assert_same, disturb_captures, padded, random_rows, tiny_model


def test_what_it_cannot_serve_is_packed_with_one_warning(device):
    model = tiny_model().to(device)
    fast, oracle = both(model)
    rows = random_rows(12)
    with pytest.warns(UserWarning, match="graph executor cannot serve .*'half' is neither .*packed serves instead"):
        got = fast.run(padded(rows), criterion=Half())
    assert_same(got, oracle.run(padded(rows), criterion=Half()), rtol=1e-4, atol=3e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.run(padded(rows), criterion=Half(), min_depth=[1, 2] * 6)
        fast.run(padded(rows))


class Late(Policy):
    """Decides from the third exit on."""

    name = "late"

    def may_decide(self, layer):
        return layer >= 3


def test_who_decides_at_some_exits_only_is_packed_where_limits_differ(device):
    fast, oracle = both(tiny_model(layers=5).to(device))
    rows = random_rows(6)
    options = dict(criterion=Late(), threshold=0.0)
    assert_same(fast.run(padded(rows), **options), oracle.run(padded(rows), **options), rtol=1e-4, atol=3e-5)
    options["max_depth"] = [5, 4, 5, 4, 5, 4]
    with pytest.warns(UserWarning, match="'late' decides at some exits only"):
        got = fast.run(padded(rows), **options)
    assert got.exit_layers.tolist() == [3] * 6
    assert_same(got, oracle.run(padded(rows), **options), rtol=1e-4, atol=3e-5)


def test_float64_is_packed(device):
    fast, oracle = both(tiny_model().double().to(device))
    with pytest.warns(UserWarning, match="float16, bfloat16 and float32, not float64"):
        got = fast.run(padded(random_rows(5)))
    assert_same(got, oracle.run(padded(random_rows(5))), rtol=1e-6, atol=1e-9)


ENDED = DISTURBED[1]


@pytest.fixture
def failing(monkeypatch):
    """An engine whose executor believes it has a stream, and the oracle; captures raise what its ``error`` is."""
    fast, oracle = both(tiny_model())
    executor, found = fast.executor, SimpleNamespace(fast=fast, oracle=oracle, tries=0, error=None)

    def fail(program, stream):
        found.tries += 1
        raise found.error

    monkeypatch.setattr(graph_module._Program, "capture", fail)
    monkeypatch.setattr(executor, "_own_stream", nullcontext)
    monkeypatch.setattr(executor, "_stream", object())
    return found


def test_a_warning_for_what_passes_one_for_options_and_one_for_good(failing):
    rows = padded(random_rows(9))
    want = failing.oracle.run(rows).exit_layers

    def said(error, **options):
        failing.error = error
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                got = failing.fast.run(rows, **options)
                assert options or torch.equal(got.exit_layers, want)
        return [str(w.message) for w in caught if "packed serves instead" in str(w.message)]

    (message,) = said(None, criterion=Half())
    assert "'half' is neither" in message and failing.tries == 0
    (message,) = said(ENDED)
    assert "a capture was disturbed, perhaps by another thread" in message and "previous error" in message
    assert failing.fast.executor._problem is None and failing.tries == 2, "each batch tries again"
    assert said(AllocationError("1 allocations")) == []
    failing.fast.executor._pause = 0
    (message,) = said(NO_LUCK)
    assert "a capture failed (RuntimeError: CUDA: no luck)" in message
    tries = failing.tries
    assert said(NO_LUCK) == [] and failing.tries == tries


def test_captures_that_are_always_disturbed_are_tried_less_and_less(failing, monkeypatch):
    monkeypatch.setattr(graph_module, "_LONGEST_PAUSE", 7)
    failing.error, tried = ENDED, []
    batch = padded(random_rows(3))
    with pytest.warns(UserWarning, match="disturbed, perhaps by another thread.*packed serves instead"):
        for k in range(30):
            before = failing.tries
            failing.fast.run(batch)
            if failing.tries > before:
                tried.append(k)
    assert tried == [0, 1, 3, 7, 15, 23]
    monkeypatch.setattr(graph_module._Program, "capture", lambda program, stream: None)
    monkeypatch.setattr(failing.fast.executor, "_stream", None)  # a program runs step by step again
    for _ in range(10):
        failing.fast.run(batch)
    assert len(failing.fast.executor._programs) == 1 and failing.fast.executor._disturbed == 0


def test_what_an_engine_allocates_waits_for_the_captures_of_others(device):
    """First batches, looks at weights, and what packed serves; not a batch whose program is there."""
    engines = [engine.from_module(tiny_model().to(device), executor="graph") for _ in range(5)]
    fresh, ready, looking, renewed, packed = engines
    batch = padded(random_rows(9))
    for seen in (ready, looking, renewed):
        seen.run(batch)
    with pytest.warns(UserWarning, match="packed serves instead"):
        packed.run(batch, criterion=Half())
    for loaded in (fresh, ready, packed):
        loaded.executor.weights.watching = False
    waiting = {
        "a first batch": lambda: fresh.run(batch),
        "a larger batch": lambda: ready.run(padded(random_rows(30))),
        "a look": looking.executor.look,
        "a refresh": renewed.refresh,
        "served by packed": lambda: packed.run(batch, criterion=Half()),
    }
    with ThreadPoolExecutor(len(waiting)) as pool:
        with capture._allocator.left_alone():
            found = {name: pool.submit(work) for name, work in waiting.items()}
            done, _ = wait(found.values(), 0.5)
            assert [name for name, result in found.items() if result in done] == []
            assert fresh.executor.weights._held is None
        for result in found.values():
            result.result(60)
        if device == "cuda":
            with capture._allocator.left_alone():
                assert pool.submit(ready.run, batch).result(10).exit_layers.shape == (9,)


def test_halves_of_a_batch_come_from_two_executors(device, monkeypatch):
    """A batch too large for memory, whose second half another thread keeps from its graph: that one stays on the
    device, where there is one."""
    fast, oracle = both(tiny_model().to(device))
    original, asked = fast.executor.submit, []

    def submit(rows, options):
        asked.append(len(rows))
        if len(asked) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(asked) == 3:
            return fast.executor._fall_back("other threads", "passing", rows, options)
        return original(rows, options)

    monkeypatch.setattr(fast.executor, "submit", submit)
    batch = padded(random_rows(9))
    with pytest.warns(UserWarning, match="other threads"):
        got = fast.run(batch)
    assert asked == [9, 4, 5]
    assert_same(got, oracle.run(batch), rtol=1e-4, atol=3e-5)


def test_out_of_memory_of_the_driver_is_the_callers(failing):
    failing.error = RuntimeError("CUDA: instantiate: out of memory")
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="with no graph left: CUDA: instantiate: out of memory"):
            failing.fast.executor._made(lambda: graph_module._Program.capture(None, None))
    assert failing.fast.executor._problem is None


@pytest.mark.gpu
@pytest.mark.parametrize("name, value, reason", [
    ("conditional_nodes_problem", lambda device: "conditional graph nodes need a driver for CUDA 12.4", "12.4"),
    ("triton", None, "triton is not installed"),
])  # fmt: skip
def test_a_device_without_graphs_is_served_by_packed(gpu, monkeypatch, name, value, reason):
    """Found when the engine is made, told once, by the first run."""
    monkeypatch.setattr(graph_module, name, value)
    fast, oracle = both(tiny_model().cuda())
    rows = random_rows(9)
    with pytest.warns(UserWarning, match=f"the graph executor cannot serve .*{reason}.*packed serves instead") as told:
        got = fast.run(padded(rows))
        fast.run(padded(rows), max_depth=3)
    assert len(told) == 1
    assert_same(got, oracle.run(padded(rows)), rtol=1e-4, atol=3e-5)


@pytest.mark.gpu
def test_a_failing_capture_falls_back(gpu, monkeypatch):
    def fail(self, stream):
        raise RuntimeError("CUDA: no luck")

    monkeypatch.setattr(graph_module._Program, "capture", fail)
    fast, oracle = both(tiny_model().cuda())
    rows = random_rows(9)
    with pytest.warns(UserWarning, match="a capture failed .*no luck.*packed serves instead"):
        got = fast.run(padded(rows))
    assert torch.equal(got.exit_layers, oracle.run(padded(rows)).exit_layers)


@pytest.mark.gpu
def test_allocations_of_other_threads_cost_an_attempt_and_nothing_more(gpu, monkeypatch):
    fast, oracle = both(tiny_model().cuda())
    tries = disturb_captures(monkeypatch)
    rows = random_rows(9)
    want = oracle.run(padded(rows))
    assert torch.equal(fast.run(padded(rows)).exit_layers, want.exit_layers) and len(tries) == 3
    with pytest.warns(UserWarning, match="other threads allocate"):
        got = fast.run(padded(rows), max_depth=3)  # another program: disturbed every time
    assert torch.equal(got.exit_layers, oracle.run(padded(rows), max_depth=3).exit_layers)
    assert fast.executor._problem is None
