"""A step as a program: graph = packed = reference, on the CPU through the kernels' twins, on a device as graphs."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engine
from engine.decoding import graph as graph_module
from engine.decoding import graph_step
from engine.decoding.cache import PagedCache, Pages
from engine.decoding.generate import begin, generate_packed, take_tokens
from engine.decoding.graph import GraphDecoder
from engine.decoding.packed import PackedDecoder, cache_shape
from engine.generation import DecoderEngine
from engine.loading import save_checkpoint
from tests.decoding.test_criteria import with_classifier
from tests.decoding.test_steps import (
    EVERY,
    assert_as_exact_as_plain,
    assert_same,
    by_reference,
    by_steps,
    decodes,
    long_shallow_decode,
    tokens,
    watch_watermarks,
)
from tests.decoding.tiny import LAYERS, random_requests, tiny_decoder

CLOSE = dict(rtol=2e-4, atol=2e-4)  # fp32


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request) -> str:
    if request.param == "cuda":
        request.getfixturevalue("gpu")
    return request.param


def by_programs(model, requests, blocks=200, block_size=4, max_rows=5):
    cache = PagedCache(cache_shape(model, block_size), blocks, model.device, model.dtype)
    decoder, sequences = GraphDecoder(model, cache), begin(requests)
    for _ in generate_packed(decoder, sequences, max_rows):
        pass
    assert cache.free_blocks == blocks
    return sequences, decoder


@pytest.mark.parametrize("exits, kv_heads, head", [(EVERY, 2, "lora"), ((2, 5), 1, "shared"), ((3, 4, 5), 4, "own")])
@pytest.mark.parametrize("seed", range(3))
def test_scripted_exits_and_forced_tokens(place, exits, kv_heads, head, seed):
    model = tiny_decoder(exits, kv_heads=kv_heads, head=head, seed=seed).to(place)
    requests = random_requests(7, seed, exits=exits, forced=True)
    want, packed = by_steps(model, requests)
    got, decoder = by_programs(model, requests)
    assert_same(got, want, **CLOSE)
    assert decoder.settled == packed.settled > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads, head", [(2, "lora"), (1, "shared"), (4, "own")])
def test_errors_of_smaller_dtypes(place, dtype, kv_heads, head):
    """Scripted exits, forced tokens."""
    model = tiny_decoder(kv_heads=kv_heads, head=head, seed=7).to(place)
    ways = {"programs": lambda model, requests: by_programs(model, requests)[0]}
    assert_as_exact_as_plain(model, dtype, ways)


# ``place`` is a name: what one example does leaves nothing to the next.
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(decode=decodes(), seed=st.integers(0, 99))
def test_watermarks_never_rise_with_depth(place, decode, seed):
    """On the host, and on the device, where the next step of the same rows finds them."""
    exits, requests, lost = decode
    model = tiny_decoder(exits, seed=seed).to(place)
    decoder = GraphDecoder(model, PagedCache(cache_shape(model, 4), 36, model.device, model.dtype))
    decoder.look()

    def look(step, rows):
        told = step.program._step.given.watermarks[: len(rows), 1:].tolist()  # no step moves the first layer's
        if step.program._exits:
            assert told == [pages.watermarks[1:] for _, pages in rows]

    watch_watermarks(decoder, requests, lost, look)


@pytest.mark.parametrize("rows, hidden", [(1, 32), (2, 64)])
def test_a_long_shallow_decode_and_one_deep_visit(place, rows, hidden, monkeypatch):
    """Hundreds of owed rows settled by one token, or by two of them, for which there is room for a few."""
    if rows > 1:
        monkeypatch.setattr(graph_step, "qkv_entries", lambda rows, *_: rows + 1)
    model, requests, settled = long_shallow_decode(rows, hidden)
    want = by_reference(model.to(place), requests)
    got, decoder = by_programs(model, requests)
    assert decoder.settled == settled
    assert_same(got, want, **CLOSE)


def test_what_only_large_models_have(place, monkeypatch):
    """Norms of their own in front of the products, with room for some of the entries."""
    monkeypatch.setattr(graph_step, "qkv_entries", lambda rows, *_: 0 if rows == 1 else rows + 1)
    model = tiny_decoder(seed=3, hidden=64).to(place)
    requests = random_requests(8, seed=11, new=30)
    got, decoder = by_programs(model, requests, max_rows=8)
    assert tokens(got) == tokens(by_reference(model, requests)) and decoder.settled > 0


@pytest.mark.parametrize("max_rows", [1, 3, 8])
def test_free_running_greedy(place, max_rows):
    """Every token decides for itself, in any company."""
    model = tiny_decoder(seed=3).to(place)
    requests = random_requests(8, seed=11, new=30)
    got, _ = by_programs(model, requests, max_rows=max_rows)
    assert tokens(got) == tokens(by_reference(model, requests))
    ahead, _ = by_programs(model, [replace(r, keep_logits=False) for r in requests], max_rows=max_rows)
    assert tokens(ahead) == tokens(got)
    assert len({t.exit_layer for s in got for t in s.new}) > 2


def test_preempted_rows_come_back(place):
    model = tiny_decoder(seed=5).to(place)
    requests = random_requests(6, seed=2, new=20)
    got, _ = by_programs(model, requests, blocks=14, max_rows=4)
    assert tokens(got) == tokens(by_reference(model, requests))


def test_nobody_may_leave(place):
    """The program without exits, and the one with, where the first owes nothing and the second does."""
    model = tiny_decoder(seed=4).to(place)
    whole = random_requests(3, seed=8, min_depth=LAYERS)
    got, decoder = by_programs(model, whole)
    assert tokens(got) == tokens(by_reference(model, whole))
    assert {measure for _, measure in decoder._programs} == {None}
    some = whole + random_requests(3, seed=9)
    got, decoder = by_programs(model, some, max_rows=6)
    assert tokens(got) == tokens(by_reference(model, some))


def test_limits_of_depth(place):
    model = tiny_decoder((1, 3, 5), seed=6).to(place)
    requests = [*random_requests(3, seed=1, max_depth=3), *random_requests(3, seed=2, min_depth=2, threshold=0.2)]
    got, _ = by_programs(model, requests)
    assert tokens(got) == tokens(by_reference(model, requests))


@pytest.mark.parametrize("criterion, threshold", [("softmax", 0.05), ("saturation", 0.6), ("classifier", 0.6)])
@pytest.mark.parametrize("exits, head", [(EVERY, "lora"), ((2, 5), "shared"), ((1, 3, 4, 5), "own")])
def test_measures_of_calm(place, criterion, threshold, exits, head):
    """As the modules measure; heads that only these know are left to them."""
    model = with_classifier(4, exit_layers=exits, head=head).to(place)
    options = dict(criterion=criterion, threshold=threshold, decay=True)
    requests = [replace(r, **options) for r in random_requests(6, seed=7, new=15)]
    want = by_reference(model, requests)
    assert len({t.exit_layer for s in want for t in s.new[1:]}) > 1, "all leave alike"
    got, decoder = by_programs(model, requests)
    assert_same(got, want, **CLOSE)
    measures = {measure for _, measure in decoder._programs}
    assert measures == (set() if criterion == "softmax" and head == "own" else {criterion})
    ahead, _ = by_programs(model, [replace(r, keep_logits=False) for r in requests])
    assert tokens(ahead) == tokens(got)


def test_criteria_of_one_batch_may_differ(place):
    model = with_classifier(4).to(place)
    kinds = ["policy", "softmax", "saturation", "classifier", "policy"]
    requests = [replace(r, criterion=kind) for r, kind in zip(random_requests(5, seed=3, new=12), kinds, strict=True)]
    got, _ = by_programs(model, requests)
    assert_same(got, by_reference(model, requests), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("head, kinds", [
    ("lora", ["policy", "softmax", "saturation", "classifier"]), ("own", ["softmax", "softmax", "policy"]),
])  # fmt: skip
def test_criteria_do_not_matter_where_nobody_may_leave(place, monkeypatch, head, kinds):
    """One program serves them all, heads of the modules' own included; no step goes through the modules."""
    model = with_classifier(4, head=head).to(place)
    requests = random_requests(len(kinds), seed=3, new=12, min_depth=LAYERS)
    requests = [replace(r, criterion=kind) for r, kind in zip(requests, kinds, strict=True)]
    monkeypatch.setattr(PackedDecoder, "step", None)
    got, decoder = by_programs(model, requests)
    assert {measure for _, measure in decoder._programs} == {None}
    assert_same(got, by_reference(model, requests), rtol=1e-3, atol=2e-4)


