"""The graph executor's pass against the other executors: step by step on the CPU, captured where there is a GPU."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import engine
from engine.bench.report import calls_inside, may_wait
from engine.criteria import Policy, make_criterion
from engine.executors import graph_pass
from engine.executors.graph import capacity_for
from engine.kernels.graphs import AllocationError, GraphBuilder
from tests.test_executors import (
    FP32,
    assert_equals_reference,
    assert_errs_no_more_than_hugging_face,
    compare,
    half_precision_batches,
    random_options,
)
from tests.tiny import (
    FAMILIES,
    LABELS,
    MAX_LENGTH,
    POOLERS,
    assert_same,
    every_exit,
    padded,
    random_rows,
    tiny_backbone,
    tiny_model,
    widen_policies,
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
    exit_probabilities: torch.Tensor
    probabilities_within: dict

    def assert_found(self, got) -> None:
        assert torch.equal(got.exit_layers, self.exit_layers)
        torch.testing.assert_close(got.logits, self.logits, **FP32)
        torch.testing.assert_close(got.exit_probabilities, self.exit_probabilities, **self.probabilities_within)


def random_cases(model, count: int, seed: int = 0, most: int = 24) -> list[Case]:
    """``count`` different batches of 1 ... ``most`` rows of any length, as many of each kind of options; one run of the
    reference for all batches of a kind. Rows that rounding may send elsewhere are in none of them."""
    oracle = engine.from_module(model, executor="reference")
    generator = torch.Generator().manual_seed(seed)
    kinds = ("plain", "threshold", "depths", "scripted")
    within = FP32 if model.device.type == "cpu" else dict(rtol=1e-5, atol=1e-4)
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
            outputs = (x[own] for x in (want.exit_layers, want.logits, want.exit_probabilities))
            cases.append(Case(padded(rows[own]), taken, *outputs, within))
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


def launches(monkeypatch, model, rows=3, **options):
    """Kernels of one pass in order, by the names of their ops."""
    names = []

    def counted(name, op):
        return lambda *args, **kwargs: (names.append(name.strip("_")), op(*args, **kwargs))[1]

    with monkeypatch.context() as patch:
        for name, op in list(vars(graph_pass).items()):
            if name.endswith("_") and not name.startswith("_") and callable(op):
                patch.setattr(graph_pass, name, counted(name, op))
        engine.from_module(model, executor="graph").run(padded(random_rows(rows)), **options)
    return names


@pytest.mark.parametrize("pooler, more", [("none", 0), ("shared", 2)])
def test_a_delayed_exit_costs_no_launch_but_those_of_its_pooler(monkeypatch, pooler, more):
    """The exit in front of the last layer, which moves its tokens at once, two more; and all of them one more where
    there are too many rows to find the survivors beside the attention."""
    model = tiny_model("bert", pooler)
    none, every = (launches(monkeypatch, model, min_depth=depth) for depth in (4, 1))
    assert none.count("survivors") == 0 and every.count("survivors") == 1
    assert every.count("add_layer_norm_compact") == 3
    assert len(every) == len(none) + 3 * more + 2
    with monkeypatch.context() as few:
        few.setattr(graph_pass, "REMOVAL_ROWS", 1)
        assert len(launches(monkeypatch, model, min_depth=1)) == len(none) + 3 * more + 4
    monkeypatch.setattr(graph_pass, "_DELAY_TOKENS", 63)
    assert len(launches(monkeypatch, model, min_depth=1)) == len(none) + 3 * more + 6


def test_survivors_are_found_at_once_where_a_node_asks_for_them(monkeypatch):
    """Behind the third layer of six, for up to 16 rows; behind the fifth, whose tokens move at once, in any case."""
    model = tiny_model(layers=6)
    for rows, expected in ((5, 2), (20, 1)):
        assert launches(monkeypatch, model, rows=rows, min_depth=1).count("survivors") == expected


def half_precision_cases():
    """Every family, pooler and dtype on the CPU. On a GPU, where each family and dtype compiles kernels of its own,
    every family and every pooler with both dtypes. Tokens move both ways with bert and the shared pooler."""
    delayed = {1 << 30: "delayed", 0: "at once"}
    for f, family in enumerate(FAMILIES):
        for p, pooler in enumerate(POOLERS):
            for d, dtype in enumerate((torch.bfloat16, torch.float16)):
                for moves in delayed if f == p == 0 else [list(delayed)[d]]:
                    for device in ("cpu", "cuda") if (f + d) % 3 == p or f == p == 0 else ("cpu",):
                        name = f"{device}-{family}-{pooler}-{('bf16', 'fp16')[d]}-{delayed[moves]}"
                        marks = [pytest.mark.gpu] if device == "cuda" else []
                        yield pytest.param(family, pooler, dtype, moves, device, id=name, marks=marks)


@pytest.mark.parametrize(
    "family, pooler, dtype, moves, device", list(half_precision_cases()), indirect=["moves", "device"]
)
def test_half_precision_errs_no_more_than_hugging_face(family, pooler, dtype, moves, device):
    model = tiny_model(family, pooler).to(device)
    fast = engine.from_module(model, executor="graph")
    assert_errs_no_more_than_hugging_face(model, fast, dtype, half_precision_batches())


@pytest.mark.gpu
@pytest.mark.parametrize("family, heads", [("bert", 2), ("mpnet", 2), ("bert", 4)])
def test_heads_of_64_and_32(family, heads, gpu, moves):
    """Which a kernel of Hopper's own serves; all other models here have narrower ones."""
    config = engine.EarlyExitConfig(4, (1, 2, 3, 4), pooler="none", labels=LABELS, max_length=MAX_LENGTH)
    backbone = tiny_backbone(family, hidden_size=128, num_attention_heads=heads)
    model = widen_policies(engine.MultiExitEncoder(backbone, config).eval()).cuda()
    fast = engine.from_module(model, executor="graph")
    assert_errs_no_more_than_hugging_face(model, fast, torch.float16, half_precision_batches())


