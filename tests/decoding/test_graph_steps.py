"""A step as a program: graph = packed = reference, on the CPU through the kernels' twins, on a device as graphs."""

from __future__ import annotations

import pytest
import torch

import engine
from engine.decoding.cache import PagedCache
from engine.decoding.generate import begin, generate_packed
from engine.decoding.graph import GraphDecoder
from engine.decoding.packed import cache_shape
from engine.generation import DecoderEngine
from engine.loading import save_checkpoint
from tests.decoding.test_steps import EVERY, assert_same, by_reference, by_steps, tokens
from tests.decoding.tiny import LAYERS, random_requests, tiny_decoder

CLOSE = {torch.float32: dict(rtol=2e-4, atol=2e-4), torch.float16: dict(rtol=5e-2, atol=5e-2)}


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
    assert_same(got, want, **CLOSE[torch.float32])
    assert decoder.settled == packed.settled > 0


@pytest.mark.parametrize("max_rows", [1, 3, 8])
def test_free_running_greedy(place, max_rows):
    """Every token decides for itself, in any company."""
    model = tiny_decoder(seed=3).to(place)
    requests = random_requests(8, seed=11, new=30)
    got, _ = by_programs(model, requests, max_rows=max_rows)
    assert tokens(got) == tokens(by_reference(model, requests))
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
    assert {exits for _, exits in decoder._programs} == {False}
    some = whole + random_requests(3, seed=9)
    got, decoder = by_programs(model, some, max_rows=6)
    assert tokens(got) == tokens(by_reference(model, some))


def test_limits_of_depth(place):
    model = tiny_decoder((1, 3, 5), seed=6).to(place)
    requests = [*random_requests(3, seed=1, max_depth=3), *random_requests(3, seed=2, min_depth=2, threshold=0.2)]
    got, _ = by_programs(model, requests)
    assert tokens(got) == tokens(by_reference(model, requests))


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
    decoder.look()
    assert decoder._current.layers[0].qkv.data_ptr() == whole.data_ptr()


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
