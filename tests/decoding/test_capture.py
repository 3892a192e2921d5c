"""A decoder's programs that cannot be captured: tried again, or served by the packed way, with nothing lost.

Without a device, a graph is its twin: ``captured`` runs on a builder that only keeps count, and a launch runs the
step's kernels one by one.
"""

from __future__ import annotations

import gc
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch

from engine.decoding import graph as graph_module
from engine.decoding.generate import begin, generate_packed
from engine.decoding.graph import GraphDecoder
from engine.generation import DecoderEngine
from engine.kernels import capture, graphs
from engine.kernels.graphs import AllocationError
from tests.decoding.test_criteria import with_classifier
from tests.decoding.test_graph_steps import by_programs, room
from tests.decoding.test_steps import by_reference, by_steps, tokens
from tests.decoding.tiny import random_requests, tiny_decoder

PROMPTS = [[5, 7, 9], [3], [8, 8, 2, 1]]
OPTIONS = dict(max_new_tokens=12, ignore_eos=True)


# --- the loop ----------------------------------------------------------------------------------------------------


class Stream:
    device = torch.device("cpu")

    def synchronize(self):
        pass


class Builder:
    """Keeps what is asked of it, in order."""

    def __init__(self):
        self.calls, self.capturing = [], False

    @contextmanager
    def rehearse(self, stream):
        self.calls.append("rehearse")
        yield

    @contextmanager
    def capture(self, stream):
        self.calls.append("capture")
        assert not gc.isenabled(), "a collection may come while a stream is captured"
        self.capturing = True
        yield
        self.capturing = False

    def when(self, flag):
        return nullcontext()

    def instantiate(self):
        self.calls.append("instantiate")
        return "a graph"

    def abort(self):
        self.calls.append("abort")

    def close(self):
        self.calls.append("close")


@pytest.fixture
def others(monkeypatch):
    """Other threads, which allocate something in each of the next ``busy`` captures."""

    class Others:
        busy, asked = 0, 0

        def meddle(self, builder):
            if builder.capturing and self.busy > 0:
                self.asked += 1
                self.busy -= 1

    found = Others()
    monkeypatch.setattr(graphs, "_allocations", lambda device: (found.asked, 0))
    return found


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