def test_a_first_layer_that_owes_is_refused(place):
    """Nothing lists what it would be owed."""
    model = tiny_decoder(seed=3).to(place)
    cache = room(model)
    decoder, (sequence,) = GraphDecoder(model, cache), begin(random_requests(1, seed=1))
    decoder.look()
    pages = Pages(cache)
    pages.reserve(len(sequence) + 2)
    take_tokens([sequence], decoder.prefill([(sequence, pages)]))
    at = len(sequence) - 1
    pages.watermarks[0] -= 1
    with pytest.raises(ValueError, match=f"must have {at} positions in front .* {at}, 0 ahead, got {at - 1}"):
        decoder.step([(sequence, pages)])


def test_new_weights_are_seen(place):
    model = tiny_decoder(seed=1).to(place)
    cache = PagedCache(cache_shape(model, 4), 100, model.device, model.dtype)
    decoder, requests = GraphDecoder(model, cache), random_requests(3, seed=4)

    def run():
        sequences = begin(requests)
        for _ in generate_packed(decoder, sequences, 4):
            pass
        return tokens(sequences)

    first = run()
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mlp.up_proj.weight.mul_(-1.5)
    assert run() == tokens(by_reference(model, requests)) != first


def test_weights_are_shared():
    """Side by side, and still the modules' own."""
    model = tiny_decoder(seed=1)
    attention = model.backbone.layers[0].self_attn
    before = attention.k_proj.weight.clone()
    cache = PagedCache(cache_shape(model, 4), 10, model.device, model.dtype)
    decoder = GraphDecoder(model, cache)
    decoder.look()
    whole = decoder._current.layers[0].qkv
    assert torch.equal(attention.k_proj.weight, before)
    assert attention.k_proj.weight.data_ptr() == whole[attention.q_proj.weight.shape[0] :].data_ptr()
    held = decoder._current
    decoder.look()
    assert decoder._current is held, "moving them is no change: programs would be made twice"
    attention.k_proj.weight.data = before
    decoder.look()
    assert decoder._current is not held, "moved by somebody else"


