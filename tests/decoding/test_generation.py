"""The engine a user holds: texts in, texts out; streams; limits; everything that is wrong, before any work."""

from __future__ import annotations

import gc
import math
import threading

import numpy as np
import pytest
import torch

import engine
from engine.generation import DecoderEngine
from tests.decoding.tiny import LAYERS, byte_tokenizer, tiny_decoder

VOCAB = 258
PROMPTS = ["why is", "a", "the sky über", "x" * 20]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_decoder(vocab=VOCAB, seed=3)


@pytest.fixture
def lm(model, tokenizer):
    return engine.from_module(model, tokenizer)


def assert_timed(stats):
    assert min(stats.prefill_s, stats.decode_s) > 0 and stats.prefill_s + stats.decode_s <= stats.wall_time_s
    assert stats.decode_tokens_per_s > 0 and stats.prompt_tokens_per_s > 0


def test_results(lm, tokenizer):
    out = lm.run(PROMPTS, max_new_tokens=20, ignore_eos=True)
    assert len(out) == 4 and [len(ids) for ids in out.token_ids] == [20] * 4
    for k in range(4):
        assert out.texts[k] == tokenizer.decode(out.token_ids[k], skip_special_tokens=True)
        assert len(out.exit_layers[k]) == len(out.exit_probabilities[k]) == 20
        assert out.exit_layers[k][0] == LAYERS
    assert out.finish_reasons == ["length"] * 4
    stats, depths = out.stats, [d for layers in out.exit_layers for d in layers[1:]]
    assert (stats.rows, stats.new_tokens) == (4, 80)
    assert stats.prompt_tokens == sum(len(p.encode()) for p in PROMPTS)
    assert stats.mean_depth == pytest.approx(sum(depths) / 76) and stats.num_layers == LAYERS
    assert stats.saved_layers == pytest.approx(1 - stats.mean_depth / LAYERS)
    assert_timed(stats)
    assert "4 rows, 80 new tokens, mean depth" in repr(out) and "exits at [1, 2, 3, 4, 5]" in repr(lm)


def test_all_kinds_of_prompts(lm, tokenizer):
    text = "u:hi;a:"
    ids = tokenizer.encode(text)
    want = lm.run([text], max_new_tokens=8)
    for prompt in ([{"role": "user", "content": "hi"}], ids, torch.tensor(ids), tuple(ids), list(np.array(ids))):
        assert lm.run([prompt], max_new_tokens=8).token_ids == want.token_ids


def test_no_prompts(lm):
    out = lm.run([])
    assert len(out) == 0 and out.texts == [] and math.isnan(out.stats.mean_depth)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(temperature=1.0, top_k=40, top_p=0.75, seed=5),
        dict(repetition_penalty=1.2, threshold=[0.1, 0.5, 0.9, 1.0]),
        dict(criterion="scripted", exit_layers=2),
        dict(min_depth=[1, 2, 3, 5], max_depth=[3, 3, 4, 5]),
    ],
    ids=str,
)
def test_packed_is_reference(options):
    model, tokenizer = tiny_decoder(vocab=VOCAB, seed=4).double(), byte_tokenizer()
    packed, oracle = (engine.from_module(model, tokenizer, executor=name) for name in ("packed", "reference"))
    got, want = (e.run(PROMPTS, max_new_tokens=15, **options) for e in (packed, oracle))
    eager = DecoderEngine(model, tokenizer, state_copy="eager").run(PROMPTS, max_new_tokens=15, **options)
    for out in (got, eager):
        assert out.token_ids == want.token_ids and out.exit_layers == want.exit_layers
        assert out.texts == want.texts and out.finish_reasons == want.finish_reasons
    assert_timed(want.stats)
    alone = [packed.run([p], max_new_tokens=15, **_row(options, k)) for k, p in enumerate(PROMPTS)]
    assert [a.token_ids[0] for a in alone] == got.token_ids


def _row(options, k):
    row = {name: value[k] if isinstance(value, list) else value for name, value in options.items()}
    if row.get("temperature"):
        row["seed"] += k
    return row


def test_seeds_and_neighbours(lm):
    options = dict(temperature=1.0, max_new_tokens=12)
    first = lm.run(PROMPTS, seed=1, **options)
    assert lm.run(PROMPTS, seed=1, **options).token_ids == first.token_ids
    assert lm.run(PROMPTS, seed=9, **options).token_ids != first.token_ids
    same = lm.run(["a"] * 3, seed=1, **options)
    assert len(set(map(tuple, same.token_ids))) == 3, "rows of one prompt draw the same"
    last, first = (lm.run(["a"], seed=seed, **options).token_ids[0] for seed in (2**64 - 1, 0))
    assert lm.run(["a"] * 2, seed=2**64 - 1, **options).token_ids == [last, first]


