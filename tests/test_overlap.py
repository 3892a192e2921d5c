"""Much text: tokenised part by part, each while the device works on what came before it; the same results as those of
a list that is tokenised at once."""

from __future__ import annotations

import io
import sys
import threading

import numpy as np
import pytest
import torch

import engine
from engine import api, inputs
from engine.executors import RowOutputs
from engine.executors.base import TokenRows
from tests.tiny import MAX_LENGTH, assert_same, random_rows, random_texts

FP32 = dict(rtol=1e-5, atol=3e-5)
LONG = "table " * (MAX_LENGTH + 1)


@pytest.fixture
def in_parts(monkeypatch):
    """Batches of tests count as much text, in parts of a few rows."""
    monkeypatch.setattr(inputs, "_AT_ONCE", 300)
    monkeypatch.setattr(inputs, "_PART", 400)


def at_once(runner, batch, monkeypatch, **options):
    with monkeypatch.context() as patch:
        patch.setattr(inputs, "_AT_ONCE", sys.maxsize)
        return runner.run(batch, **options)


class Tokenizer:
    """Stands before the tokenizers library's and tells of each call with how many rows it came."""

    def __init__(self, inner, tell):
        self.inner, self.tell = inner, tell

    def encode_batch_fast(self, batch):
        self.tell(len(batch))
        return self.inner.encode_batch_fast(batch)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def watched(runner, monkeypatch, tell) -> None:
    for name in ("_backend", "_truncating"):
        monkeypatch.setattr(runner._reader, name, Tokenizer(getattr(runner._reader, name), tell))


# -- the same results --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["packed", "graph", "reference"])
@pytest.mark.parametrize("pairs", [False, True], ids=["texts", "pairs"])
def test_results_are_those_of_a_list_tokenised_at_once(model, tokenizer, executor, pairs, in_parts, monkeypatch):
    runner = engine.from_module(model, tokenizer, executor=executor)
    batch = random_texts(90, seed=1, longest=25)
    if pairs:
        batch = list(zip(batch, random_texts(90, seed=2, longest=25), strict=True))
    draw = torch.Generator().manual_seed(3)
    options = [
        {},
        dict(threshold=torch.rand(90, generator=draw), min_depth=[1, 2, 1] * 30, max_depth=[4, 3, 2] * 30),
        dict(criterion="scripted", exit_layers=torch.randint(1, 5, (90,), generator=draw)),
    ]
    for chosen in options:
        whole = at_once(runner, batch, monkeypatch, batch_tokens=10**6, **chosen)
        for batch_tokens in (1, 100, 333, None, 10**6):
            calls = []
            with monkeypatch.context() as patch:
                watched(runner, patch, calls.append)
                got = runner.run(batch, batch_tokens=batch_tokens, **chosen)
            assert len(calls) > 5 and sum(calls) == 90
            assert_same(got, whole, **FP32)
            assert got.labels == whole.labels
            assert got.stats.exit_histogram == whole.stats.exit_histogram
            assert (got.stats.rows, got.stats.tokens) == (90, whole.stats.tokens)


def test_truncation(packed, in_parts, monkeypatch):
    texts = random_texts(40, seed=4) + [LONG] + random_texts(40, seed=5)
    want = at_once(packed, texts, monkeypatch, truncation=True)
    assert_same(packed.run(texts, truncation=True), want, **FP32)


def test_micro_batches_are_as_full_as_those_of_a_sorted_list(packed, in_parts, monkeypatch):
    texts = random_texts(300, seed=6)
    sizes = []
    submit = packed.executor.submit
    monkeypatch.setattr(packed.executor, "submit", lambda rows, o: (sizes.append(rows.num_tokens), submit(rows, o))[1])
    for budget in (100, 400, 1500):
        want = at_once(packed, texts, monkeypatch, batch_tokens=budget).stats.micro_batches
        sizes.clear()
        got = packed.run(texts, batch_tokens=budget).stats.micro_batches
        assert got == len(sizes) and abs(got - want) <= 1
        assert budget - MAX_LENGTH < min(sizes[:-1]) and max(sizes) <= budget


