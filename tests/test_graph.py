"""The graph executor's pass against the other executors: step by step on the CPU, captured where there is a GPU."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import warnings
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import engine
from engine.criteria import Policy, make_criterion
from engine.executors import graph_pass
from tests.test_executors import FP32, assert_equals_reference, random_options
from tests.tiny import (
    FAMILIES,
    MAX_LENGTH,
    POOLERS,
    assert_same,
    every_exit,
    padded,
    random_rows,
    tiny_model,
)


@pytest.fixture(params=[1 << 30, 0], ids=["delayed", "at once"])
def moves(request, monkeypatch):
    """Whether tokens move in the layer behind an exit or at once, whatever the capacity would choose."""
    monkeypatch.setattr(graph_pass, "_DELAY_TOKENS", request.param)


def both(model):
    return engine.from_module(model, executor="graph"), engine.from_module(model, executor="reference")


class Case(NamedTuple):
    """A batch, its options, and what the reference says of it."""

    batch: dict
    options: dict
    exit_layers: torch.Tensor
    logits: torch.Tensor

    def assert_found(self, got) -> None:
        assert torch.equal(got.exit_layers, self.exit_layers)
        torch.testing.assert_close(got.logits, self.logits, rtol=1e-3, atol=1e-3)


def random_cases(model, count: int, seed: int = 0, most: int = 24) -> list[Case]:
    """``count`` different batches of 1 ... ``most`` rows of any length, as many of each kind of options; one run of the
    reference for all batches of a kind. Rows that rounding may send elsewhere are in none of them."""
    oracle = engine.from_module(model, executor="reference")
    generator = torch.Generator().manual_seed(seed)
    kinds = ("plain", "threshold", "depths", "scripted")
    cases = []
    for number, kind in enumerate(kinds):
        sizes = torch.randint(1, most + 1, (count // len(kinds),), generator=generator).tolist()
        drawn = random_rows(sum(sizes) * 11 // 10 + 10, seed=seed * len(kinds) + number)
        options = random_options(kind, len(drawn), model.config.exit_layers, seed)
        limit = torch.logit(torch.as_tensor(options.get("threshold", 0.5))).expand(len(drawn))
        distance = (every_exit(model, drawn).policy_logits.cpu() - limit[:, None]).abs().amin(1)
        sure = torch.nonzero(distance > 1e-3).flatten()[: sum(sizes)].tolist()
        rows = [drawn[i] for i in sure]
        options = {k: v if isinstance(v, str) else torch.as_tensor(v)[sure].tolist() for k, v in options.items()}
        ends = list(accumulate(sizes))
        assert len(rows) == ends[-1]
        if kind == "depths":  # one row of each batch may go anywhere: every other depth would be a program of its own
            for end in ends:
                options["min_depth"][end - 1], options["max_depth"][end - 1] = 1, model.config.num_layers
        want = oracle.run(padded(rows), **options)
        for size, end in zip(sizes, ends, strict=True):
            own = slice(end - size, end)
            taken = {k: v if isinstance(v, str) else v[own] for k, v in options.items()}
            cases.append(Case(padded(rows[own]), taken, want.exit_layers[own], want.logits[own]))
    return cases


def run_in_threads(work, *arguments) -> None:
    """``work`` of each argument in a thread of its own, all begun together; the first failure is raised."""
    problems, start = [], threading.Barrier(len(arguments))

    def begin(argument) -> None:
        try:
            start.wait(60)
            work(argument)
        except BaseException as error:  # the thread's own failure would pass unseen
            problems.append(error)

    threads = [threading.Thread(target=begin, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]


# -- the same answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exits", [None, (2, 4)], ids=["all exits", "exits 2 and 4"])
@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_graph_equals_reference(family, pooler, exits, device, moves):
    model = tiny_model(family, pooler, exits).to(device)
    assert_equals_reference(model, *both(model))


@pytest.mark.parametrize("executor", ["graph", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_batches(family, executor, device):
    model = tiny_model(family).to(device)
    fast = engine.from_module(model, executor=executor)
    for case in random_cases(model, 40, seed=5):
        case.assert_found(fast.run(case.batch, **case.options))


@pytest.mark.parametrize("stage", [1, 2, 3, 9])
@pytest.mark.parametrize("exits", [None, (1, 2, 7), (1, 3, 6, 7), (2, 5, 7)], ids=str)
def test_depths_and_stages(exits, stage, device, moves, monkeypatch):
    """Exits in a row and with layers between them, the last but one among them; a stage everywhere or nowhere."""
    monkeypatch.setattr(graph_pass, "stage_layers", lambda deepest, rows: stage)
    model = tiny_model("bert", "none", exits, layers=7).to(device)
    assert_equals_reference(model, *both(model))


def launches(monkeypatch, model, **options):
    """Kernels of one pass in order, by the names of their ops."""
    names = []

    def counted(name, op):
        return lambda *args, **kwargs: (names.append(name.strip("_")), op(*args, **kwargs))[1]

    with monkeypatch.context() as patch:
        for name, op in list(vars(graph_pass).items()):
            if name.endswith("_") and not name.startswith("_") and callable(op):
                patch.setattr(graph_pass, name, counted(name, op))
        engine.from_module(model, executor="graph").run(padded(random_rows(3)), **options)
    return names


@pytest.mark.parametrize("pooler, more", [("none", 1), ("shared", 3)])
def test_a_delayed_exit_costs_one_launch_and_those_of_its_pooler(monkeypatch, pooler, more):
    """The exit in front of the last layer, which moves its tokens at once, one more."""
    model = tiny_model("bert", pooler)
    none, every = (launches(monkeypatch, model, min_depth=depth) for depth in (4, 1))
    assert none.count("survivors") == 0 and every.count("survivors") == 3
    assert every.count("add_layer_norm_compact") == 3
    assert len(every) == len(none) + 3 * more + 1
    monkeypatch.setattr(graph_pass, "_DELAY_TOKENS", 63)
    assert len(launches(monkeypatch, model, min_depth=1)) == len(none) + 3 * more + 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_errs_no_more_than_hugging_face(dtype, device, moves):
    model = tiny_model().to(device)
    rows = random_rows(60, seed=3)
    options = random_options("scripted", 60, model.config.exit_layers, 4)
    fast, oracle = both(model)
    exact = oracle.run(padded(rows), **options)
    model.to(dtype)
    plain, got = oracle.run(padded(rows), **options), fast.run(padded(rows), **options)
    assert torch.equal(got.exit_layers, exact.exit_layers)
    error, allowed = ((x.logits - exact.logits).abs() for x in (got, plain))
    assert float(allowed.max()) > 0, "the model ran in full precision"
    assert float(error.max()) <= 3 * float(allowed.max()) + 1e-3


@pytest.mark.parametrize("layer", [1, 4], ids=["all leave at once", "nobody leaves"])
def test_extremes(layer, device, moves):
    fast, oracle = both(tiny_model().to(device))
    rows = random_rows(20)
    options = dict(criterion="scripted", exit_layers=layer)
    got = fast.run(padded(rows), **options)
    assert got.exit_layers.tolist() == [layer] * 20
    torch.testing.assert_close(got.logits, oracle.run(padded(rows), **options).logits, **FP32)


def test_a_row_says_the_same_in_any_batch(device):
    fast = engine.from_module(tiny_model().to(device), executor="graph")
    rows = random_rows(40)
    whole = fast.run(padded(rows), batch_tokens=10**6)
    for tokens in (1, 50, 200):
        cut = fast.run(padded(rows), batch_tokens=tokens)
        assert torch.equal(cut.exit_layers, whole.exit_layers)
        torch.testing.assert_close(cut.logits, whole.logits, **FP32)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13])
def test_every_capacity_boundary(rows, device, moves):
    fast, oracle = both(tiny_model().to(device))
    for tokens in (63, 64, 65, 96, 97, 128, 129):
        lengths = [max(1, tokens // rows)] * rows
        lengths[0] += max(0, tokens - sum(lengths))
        if max(lengths) > MAX_LENGTH:
            continue
        generator = torch.Generator().manual_seed(tokens)
        batch = [torch.randint(5, 60, (n,), generator=generator).tolist() for n in lengths]
        got, want = (e.run(padded(batch), batch_tokens=10**6) for e in (fast, oracle))
        assert torch.equal(got.exit_layers, want.exit_layers)
        torch.testing.assert_close(got.logits, want.logits, **FP32)


# -- batches in flight -------------------------------------------------------------------------------------------


def test_results_of_a_batch_outlive_the_next(device):
    fast = engine.from_module(tiny_model().to(device), executor="graph")
    batches = [random_rows(7, seed=s) for s in range(3)]
    alone = [fast.run(padded(b)) for b in batches]
    waiting = []
    for rows in batches:
        read = fast._reader.read(padded(rows), False)
        options = fast._options_reader.options(fast.config, 7, Policy(), None, None, None, None)
        waiting.append(fast._start(read, options))
    for found, want in zip(reversed([w() for w in reversed(waiting)]), alone, strict=True):
        assert torch.equal(found.exit_layers, want.exit_layers)
        torch.testing.assert_close(found.logits, want.logits)


def test_results_may_be_asked_for_twice(device):
    fast = engine.from_module(tiny_model().to(device), executor="graph")
    batches = [padded(random_rows(7, seed=s)) for s in range(3)]
    alone = [fast.run(batch) for batch in batches]

    def start(batch):
        options = fast._options_reader.options(fast.config, 7, Policy(), None, None, None, None)
        return fast._start(fast._reader.read(batch, False), options)

    first = start(batches[0])
    assert torch.equal(first().logits, first().logits)
    waiting = [start(batch) for batch in batches[1:]]
    for outputs, want in zip(waiting, alone[1:], strict=True):
        torch.testing.assert_close(outputs().logits, want.logits)


@pytest.mark.parametrize("engines", [1, 2], ids=["one engine", "two engines"])
def test_two_threads(device, engines):
    """On one engine, or on two of different models that share the device and the host's threads. Nothing is captured
    ahead: they do that, too, while the other one runs."""
    models = [tiny_model(seed=seed).to(device) for seed in range(engines)]
    cases = [random_cases(model, 40, seed=seed, most=12) for seed, model in enumerate(models)]
    fast = [engine.from_module(model, executor="graph") for model in models]
    runs = 200 if device == "cuda" else 20

    def work(thread: int) -> None:
        of = thread % engines
        for k in torch.randint(len(cases[of]), (runs,), generator=torch.Generator().manual_seed(thread)).tolist():
            case = cases[of][k]
            case.assert_found(fast[of].run(case.batch, **case.options))

    with warnings.catch_warnings():
        # A capture that the other thread disturbs every time costs that one batch its graph, which is not at stake.
        warnings.filterwarnings("ignore", message="the graph executor cannot serve .other threads allocate")
        run_in_threads(work, 0, 1)
    for one, own in zip(fast, cases, strict=True):
        assert one.executor._problem is None and one.executor._programs
        one.executor._pause = 0
        one.executor._warned.clear()
        for case in own:
            case.assert_found(one.run(case.batch, **case.options))
    run_in_threads(work, 0, 1)  # of captured programs alone: a fallback would warn


def test_four_threads_on_one_engine(device):
    fast = engine.from_module(tiny_model().to(device), executor="graph")
    batches = [random_rows(5 + s, seed=s) for s in range(4)]
    alone = [fast.run(padded(b)) for b in batches]

    def work(k: int) -> None:
        for _ in range(5):
            got = fast.run(padded(batches[k]))
            assert torch.equal(got.exit_layers, alone[k].exit_layers)
            assert torch.allclose(got.logits, alone[k].logits)

    run_in_threads(work, *range(4))


def test_too_large_for_memory_runs_in_halves(device, monkeypatch):
    fast = engine.from_module(tiny_model().to(device), executor="graph")
    rows = random_rows(20)
    whole = fast.run(padded(rows), batch_tokens=10**6)
    original, sizes = fast.executor.submit, []

    def small_only(batch, options):
        sizes.append(len(batch.lengths))
        if len(batch.lengths) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(batch, options)

    monkeypatch.setattr(fast.executor, "submit", small_only)
    limit = 6
    got = fast.run(padded(rows), batch_tokens=10**6)
    assert sizes == [20, 10, 5, 5, 10, 5, 5]
    assert torch.equal(got.exit_layers, whole.exit_layers)
    torch.testing.assert_close(got.logits, whole.logits, **FP32)
    limit = 0
    with pytest.raises(RuntimeError, match="out of memory on .* a single row of .* tokens .*smaller dtype"):
        fast.run(padded(rows), batch_tokens=10**6)


@pytest.mark.gpu
def test_batches_seen_before_take_a_short_way(gpu, monkeypatch):
    model = tiny_model("bert", "none").cuda()
    fast, oracle = both(model)
    fast.executor.weights.watching = False
    cases = [(padded(random_rows(n, seed=n)), options) for n in (1, 5, 33) for options in ({}, {"threshold": 0.3})]
    first = [fast.run(batch, **options) for batch, options in cases]
    with monkeypatch.context() as patch:
        patch.setattr(fast.executor, "_program", None)  # the long way would call it
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
def test_options_of_one_call_are_not_remembered(gpu):
    fast = engine.from_module(tiny_model("bert", "none").cuda(), executor="graph")
    fast.executor.weights.watching = False
    batch = padded(random_rows(6))
    for _ in range(5):
        fast.run(batch, criterion="scripted", exit_layers=[1, 2, 3, 1, 2, 3])
    gc.collect()
    assert len(fast.executor._recent) <= 1  # the last ones, which the program's buffers hold
    for _ in range(2):
        fast.run(batch, threshold=0.4)  # another program
    gc.collect()
    assert len(fast.executor._recent) in (1, 2)
    options = fast._options_reader.options(fast.config, 6, make_criterion("policy"), 0.4, None, None, None)
    assert options in fast.executor._recent


@pytest.mark.gpu
def test_a_batch_nobody_waits_for_disturbs_no_other(gpu):
    model = tiny_model("bert", "none").cuda()
    fast, oracle = both(model)
    fast.executor.weights.watching = False
    batch = padded(random_rows(20))
    want = oracle.run(batch)
    for _ in range(50):
        rows = fast._reader.read(batch, False)
        options = fast._options_reader.options(fast.config, 20, Policy(), None, None, None, None)
        fast._start(rows, options)  # and forgotten
        assert_same(fast.run(batch), want)


@pytest.mark.gpu
def test_a_pass_is_one_launch_without_host_synchronisation(gpu):
    fast = engine.from_module(tiny_model().cuda(), executor="graph")
    fast.executor.weights.watching = False
    rows = random_rows(9)
    fast.run(padded(rows))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
            fast.run(padded(rows))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    launches = [event for event in profile.events() if event.name == "cudaGraphLaunch"]
    assert len(launches) == 1


def replay(model, batches: int, runs: int) -> None:
    """``runs`` runs of so many different batches in random order: no mismatch, no program that is made twice, and where
    there is a device, no memory that is not given back: torch's there, the driver's, the host's."""
    fast, cases = engine.from_module(model, executor="graph"), random_cases(model, batches)
    fast.executor.weights.watching = False
    for case in cases:
        case.assert_found(fast.run(case.batch, **case.options))
    made = list(fast.executor._programs.values())
    on_device = model.device.type == "cuda"

    def held() -> tuple[int, int, int]:
        gc.collect()
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return torch.cuda.memory_allocated(), total - free, resident

    before = held() if on_device else None
    for k in torch.randint(len(cases), (runs,), generator=torch.Generator().manual_seed(0)).tolist():
        cases[k].assert_found(fast.run(cases[k].batch, **cases[k].options))
    assert set(map(id, fast.executor._programs.values())) == set(map(id, made))
    if on_device:
        torchs, drivers, hosts = (now - then for now, then in zip(held(), before, strict=True))
        assert torchs == 0 and drivers <= 1 << 21 and hosts <= 1 << 25, (torchs, drivers, hosts)


def test_batches_in_any_order():
    replay(tiny_model(), batches=24, runs=24)


@pytest.mark.gpu
@pytest.mark.slow
def test_ten_thousand_batches_without_a_mismatch_or_growth(gpu):
    replay(tiny_model().cuda(), batches=400, runs=10_000)


def test_who_does_not_ask_for_graphs_imports_none_of_it():
    code = "import sys, engine; assert not [m for m in sys.modules if 'executors.graph' in m or 'kernels.gpu_' in m]"
    subprocess.run([sys.executable, "-c", code], check=True)