def test_exits_removed_and_scripts(lm):
    out = lm.run(PROMPTS, max_new_tokens=10, min_depth=LAYERS)
    assert {d for layers in out.exit_layers for d in layers} == {LAYERS}
    script = [[LAYERS, 1, 3, 2, 5], [LAYERS, 5, 5, 1, 1]]
    out = lm.run(PROMPTS[:2], max_new_tokens=5, criterion="scripted", exit_layers=script, ignore_eos=True)
    assert out.exit_layers == script
    one = dict(max_new_tokens=np.int64(5), criterion="scripted", exit_layers=np.int64(3), ignore_eos=True)
    assert lm.run(["a"], **one).exit_layers == [[LAYERS, 3, 3, 3, 3]]
    assert [t.exit_layer for t in lm.stream("a", **one)] == [LAYERS, 3, 3, 3, 3]


def test_stop_strings_and_eos(lm, tokenizer, model):
    free = lm.run(["why is"], max_new_tokens=40, ignore_eos=True)
    text = free.texts[0]
    for stop in (text[5], text[7:10], text[:1]):
        out = lm.run(["why is"], max_new_tokens=40, stop=["never to be found", stop], ignore_eos=True)
        assert out.texts[0] == text[: text.index(stop)] and out.finish_reasons == ["stop"]
        assert len(out.token_ids[0]) < 40
    eos = free.token_ids[0][6]
    model.language_model.generation_config.eos_token_id = [eos]
    try:
        fresh = engine.from_module(model, tokenizer)
        out = fresh.run(["why is"], max_new_tokens=40)
        first = free.token_ids[0].index(eos)
        assert out.token_ids[0] == free.token_ids[0][: first + 1] and out.finish_reasons == ["stop"]
        assert out.texts[0] == tokenizer.decode(free.token_ids[0][:first], skip_special_tokens=True)
    finally:
        model.language_model.generation_config.eos_token_id = 2


def test_a_special_token_is_a_stop_string(model):
    """No text shows it, so it is found among the ids."""
    options = dict(max_new_tokens=20, ignore_eos=True)
    tokenizer = byte_tokenizer()
    free = engine.from_module(model, tokenizer).run(["why is"], stop=None, **options).token_ids[0]
    end = next(k for k in range(3, 20) if free[k] not in free[:k])
    token = tokenizer.convert_ids_to_tokens(free[end])
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    lm = engine.from_module(model, tokenizer)
    out = lm.run(["why is"], stop=["never to be found", token], **options)
    assert out.token_ids == [free[: end + 1]] and out.finish_reasons == ["stop"]
    assert out.texts == [tokenizer.decode(free[:end])]
    assert "".join(t.text for t in lm.stream("why is", stop=token, **options)) == out.texts[0]


@pytest.mark.parametrize("executor", ["packed", "reference"])
@pytest.mark.parametrize("stop", [(), ("e",), ("\ufffd", "zz")], ids=str)
def test_a_stream_is_a_run(model, tokenizer, stop, executor):
    lm = engine.from_module(model, tokenizer, executor=executor)
    options = dict(max_new_tokens=25, temperature=0.8, seed=3, stop=stop)
    for prompt in PROMPTS[:2]:
        want, tokens = lm.run([prompt], **options), list(lm.stream(prompt, **options))
        assert "".join(t.text for t in tokens) == want.texts[0]
        assert [t.token_id for t in tokens] == want.token_ids[0]
        assert [t.exit_layer for t in tokens] == want.exit_layers[0]
        assert [t.exit_probability for t in tokens] == pytest.approx(want.exit_probabilities[0])


def test_a_stream_may_end_while_somebody_else_runs(model, tokenizer):
    """Wherever the collector finds it: it waits for nobody, and its room is given back by the next call."""
    lm = DecoderEngine(model, tokenizer)
    cache = lm._decoder.cache
    free, stream = cache.free_blocks, lm.stream("why is", max_new_tokens=30)
    next(stream)
    held = threading.Barrier(2)

    def hold():
        with lm._lock:
            held.wait()
            held.wait()

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    stream.close()
    assert cache.free_blocks < free
    held.wait()
    other.join()
    lm.run(["why"], max_new_tokens=2)
    assert cache.free_blocks == free


def test_streams_tell_no_half_characters_and_no_beginning_of_a_stop_string():
    from engine.generation import _sure

    assert _sure("ab\ufffd", ()) == "ab" and _sure("ab", ("bcd",)) == "a" and _sure("abc", ("bcd", "c!")) == "a"
    assert _sure("abcd", ("x",)) == "abcd"