def test_every_row_is_in_one_micro_batch():
    """Parts of any size, empty budgets and huge rows: all rows, once, with their own tokens."""
    generator = np.random.default_rng(0)
    for trial in range(60):
        rows = random_rows(int(generator.integers(1, 40)), seed=trial)
        order = generator.permutation(len(rows))
        cuts = np.sort(generator.integers(1, len(rows) + 1, int(generator.integers(0, 5))))
        parts = [
            (places, TokenRows(np.concatenate([rows[i] for i in places]), None, tuple(len(rows[i]) for i in places)))
            for places in np.split(order, np.unique(cuts))
            if len(places)
        ]
        budget = int(generator.choice([1, 40, 150, 5000]))
        seen = []
        for places, micro_batch in api._micro_batches(iter(parts), budget):
            assert micro_batch.num_tokens <= budget or len(places) == 1
            assert list(micro_batch.lengths) == sorted(micro_batch.lengths, reverse=True)
            for i, place in enumerate(places.tolist()):
                assert micro_batch[i : i + 1].ids.tolist() == rows[place]
            seen += places.tolist()
        assert sorted(seen) == list(range(len(rows)))


def test_little_text_is_tokenised_at_once(packed, monkeypatch):
    calls = []
    watched(packed, monkeypatch, calls.append)
    packed.run(random_texts(30), batch_tokens=50)
    packed.run([LONG] * 3, truncation=True)
    assert calls == [30, 3]
    packed.run(["a b c " * 6] * 3000)
    assert len(calls) > 4 and sum(calls[2:]) == 3000


def test_parts_of_very_short_texts_hold_no_more_tokens_than_others(packed, monkeypatch):
    calls = []
    watched(packed, monkeypatch, calls.append)
    packed.run(["a"] * 100_000, max_depth=1, batch_tokens=10**6)
    assert 3 * max(calls) < 12_000


# -- overlap -----------------------------------------------------------------------------------------------------


def test_a_part_is_tokenised_while_a_micro_batch_is_on_its_way(packed, in_parts, monkeypatch):
    """From the first micro-batch on, whenever the tokenizer works, the device has something to do."""
    idle, on_its_way, waited_for = observed(packed, monkeypatch)
    packed.run(random_texts(200, seed=7), batch_tokens=200, truncation=True)
    first = idle.index(False)
    assert first <= 5 and len(idle) > 10 and not any(idle[first:])
    assert len(waited_for) == len(on_its_way)


def test_the_next_part_is_tokenised_while_the_caller_works(packed, in_parts, monkeypatch):
    """That one, and no other; whoever stops in between leaves no thread."""
    calls, begun = [], threading.Event()

    def tell(rows):
        calls.append(threading.current_thread())
        if len(calls) == 2:
            begun.set()

    threads = threading.active_count()
    watched(packed, monkeypatch, tell)
    parts = packed._reader.open(random_texts(100, seed=7), True).parts()
    next(parts)
    assert begun.wait(60) and set(calls) - {threading.current_thread()} == set(calls)
    parts.close()
    assert len(calls) == 2 and threading.active_count() == threads


def observed(packed, monkeypatch):
    """(whether the device had nothing to do, at every call of the tokenizer; what was started; what was waited for)"""
    on_its_way, waited_for, idle = [], [], []
    original = packed.executor.submit

    def submit(rows, options):
        outputs = original(rows, options)()
        on_its_way.append(rows)

        def wait() -> RowOutputs:
            waited_for.append(rows)
            return outputs

        return wait

    monkeypatch.setattr(packed.executor, "submit", submit)
    watched(packed, monkeypatch, lambda rows: idle.append(len(on_its_way) - len(waited_for) == 0))
    return idle, on_its_way, waited_for


def test_rows_that_could_be_too_long_are_tokenised_before_the_rest(packed, in_parts, monkeypatch):
    """By their bytes: of 40 characters each, but one that takes two bytes and one long one."""
    texts = [*["a b c " * 5] * 100, "a b \u00e9 " * 5, "a b c " * 12]
    assert 30 + inputs._SPECIAL <= MAX_LENGTH < 4 * 30
    read, started = [], []
    submit = packed.executor.submit
    monkeypatch.setattr(packed.executor, "submit", lambda *a: (started.append(len(read)), submit(*a))[1])
    monkeypatch.setattr(inputs, "_PART", 60)  # a text or two
    tokens = packed._reader._tokens
    monkeypatch.setattr(packed._reader, "_tokens", lambda rows, t: (read.extend(rows), tokens(rows, t))[1])
    packed.run(texts, batch_tokens=200)
    assert len(read) == 102 and set(texts[100:]) <= set(read[:4]), "in front of all others, though they came last"
    assert started[0] < 40, "and the rest while passes run"


@pytest.mark.parametrize("what", ["a vocabulary that the model has not", "no special tokens"])
def test_where_any_row_could_be_wrong_all_are_tokenised_first(packed, in_parts, what, monkeypatch):
    idle, *_ = observed(packed, monkeypatch)
    monkeypatch.setattr(packed._reader, "_knows_all", None)
    if what == "no special tokens":
        monkeypatch.setattr(Tokenizer, "num_special_tokens_to_add", lambda self, pair: 0, raising=False)
    else:
        monkeypatch.setattr(Tokenizer, "get_vocab", lambda self, **options: {"a": 10**9}, raising=False)
    packed.run(random_texts(100, seed=7), batch_tokens=200, truncation=True)
    assert len(idle) > 5 and all(idle)


