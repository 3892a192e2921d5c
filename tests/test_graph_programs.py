"""Programs of the graph executor: which one serves a batch, when one is made, what it costs the others."""

from __future__ import annotations

import gc
from weakref import WeakSet

import pytest
import torch

import engine
from engine.executors import graph as graph_module
from engine.executors import weights as weights_module
from engine.executors.graph import Capacity, capacity_for
from tests.test_executors import FP32
from tests.test_graph import both
from tests.tiny import (
    Half,
    assert_same,
    padded,
    random_rows,
    tiny_model,
)


def test_capacities():
    assert capacity_for(1, 5, 5, 512) == Capacity(1, 64, 32)
    assert capacity_for(5, 97, 33, 512) == Capacity(6, 128, 64)
    assert capacity_for(32, 4096, 128, 512) == Capacity(32, 4096, 128)
    assert capacity_for(33, 4097, 129, 200) == Capacity(48, 6144, 200)
    for n in range(1, 3000):
        for least in (1, 64):
            found = graph_module._up(n, least)
            assert n <= found <= max(least, 1.5 * n + 1)


def programs_made(monkeypatch) -> list[Capacity]:
    """Grows by the capacity of every program that is made."""
    made, original = [], graph_module._Program.__init__

    def init(self, weights, arena, capacity, *rest):
        made.append(capacity)
        original(self, weights, arena, capacity, *rest)

    monkeypatch.setattr(graph_module._Program, "__init__", init)
    return made


def test_a_capacity_is_made_once(device, monkeypatch):
    fast = engine.from_module(tiny_model().to(device), executor="graph")
    fast.executor.weights.watching = False
    made = programs_made(monkeypatch)
    for size in (5, 6, 5, 6, 5):
        fast.run(padded(random_rows(size, seed=size)), threshold=0.9)
    first = len(made)
    for size in (5, 6):
        fast.run(padded(random_rows(size, seed=size)), threshold=0.1)  # a threshold is a value, not a program
    assert 1 <= first <= 2 and len(made) == first


@pytest.mark.gpu
def test_batches_seen_before_take_a_short_way(gpu, monkeypatch):
    model = tiny_model("bert", "none").cuda()
    fast, oracle = both(model)
    fast.executor.weights.watching = False
    cases = [(padded(random_rows(n, seed=n)), options) for n in (1, 5, 33) for options in ({}, {"threshold": 0.3})]
    first = [fast.run(batch, **options) for batch, options in cases]
    fast.run(padded(random_rows(9, lengths=[5] * 9)))
    with monkeypatch.context() as patch:
        patch.setattr(fast.executor, "_program", None)  # the long way would call it
        for lengths in ([6] * 9, [7, 1, 2, 30, 3, 3, 3, 3, 3]):  # as many rows, and a program that there is
            batch = padded(random_rows(9, lengths=lengths))
            assert_same(fast.run(batch), oracle.run(batch))
        again = [fast.run(batch, **options) for batch, options in reversed(cases)][::-1]
        for got, before, (batch, options) in zip(again, first, cases, strict=True):
            assert_same(got, before)
            assert_same(got, oracle.run(batch, **options))
    with torch.no_grad():
        for classifier in model.exits.classifiers:
            classifier.bias += 3.0 * torch.arange(len(classifier.bias), device="cuda")
    fast.refresh()
    batch, options = cases[-1]
    assert_same(fast.run(batch, **options), oracle.run(batch, **options))


@pytest.mark.gpu
def test_options_of_one_call_take_the_short_way(gpu, monkeypatch):
    """Those that a program was made for: what it does, not what it was first asked with."""
    model = tiny_model("bert", "none").cuda()
    fast, oracle = both(model)
    fast.executor.weights.watching = False
    batch = padded(random_rows(6))
    fast.run(batch, criterion="scripted", exit_layers=[1] * 6)
    fast.run(batch, threshold=0.4)
    known, records, submit = dict(fast.executor._known), WeakSet(), fast.executor.submit

    def submitted(rows, options):
        records.add(options)
        return submit(rows, options)

    with monkeypatch.context() as patch:
        patch.setattr(fast.executor, "submit", submitted)
        patch.setattr(fast.executor, "_program", None)  # the long way would call it
        for script in ([1, 2, 3, 1, 2, 3], [3] * 6, [2, 1, 1, 1, 1, 3]):
            assert fast.run(batch, criterion="scripted", exit_layers=script).exit_layers.tolist() == script
        thresholds = [0.1, 0.9, 0.5, 0.3, 0.2, 0.7]
        assert_same(fast.run(batch, threshold=thresholds), oracle.run(batch, threshold=thresholds))
    gc.collect()
    assert len(records) <= 2  # the last ones, which buffers of the two programs hold
    assert fast.executor._known == known and len(known) == 2
    with pytest.warns(UserWarning, match="'half' is neither"):  # though a script's program looks alike
        got = fast.run(batch, criterion=Half())
    assert_same(got, oracle.run(batch, criterion=Half()), rtol=1e-4, atol=3e-5)