@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize("layer", [1, 4], ids=["all leave at once", "nobody leaves"])
def test_extremes(layer, rows, device, moves):
    """Few rows pass the conditional node, 20 have none."""
    fast, oracle = both(tiny_model().to(device))
    batch = padded(random_rows(rows))
    options = dict(criterion="scripted", exit_layers=layer)
    got = fast.run(batch, **options)
    assert got.exit_layers.tolist() == [layer] * rows
    assert_same(got, oracle.run(batch, **options), **FP32)


@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize("executor", ["graph", "packed", "reference"])
@pytest.mark.parametrize("pooler", ["shared", "none"])
def test_exits_that_never_fire_equal_exits_removed(pooler, executor, rows, device, moves):
    """Bit for bit where the path is the same: packed's order of work may differ (``test_executors``)."""
    fast = engine.from_module(tiny_model("bert", pooler).to(device), executor=executor)
    batch = padded(random_rows(rows, seed=2))
    never, removed = fast.run(batch, threshold=1.0), fast.run(batch, min_depth=4)
    assert never.exit_layers.tolist() == removed.exit_layers.tolist() == [4] * rows
    assert_same(never, removed, **FP32)
    if device == "cpu" and executor != "packed":
        assert torch.equal(never.logits, removed.logits)


def test_a_row_says_the_same_in_any_batch(device):
    fast = engine.from_module(tiny_model().to(device), executor="graph")
    rows = random_rows(40)
    whole = fast.run(padded(rows), batch_tokens=10**6)
    for tokens in (1, 50, 200):
        cut = fast.run(padded(rows), batch_tokens=tokens)
        assert torch.equal(cut.exit_layers, whole.exit_layers)
        torch.testing.assert_close(cut.logits, whole.logits, **FP32)


def boundary_batches(rows: int) -> list[list[list[int]]]:
    """``rows`` rows with the fewest tokens, the most, and on both sides of the ladder's first two steps within reach
    and of the last one; as even as they come."""
    most = rows * MAX_LENGTH
    steps = [n for n in range(max(rows, 64), most) if capacity_for(rows, n, 1, MAX_LENGTH).tokens == n]
    tokens = {rows, most, *(n + more for n in (*steps[:2], *steps[-1:]) for more in (0, 1))}
    lengths = [[total // rows + (i < total % rows) for i in range(rows)] for total in sorted(tokens)]
    return [random_rows(rows, seed=sum(own), lengths=own) for own in lengths]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 25, 32, 33])
def test_every_capacity_boundary(rows, device, moves):
    """A conditional node stands up to 16 rows."""
    model = tiny_model().to(device)
    batches = boundary_batches(rows)
    assert len(batches) >= (2 if rows == 1 else 4)
    assert_found_alike(model, batches)


@pytest.mark.parametrize("rows", [1, 2, 16, 17])
def test_every_length_boundary(rows, device, moves):
    batches = [random_rows(rows, seed=n, lengths=[n] * rows) for n in (1, 31, 32, 33, MAX_LENGTH)]
    assert {capacity_for(rows, 1, len(batch[0]), MAX_LENGTH).longest for batch in batches} == {32, MAX_LENGTH}
    assert_found_alike(tiny_model().to(device), batches)


@pytest.mark.parametrize("rows", [16, 17])
def test_capacity_boundaries_in_half_precision(rows, device):
    model = tiny_model().to(device)
    fast = engine.from_module(model, executor="graph")
    assert_errs_no_more_than_hugging_face(model, fast, torch.float16, boundary_batches(rows))


