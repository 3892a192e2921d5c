"""Lazy = eager = reference = (without exits) Hugging Face, over any exits, any batch and any cache that has room."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.decoding.cache import PagedCache, Pages
from engine.decoding.generate import Counts, begin, generate_packed, generate_reference, take_tokens
from engine.decoding.packed import PackedDecoder, cache_shape
from engine.decoding.reference import ReferenceDecoder
from engine.decoding.requests import Request
from engine.kernels.linear import own_kernel
from tests.decoding.tiny import LAYERS, VOCAB, random_requests, tiny_decoder

needs_own_kernel = pytest.mark.skipif(
    not own_kernel(torch.device("cpu"), torch.float32), reason="the extension has no product of its own on this machine"
)
EVERY = tuple(range(1, LAYERS + 1))
LLAMA3 = dict(rope_type="llama3", rope_theta=100.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)  # fmt: skip
LINEAR = dict(rope_type="linear", rope_theta=100.0, factor=4.0)
# Of four frequencies, one is kept, one is blended and two are divided; cos and sin are scaled, too.
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=32)
# Hugging Face's RMSNorm rounds to fp32 whatever the model's dtype is: where two ways differ in the last bit of fp64, a
# norm may differ in the last bit of fp32.
FP64 = dict(rtol=1e-6, atol=1e-6)


def by_reference(model, requests):
    sequences = begin(requests)
    for _ in generate_reference(ReferenceDecoder(model), sequences):
        pass
    return sequences


def by_steps(model, requests, state_copy="lazy", blocks=200, block_size=4, max_rows=5):
    cache = PagedCache(cache_shape(model, block_size), blocks, model.device, model.dtype)
    decoder, sequences = PackedDecoder(model, cache, state_copy), begin(requests)
    for _ in generate_packed(decoder, sequences, max_rows):
        pass
    assert cache.free_blocks == blocks
    return sequences, decoder


def tokens(sequences):
    return [[(t.token_id, t.exit_layer) for t in s.new] for s in sequences]


def assert_same(got, want, **tolerance):
    assert tokens(got) == tokens(want)
    for a, b in zip(got, want, strict=True):
        assert a.finish_reason == b.finish_reason
        torch.testing.assert_close(torch.stack(a.logits), torch.stack(b.logits), **(tolerance or FP64))
        probs = [torch.tensor([t.exit_prob for t in s.new]) for s in (a, b)]
        torch.testing.assert_close(*probs, **(tolerance or dict(rtol=1e-5, atol=1e-6)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("exits", [EVERY, (2, 5), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_scripted_exits_and_forced_tokens(exits, kv_heads, seed):
    model = tiny_decoder(exits, kv_heads=kv_heads, seed=seed).double()
    requests = random_requests(7, seed, exits=exits, forced=True)
    want = by_reference(model, requests)
    for s in want:
        assert [t.exit_layer for t in s.new[1:]] == list(s.request.script[: len(s.new) - 1])
    assert all(s.new[0].exit_layer == LAYERS for s in want), "a prompt runs at full depth"
    for state_copy in ("lazy", "eager"):
        assert_same(by_steps(model, requests, state_copy)[0], want)


@pytest.mark.parametrize("head", ["shared", "lora", "own"])
@pytest.mark.parametrize("side", ["hidden", "logits"])
@pytest.mark.parametrize(
    "rope", [None, LINEAR, LLAMA3, YARN], ids=["plain rope", "linear rope", "llama3 rope", "yarn rope"]
)
def test_free_running_greedy(head, side, rope):
    """Token for token, exit for exit, each deciding for itself."""
    model = tiny_decoder(head=head, head_side=side, rope=rope, seed=3).double()
    requests = random_requests(8, seed=11, new=30)
    want = by_reference(model, requests)
    assert len({t.exit_layer for s in want for t in s.new[1:]}) >= 4, "policies are not spread out"
    for state_copy in ("lazy", "eager"):
        assert_same(by_steps(model, requests, state_copy)[0], want)


def test_exits_removed_equal_hugging_face():
    for tied in (True, False):
        model = tiny_decoder(tied=tied, seed=5)
        for request in random_requests(4, seed=2, new=20):
            request = replace(request, min_depth=LAYERS)
            ids = torch.tensor([request.prompt])
            theirs = model.causal_lm.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request.max_new_tokens,
                do_sample=False,
                eos_token_id=None,
            )
            with torch.no_grad():
                for parameter in model.head_parameters():
                    parameter.zero_()
            for sequences in (by_reference(model, [request]), by_steps(model, [request])[0]):
                assert sequences[0].ids == theirs[0].tolist()


def assert_as_exact_as_plain(model, dtype, ways):
    """Error against fp64 at most three times that of Hugging Face's layers in the same dtype. ways: name -> what runs
    a model and requests; leaves the model in ``dtype``."""
    # What is stored in ``dtype`` is not what this is about: fp64 runs the rounded weights, too.
    model = model.to(dtype).double()
    requests = random_requests(6, seed=4, exits=EVERY, forced=True)
    exact = by_reference(model, requests)
    model.to(dtype)
    errors = {}
    for name, way in (("plain", by_reference), *ways.items()):
        sequences = way(model, requests)
        assert tokens(sequences) == tokens(exact)
        errors[name] = max(
            float((torch.stack(a.logits).double() - torch.stack(b.logits)).abs().max())
            for a, b in zip(sequences, exact, strict=True)
        )
    assert errors["plain"] > 0
    assert max(errors.values()) <= 3 * errors["plain"], errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_errors_of_smaller_dtypes(dtype):
    ways = {how: lambda model, requests, how=how: by_steps(model, requests, how)[0] for how in ("lazy", "eager")}
    assert_as_exact_as_plain(tiny_decoder(seed=7), dtype, ways)


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("max_rows", [1, 3, 9])
def test_batch_and_blocks_do_not_matter(block_size, max_rows):
    model = tiny_decoder(seed=1).double()
    requests = random_requests(9, seed=6)
    want = [by_steps(model, [r])[0][0] for r in requests]
    got = by_steps(model, requests, block_size=block_size, max_rows=max_rows)[0]
    assert_same(got, want)


@pytest.mark.parametrize("state_copy", ["lazy", "eager"])
@pytest.mark.parametrize("blocks", [17, 20, 26])
def test_preempted_sequences_are_replayed_with_their_exits(state_copy, blocks):
    """A cache too small for all of them: rows lose their blocks, and nothing of what they say."""
    model = tiny_decoder(seed=2).double()
    requests = random_requests(8, seed=8, longest=20, new=45)
    want = by_reference(model, requests)
    cache = PagedCache(cache_shape(model, 4), blocks, model.device, model.dtype)
    decoder, sequences = PackedDecoder(model, cache, state_copy), begin(requests)
    replayed = []
    prefill = decoder.prefill
    decoder.prefill = lambda rows: (replayed.extend(s.number for s, _ in rows if s.new), prefill(rows))[1]
    for _ in generate_packed(decoder, sequences, 8):
        pass
    assert replayed, "nobody was preempted"
    assert_same(sequences, want)
    assert cache.free_blocks == blocks


def test_a_replay_at_full_depth_would_change_the_continuation():
    """Why tokens are frozen: the negative control of the test above."""
    model = tiny_decoder(seed=2).double()
    request = random_requests(1, seed=9, new=1, exits=(1,), forced=True)[0]
    request = replace(request, max_new_tokens=12, script=(1,) * 10 + (LAYERS,), forced=tuple(range(12)))
    want = by_reference(model, [request])[0]
    other = by_reference(model, [replace(request, script=(LAYERS,) * 11)])[0]
    assert float((want.logits[-1] - other.logits[-1]).abs().max()) > 1e-3


@st.composite
def decodes(draw):
    """Exit layers, requests that leave by script or by policy, and before which steps the first row loses its pages."""
    exits = (*sorted(draw(st.sets(st.integers(1, LAYERS - 1)))), LAYERS)
    requests = []
    for k in range(draw(st.integers(1, 6))):
        script = tuple(draw(st.lists(st.sampled_from(exits), min_size=1, max_size=10)))
        limits = dict(min_depth=draw(st.integers(1, LAYERS)), max_depth=draw(st.sampled_from((None, *exits))))
        if limits["max_depth"] is not None and limits["max_depth"] < limits["min_depth"]:
            limits = {}
        prompt = (7 * k + 3,) * draw(st.integers(1, 9))
        requests.append(Request(prompt, 1 + len(script), script=script if draw(st.booleans()) else None, **limits))
    return exits, requests, draw(st.sets(st.integers(1, 9), max_size=2))


def watch_watermarks(decoder, requests, lost, look: Callable | None = None):
    """Decode with an eye on every row's watermarks behind every step.

    look  called with the step that ran last, and its rows
    """
    sequences = begin(requests)
    rows = [(s, Pages(decoder.cache)) for s in sequences]
    for _, pages in rows:
        pages.reserve(24)
    take_tokens(sequences, decoder.prefill(rows))
    count = 0
    while rows := [row for row in rows if row[0].finish_reason is None]:
        count += 1
        if count in lost:
            sequence, pages = rows[0]
            pages.release()
            pages.reserve(24)
            decoder.prefill(rows[:1])
            assert pages.watermarks == [len(sequence) - 1] * LAYERS
        steps = [decoder.launch(rows)]
        following = decoder.launch_next(steps[0])
        if following is not None:
            steps.append(following)
        for step in steps:
            before = [(len(s) - 1, list(pages.watermarks)) for s, pages in rows]
            outputs = step.outputs()
            for (_, pages), (position, old), layer in zip(rows, before, outputs.exit_layers, strict=True):
                marks = pages.watermarks
                assert marks == sorted(marks, reverse=True)
                assert marks[:layer] == [position + 1] * layer
                assert marks[layer:] == old[layer:] and all(mark <= position for mark in marks[layer:])
                assert pages.owed == sum(position + 1 - mark for mark in marks)
            take_tokens([s for s, _ in rows], outputs)
        if look is not None:
            look(steps[-1], rows)


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=needs_own_kernel)], ids=str)
@settings(max_examples=60, deadline=None)
@given(decode=decodes(), seed=st.integers(0, 99))
def test_watermarks_never_rise_with_depth_and_owed_states_are_settled_on_a_visit(dtype, decode, seed):
    """fp64: module by module; fp32: a step as one op."""
    exits, requests, lost = decode
    model = tiny_decoder(exits, seed=seed).to(dtype)
    decoder = PackedDecoder(model, PagedCache(cache_shape(model, 4), 36, model.device, dtype))
    decoder.look()
    assert (decoder._plan is not None) == (dtype == torch.float32)
    watch_watermarks(decoder, requests, lost)


def long_shallow_decode(rows, hidden=32):
    """A model, requests whose rows leave at the first layer for 300 tokens and then visit the last one, at
    which hundreds of positions are owed; and how many are settled in all."""
    model, steps = tiny_decoder(seed=6, exit_layers=(1, 5), positions=512, hidden=hidden), 300
    requests, settled = [], 0
    for k in range(rows):
        shallow = steps - 2 - k
        forced = tuple((7 * k + i) % VOCAB for i in range(steps))
        script = (1,) * shallow + (LAYERS,) * (1 + k)
        requests.append(Request((3, 4, 5), steps, script=script, forced=forced, keep_logits=True))
        settled += shallow * (LAYERS - 1)
    return model, requests, settled


@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, FP64), pytest.param(torch.float32, dict(rtol=1e-3, atol=2e-4), marks=needs_own_kernel)],
    ids=["modules", "one op"],
)
def test_a_long_shallow_decode_and_one_deep_visit(dtype, tolerance):
    """Hundreds of owed rows settled by one token."""
    model, requests, settled = long_shallow_decode(1)
    want = by_reference(model.to(dtype), requests)
    for state_copy in ("lazy", "eager"):
        got, decoder = by_steps(model, requests, state_copy)
        assert decoder.settled == settled
        assert_same(got, want, **tolerance)


def test_what_nobody_visits_again_is_never_computed():
    model = tiny_decoder(seed=6)
    request = Request((1, 2, 3), 20, script=(1,) * 19)
    assert by_steps(model, [request], "lazy")[1].settled == 0
    assert by_steps(model, [request], "eager")[1].settled == 19 * (LAYERS - 1)


@pytest.mark.parametrize("state_copy", ["lazy", "eager"])
def test_limits_of_each_row(state_copy):
    model = tiny_decoder(seed=9).double()
    requests = random_requests(6, seed=5, new=15)
    requests = [
        replace(r, min_depth=1 + k % 3, max_depth=3 + k % 3, threshold=(0.0, 0.3, 0.5, 0.9, 1.0, 0.5)[k])
        for k, r in enumerate(requests)
    ]
    want = by_reference(model, requests)
    assert_same(by_steps(model, requests, state_copy)[0], want)
    for s in want:
        layers = [t.exit_layer for t in s.new[1:]]
        assert all(s.request.min_depth <= layer <= s.request.max_depth for layer in layers)
        assert all(t.exit_prob == 1.0 for t in s.new if t.exit_layer == s.request.max_depth)
    assert {t.exit_layer for t in want[0].new[1:]} <= {1}  # threshold 0: at once
    assert {t.exit_layer for t in want[4].new[1:]} <= {4}  # threshold 1: never before the limit


def test_stop_ids():
    model = tiny_decoder(seed=1)
    free = by_reference(model, [Request((5, 6), 20)])[0]
    stop = free.new[6].token_id
    first = next(k for k, t in enumerate(free.new) if t.token_id == stop)
    for sequences in (
        by_reference(model, [Request((5, 6), 20, stop_ids=frozenset([stop]))]),
        by_steps(model, [Request((5, 6), 20, stop_ids=frozenset([stop]))])[0],
    ):
        assert sequences[0].finish_reason == "stop" and tokens(sequences) == [tokens([free])[0][: first + 1]]


def test_an_iterator_that_is_closed_gives_everything_back():
    model = tiny_decoder()
    cache = PagedCache(cache_shape(model, 4), 50, model.device, model.dtype)
    steps = generate_packed(PackedDecoder(model, cache), begin(random_requests(5, new=30)), 3)
    for _ in range(4):
        next(steps)
    assert cache.free_blocks < 50
    steps.close()
    assert cache.free_blocks == 50


def in_use() -> tuple[int, int]:
    """Objects of Python, and bytes that somebody has from malloc (0 where it does not say). The size of the process
    would tell less: what other tests have given back would be used up before it grows."""

    class Info(ctypes.Structure):  # struct mallinfo2 of glibc
        names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

    gc.collect()
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return sys.getallocatedblocks(), 0
    ask.restype = Info
    told = ask()
    return sys.getallocatedblocks(), told.uordblks + told.hblkhd


def decode_for(decoder, count) -> tuple[int, int]:
    """``count`` decode steps or a few more, in runs that preempt. What they leave behind: see ``in_use``."""
    blocks, done, preempted = decoder.cache.num_blocks, 0, 0

    def step(rows, run=decoder.step):
        nonlocal done
        done += 1
        return run(rows)

    decoder.step = step
    try:
        seed = 0
        while done < count:
            counts = Counts()
            for _ in generate_packed(decoder, begin(random_requests(5, seed % 20, longest=8, new=40)), 4, counts):
                pass
            assert decoder.cache.free_blocks == blocks and sorted(decoder.cache._free) == list(range(blocks))
            preempted, seed = preempted + counts.preemptions, seed + 1
    finally:
        del decoder.step
    assert preempted, "nobody was preempted"
    return in_use()


@pytest.mark.parametrize(
    "dtype, steps", [pytest.param(torch.float32, 10_000, marks=needs_own_kernel), (torch.float64, 1_500)], ids=str
)
def test_memory_does_not_grow(dtype, steps):
    """Ten thousand decode steps in one cache, each as one op; fewer module by module (fp64), which takes longer. Two
    thirds of them leave nothing behind, once the first has made what is kept."""
    model = tiny_decoder(exit_layers=(1, 5)).to(dtype)
    decoder = PackedDecoder(model, PagedCache(cache_shape(model, 4), 24, model.device, model.dtype))
    thirds = [decode_for(decoder, math.ceil(steps / 3)) for _ in range(3)]
    assert (decoder._plan is not None) == (dtype == torch.float32)
    objects, size = ([third[k] for third in thirds] for k in range(2))
    # Less than one object, or 32 bytes, in two steps: a step that keeps anything keeps more.
    assert objects[2] - objects[0] < steps / 3, thirds
    assert size[2] - size[0] < 32 * steps / 3 + (1 << 17), thirds


def test_state_copy_by_name():
    model = tiny_decoder()
    cache = PagedCache(cache_shape(model), 2, model.device, model.dtype)
    with pytest.raises(ValueError, match="state_copy must be one of lazy, eager, got 'never'"):
        PackedDecoder(model, cache, "never")
    assert math.isclose(cache.shape.block_bytes(torch.float16), 16 * 2 * (2 * 5 * 2 * 8 + 32))


# -- a step as one op --------------------------------------------------------------------------------------------


@needs_own_kernel
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("exits", [EVERY, (2, 5), (3, 4, 5), (5,)], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_step_as_one_op_is_the_modules(exits, kv_heads, seed, monkeypatch):
    """fp32, lazy: the same exits and tokens as module by module, with scripts and with policies of their own."""
    model = tiny_decoder(exits, kv_heads=kv_heads, seed=seed, rope=LLAMA3 if seed % 2 else None)
    requests = random_requests(7, seed, exits=exits, forced=True)
    free = [
        replace(r, threshold=(0.2, 0.5, 0.8)[k % 3], min_depth=1 + k % 2, max_depth=(None, exits[-2:][0])[k % 2])
        for k, r in enumerate(random_requests(7, seed + 50, forced=True, new=20))
    ]
    for some in (requests, free):
        for blocks in (200, 12):  # preempted, and replayed
            got, decoder = by_steps(model, some, blocks=blocks)
            assert decoder._plan is not None
            with monkeypatch.context() as patched:
                patched.setattr("engine.decoding.packed.own_kernel", lambda *_: False)
                want, plain = by_steps(model, some, blocks=blocks)
            assert plain._plan is None and plain.settled == decoder.settled
            assert_same(got, want, rtol=1e-3, atol=2e-4)


@needs_own_kernel
def test_weights_changed_between_runs_are_seen():
    model = tiny_decoder(seed=3)
    cache = PagedCache(cache_shape(model, 4), 100, model.device, model.dtype)
    decoder, requests = PackedDecoder(model, cache), random_requests(3, seed=1, forced=True, exits=EVERY)

    def run():
        sequences = begin(requests)
        for _ in generate_packed(decoder, sequences, 3):
            pass
        return sequences

    before, plan = run(), decoder._plan
    assert run() and decoder._plan is plan, "packed again though nothing changed"
    with torch.no_grad():
        model.backbone.layers[1].mlp.up_proj.weight.mul_(1.5)
    after = run()
    assert decoder._plan is not plan
    assert float((torch.stack(before[0].logits) - torch.stack(after[0].logits)).abs().max()) > 1e-3
    assert_same(after, by_reference(model, requests), rtol=1e-3, atol=2e-4)


@needs_own_kernel
def test_an_adapter_is_folded_in_and_what_cannot_be_is_called():
    from peft import LoraConfig, get_peft_model

    requests = random_requests(4, seed=2, forced=True, exits=EVERY)
    for options, folded in ((dict(), True), (dict(use_dora=True), False)):
        model = tiny_decoder(seed=4)
        lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)
        model.causal_lm = get_peft_model(model.causal_lm, lora).eval()
        got, decoder = by_steps(model, requests)
        assert (decoder._plan is not None) == folded
        assert_same(got, by_reference(model, requests), rtol=1e-3, atol=2e-4)