def test_other_errors_are_not_tried_again(others):
    builder = Builder()

    def record(when):
        if builder.capturing:
            raise RuntimeError("CUDA: no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        capture.captured(builder, Stream(), record)
    assert builder.calls == ["rehearse", "capture", "close"] and gc.isenabled()


# --- the decoder -------------------------------------------------------------------------------------------------


class Twin:
    """A graph that runs its step's kernels through their twins."""

    def __init__(self, step):
        self._step, self.open, self.launches = step, True, 0

    def launch(self):
        assert self.open
        self.launches += 1
        self._step.record(lambda flag: nullcontext())

    def close(self):
        self.open = False


@pytest.fixture
def twins(monkeypatch, others):
    """Programs have twins for graphs. error: what a capture raises; graphs: what was captured; tries: programs that
    were to be, as (rows, measure)."""

    class Twins:
        error = None

        def __init__(self):
            self.graphs, self.tries = [], []

    found = Twins()

    def captured(program):
        step, builder = program._step, Builder()
        found.tries.append((step._rows, step.measure))

        def record(when):
            others.meddle(builder)
            if builder.capturing and found.error is not None:
                raise found.error

        capture.captured(builder, Stream(), record)
        program._graph = Twin(step)
        found.graphs.append(program._graph)

    monkeypatch.setattr(graph_module._Program, "capture", captured)
    return found


@contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def free_running(count, **fields):
    """Some kept, so that not all steps are launched ahead."""
    requests = random_requests(count, seed=11, new=30, **fields)
    return [replace(r, keep_logits=k % 2 == 0) for k, r in enumerate(requests)]


NO_LUCK = RuntimeError("CUDA: no luck")


def test_disturbed_once_and_then_captured(twins, others):
    others.busy = capture.CAPTURES - 1
    model, requests = tiny_decoder(seed=3), free_running(6)
    with no_warning():
        got, decoder = by_programs(model, requests)
    assert tokens(got) == tokens(by_reference(model, requests))
    assert others.busy == 0 and set(decoder._programs) == set(twins.tries)
    assert len(twins.tries) == len(set(twins.tries)) and all(graph.launches for graph in twins.graphs)


def test_always_disturbed_is_packed_and_tried_again_by_the_next_run(twins, others):
    others.busy = 10**6
    model, requests = tiny_decoder(seed=3), free_running(6)
    decoder = GraphDecoder(model, room(model))

    def run():
        sequences = begin(requests)
        for _ in generate_packed(decoder, sequences, 5):
            pass
        assert decoder.cache.free_blocks == 200
        return tokens(sequences)

    want = tokens(by_reference(model, requests))
    with pytest.warns(UserWarning) as warned:
        assert run() == want
    assert [str(w.message) for w in warned] == [
        "the graph executor cannot serve (other threads allocate while a graph is captured): packed serves instead"
    ]
    once = len(set(twins.tries))
    assert not decoder._programs and once > 1 and len(twins.tries) == once, "tried more than once a run"
    with no_warning():
        assert run() == want
        assert len(twins.tries) == 2 * once and not decoder._programs
        others.busy = 0
        assert run() == want
        assert len(twins.tries) == 3 * once == 3 * len(decoder._programs)
    assert all(graph.launches for graph in twins.graphs)


def test_a_failing_capture_is_packed_for_good(twins):
    twins.error = NO_LUCK
    model, requests = with_classifier(3), free_running(6)
    requests = [replace(r, criterion="classifier", threshold=0.6) if k < 3 else r for k, r in enumerate(requests)]
    decoder, want = GraphDecoder(model, room(model)), tokens(by_reference(model, requests))
    with pytest.warns(UserWarning) as warned:
        for _ in range(2):
            sequences = begin(requests)
            for _ in generate_packed(decoder, sequences, 5):
                pass
            assert tokens(sequences) == want and decoder.cache.free_blocks == 200
    assert [str(w.message) for w in warned] == [
        "the graph executor cannot serve (a capture failed (RuntimeError: CUDA: no luck)): packed serves instead"
    ]
    assert len(twins.tries) == 1 and decoder._arena is None


@pytest.mark.parametrize("disturbed", [True, False])
@pytest.mark.parametrize("fine", [1, 2])
def test_failing_in_the_middle_changes_no_sequence(twins, others, monkeypatch, fine, disturbed):
    """Positions that programs left owed are settled by the packed way, and the other way round."""
    made = graph_module._Program.capture

    def later(program):
        if len(twins.tries) == fine:
            twins.error = None if disturbed else NO_LUCK
            others.busy = capture.CAPTURES if disturbed else 0  # one program is not had, the next ones are
        made(program)

    monkeypatch.setattr(graph_module._Program, "capture", later)
    model, requests = tiny_decoder(seed=3), free_running(9)
    want = by_reference(model, requests)
    with pytest.warns(UserWarning, match="graph executor cannot serve") as warned:
        got, decoder = by_programs(model, requests, max_rows=8)
    assert len(warned) == 1 and all(graph.launches for graph in twins.graphs)
    assert len(twins.graphs) == (len(twins.tries) - 1 if disturbed else fine)
    assert tokens(got) == tokens(want) and [s.finish_reason for s in got] == [s.finish_reason for s in want]
    assert decoder.settled == by_steps(model, requests, max_rows=8)[1].settled > 0
    assert all(graph.open for graph in twins.graphs) if disturbed else not any(graph.open for graph in twins.graphs)


def test_the_engine_warns_once_and_names_the_caller(twins):
    twins.error = NO_LUCK
    model = tiny_decoder(seed=2)
    packed = DecoderEngine(model, executor="packed")
    want, drawn = packed.run(PROMPTS, **OPTIONS), dict(OPTIONS, temperature=0.8, seed=3)
    lm = DecoderEngine(model, executor="graph")
    with pytest.warns(UserWarning, match="a capture failed .*no luck.*packed serves instead") as warned:
        got = lm.run(PROMPTS, **OPTIONS)
    assert len(warned) == 1 and warned[0].filename == __file__
    assert got.token_ids == want.token_ids and got.exit_layers == want.exit_layers
    assert got.stats.owed_settled == want.stats.owed_settled > 0
    with no_warning():
        told = [(t.token_id, t.exit_layer) for t in lm.stream(PROMPTS[0], **OPTIONS)]
        assert lm.run(PROMPTS, **drawn).token_ids == packed.run(PROMPTS, **drawn).token_ids
        lm.warm_up(3, 9)
    assert told == list(zip(want.token_ids[0], want.exit_layers[0], strict=True))
    assert len(twins.tries) == 1


def test_a_stream_goes_on_where_the_capture_of_a_run_fails(twins):
    model = tiny_decoder(seed=2)
    lm = DecoderEngine(model, executor="graph")
    want = DecoderEngine(model, executor="packed").run(PROMPTS, **OPTIONS)
    stream = lm.stream(PROMPTS[0], **OPTIONS)
    told = [next(stream).token_id for _ in range(4)]  # one more is under way
    assert twins.graphs[0].launches == 4
    twins.error = NO_LUCK
    with pytest.warns(UserWarning, match="no luck"):
        assert lm.run(PROMPTS, **OPTIONS).token_ids == want.token_ids
    assert not twins.graphs[0].open
    told += [token.token_id for token in stream]
    assert told == want.token_ids[0]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA: upload: out of memory"),
], ids=["torch", "driver"])  # fmt: skip
def test_out_of_memory_is_the_callers(twins, error):
    model = tiny_decoder(seed=2)
    lm = DecoderEngine(model, executor="graph")
    want = DecoderEngine(model, executor="packed").run(PROMPTS, **OPTIONS).token_ids
    twins.error = error
    free = lm._decoder.cache.free_blocks
    with no_warning(), pytest.raises(type(error), match="out of memory") as raised:
        lm.run(PROMPTS, **OPTIONS)
    assert raised.value is error and lm._decoder.cache.free_blocks == free
    twins.error = None
    with no_warning():
        assert lm.run(PROMPTS, **OPTIONS).token_ids == want
    assert lm._decoder._programs