def test_the_engine_runs_programs(place):
    model = tiny_decoder(seed=2).to(place)
    prompts = [[5, 7, 9], [3], [8, 8, 2, 1]]
    want = DecoderEngine(model, executor="packed").run(prompts, max_new_tokens=12, ignore_eos=True)
    lm = DecoderEngine(model, executor="graph")
    got = lm.run(prompts, max_new_tokens=12, ignore_eos=True)
    assert lm.executor == "graph" and got.token_ids == want.token_ids and got.exit_layers == want.exit_layers
    told = [(t.token_id, t.exit_layer) for t in lm.stream(prompts[0], max_new_tokens=12, ignore_eos=True)]
    assert told == list(zip(want.token_ids[0], want.exit_layers[0], strict=True))
    drawn = dict(max_new_tokens=12, temperature=0.8, seed=3, ignore_eos=True)
    assert lm.run(prompts, **drawn).token_ids == DecoderEngine(model, executor="packed").run(prompts, **drawn).token_ids


def test_who_cannot_be_a_program():
    with pytest.warns(UserWarning, match="cannot serve .it is in float64.*packed serves instead"):
        lm = DecoderEngine(tiny_decoder().double(), executor="graph")
    assert lm.executor == "packed"
    with pytest.raises(ValueError, match="copies states lazily, got 'eager'"):
        DecoderEngine(tiny_decoder(), executor="graph", state_copy="eager")


