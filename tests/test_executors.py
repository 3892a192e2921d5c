"""One meaning, several executors: packed against reference, reference against Hugging Face, any batch against any."""

from __future__ import annotations

import threading
from functools import partial
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch

import engine
from engine.executors import packed as packed_module
from engine.executors.weights import EncoderWeights
from engine.kernels import linear as linear_module
from tests.tiny import (
    FAMILIES,
    MAX_LENGTH,
    POOLERS,
    assert_same,
    borderline_rows,
    every_exit,
    hugging_face_logits,
    padded,
    random_rows,
    tiny_model,
)

FP32 = dict(rtol=1e-5, atol=3e-5)
FP64 = dict(rtol=2.5e-7, atol=1e-12)  # results are handed out in fp32: two units in the last place
OUTPUTS = ("exit_layers", "logits", "probabilities", "exit_probabilities")


def both(model):
    return engine.from_module(model, executor="packed"), engine.from_module(model, executor="reference")


def random_options(kind: str, n: int, exits: tuple[int, ...], seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int):
        return torch.randint(low, high + 1, (n,), generator=g)

    if kind == "threshold":
        return dict(threshold=torch.rand(n, generator=g))
    if kind == "depths":
        most = torch.tensor(exits)[draw(0, len(exits) - 1)]
        least = (most - draw(0, exits[-1])).clamp(min=1)
        return dict(min_depth=least.tolist(), max_depth=most.tolist(), threshold=torch.rand(n, generator=g).tolist())
    if kind == "scripted":
        return dict(criterion="scripted", exit_layers=torch.tensor(exits)[draw(0, len(exits) - 1)])
    return {}


def compare(model, got, want, rows, options, tolerance) -> int:
    """Agreement but for borderline rows; returns how many of those there are."""
    z = every_exit(model, rows).policy_logits
    different = borderline_rows(got, want, z, model.config.exit_layers, options.get("threshold", 0.5))
    same = torch.ones(len(rows), dtype=torch.bool)
    same[different] = False
    torch.testing.assert_close(got.logits[same], want.logits[same], **tolerance)
    torch.testing.assert_close(got.probabilities[same], want.probabilities[same], **tolerance)
    torch.testing.assert_close(got.exit_probabilities[same], want.exit_probabilities[same], **tolerance)
    return len(different)