def test_an_open_stream_holds_its_room_and_no_more(model, tokenizer):
    lm = DecoderEngine(model, tokenizer, cache_bytes=None)
    cache = lm._packed().cache
    free = cache.free_blocks
    stream = lm.stream("why is", max_new_tokens=30)
    assert cache.free_blocks == free - cache.blocks_for(6 + 29)
    want = lm.run(["why is"], max_new_tokens=30)
    assert next(stream).token_id == want.token_ids[0][0], "a run in between changed it"
    assert [t.token_id for t in stream] == want.token_ids[0][1:] and cache.free_blocks == free
    for leave in ("close", "with", "forget", "unread"):
        stream = lm.stream("why is", max_new_tokens=30)
        if leave != "unread":
            next(stream)
        if leave == "with":
            with stream:
                next(stream)
        elif leave == "close":
            stream.close()
            assert list(stream) == []
        del stream
        gc.collect()
        assert cache.free_blocks == free, leave


def test_a_small_budget_is_kept(model, tokenizer):
    block = DecoderEngine(model, tokenizer)._packed().cache.shape.block_bytes(torch.float32)
    small = DecoderEngine(model, tokenizer, cache_bytes=4 * block + 1)
    out = small.run(PROMPTS, max_new_tokens=30, ignore_eos=True)
    assert out.stats.cache_bytes == out.stats.peak_cache_bytes == 4 * block and out.stats.preemptions > 0
    assert small.run(["why is"], max_new_tokens=17, ignore_eos=True).stats.peak_cache_bytes == 2 * block
    assert out.token_ids == DecoderEngine(model, tokenizer).run(PROMPTS, max_new_tokens=30, ignore_eos=True).token_ids
    with pytest.raises(ValueError, match=r"request 0 may need 83 positions .* has room for 64"):
        small.run(["why "], max_new_tokens=80)
    with pytest.raises(ValueError, match="may need 83 positions, the cache has room for 64: close other streams"):
        small.stream("why ", max_new_tokens=80)
    with pytest.raises(ValueError, match=f"cache_bytes must be at least {block}, one block, got {block - 1}"):
        DecoderEngine(model, tokenizer, cache_bytes=block - 1)


def test_two_threads(lm):
    want = [lm.run([p], max_new_tokens=15).token_ids for p in PROMPTS]
    problems = []

    def work(offset):
        for step in range(6):
            k = (step + offset) % 4
            if lm.run([PROMPTS[k]], max_new_tokens=15).token_ids != want[k]:
                problems.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