def assert_found_alike(model, batches) -> None:
    """By the graph executor and the reference, but for rows that stand at the threshold."""
    fast, oracle = both(model)
    for rows in batches:
        got, want = (e.run(padded(rows), batch_tokens=10**6) for e in (fast, oracle))
        assert compare(model, got, want, rows, {}, FP32) <= max(1, len(rows) // 20)


def test_where_tokens_begin_to_move_at_once(device, monkeypatch):
    """One engine on both sides of that capacity, back and forth."""
    monkeypatch.setattr(graph_pass, "_DELAY_TOKENS", 96)
    model = tiny_model().to(device)
    fast, oracle = both(model)
    for tokens, delays in ((95, True), (97, False), (96, True), (193, False), (64, True), (97, False)):
        rows = random_rows(5, seed=tokens, lengths=[tokens - 4 * (tokens // 5), *[tokens // 5] * 4])
        got, want = fast.run(padded(rows)), oracle.run(padded(rows))
        assert compare(model, got, want, rows, {}, FP32) == 0
        program = next(reversed(fast.executor._programs.values()))
        assert program._pass._delays is delays


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
@pytest.mark.parametrize("short", [True, False], ids=["seen before", "sizes not seen before"])
def test_a_pass_is_one_launch_without_host_synchronisation(gpu, short):
    """Seen before or not, in a program that is there: the host launches nothing but the graph, and waits for nothing
    but the results."""
    fast = engine.from_module(tiny_model().cuda(), executor="graph")
    fast.executor.weights.watching = False
    options = fast._options_reader.options(fast.config, 9, make_criterion("policy"), None, None, None, None)
    rows = random_rows(9, lengths=[12] * 9)
    others = rows if short else [row[:11] for row in rows]
    batches = [fast._reader.read(padded(batch), False) for batch in (rows, others)]
    fast.executor.submit(batches[0], options)()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
            with torch.profiler.record_function("start a pass"):
                results = fast.executor.submit(batches[1], options)
            with torch.profiler.record_function("wait for results"):
                results()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(fast.executor._programs) == 1
    events = list(profile.events())
    started, waited = calls_inside(events, "start a pass"), calls_inside(events, "wait for results")
    assert started.count("cudaGraphLaunch") == 1
    assert [call for call in started if may_wait(call)] == []
    launched = [e.name for e in events if e.name.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch"))]
    assert launched == ["cudaGraphLaunch"]
    assert sum(map(may_wait, waited)) == 1


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
    """Every batch some five times, in some 75 programs. On a device that no other process uses: the driver's memory is
    counted for all of them."""
    replay(tiny_model().cuda(), batches=2000, runs=10_000)


# -- captures that end half way ----------------------------------------------------------------------------------


@pytest.fixture
def ends_within_a_node(gpu, monkeypatch):
    """``ends_within_a_node(error, times)``: so many captures raise it at their fifth attention, no rehearsal does. With
    seven layers and few rows it stands within a conditional node. Returns a list that grows by the number of open
    nodes."""

    def end(error: Exception, times: int) -> list[int]:
        calls, nodes, ended = [], [], []
        capture, when, attention_ = GraphBuilder.capture, GraphBuilder.when, graph_pass.varlen_attention_

        def begin(self, stream=None):
            calls.clear()
            return capture(self, stream)

        @contextmanager
        def counted(self, flag):
            with when(self, flag):
                nodes.append(flag)
                try:
                    yield
                finally:
                    nodes.pop()

        def failing(*arguments, **named):
            if torch.cuda.is_current_stream_capturing():
                calls.append(1)
                if len(calls) == 5 and len(ended) < times:
                    ended.append(len(nodes))
                    raise error
            attention_(*arguments, **named)

        monkeypatch.setattr(GraphBuilder, "capture", begin)
        monkeypatch.setattr(GraphBuilder, "when", counted)
        monkeypatch.setattr(graph_pass, "varlen_attention_", failing)
        return ended

    return end


@pytest.mark.gpu
def test_a_capture_that_fails_within_a_node_falls_back(ends_within_a_node):
    model = tiny_model(layers=7).cuda()
    ended = ends_within_a_node(RuntimeError("CUDA: no luck"), times=1)
    fast, oracle = both(model)
    batches = [random_rows(n, seed=n) for n in (9, 5)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rows in (*batches, batches[0]):
            assert compare(model, fast.run(padded(rows)), oracle.run(padded(rows)), rows, {}, FP32) == 0
    (message,) = (str(w.message) for w in caught if "packed serves instead" in str(w.message))
    assert "a capture failed (RuntimeError: CUDA: no luck)" in message
    assert ended == [1] and not fast.executor._programs
    another = engine.from_module(model, executor="graph")  # whose fallback would be an error
    for rows in batches:
        assert compare(model, another.run(padded(rows)), oracle.run(padded(rows)), rows, {}, FP32) == 0
    assert another.executor._problem is None
    assert all(p.graph.num_conditionals == 1 for p in another.executor._programs.values())


@pytest.mark.gpu
def test_a_capture_that_is_disturbed_within_a_node_is_tried_again(ends_within_a_node):
    model = tiny_model(layers=7).cuda()
    ended = ends_within_a_node(AllocationError("1 allocations"), times=2)
    fast, oracle = both(model)
    rows = random_rows(9)
    assert compare(model, fast.run(padded(rows)), oracle.run(padded(rows)), rows, {}, FP32) == 0
    (program,) = fast.executor._programs.values()
    assert ended == [1, 1] and program.graph.num_conditionals == 1


def test_who_does_not_ask_for_graphs_imports_none_of_it():
    code = "import sys, engine; assert not [m for m in sys.modules if 'executors.graph' in m or 'kernels.gpu_' in m]"
    subprocess.run([sys.executable, "-c", code], check=True)