def test_what_a_large_batch_needed_does_not_push_out_small_ones(device, monkeypatch):
    """Its buffers alone are more than the limit; theirs are not."""
    fast, oracle = both(tiny_model().to(device))
    large, *small = (padded(random_rows(size, seed=size)) for size in (600, 1, 9))
    made = programs_made(monkeypatch)
    fast.run(large, batch_tokens=10**6)
    (alone,) = fast.executor._programs.values()
    monkeypatch.setattr(fast.executor, "_limit", lambda: alone.arena.bytes)
    for batch in (*small, *small, *small):
        got, want = fast.run(batch), oracle.run(batch)
        assert torch.equal(got.exit_layers, want.exit_layers)
    assert len(made) == 4 and len(fast.executor._programs) == 2, "the first small one took the large buffers over"


def test_no_memory_for_a_program_costs_the_others_first(device, monkeypatch):
    fast, oracle = both(tiny_model().to(device))
    small, large = (padded(random_rows(size, seed=size)) for size in (3, 40))
    fast.run(small)
    original, held = graph_module.Arena.__init__, []

    def short(self, *given):
        held.append(len(fast.executor._programs))
        if fast.executor._programs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(self, *given)

    monkeypatch.setattr(graph_module.Arena, "__init__", short)
    got = fast.run(large, batch_tokens=10**6)
    assert held == [1, 0] and got.stats.micro_batches == 1 and len(fast.executor._programs) == 1
    assert torch.equal(got.exit_layers, oracle.run(large).exit_layers)

    def none(self, *given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graph_module.Arena, "__init__", none)
    with pytest.raises(RuntimeError, match="out of memory on .* for a single row of"):
        fast.run(padded(random_rows(90, seed=1)), batch_tokens=10**6)
    assert fast.executor._arena is None and not fast.executor._programs


def test_values_that_change_in_place_cost_no_program(device, monkeypatch):
    """Not of queries, keys and values, which are copied, nor of a module's own tensors, nor those made ahead."""
    model = tiny_model().to(device)
    fast, oracle = both(model)
    fast.warm_up(16, 256)
    made, batch = programs_made(monkeypatch), {"input_ids": torch.randint(5, 60, (12, 16))}
    before = fast.run(batch, threshold=0.9)
    layer = model.encoder_backbone.encoder.layer[1]
    for weight in (layer.attention.self.value.weight, layer.attention.self.query.bias, layer.output.dense.weight):
        with torch.no_grad():
            weight += 0.3 * torch.randn_like(weight)
        got = fast.run(batch, threshold=0.9)
        assert not torch.allclose(got.logits, before.logits)
        torch.testing.assert_close(got.logits, oracle.run(batch, threshold=0.9).logits, **FP32)
        before = got
    assert made == []
    layer.output.dense.weight.data = layer.output.dense.weight.data.clone()
    torch.testing.assert_close(fast.run(batch, threshold=0.9).logits, before.logits, **FP32)
    assert [capacity.rows for capacity in made] == [16], "at the new place, as large as was asked for ahead"


def test_a_run_looks_at_the_weights_once(device, monkeypatch):
    model = tiny_model().to(device)
    looks, original = [], weights_module._contents
    monkeypatch.setattr(weights_module, "_contents", lambda found: (looks.append(1), original(found))[1])
    for executor in ("graph", "packed"):
        fast, batch = engine.from_module(model, executor=executor), padded(random_rows(20))
        fast.run(batch)
        looks.clear()
        assert fast.run(batch, batch_tokens=16).stats.micro_batches > 5 and len(looks) == 1


def test_warming_up_looks_at_the_model_first(device, monkeypatch):
    model = tiny_model().to(device)
    fast, batch = engine.from_module(model, executor="graph"), {"input_ids": torch.randint(5, 60, (12, 16))}
    fast.warm_up(16, 256)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    made = programs_made(monkeypatch)
    fast.warm_up(16, 256)
    fast.run(batch)
    assert [capacity.rows for capacity in made] == [16]


def test_capacities_asked_for_that_do_not_fit_together(device, monkeypatch):
    """Each fits alone, as do the batches' own: nothing is made at every batch."""
    fast, oracle = both(tiny_model().to(device))
    batches = [{"input_ids": torch.randint(5, 60, (rows, 16))} for rows in (9, 24)]
    fast.warm_up(16, 256)
    fast.warm_up(40, 640)
    largest = list(fast.executor._programs.values())[-1]
    monkeypatch.setattr(fast.executor, "_limit", lambda: largest.bytes + largest.arena.bytes)
    made = programs_made(monkeypatch)
    for batch in batches * 4:
        assert torch.equal(fast.run(batch).exit_layers, oracle.run(batch).exit_layers)
    assert len(made) <= 4