@pytest.mark.parametrize(
    "prompts, options, error, message",
    [
        ("text", {}, TypeError, "prompts must be a list, got str: for one prompt, put it in a list"),
        ({"input_ids": [1]}, {}, TypeError, "prompts must be a list, got dict"),
        (["a", ""], {}, ValueError, "prompt 1 is an empty string"),
        ([[]], {}, ValueError, "prompt 0 is empty"),
        ([3], {}, TypeError, "prompt 0 must be a string, a list of messages or a list of token ids, got int"),
        ([[1, "a"]], {}, TypeError, "prompt 0 must hold token ids, got 'a' at 1"),
        ([[1, 258]], {}, ValueError, "prompt 0 has token id 258 at 1, allowed are 0 to 257"),
        ([[{"role": "user"}]], {}, ValueError, "prompt 0, message 0, must have role and content"),
        ([[{"role": "foo", "content": "a"}]], {}, ValueError, "message 0, must have one of the roles .* got 'foo'"),
        (["a", "\ud800"], {}, ValueError, "prompt 1 has half a surrogate pair"),
        ([[{"role": "user", "content": "\ud800"}]], {}, ValueError, "prompt 0, message 0, has half a surrogate pair"),
        (["a"], dict(max_new_tokens=0), ValueError, "max_new_tokens must be an integer of at least 1, got 0"),
        (["a"], dict(decay="no"), ValueError, "decay must be a bool, True or False, got 'no'"),
        (["a"], dict(decay=7), ValueError, "decay must be a bool, True or False, got 7"),
        (["a"], dict(ignore_eos="no"), ValueError, "ignore_eos must be a bool, True or False, got 'no'"),
        (["a" * 9], dict(max_new_tokens=120), ValueError, "prompt 0 has 9 tokens and may become 129 .* at most 128"),
        (["a"], dict(temperature=-1), ValueError, "temperature must be 0"),
        (["a"], dict(top_p=2), ValueError, "top_p must be above 0"),
        (["a"], dict(stop=[""]), ValueError, "stop must hold strings of one character or more"),
        (["a"], dict(stop=5), TypeError, "stop must be a string, or a list of strings, got 5"),
        (["a"], dict(stop="</s>!"), ValueError, "stop string '</s>!' holds the special token '</s>', which"),
        (["a"], dict(threshold=1.5), ValueError, r"threshold must lie in \[0, 1\], got 1.5 \(row 0\)"),
        (["a"], dict(threshold=[0.5, 0.5]), ValueError, r"threshold has shape \[2\], the batch has 1 rows"),
        (["a"], dict(min_depth=6), ValueError, r"min_depth must lie between 1 and 5, got 6 \(row 0\)"),
        (["a"], dict(max_depth=0), ValueError, "max_depth must lie between 1, where the first exit stands, and 5"),
        (["a"], dict(min_depth=4, max_depth=3), ValueError, "row 0 may not leave before layer 4"),
        (["a"], dict(criterion="entropy"), ValueError, "criterion must be one of .* got 'entropy'"),
        (["a"], dict(exit_layers=2), ValueError, "exit_layers is for the scripted criterion"),
        (["a"], dict(criterion="scripted"), ValueError, "the scripted criterion needs exit_layers"),
        (["a"], dict(criterion="scripted", exit_layers=[5]), TypeError, r"exit_layers\[0\] must be a list"),
        (["a"], dict(criterion="scripted", exit_layers=[[5]]), ValueError, r"\[0\] must have a layer for each"),
        (["a"], dict(criterion="scripted", exit_layers=7, max_new_tokens=3), ValueError, r"exit_layers\[0\]\[1\] is 7"),
        (
            ["a"],
            dict(criterion="scripted", exit_layers=[[1, 1]], max_new_tokens=2),
            ValueError,
            r"exit_layers\[0\]\[0\] is 1: the first new token comes from the prompt, at 5",
        ),
        (["a"], dict(temprature=1), TypeError, "temprature"),
    ],
)
def test_what_is_wrong(lm, monkeypatch, prompts, options, error, message):
    monkeypatch.setattr(lm._packed(), "prefill", lambda *_: pytest.fail("work was done"))
    with pytest.raises(error, match=message):
        lm.run(prompts, **options)
    if isinstance(prompts, list) and len(prompts) == 1 and "exit_layers" not in str(options):
        with pytest.raises(error, match=message.replace(r"\(row 0\)", "")):
            lm.stream(prompts[0], **options)


def test_text_without_a_tokenizer(model):
    lm = engine.from_module(model)
    out = lm.run([[3, 4, 5]], max_new_tokens=4)
    assert out.texts == [None] and len(out.token_ids[0]) == 4
    assert [t.text for t in lm.stream([3, 4, 5], max_new_tokens=4)] == [""] * 4
    with pytest.raises(ValueError, match="prompt 0 is text and this model has no tokenizer: pass token ids"):
        lm.run(["a"])
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        lm.run([[3]], stop="x")


def test_engines():
    model = tiny_decoder()
    for wrong in ("fast", None):
        with pytest.raises(ValueError, match="a decoder's executor must be one of auto, packed, reference, graph"):
            engine.from_module(model, executor=wrong)


def test_the_model_moves_to_another_dtype(model, tokenizer):
    model = tiny_decoder(vocab=VOCAB, seed=3)
    lm = engine.from_module(model, tokenizer)
    before = lm.run(["a"], max_new_tokens=5)
    model.double()
    after = lm.run(["a"], max_new_tokens=5)
    assert after.stats.cache_bytes > before.stats.cache_bytes
    assert after.token_ids == before.token_ids


def test_a_stream_that_cannot_begin_keeps_no_memory():
    model = tiny_decoder(seed=2)
    lm = DecoderEngine(model, executor="graph")  # packed runs the modules where it cannot take their weights
    list(lm.stream([5, 7], max_new_tokens=3, ignore_eos=True))
    free = lm._decoder.cache.free_blocks
    hook = model.backbone.layers[0].mlp.down_proj.register_forward_hook(lambda module, given, out: out * 3)
    for _ in range(3):
        with pytest.raises(TypeError, match="hooks"):
            lm.stream([5, 7], max_new_tokens=3)
    assert lm._decoder.cache.free_blocks == free
    hook.remove()
    assert len(list(lm.stream([5, 7], max_new_tokens=3, ignore_eos=True))) == 3


def test_a_chat_that_the_template_refuses():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    lm = DecoderEngine(tiny_decoder(vocab=258, seed=2), tokenizer)
    with pytest.raises(ValueError, match="prompt 0: the tokenizer's chat template refuses it: roles must alternate"):
        lm.run([[{"role": "user", "content": "a"}]])
