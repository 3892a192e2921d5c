"""A decoder's programs that cannot be captured: tried again, or served by the packed way, with nothing lost.

Without a device, a graph is its twin: ``captured`` runs on a builder that only keeps count, and a launch runs the
step's kernels one by one.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engine.decoding import graph as graph_module
from engine.decoding.generate import begin, generate_packed
from engine.decoding.graph import GraphDecoder
from engine.generation import DecoderEngine
from engine.kernels import capture
from tests.captures import DISTURBED, NO_LUCK, Builder, Stream
from tests.decoding.test_criteria import with_classifier
from tests.decoding.test_graph_steps import by_programs, room
from tests.decoding.test_steps import by_reference, by_steps, tokens
from tests.decoding.tiny import random_requests, tiny_decoder
from tests.tiny import disturb_captures

PROMPTS = [[5, 7, 9], [3], [8, 8, 2, 1]]
OPTIONS = dict(max_new_tokens=12, ignore_eos=True)


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


def test_ended_by_others_every_time_is_packed_for_this_run(twins):
    twins.error = DISTURBED[0]
    model = tiny_decoder(seed=2)
    lm = DecoderEngine(model, executor="graph")
    want = DecoderEngine(model, executor="packed").run(PROMPTS, **OPTIONS).token_ids
    with pytest.warns(UserWarning, match="cannot serve .a capture was disturbed, .*stream is capturing") as warned:
        for _ in range(2):
            assert lm.run(PROMPTS, **OPTIONS).token_ids == want
    assert len(warned) == 1 and lm._decoder._problem is None
    twins.error = None
    with no_warning():
        assert lm.run(PROMPTS, **OPTIONS).token_ids == want
    assert lm._decoder._programs and all(graph.launches for graph in twins.graphs)


def test_what_passes_does_not_hide_what_is_for_good(twins, others):
    others.busy = 10**6
    lm = DecoderEngine(tiny_decoder(seed=2), executor="graph")
    with pytest.warns(UserWarning, match="other threads allocate"):
        lm.run(PROMPTS, **OPTIONS)
    others.busy, twins.error = 0, NO_LUCK
    with pytest.warns(UserWarning, match="a capture failed .*no luck") as warned:
        for _ in range(2):
            lm.run(PROMPTS, **OPTIONS)
    assert len(warned) == 1


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
    assert len(twins.tries) == 1
    assert decoder._arena is decoder._current is decoder._step_weights is None, "memory for nothing"
    decoder.watch()


def test_heads_of_their_own_are_packed_for_good_too(twins):
    """What the weights said of the head is still known when they are gone."""
    twins.error = NO_LUCK
    model = tiny_decoder(seed=3, head="own")
    decoder = GraphDecoder(model, room(model))

    def run(**fields):
        requests = free_running(3, **fields)
        sequences = begin(requests)
        for _ in generate_packed(decoder, sequences, 5):
            pass
        assert tokens(sequences) == tokens(by_reference(model, requests))

    with pytest.warns(UserWarning, match="no luck"):
        run()
    assert decoder._current is None
    with no_warning():
        run(criterion="softmax", threshold=0.1)
        run()


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
def test_out_of_memory_is_the_callers(twins, monkeypatch, error):
    model = tiny_decoder(seed=2)
    lm = DecoderEngine(model, executor="graph")
    want = DecoderEngine(model, executor="packed").run(PROMPTS, **OPTIONS).token_ids
    twins.error = error
    free = lm._decoder.cache.free_blocks
    closed, close = [], graph_module._Program.close
    monkeypatch.setattr(graph_module._Program, "close", lambda program: (closed.append(program), close(program)))
    with no_warning(), pytest.raises(torch.OutOfMemoryError, match="out of memory") as raised:
        lm.run(PROMPTS, **OPTIONS)
    if isinstance(error, torch.OutOfMemoryError):
        assert raised.value is error
    else:
        assert raised.value.__cause__ is error and "fewer rows" in str(raised.value)
        assert "cache_bytes" in str(raised.value)
    assert lm._decoder.cache.free_blocks == free and len(closed) == 1 and not lm._decoder._programs
    twins.error = None
    with no_warning():
        assert lm.run(PROMPTS, **OPTIONS).token_ids == want
    assert lm._decoder._programs


def test_an_interrupted_capture_is_closed(twins, monkeypatch):
    closed, close = [], graph_module._Program.close
    monkeypatch.setattr(graph_module._Program, "close", lambda program: (closed.append(program), close(program)))
    lm = DecoderEngine(tiny_decoder(seed=2), executor="graph")
    twins.error = KeyboardInterrupt()
    with no_warning(), pytest.raises(KeyboardInterrupt):
        lm.run(PROMPTS, **OPTIONS)
    assert len(closed) == 1 and lm._decoder._problem is None and not lm._decoder._programs


def test_no_room_for_the_arena_is_the_callers_and_tried_again(twins, monkeypatch):
    """Also where weights have changed under a stream, which goes on."""
    model = tiny_decoder(seed=2)
    lm, packed = (DecoderEngine(model, executor=name) for name in ("graph", "packed"))
    want, arena = packed.run(PROMPTS, **OPTIONS).token_ids, graph_module.StepArena
    stream = lm.stream(PROMPTS[0], **OPTIONS)
    told = [next(stream).token_id for _ in range(4)]

    def full(*sizes):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graph_module, "StepArena", full)
    lm._decoder._step_weights.refresh()  # the same values elsewhere
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            lm.run(PROMPTS, **OPTIONS)
    with no_warning():
        told += [token.token_id for token in stream]
        assert told == want[0] and not lm._decoder._programs
        monkeypatch.setattr(graph_module, "StepArena", arena)
        assert lm.run(PROMPTS, **OPTIONS).token_ids == want
    assert lm._decoder._programs


def test_programs_wait_for_streams_and_never_for_the_device(monkeypatch):
    """With everything of CUDA told, not done: a wait for the device ends what another thread captures."""
    told = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: pytest.fail("waits for the device"))
    monkeypatch.setattr(graph_module, "own_stream", lambda owner, device: "own")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: theirs)
    monkeypatch.setattr(graph_module, "GraphBuilder", lambda: "builder")
    theirs = SimpleNamespace(synchronize=lambda: told.append("theirs"))
    graph = SimpleNamespace(upload=lambda: told.append("upload"), close=lambda: told.append("close"))
    monkeypatch.setattr(graph_module, "captured", lambda *given, after: told.append((*given, after)) or graph)
    program = object.__new__(graph_module._Program)
    program._device_given = SimpleNamespace(device=torch.device("cuda"))
    program._step, program._graph = SimpleNamespace(record="record"), None
    events = [SimpleNamespace(synchronize=lambda k=k: told.append(k)) for k in range(2)]
    program._hosts = [SimpleNamespace(done=event) for event in events]
    program.capture()
    program.close()
    assert told == [("builder", "own", "record", theirs), "upload", 0, 1, "close"]
    told.clear()

    def lost(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graph_module._Program, "_fill", lambda *given: None)
    monkeypatch.setattr(graph_module._Program, "_enqueue", lost)
    with pytest.raises(torch.OutOfMemoryError):
        program.launch([], 0, False)
    assert told == ["theirs"], "a step that nobody can ask for is under way"


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
    tries = disturb_captures(monkeypatch)
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