# -- what is wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong, error", [(3, TypeError), ("  ", ValueError), ("a \ud800", ValueError)], ids=str)
def test_what_the_text_shows_is_refused_before_any_work(packed, in_parts, wrong, error, monkeypatch):
    watched(packed, monkeypatch, lambda rows: pytest.fail("tokenised before the check"))
    with pytest.raises(error, match="row 99 "):
        packed.run([*random_texts(99), wrong])


def test_options_are_refused_before_any_work(packed, in_parts, monkeypatch):
    watched(packed, monkeypatch, lambda rows: pytest.fail("tokenised before the check"))
    for options in (dict(threshold=[0.5] * 99), dict(max_depth=9), dict(batch_tokens=0), dict(criterion="scripted")):
        with pytest.raises((ValueError, TypeError)):
            packed.run(random_texts(100), **options)


def test_the_first_row_of_too_many_tokens_is_named(packed, in_parts, monkeypatch):
    """Whatever part shows one first, and by nothing but its tokens."""
    short_but_many = "? " * (MAX_LENGTH + 1)
    texts = random_texts(120, seed=8)
    texts[30], texts[90] = short_but_many, LONG
    with pytest.raises(ValueError) as whole:
        at_once(packed, texts, monkeypatch)
    good = random_texts(100, seed=9)
    before = packed.run(good)
    with monkeypatch.context() as patch:
        patch.setattr(packed.executor, "submit", lambda *a: pytest.fail("work was done before the check"))
        with pytest.raises(ValueError) as caught:
            packed.run(texts, batch_tokens=100)
    assert str(caught.value) == str(whole.value) and "row 30 " in str(caught.value)
    assert_same(packed.run(good), before, atol=0)


def test_a_row_that_grows_in_its_tokenizer_is_found_under_way(packed, in_parts, monkeypatch):
    """More tokens than bytes, from a normaliser that spells things out: no result, and nothing left behind."""
    good, waited = random_texts(100, seed=9), []
    before = packed.run(good)

    class Spelling(Tokenizer):
        def encode_batch_fast(self, batch):
            return self.inner.encode_batch_fast([LONG if text == "a" else text for text in batch])

    texts = ["b c d e " * 2] * 200 + ["a"]
    submit = packed.executor.submit
    with monkeypatch.context() as patch:
        patch.setattr(packed._reader, "_backend", Spelling(packed._reader._backend, None))
        patch.setattr(packed.executor, "submit", lambda *a: (waited.append(1), submit(*a))[1])
        with pytest.raises(ValueError, match="row 200 has") as caught:
            packed.run(texts, batch_tokens=100)
    assert waited and caught.value.__context__ is None
    assert_same(packed.run(good), before, atol=0)


def test_rows_of_far_too_many_characters_are_found_before_any_work(packed, in_parts, monkeypatch):
    monkeypatch.setattr(packed.executor, "submit", lambda *a: pytest.fail("work was done before the check"))
    with pytest.raises(ValueError, match="row 99 has"):
        packed.run([*random_texts(99), LONG], batch_tokens=100)


@pytest.mark.parametrize("where", ["tokenizer", "executor"])
def test_an_interrupt_leaves_nothing_behind(packed, in_parts, where, monkeypatch):
    texts = random_texts(100, seed=10)
    want = packed.run(texts)
    left = [4]

    def interrupt(*_):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    threads = threading.active_count()
    with monkeypatch.context() as patch:
        if where == "tokenizer":
            watched(packed, patch, interrupt)
        else:
            original = packed.executor.submit
            patch.setattr(packed.executor, "submit", lambda *a: (interrupt(), original(*a))[1])
        with pytest.raises(KeyboardInterrupt):
            packed.run(texts, batch_tokens=100)
    assert threading.active_count() == threads
    assert_same(packed.run(texts), want, atol=0)


def test_a_list_that_changes_under_way_was_read_before(packed, in_parts, monkeypatch):
    texts = random_texts(100, seed=11)
    want = packed.run(texts)
    watched(packed, monkeypatch, lambda rows: texts.__setitem__(slice(None), [None]))
    assert_same(packed.run(texts), want, atol=0)


def test_progress(packed, in_parts, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    packed.run(random_texts(150, seed=12), batch_tokens=100, progress=True)
    assert "150/150" in stream.getvalue()