def test_no_conditional_nodes(monkeypatch):
    """Found when the engine is made."""
    monkeypatch.setattr(graph_module, "graph_problem", lambda model: "the driver has no conditional nodes")
    model = tiny_decoder(seed=2)
    with pytest.warns(UserWarning, match="cannot serve .the driver has no conditional nodes.: packed") as warned:
        lm = DecoderEngine(model, executor="graph")
        got = lm.run(PROMPTS, **OPTIONS)
    assert len(warned) == 1 and lm.executor == "packed"
    assert got.token_ids == DecoderEngine(model, executor="packed").run(PROMPTS, **OPTIONS).token_ids


# --- on a device -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_failing_capture_falls_back(gpu, monkeypatch):
    @contextmanager
    def broken(self, stream=None):
        raise RuntimeError("CUDA: no luck")
        yield

    monkeypatch.setattr(graph_module.GraphBuilder, "capture", broken)
    model = tiny_decoder(seed=2).to("cuda")
    want = DecoderEngine(model, executor="reference").run(PROMPTS, **OPTIONS)
    lm = DecoderEngine(model, executor="graph")
    with pytest.warns(UserWarning, match="a capture failed .*no luck.*packed serves instead") as warned:
        for _ in range(2):
            got = lm.run(PROMPTS, **OPTIONS)
            assert got.token_ids == want.token_ids and got.exit_layers == want.exit_layers
    assert len(warned) == 1


@pytest.mark.gpu
def test_allocations_of_other_threads_cost_an_attempt_and_nothing_more(gpu, monkeypatch):
    original, tries = graph_module.GraphBuilder.capture, []

    def disturbed(self, stream):
        tries.append(1)
        if len(tries) in (1, 2, *range(4, 4 + capture.CAPTURES)):
            torch.empty(1 << 20, device="cuda")
        return original(self, stream)

    monkeypatch.setattr(graph_module.GraphBuilder, "capture", disturbed)
    model = tiny_decoder(seed=2).to("cuda")
    lm, oracle = (DecoderEngine(model, executor=name) for name in ("graph", "reference"))
    with no_warning():
        assert lm.run(PROMPTS, **OPTIONS).token_ids == oracle.run(PROMPTS, **OPTIONS).token_ids
    assert len(tries) == 3 and set(lm._decoder._programs) == {(4, "policy")}
    with pytest.warns(UserWarning, match="other threads allocate"):
        got = lm.run(PROMPTS[:1], **OPTIONS)  # another program: disturbed every time
    assert got.token_ids == oracle.run(PROMPTS[:1], **OPTIONS).token_ids and len(tries) == 3 + capture.CAPTURES
    with no_warning():
        assert lm.run(PROMPTS[:1], **OPTIONS).token_ids == got.token_ids
    assert set(lm._decoder._programs) == {(4, "policy"), (1, "policy")}
