"""A decoder's own options through ``load``, ``from_module`` and the command line; an encoder refuses them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import engine
from engine.decoding.packed import cache_shape
from engine.loading import save_checkpoint
from tests.decoding.tiny import save_talker, tiny_decoder
from tests.test_cli import call, refused
from tests.tiny import tiny_model, tiny_tokenizer

PROMPTS = [[5, 7, 9], [3], [8, 8, 2, 1]]
BLOCK = cache_shape(tiny_decoder(vocab=258)).block_bytes(torch.float32)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return save_talker(tmp_path_factory.mktemp("lm") / "lm")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return str(save_checkpoint(tiny_model(), tmp_path_factory.mktemp("ee") / "ee", tiny_tokenizer()))


@pytest.fixture(params=["load", "from_module"])
def make(request, decoder):
    """An engine of the decoder with options, made either way."""
    if request.param == "load":
        return lambda **options: engine.load(decoder, device="cpu", **options)
    model = engine.load(decoder, device="cpu").model
    return lambda **options: engine.from_module(model, **options)


def test_they_arrive(make):
    plain = make()
    want = plain.run(PROMPTS, max_new_tokens=40)
    small = make(cache_bytes=4 * BLOCK + 1)
    got = small.run(PROMPTS, max_new_tokens=40)
    assert got.stats.cache_bytes == 4 * BLOCK < want.stats.cache_bytes
    assert got.stats.preemptions > 0 == want.stats.preemptions
    assert got.token_ids == want.token_ids and got.exit_layers == want.exit_layers
    assert plain._decoder.state_copy == make(state_copy="lazy")._decoder.state_copy == "lazy"
    eager = make(state_copy="eager", cache_bytes=9 * BLOCK)
    assert (eager.executor, eager._decoder.state_copy, eager._decoder.cache.bytes) == ("packed", "eager", 9 * BLOCK)
    assert eager.run(PROMPTS, max_new_tokens=40).token_ids == want.token_ids
    assert make(cache_bytes=BLOCK, executor="graph")._decoder.cache.bytes == BLOCK
    assert make(cache_bytes=BLOCK, executor="reference").run([[3]], max_new_tokens=2).stats.cache_bytes == 0


@pytest.mark.parametrize("executor", ["auto", "reference"])
@pytest.mark.parametrize("options, message", [
    (dict(state_copy="never"), "state_copy must be one of lazy, eager, got 'never'"),
    (dict(state_copy=""), "state_copy must be one of lazy, eager, got ''"),
    (dict(cache_bytes=0), "cache_bytes must be a positive integer, or None for the default, got 0"),
    (dict(cache_bytes=-5), "cache_bytes must be a positive integer, .* got -5"),
    (dict(cache_bytes=True), "cache_bytes must be a positive integer, .* got True"),
    (dict(cache_bytes=1e9), "cache_bytes must be a positive integer, .* got 1000000000.0"),
    (dict(cache_bytes="1 GiB"), "cache_bytes must be a positive integer, .* got '1 GiB'"),
])  # fmt: skip
def test_wrong_values(make, monkeypatch, executor, options, message):
    """Of them all but what needs the model's shape are found before anything is read."""
    monkeypatch.setattr("engine.loading.resolve_checkpoint", None)
    with pytest.raises(ValueError, match=message):
        make(executor=executor, **options)


def test_values_that_do_not_go_together(make, monkeypatch):
    with pytest.raises(ValueError, match=f"cache_bytes must be at least {BLOCK}, one block, got {BLOCK - 1}"):
        make(cache_bytes=BLOCK - 1)
    monkeypatch.setattr("engine.loading.resolve_checkpoint", None)
    with pytest.raises(ValueError, match="the graph executor copies states lazily, got 'eager': packed knows both"):
        make(executor="graph", state_copy="eager")


@pytest.mark.parametrize("options, named", [
    (dict(cache_bytes=1 << 20), r"cache_bytes=1048576: for decoders, and {} is an encoder, .*: leave it out"),
    (dict(state_copy="lazy"), r"state_copy='lazy': for decoders, and {} is an encoder, .*: leave it out"),
    (dict(cache_bytes=7, state_copy="eager"), r"cache_bytes=7, state_copy='eager': for decoders.*: leave them out"),
])  # fmt: skip
def test_an_encoder_refuses_them(encoder, monkeypatch, options, named):
    with pytest.raises(ValueError, match=named.format("the model")):
        engine.from_module(tiny_model(), **options)
    monkeypatch.setattr("engine.loading.load_model", None)  # said before the weights are read
    with pytest.raises(ValueError, match=named.format(encoder)):
        engine.load(encoder, device="cpu", **options)


@pytest.mark.parametrize("options", [{}, dict(cache_bytes=9 * BLOCK)])
def test_a_hub_id_is_resolved_once(decoder, monkeypatch, options):
    """Asked twice, a model of several files might be one of two revisions."""
    asked = []
    monkeypatch.setattr("engine.loading.hub_snapshot", lambda name, **_: (asked.append(name), Path(decoder))[1])
    engine.load("somebody/some-model", device="cpu", **options)
    assert asked == ["somebody/some-model"]


def test_an_encoder_without_them(encoder):
    engine.load(encoder, device="cpu", cache_bytes=None, state_copy=None).run(["text"])
    engine.from_module(tiny_model(), cache_bytes=None, state_copy=None).run({"input_ids": [[5, 6]]})


def test_the_command(decoder, encoder):
    arguments = "run", decoder, "why", "--max-new-tokens", 20, "--json", "--device", "cpu"
    (want,), (got,) = (
        [json.loads(line) for line in call(*arguments, *more).stdout.splitlines()]
        for more in ((), ("--cache-bytes", 4 * BLOCK))
    )
    assert got == want
    assert f"cache_bytes must be at least {BLOCK}, one block, got 5" in refused(*arguments, "--cache-bytes", 5)
    assert "has room for 16" in refused(*arguments, "--cache-bytes", BLOCK)
    for size in (0, 5):
        said = refused("run", encoder, "text", "--cache-bytes", size)
        assert "--cache-bytes: for decoders, and this checkpoint is a classifier" in said