def assert_equals_reference(model, fast, oracle) -> None:
    """Batches of several sizes under every kind of options; every exit is taken, and borderline rows are few."""
    borderline = total = 0
    seen = set()
    for seed, size in enumerate((1, 2, 9, 60)):
        rows = random_rows(size, seed=seed)
        for kind in ("plain", "threshold", "depths", "scripted"):
            options = random_options(kind, size, model.config.exit_layers, seed)
            want = oracle.run(padded(rows), **options)
            got = fast.run(padded(rows), batch_tokens=10**6, **options)
            borderline += compare(model, got, want, rows, options, FP32)
            total += size
            seen |= set(got.exit_layers.tolist())
    assert seen == set(model.config.exit_layers)
    assert borderline <= max(1, total // 200)


def half_precision_batches() -> list[list[list[int]]]:
    """Of 1, 9 and 60 rows."""
    sizes = [1] * 6 + [9] * 2 + [60]
    rows = random_rows(sum(sizes), seed=3)
    return [rows[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]


def joined(results) -> SimpleNamespace:
    """Results of several runs as one's of all their rows."""
    return SimpleNamespace(**{name: torch.cat([getattr(x, name) for x in results]) for name in OUTPUTS})


def assert_errs_no_more_than_hugging_face(model, fast, dtype, batches) -> None:
    """Whole models, converted to ``dtype`` here: errors against fp64 at most three times those of the plain modules in
    the same dtype, whose rows are all in one batch. Scripted exits and free ones."""
    rows = [row for batch in batches for row in batch]
    exits = model.config.exit_layers
    oracle = engine.from_module(model, executor="reference")
    script = random_options("scripted", len(rows), exits, 4)

    def free_and_scripted(run):
        return run(), run(**script)

    def in_batches(**options):
        found, start = [], 0
        for batch in batches:
            own = slice(start, start := start + len(batch))
            taken = {name: x if isinstance(x, str) else x[own] for name, x in options.items()}
            found.append(fast.run(padded(batch), batch_tokens=10**6, **taken))
        return joined(found)

    model.double()
    exact_free, exact = free_and_scripted(partial(oracle.run, padded(rows)))
    z = every_exit(model, rows).policy_logits.cpu()
    model.to(dtype)
    plain_free, plain = free_and_scripted(partial(oracle.run, padded(rows)))
    got_free, got = free_and_scripted(in_batches)
    # Decisions: whoever leaves elsewhere than in fp64 stood within rounding of the threshold.
    rounding = (every_exit(model, rows).policy_logits.double().cpu() - z).abs().max()
    margin = 3 * float(rounding) + 1e-3
    different = borderline_rows(got_free, exact_free, z, exits, margin=margin)
    assert len(different) <= len(rows) // 10
    assert set(exact_free.exit_layers.tolist()) == set(exits)
    assert torch.equal(got.exit_layers, exact.exit_layers)
    same = (got_free.exit_layers == exact_free.exit_layers) & (plain_free.exit_layers == exact_free.exit_layers)
    everywhere = torch.ones(len(rows), dtype=torch.bool)
    for found, theirs, truth, at in ((got, plain, exact, everywhere), (got_free, plain_free, exact_free, same)):
        for name in ("logits", "exit_probabilities"):
            error, allowed = ((getattr(x, name) - getattr(truth, name))[at].abs() for x in (found, theirs))
            assert float(allowed.max()) > 0, "the model ran in full precision"
            assert float(error.max()) <= 3 * float(allowed.max()) + 1e-3
            assert float(error.mean()) <= 3 * float(allowed.mean()) + 1e-4


# -- packed = reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exits", [None, (2, 4)], ids=["all exits", "exits 2 and 4"])
@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_reference(family, pooler, exits, first_tokens_first, way):
    model = tiny_model(family, pooler, exits)
    assert_equals_reference(model, *both(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_reference_in_fp64(family, first_tokens_first):
    model = tiny_model(family).double()
    fast, oracle = both(model)
    for seed, size in enumerate((1, 5, 60)):
        rows = random_rows(size, seed=seed)
        for kind in ("plain", "depths", "scripted"):
            options = random_options(kind, size, model.config.exit_layers, seed)
            want, got = oracle.run(padded(rows), **options), fast.run(padded(rows), batch_tokens=10**6, **options)
            assert torch.equal(got.exit_layers, want.exit_layers)
            assert compare(model, got, want, rows, options, FP64) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_errs_no_more_than_hugging_face(family, dtype, device, first_tokens_first):
    model = tiny_model(family).to(device)
    fast = engine.from_module(model, executor="packed")
    assert_errs_no_more_than_hugging_face(model, fast, dtype, half_precision_batches())


def spy_on_orders(monkeypatch) -> list[tuple[str, int]]:
    """(order of work, tokens) of every layer with an exit, as it is planned, op by op."""
    monkeypatch.setattr(EncoderWeights, "plan", None)
    calls = []
    for name in ("_layer_first_tokens_first", "_layer_then_exit"):
        original = getattr(packed_module._Pass, name)

        def spy(self, *args, _name=name, _original=original):
            calls.append((_name, int(self.cu_seqlens[-1])))
            return _original(self, *args)

        monkeypatch.setattr(packed_module._Pass, name, spy)
    return calls


def test_the_plan_uses_both_orders(model, monkeypatch):
    """As shipped: whole layers first while a batch is small, first tokens first for a large one that half of leaves; a
    large batch that shrinks changes over on its way."""
    calls = spy_on_orders(monkeypatch)
    fast, oracle = both(model)
    seen = []
    for size in (1, 4, 60, 400):
        rows = random_rows(size, seed=size, shortest=7, longest=12)
        script = [1 if i % 2 else 2 if i % 4 else 3 if i % 8 else 4 for i in range(size)]
        options = dict(criterion="scripted", exit_layers=script, batch_tokens=10**9)
        calls.clear()
        assert_same(fast.run(padded(rows), **options), oracle.run(padded(rows), **options), **FP32)
        seen.append([name for name, _ in calls])
        tokens = [n for _, n in calls]
        assert tokens == sorted(tokens, reverse=True)
    assert set(seen[0]) == {"_layer_then_exit"}
    assert set(seen[-1]) == {"_layer_first_tokens_first"}
    assert any(len(set(names)) == 2 for names in seen), "no batch changed over"


@pytest.mark.parametrize("rates", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.9, 0.0, 1.0)])
def test_the_plan_changes_no_result(rates):
    """Expected leave rates plan the order of work; wrong ones cost time and nothing else."""
    plain, planned = tiny_model(), tiny_model(leave_rates=((0.5, rates),))
    rows = random_rows(150, seed=40)
    for options in ({}, dict(threshold=0.7), dict(min_depth=2, max_depth=3)):
        got, want = (both(model)[0].run(padded(rows), **options) for model in (planned, plain))
        compare(plain, got, want, rows, options, FP32)


@pytest.mark.parametrize("family", FAMILIES)
def test_scripted_exits_are_exact(family, first_tokens_first, way):
    """The given layer, and the logits that this layer's exit has for the row."""
    model = tiny_model(family)
    exits = model.config.exit_layers
    rows = random_rows(50, seed=11)
    out = every_exit(model, rows)
    for seed in range(3):
        script = random_options("scripted", 50, exits, seed)["exit_layers"]
        got = both(model)[0].run(padded(rows), criterion="scripted", exit_layers=script)
        assert got.exit_layers.tolist() == script.tolist()
        torch.testing.assert_close(got.logits, out.logits[torch.arange(50), script - 1], **FP32)


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_everybody_leaves_at_once(model, layer, first_tokens_first, way):
    fast, oracle = both(model)
    for size in (1, 2, 40):
        rows = random_rows(size, seed=size)
        options = dict(criterion="scripted", exit_layers=layer)
        got = fast.run(padded(rows), **options)
        assert got.exit_layers.tolist() == [layer] * size
        assert_same(got, oracle.run(padded(rows), **options), **FP32)
        forced = fast.run(padded(rows), max_depth=layer, threshold=1.0)
        torch.testing.assert_close(forced.logits, got.logits, **FP32)
        assert forced.exit_probabilities.tolist() == [1.0] * size


@pytest.mark.parametrize("family", FAMILIES)
def test_exits_that_never_fire_equal_exits_removed(family, first_tokens_first, way):
    """Bit for bit where the path is the same."""
    fast, _ = both(tiny_model(family))
    rows = random_rows(30, seed=2)
    never, removed = fast.run(padded(rows), threshold=1.0), fast.run(padded(rows), min_depth=4)
    assert never.exit_layers.tolist() == removed.exit_layers.tolist() == [4] * 30
    if not first_tokens_first:
        assert torch.equal(never.logits, removed.logits)
    assert_same(never, removed, **FP32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "lengths",
    [[1], [MAX_LENGTH], [1] * 40, [1] * 150, [MAX_LENGTH] * 5, [1, MAX_LENGTH] * 6, [2, 1, 1, 2, MAX_LENGTH, 1]],
    ids=lambda lengths: f"{len(lengths)} rows, {sum(lengths)} tokens",
)
def test_extreme_lengths(family, lengths, first_tokens_first, way):
    model = tiny_model(family)
    fast, oracle = both(model)
    rows = random_rows(len(lengths), seed=5, lengths=lengths)
    compare(model, fast.run(padded(rows)), oracle.run(padded(rows)), rows, {}, FP32)
    options = random_options("scripted", len(rows), model.config.exit_layers, 6)
    assert_same(fast.run(padded(rows), **options), oracle.run(padded(rows), **options), **FP32)


@pytest.mark.parametrize("exits", [(4,), (1, 4), (3, 4)])
def test_few_exits(exits, first_tokens_first, way):
    model = tiny_model(exit_layers=exits)
    fast, oracle = both(model)
    rows = random_rows(40, seed=8)
    got = fast.run(padded(rows))
    assert set(got.exit_layers.tolist()) == set(exits)
    compare(model, got, oracle.run(padded(rows)), rows, {}, FP32)


# -- reference = Hugging Face ------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["reference", "packed"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooler", ["shared", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exits_removed_equal_hugging_face(family, pooler, side, executor):
    model = tiny_model(family, pooler)
    lengths = [1, 2, 17, MAX_LENGTH - 1, MAX_LENGTH, 5]
    batch = padded(random_rows(6, seed=1, lengths=lengths), side, pad_id=model.encoder_backbone.config.pad_token_id)
    got = engine.from_module(model, executor=executor).run(batch, min_depth=4)
    assert got.exit_layers.tolist() == [4] * 6
    torch.testing.assert_close(got.logits, hugging_face_logits(model, batch), **FP32)
    assert got.stats.tokens == sum(lengths)


@pytest.mark.parametrize("executor", ["reference", "packed"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_segment_ids_equal_hugging_face(model, side, executor):
    rows = random_rows(5, seed=3, shortest=4)
    types = [[0] * (len(r) // 2) + [1] * (len(r) - len(r) // 2) for r in rows]
    batch = padded(rows, side, types=types)
    got = engine.from_module(model, executor=executor).run(batch, min_depth=4)
    torch.testing.assert_close(got.logits, hugging_face_logits(model, batch), **FP32)
    without = engine.from_module(model, executor=executor).run(padded(rows), min_depth=4)
    assert float((got.logits - without.logits).abs().min(1).values.max()) > 1e-3, "segment ids have no effect"


@pytest.mark.parametrize("family", FAMILIES)
def test_early_exits_equal_a_shorter_hugging_face_model(family):
    """A row that leaves at layer l is classified from Hugging Face's hidden state l."""
    model = tiny_model(family, "per_layer")
    batch = padded(random_rows(12, seed=4), pad_id=model.encoder_backbone.config.pad_token_id)
    with torch.no_grad():
        hidden = model.encoder_backbone(**batch, output_hidden_states=True).hidden_states
    for layer in (1, 2, 3):
        got = engine.from_module(model).run(batch, criterion="scripted", exit_layers=layer)
        with torch.no_grad():
            state = torch.tanh(model.exits.poolers[layer - 1](hidden[layer][:, 0]))
            torch.testing.assert_close(got.logits, model.exits.classifiers[layer - 1](state), **FP32)
            z = model.exits.policies[layer - 1](state)
        torch.testing.assert_close(got.exit_probabilities, torch.sigmoid(z), **FP32)


# -- batch composition -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["packed", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_equals_its_rows_one_by_one(family, executor):
    model = tiny_model(family)
    run = engine.from_module(model, executor=executor).run
    rows = random_rows(90, seed=21)
    together = run(padded(rows), batch_tokens=10**6)
    alone = [run(padded([row])) for row in rows]
    assert compare(model, together, joined(alone), rows, {}, FP32) <= 1
    assert min(together.stats.exit_histogram.values()) > 0


@pytest.mark.parametrize("executor", ["packed", "reference"])
def test_row_order_does_not_matter(model, executor):
    run = engine.from_module(model, executor=executor).run
    rows = random_rows(70, seed=22)
    options = random_options("depths", 70, (1, 2, 3, 4), 5)
    first = run(padded(rows), **options)
    for seed in range(3):
        place = torch.randperm(70, generator=torch.Generator().manual_seed(seed)).tolist()
        moved = {name: [list(value)[i] for i in place] for name, value in options.items()}
        got = run(padded([rows[i] for i in place]), batch_tokens=(10**6, 300, 64)[seed], **moved)
        assert torch.equal(got.exit_layers, first.exit_layers[place])
        torch.testing.assert_close(got.logits, first.logits[place], **FP32)
        torch.testing.assert_close(got.exit_probabilities, first.exit_probabilities[place], **FP32)
        assert got.labels == [first.labels[i] for i in place]


@pytest.mark.parametrize("executor", ["packed", "reference"])
@pytest.mark.parametrize("kind", ["plain", "threshold", "depths", "scripted"])
def test_batch_tokens_does_not_matter(model, kind, executor):
    run = engine.from_module(model, executor=executor).run
    rows = random_rows(50, seed=23)
    options = random_options(kind, 50, (1, 2, 3, 4), 9)
    first = run(padded(rows), batch_tokens=10**6, **options)
    assert first.stats.micro_batches == 1
    for batch_tokens in (1, 61, 500):
        got = run(padded(rows), batch_tokens=batch_tokens, **options)
        assert_same(got, first, **FP32)
        assert got.labels == first.labels and got.stats.exit_histogram == first.stats.exit_histogram
        assert got.stats.micro_batches > 1 or batch_tokens > sum(map(len, rows))


def test_micro_batches_respect_the_token_budget(model, monkeypatch):
    fast = engine.from_module(model)
    seen, original = [], fast.executor.run

    def spy(rows, options):
        seen.append(rows.lengths)
        return original(rows, options)

    monkeypatch.setattr(fast.executor, "run", spy)
    rows = random_rows(60, seed=24)
    assert fast.run(padded(rows), batch_tokens=100).stats.micro_batches == len(seen)
    assert sorted(n for lengths in seen for n in lengths) == sorted(map(len, rows))
    assert all(sum(lengths) <= 100 or len(lengths) == 1 for lengths in seen)
    assert all(max(b) <= min(a) for a, b in zip(seen, seen[1:], strict=False)), "not sorted by length"


def test_rows_really_leave(model, first_tokens_first, monkeypatch):
    """Nothing is computed for a row behind its exit: the survivors' tokens are all that the next layer gets."""
    rows = random_rows(200, seed=25)
    script = torch.arange(200) % 4 + 1
    monkeypatch.setattr(EncoderWeights, "plan", None)
    seen = []
    for name in ("_layer_first_tokens_first", "_layer_then_exit"):
        original = getattr(packed_module._Pass, name)

        def spy(self, layer, *args, _original=original):
            seen.append((layer, self.num_rows, self.cu_seqlens.diff().tolist(), len(self.hidden)))
            return _original(self, layer, *args)

        monkeypatch.setattr(packed_module._Pass, name, spy)
    engine.from_module(model).run(padded(rows), criterion="scripted", exit_layers=script, batch_tokens=10**9)
    assert [layer for layer, *_ in seen] == [1, 2, 3]
    for layer, active, lengths, held in seen:
        staying = [len(row) for row, exit_layer in zip(rows, script, strict=True) if exit_layer >= layer]
        assert active == len(staying) and lengths == staying
        assert sum(staying) <= held <= 1.1 * sum(staying) + 8, "more than a little spare capacity is computed"


# -- side effects ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["packed", "reference"])
def test_a_model_in_training_mode(model, executor):
    """No dropout, no random number drawn, and the mode stays."""
    rows = padded(random_rows(20, seed=30))
    run = engine.from_module(model, executor=executor).run
    want = run(rows)
    model.train()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert_same(run(rows), want, atol=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("executor", ["packed", "reference"])
def test_a_model_that_is_partly_in_training_mode(model, executor):
    """A frozen backbone in eval mode under exits that train stays what it is."""
    model.train()
    model.backbone.eval()
    engine.from_module(model, executor=executor).run(padded(random_rows(20, seed=30)))
    assert model.training and all(module.training for module in model.exits.modules())
    assert not any(module.training for module in model.backbone.modules())


def test_reference_restores_the_mode_after_an_error(model):
    model.train()
    oracle = engine.from_module(model, executor="reference")
    oracle.run(padded(random_rows(2)))
    model.exits.classifiers[2] = torch.nn.Linear(7, 3)
    with pytest.raises(RuntimeError):
        oracle.run(padded(random_rows(2)))
    assert model.training


@pytest.mark.parametrize("executor", ["packed", "reference"])
def test_a_run_between_forward_and_backward(model, executor):
    batch = padded(random_rows(8, seed=31))
    run = engine.from_module(model, executor=executor).run

    def gradients(between):
        model.zero_grad()
        loss = model(**batch).logits.square().mean()
        between()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, disturbed = gradients(lambda: None), gradients(lambda: run(batch))
    assert plain and all(torch.equal(a, b) for a, b in zip(plain, disturbed, strict=True))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("executor", ["packed", "reference"])
def test_two_threads_share_an_engine(model, executor):
    shared = engine.from_module(model, executor=executor)
    batches = [padded(random_rows(n, seed=n)) for n in (1, 5, 20, 40)]
    options = [{}, dict(threshold=0.3), dict(max_depth=2), dict(min_depth=3)]
    expected = [engine.from_module(model, executor=executor).run(b, **o) for b, o in zip(batches, options, strict=True)]
    problems, start = [], threading.Barrier(2)

    def work(offset: int) -> None:
        try:
            start.wait(10)
            for step in range(40):
                k = (step + offset) % len(batches)
                assert_same(shared.run(batches[k], **options[k]), expected[k], **FP32)
        except BaseException as error:  # the thread's own failure would pass unseen
            problems.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not problems, problems[0]


def test_reference_in_two_threads_on_a_model_in_training_mode(model, monkeypatch):
    """The second run starts within the first and ends after it: no dropout in it, and the mode comes back."""
    oracle = engine.from_module(model, executor="reference")
    batch = padded(random_rows(20, seed=32))
    want = oracle.run(batch)
    model.train()
    first_inside, second_inside, first_done = threading.Event(), threading.Event(), threading.Event()
    original, results = model.hidden_states, {}

    def slow(*args):
        if threading.current_thread().name == "first":
            first_inside.set()
            second_inside.wait(0.5)
        else:
            second_inside.set()
            first_done.wait(0.5)
        return original(*args)

    monkeypatch.setattr(model, "hidden_states", slow)

    def work() -> None:
        name = threading.current_thread().name
        results[name] = oracle.run(batch)
        if name == "first":
            first_done.set()

    first, second = (threading.Thread(target=work, name=name) for name in ("first", "second"))
    first.start()
    first_inside.wait(10)
    second.start()
    first.join(20)
    second.join(20)
    assert model.training and all(m.training for m in model.modules())
    assert_same(results["first"], want, atol=0)
    assert_same(results["second"], want, atol=0)


def test_where_our_product_does_not_serve(first_tokens_first, monkeypatch):
    """oneDNN then multiplies, on a ladder of row counts: same answers, same exits."""
    monkeypatch.setattr(linear_module, "_OWN_KERNELS", ())
    model = tiny_model()
    fast, oracle = both(model)
    for size in (1, 5, 30):
        rows = random_rows(size, seed=50 + size)
        script = [i % 4 + 1 for i in range(size)]
        options = dict(criterion="scripted", exit_layers=script)
        assert_same(fast.run(padded(rows), **options), oracle.run(padded(rows), **options), **FP32)
    assert fast.executor.weights.current().plan is None