def test_a_model_that_was_run_can_be_saved(tmp_path):
    """Views of one tensor are still tensors of their own for who stores them."""
    model = tiny_decoder(seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lm = DecoderEngine(model, executor="graph")
    want = lm.run([[3, 4]], max_new_tokens=6).token_ids
    save_checkpoint(model, tmp_path / "ck")
    loaded = engine.load(tmp_path / "ck", device="cpu")
    assert loaded.run([[3, 4]], max_new_tokens=6).token_ids == want
    after = loaded.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- launched ahead ----------------------------------------------------------------------------------------------


def counted(decoder, monkeypatch) -> list[bool]:
    """Whether each attempt to launch a step ahead came to one."""
    found, launch_next = [], decoder.launch_next

    def told(launched):
        following = launch_next(launched)
        found.append(following is not None)
        return following

    monkeypatch.setattr(decoder, "launch_next", told)
    return found


def test_greedy_steps_are_launched_ahead(place, monkeypatch):
    """All but the last of a row, whatever it turns out that the step in front came to."""
    model = tiny_decoder(seed=3).to(place)
    lm = DecoderEngine(model, executor="graph")
    prompts = [[5, 7, 9], [3], [8, 8, 2, 1]]
    want = DecoderEngine(model, executor="reference").run(prompts, max_new_tokens=20, ignore_eos=True)
    lm.run(prompts, max_new_tokens=2)
    ahead = counted(lm._decoder, monkeypatch)
    got = lm.run(prompts, max_new_tokens=20, ignore_eos=True)
    assert got.token_ids == want.token_ids and got.exit_layers == want.exit_layers
    assert ahead == [True] * 18 + [False]
    assert not lm._decoder._under_way
    ahead.clear()
    lm.run(prompts, max_new_tokens=5, temperature=0.7, ignore_eos=True)
    assert not any(ahead)


@pytest.mark.parametrize("waiting", [0, 3])
def test_rows_that_end_while_the_next_step_is_under_way(place, waiting):
    """By a stop id that nobody foresees; what ran in vain leaves no trace, and who waits joins behind it."""
    model = tiny_decoder(seed=3).to(place)
    free = begin(random_requests(4 + waiting, seed=11, new=30))
    for _ in generate_packed(GraphDecoder(model, room(model)), free, 4):
        pass
    stops = frozenset(s.new_ids[len(s.new) // 2] for s in free)
    requests = [replace(s.request, stop_ids=stops, keep_logits=False) for s in free]
    want = by_reference(model, requests)
    assert len({len(s.new) for s in want}) > 2
    got, decoder = by_programs(model, requests, max_rows=4)
    assert tokens(got) == tokens(want)
    assert [s.finish_reason for s in got] == [s.finish_reason for s in want]
    packed = PackedDecoder(model, room(model))
    for _ in generate_packed(packed, begin(requests), 4):
        pass
    assert decoder.settled == packed.settled


def unkept(requests):
    """Steps whose logits somebody wants are not launched ahead."""
    return [replace(request, max_new_tokens=9, keep_logits=False) for request in requests]


def room(model) -> PagedCache:
    return PagedCache(cache_shape(model, 4), 200, model.device, model.dtype)


def test_a_stream_and_a_run_take_turns(place):
    """Each between two steps of the other that know nothing of it."""
    model = tiny_decoder(seed=2).to(place)
    lm = DecoderEngine(model, executor="graph")
    options = dict(max_new_tokens=16, ignore_eos=True)
    alone = lm.run([[5, 7, 9], [3, 1]], **options)
    streams = [iter(lm.stream(prompt, **options)) for prompt in ([5, 7, 9], [3, 1])]
    told = [[], []]
    for turn in range(16):
        for found, stream in zip(told, streams, strict=True):
            found.append(next(stream))
        if turn in (4, 5, 11):
            assert lm.run([[5, 7, 9], [3, 1]], **options).token_ids == alone.token_ids
    assert [[t.token_id for t in found] for found in told] == alone.token_ids
    assert [[t.exit_layer for t in found] for found in told] == alone.exit_layers


def test_heads_of_their_own_are_waited_for(monkeypatch):
    """They read the states of a step behind its graph, and a step from another stream would write over them."""
    finished = []

    class Done:
        def synchronize(self):
            finished.append(self)

    class Program(graph_module._Program):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self._hosts = [host._replace(done=Done()) for host in self._hosts]

        def _mark(self, host):
            pass

    monkeypatch.setattr(graph_module, "_Program", Program)
    model = tiny_decoder(seed=3, head="own")
    (sequence,), decoder = by_programs(model, random_requests(1, seed=4), max_rows=1)
    assert decoder._programs and len(finished) == len(sequence.new) - 1 > 3, "a step each but for the prompt's token"


def test_threads(place):
    model = tiny_decoder(seed=2).to(place)
    lm = DecoderEngine(model, executor="graph")
    prompts = [[5, 7, 9], [3, 1], [4, 4, 4, 4], [6]]
    options = dict(max_new_tokens=24, ignore_eos=True)
    want = [lm.run([prompt], **options).token_ids[0] for prompt in prompts]

    def stream(k: int) -> list[int]:
        return [t.token_id for t in lm.stream(prompts[k % 4], **options)]

    def run(k: int) -> list[int]:
        return lm.run([prompts[k % 4]], **options).token_ids[0]

    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(stream if k % 2 else run, k // 2) for k in range(16)]
        assert [f.result() for f in found] == [want[k // 2 % 4] for k in range(16)]


@pytest.mark.gpu
def test_a_step_is_one_launch_without_a_wait(gpu):
    model = tiny_decoder(seed=2).to("cuda")
    decoder, sequences = GraphDecoder(model, room(model)), begin(unkept(random_requests(5, seed=1, new=9)))
    steps = generate_packed(decoder, sequences, 5)
    for _ in range(3):
        next(steps)  # captured, and a step under way
    decoder._wait()
    scheduler = steps.gi_frame.f_locals["scheduler"]
    assert scheduler.reserve_next()
    rows = list(scheduler._running)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            launched = decoder.launch(rows)
            following = decoder.launch_next(launched)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert following is not None
    launched.outputs()
    following.outputs()
    calls = [event.name for event in trace.events() if event.name.startswith(("cuda", "cu"))]
    assert calls.count("cudaGraphLaunch") == 2 and not any("Synchronize" in name for name in calls)
    steps.close()


@pytest.mark.gpu
def test_ten_thousand_steps_take_no_memory(gpu):
    model = tiny_decoder(seed=2).to("cuda")
    lm = DecoderEngine(model, executor="graph")
    prompts = [[k % 50 + 1] * (k % 7 + 1) for k in range(48)]
    options = dict(max_new_tokens=24, ignore_eos=True)
    want = lm.run(prompts, **options).token_ids
    gc.collect()  # what other tests have left
    torch.cuda.synchronize()
    before, done = torch.cuda.memory_allocated(), 0
    while done < 10_000:
        assert lm.run(prompts, **options).token_ids == want
        done += 23
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