def test_no_memory_to_look_costs_programs_first(device, monkeypatch):
    model = tiny_model().to(device)
    fast, oracle = both(model)
    batch = padded(random_rows(9))
    fast.run(batch)
    original, tries = fast.executor.weights._derive, []

    def derive(found):
        tries.append(len(fast.executor._programs))
        if tries[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(found)

    monkeypatch.setattr(fast.executor.weights, "_derive", derive)
    with torch.no_grad():
        model.exits.classifiers[0].bias += 2.0
    got = fast.run(batch, threshold=0.1)
    assert tries == [1, 0]
    torch.testing.assert_close(got.logits, oracle.run(batch, threshold=0.1).logits, **FP32)


def test_calls_that_are_refused_do_not_look(device, monkeypatch):
    fast, looks = engine.from_module(tiny_model().to(device), executor="graph"), []
    monkeypatch.setattr(fast.executor, "look", lambda: looks.append(1))
    with pytest.raises(ValueError, match="batch_tokens"):
        fast.run(padded(random_rows(3)), batch_tokens=0)
    fast.run([])
    assert looks == []


def test_token_types_come_and_go(device):
    """In the buffers of one program."""
    fast, oracle = both(tiny_model().to(device))
    batch = padded(random_rows(5, seed=3))
    types = torch.randint(0, 2, batch["input_ids"].shape)
    for given in (batch, batch | {"token_type_ids": types}, batch, batch | {"token_type_ids": 1 - types}):
        assert_same(fast.run(given), oracle.run(given), **FP32)
    assert len(fast.executor._programs) == 1


def test_programs_keep_to_their_share_of_memory(device, monkeypatch):
    fast, oracle = both(tiny_model().to(device))
    executor = fast.executor
    for size in (2, 9, 30):
        fast.run(padded(random_rows(size, seed=size)), batch_tokens=10**6)
    assert len(executor._programs) == 3
    held, largest = executor._bytes(), list(executor._programs.values())[-1]
    assert held > largest.bytes + largest.arena.bytes
    monkeypatch.setattr(executor, "_limit", lambda: largest.bytes + largest.arena.bytes + 1)
    rows = random_rows(31, seed=5)
    got = fast.run(padded(rows), batch_tokens=10**6, max_depth=2)
    assert len(executor._programs) == 1 and executor._bytes() < held
    assert torch.equal(got.exit_layers, oracle.run(padded(rows), batch_tokens=10**6, max_depth=2).exit_layers)


def test_weights_changed_in_place_and_replaced_are_seen(device):
    model = tiny_model().to(device)
    fast, oracle = both(model)
    rows = random_rows(12)
    fast.run(padded(rows))
    with torch.no_grad():
        model.encoder_backbone.encoder.layer[1].intermediate.dense.weight.mul_(1.5)
        model.exits.classifiers[0].weight.mul_(-1.0)
    torch.testing.assert_close(fast.run(padded(rows)).logits, oracle.run(padded(rows)).logits, **FP32)
    model.load_state_dict({k: v.clone() for k, v in tiny_model(seed=9).to(device).state_dict().items()}, assign=True)
    torch.testing.assert_close(fast.run(padded(rows)).logits, oracle.run(padded(rows)).logits, **FP32)


def test_layers_of_different_width(device):
    model = tiny_model().to(device)
    fast, oracle = both(model)
    rows = random_rows(9)
    fast.run(padded(rows))
    for number, width in ((1, 80), (2, 24)):  # wider, and narrower, than the buffers of the first run
        layer = model.encoder_backbone.encoder.layer[number]
        hidden = layer.intermediate.dense.in_features
        layer.intermediate.dense = torch.nn.Linear(hidden, width, device=device)
        layer.output.dense = torch.nn.Linear(width, hidden, device=device)
    got, want = fast.run(padded(rows)), oracle.run(padded(rows))
    assert torch.equal(got.exit_layers, want.exit_layers)
    torch.testing.assert_close(got.logits, want.logits, **FP32)


def test_a_model_that_moves_is_followed(device):
    model = tiny_model()
    fast = engine.from_module(model, executor="graph")
    rows = random_rows(7)
    before = fast.run(padded(rows))
    model.to(device)
    after = fast.run(padded(rows))
    assert torch.equal(after.exit_layers, before.exit_layers)
    assert (fast.executor._stream is None) == (device == "cpu") and fast.executor._packed is None
