"""Graphs with conditional nodes. Order of calls is checked in rehearsals, which need no device; replays need one."""

import threading
from contextlib import nullcontext

import pytest
import torch

from engine.kernels import extension, graphs
from engine.kernels.graphs import (
    GraphBuilder,
    builder_problem,
    conditional_nodes_problem,
    conditional_nodes_supported,
    no_allocation,
    own_stream,
)
from engine.kernels.survivors import survivors_
from tests.kernels.test_survivors import case, expected

needs_builder = pytest.mark.skipif(builder_problem() is not None, reason=f"no graph builder: {builder_problem()}")
needs_nodes = pytest.mark.skipif(not conditional_nodes_supported(), reason=f"{conditional_nodes_problem()}")


def ints(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


ONE = ints(1)


# --- without a device ----------------------------------------------------------------------------------------------


def test_support_is_a_reason_or_none():
    problem = conditional_nodes_problem()
    assert problem is None or (isinstance(problem, str) and problem)
    assert conditional_nodes_supported() == (problem is None)
    if torch.version.cuda is None and extension.library() is not None:
        assert problem in ("this torch has no CUDA", "the extension was built without CUDA (nvcc was absent)")


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(extension, "_dll", None)
    assert conditional_nodes_problem() == "the extension is not built"
    with pytest.raises(RuntimeError, match="graphs cannot be built: the extension is not built"):
        GraphBuilder()


@needs_builder
def test_a_rehearsal_runs_every_body_and_counts():
    builder, ran = GraphBuilder(), []
    with builder.rehearse() as same:
        assert same is builder
        ran.append("root")
        with builder.when(ints(0)):
            ran.append("if")
            with builder.when(ONE):
                ran.append("inner")
            with builder.choose(ONE, 3) as cases:
                for k in (2, 0):
                    with cases.case(k), builder.when(ONE):
                        ran.append(k)
        with builder.choose(ONE, 1):
            pass
    assert ran == ["root", "if", "inner", 2, 0]
    assert (builder.num_nodes, builder.num_conditionals) == (0, 6)
    with builder.rehearse():
        pass
    assert builder.num_conditionals == 0
    with pytest.raises(RuntimeError, match="a rehearsal records no graph"):
        builder.instantiate()


def enter(context):
    return context.__enter__()


MISUSE = {
    "if before begin": (lambda b: b._call("begin_if", 0), "begin_if: nothing is being captured; begin a capture first"),
    "end before begin": (lambda b: b._call("end"), "end: nothing is being captured"),
    "end_if before begin": (lambda b: b._call("end_if"), "end_if: nothing is being captured"),
    "nothing recorded": (lambda b: b.instantiate(), "counts: nothing is recorded yet"),
}
MISUSE_INSIDE = {
    "begin twice": (lambda b: enter(b.rehearse()), "begin: this builder is already capturing"),
    "end_if without begin_if": (lambda b: b._call("end_if"), "end_if without begin_if: what is open is the capture"),
    "case without switch": (lambda b: b._call("begin_case", 0), "begin_case without begin_switch"),
    "end_case without case": (lambda b: b._call("end_case"), "end_case without begin_case"),
    "end_switch without switch": (lambda b: b._call("end_switch"), "end_switch without begin_switch"),
    "if never ended": (lambda b: enter(b.when(ONE)) or b._call("end"), "end without begin: what is open is an IF body"),
    "counts too early": (lambda b: b.num_nodes, "counts: nothing is recorded yet"),
    "no case": (lambda b: enter(b.choose(ONE, 0)), "a switch needs at least 1 case, got 0"),
    "case out of range": (
        lambda b: enter(enter(b.choose(ONE, 3)).case(3)),
        r"begin_case: the case must lie in \[0, 3\), got 3",
    ),
    "case below range": (lambda b: enter(enter(b.choose(ONE, 3)).case(-1)), r"must lie in \[0, 3\), got -1"),
    "if between cases": (
        lambda b: enter(b.choose(ONE, 3)) and enter(b.when(ONE)),
        "begin_if: inside a switch, work belongs into one of its cases",
    ),
    "switch between cases": (
        lambda b: enter(b.choose(ONE, 3)) and enter(b.choose(ONE, 3)),
        "begin_switch: inside a switch, work belongs into one of its cases",
    ),
}


@needs_builder
@pytest.mark.parametrize("name", MISUSE)
def test_misuse_outside(name):
    call, message = MISUSE[name]
    with pytest.raises(RuntimeError, match=message):
        call(GraphBuilder())


@needs_builder
@pytest.mark.parametrize("name", MISUSE_INSIDE)
def test_misuse_inside(name):
    call, message = MISUSE_INSIDE[name]
    builder = GraphBuilder()
    with pytest.raises(RuntimeError, match=message), builder.rehearse():
        call(builder)
    with builder.rehearse():  # aborted by the exception, and usable again
        pass


@needs_builder
def test_switches_do_not_nest():
    builder = GraphBuilder()
    with pytest.raises(RuntimeError, match="a switch must not stand inside another switch"), builder.rehearse():
        with builder.choose(ONE, 2) as cases, cases.case(0), builder.when(ONE), builder.choose(ONE, 2):
            pass
    with builder.rehearse():
        for _ in range(3):
            with builder.when(ONE), builder.choose(ONE, 2) as cases, cases.case(1):
                pass
    assert builder.num_conditionals == 6


@needs_builder
def test_a_case_is_recorded_once():
    builder = GraphBuilder()
    with pytest.raises(RuntimeError, match="case 1 is already recorded"), builder.rehearse():
        with builder.choose(ONE, 2) as cases:
            for _ in range(2):
                with cases.case(1):
                    pass


@needs_builder
def test_misuse_leaves_the_capture_as_it_was():
    builder = GraphBuilder()
    with builder.rehearse():
        with builder.choose(ONE, 2) as cases:
            with pytest.raises(RuntimeError, match="got 5"):
                enter(cases.case(5))
            with cases.case(1):
                pass
    assert builder.num_conditionals == 1


@needs_builder
def test_conditions_are_checked():
    builder = GraphBuilder()
    with builder.rehearse():
        for flag in (torch.ones(1), ints(1, 2), torch.ones(1, dtype=torch.int64)):
            with pytest.raises(ValueError, match="flag must be one int32, got torch"):
                enter(builder.when(flag))
        with pytest.raises(ValueError, match="value must be one int32"):
            enter(builder.choose(torch.ones(2), 2))


@needs_builder
def test_abort_and_close_in_every_state():
    builder = GraphBuilder()
    for _ in range(2):
        builder.abort()
    block = builder.rehearse()
    enter(block)
    enter(builder.when(ONE))
    builder.abort()
    with pytest.raises(RuntimeError, match="end_if: nothing is being captured"):
        builder._call("end_if")
    with builder.rehearse():
        pass
    for _ in range(2):
        builder.close()
        builder.abort()
    with pytest.raises(RuntimeError, match="begin: the builder is closed"):
        enter(builder.rehearse())


@needs_builder
def test_the_default_stream_is_refused():
    builder = GraphBuilder()
    with pytest.raises(RuntimeError, match="begin: the default stream cannot be captured"):
        builder._call("begin", None, 0)


@needs_builder
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device: nothing to fail")
def test_errors_carry_the_text_of_cuda():
    builder = GraphBuilder()
    with pytest.raises(RuntimeError, match="^CUDA: begin: .*(driver|device)"):
        builder._call("begin", 0x10, 0)
    with pytest.raises(RuntimeError, match="end: nothing is being captured"):
        builder._call("end")


class Owner:
    pass


def test_a_stream_has_one_owner_at_a_time(monkeypatch):
    made = []

    def new_stream(index, handle):
        made.append(index)
        handle._obj.value = 100 + len(made)

    monkeypatch.setattr(graphs, "_native", lambda: {"new_stream": new_stream})
    monkeypatch.setattr(graphs, "_streams", {})
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: (handle, device.index))
    first, second, elsewhere = Owner(), Owner(), Owner()
    zero, one = torch.device("cuda", 0), torch.device("cuda", 1)
    assert own_stream(first, zero) == (101, 0) and own_stream(second, zero) == (102, 0)
    assert own_stream(elsewhere, one) == (103, 1)
    del first
    assert own_stream(second, zero) == (101, 0) and own_stream(elsewhere, one) == (104, 1)
    assert made == [0, 0, 1, 1]
    monkeypatch.setattr(graphs, "_native", lambda: {"new_stream": lambda index, handle: b"no luck"})
    with pytest.raises(RuntimeError, match="CUDA: new stream: no luck"):
        own_stream(second, zero)
    monkeypatch.setattr(graphs, "_native", lambda: "the extension is not built")
    with pytest.raises(RuntimeError, match="no stream can be made: the extension is not built"):
        own_stream(second, zero)


# --- on a device ---------------------------------------------------------------------------------------------------


@pytest.fixture
def stream(cuda_device):
    return torch.cuda.Stream()


def run(graph, stream):
    graph.launch(stream)
    stream.synchronize()


def assert_captures(builder, stream, x):
    """Whatever became of the capture before. x: 0 so far."""
    with builder.capture(stream):
        x.add_(1)
    run(builder.instantiate(), stream)
    assert x.item() == 1


def nested(builder, flags, x):
    """``x[i] += 1`` where flags[0] to flags[i] are all set."""

    def level(i):
        with builder.when(flags[i : i + 1]):
            x[i : i + 1].add_(1)
            if i + 1 < len(flags):
                level(i + 1)
            x[-1:].add_(1)  # behind the inner body: counts the levels that were entered

    level(0)


@pytest.mark.gpu
@needs_nodes
def test_nested_if(stream):
    depth = 12
    flags, x = torch.zeros(depth, dtype=torch.int32, device="cuda"), torch.zeros(depth + 1, device="cuda")
    builder = GraphBuilder()
    torch.cuda.synchronize()
    with builder.rehearse(stream):
        nested(builder, flags, x)
    assert builder.num_conditionals == depth
    stream.synchronize()
    x.zero_()
    torch.cuda.synchronize()
    with no_allocation(), builder.capture(stream):
        nested(builder, flags, x)
    torch.cuda.synchronize()
    assert not x.any(), "captured, not run"
    graph = builder.instantiate()
    assert builder.num_nodes == graph.num_nodes == 4 * depth and graph.num_conditionals == depth
    builder.close()
    for taken in (0, depth, 5, 1, depth, 0):  # the flags are read at the replay
        x.zero_()
        flags.copy_(torch.arange(depth) < taken)
        torch.cuda.synchronize()
        run(graph, stream)
        assert x.tolist() == [1.0] * taken + [0.0] * (depth - taken) + [taken]
    flags.fill_(-3)  # not zero
    flags[4] = 0
    x.zero_()
    torch.cuda.synchronize()
    run(graph, stream)
    assert x.tolist() == [1.0] * 4 + [0.0] * (depth - 4) + [4.0]


@pytest.mark.gpu
@needs_nodes
def test_work_around_conditional_nodes_keeps_its_order(stream):
    flag, x = ints(1, device="cuda"), torch.zeros(1, device="cuda")
    builder = GraphBuilder()
    torch.cuda.synchronize()
    with builder.capture(stream):
        x.fill_(1)
        with builder.when(flag):
            x.mul_(10)
        x.add_(1)
        with builder.when(flag):
            flag.zero_()  # a body may write what a later condition reads
            x.mul_(10)
        with builder.when(flag):
            x.mul_(1000)
        x.add_(1)
    graph = builder.instantiate()
    run(graph, stream)
    assert x.item() == 111
    run(graph, stream)  # the flag is zero now
    assert x.item() == 3


@pytest.mark.gpu
@needs_nodes
def test_switch(stream):
    value, x = ints(0, device="cuda"), torch.zeros(1, device="cuda")
    builder = GraphBuilder()
    torch.cuda.synchronize()
    with builder.capture(stream):
        for scale in (1, 100):
            with builder.choose(value, 5) as cases:
                for k in (4, 0, 1, 3):  # in any order; case 2 stays empty
                    with cases.case(k):
                        x.add_((k + 1) * scale)
                        with builder.when(value):
                            x.add_(0.5)
    graph = builder.instantiate()
    assert graph.num_conditionals == 10
    for chosen in (0, 1, 2, 3, 4, 5, 99, -1, 0):
        value.fill_(chosen)
        x.zero_()
        torch.cuda.synchronize()
        run(graph, stream)
        inside = chosen in (0, 1, 3, 4)
        assert x.item() == (101 * (chosen + 1) + (1 if chosen else 0) if inside else 0), chosen


@pytest.mark.gpu
@needs_nodes
def test_abort_leaves_the_stream_usable(stream):
    flag, x = ints(1, device="cuda"), torch.zeros(1, device="cuda")
    builder = GraphBuilder()
    torch.cuda.synchronize()

    def fails(inside):
        with pytest.raises(ZeroDivisionError), builder.capture(stream):
            x.add_(1)
            inside()

    def in_if():
        with builder.when(flag):
            x.add_(1)
            raise ZeroDivisionError

    def in_case():
        with builder.when(flag), builder.choose(flag, 2) as cases, cases.case(1):
            x.add_(1)
            raise ZeroDivisionError

    def between_cases():
        with builder.choose(flag, 2) as cases:
            with cases.case(1):
                x.add_(1)
            raise ZeroDivisionError

    for inside in (lambda: 1 / 0, in_if, in_case, between_cases):
        fails(inside)
        assert not torch.cuda.is_current_stream_capturing()
        with torch.cuda.stream(stream):
            assert not torch.cuda.is_current_stream_capturing()
            assert x.item() == 0
    assert_captures(builder, stream, x)


@pytest.mark.gpu
@needs_nodes
@pytest.mark.parametrize("inside", [False, True])
def test_an_invalidated_capture_is_an_error_and_can_be_aborted(stream, inside):
    flag, x = ints(1, device="cuda"), torch.zeros(1, device="cuda")
    builder = GraphBuilder()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="CUDA|capture was invalidated"), builder.capture(stream):
        if inside:
            enter(builder.when(flag))
        x.item()  # waits for a stream that is being captured
    assert_captures(builder, stream, x)


@pytest.mark.gpu
@needs_nodes
@pytest.mark.parametrize("inside", [False, True])
def test_an_invalidated_capture_is_told_in_the_words_of_cuda(stream, inside):
    """By the builder, to whom torch's error has not come."""
    flag, x = ints(1, device="cuda"), torch.zeros(1, device="cuda")
    builder = GraphBuilder()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="^CUDA: end capture: .*capture"), builder.capture(stream):
        with builder.when(flag) if inside else nullcontext():
            x.add_(1)
            with pytest.raises(RuntimeError, match="CUDA"):
                x.item()
    assert_captures(builder, stream, x)


@pytest.mark.gpu
@needs_nodes
def test_work_between_cases_is_refused(stream):
    value, x = ints(0, device="cuda"), torch.zeros(1, device="cuda")
    builder = GraphBuilder()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="work was recorded between the cases"), builder.capture(stream):
        with builder.choose(value, 2) as cases:
            x.add_(1)
            with cases.case(0):
                pass
    stream.synchronize()
    assert x.item() == 0


@pytest.mark.gpu
@needs_nodes
def test_a_foreign_capture_is_left_alone(stream):
    x, builder = torch.zeros(1, device="cuda"), GraphBuilder()
    torch.cuda.synchronize()
    foreign = torch.cuda.CUDAGraph()
    with torch.cuda.graph(foreign, stream=stream):
        x.add_(1)
        with pytest.raises(RuntimeError, match="already being captured by somebody else"), builder.capture(stream):
            pass
        builder.abort()
        x.add_(1)
    foreign.replay()
    torch.cuda.synchronize()
    assert x.item() == 2


@pytest.mark.gpu
@needs_nodes
def test_allocations_are_seen(stream):
    x, builder = torch.zeros(8, device="cuda"), GraphBuilder()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="allocations .* where none may happen"), no_allocation():
        with builder.capture(stream):
            x + 1
    with no_allocation(), builder.capture(stream):
        torch.add(x, 1, out=x)


@pytest.mark.gpu
@needs_nodes
def test_two_captures_on_two_streams(cuda_device):
    """Interleaved step by step, in two threads."""
    turn, results, errors = threading.Barrier(2, timeout=60), [None, None], []

    def capture(i):
        try:
            stream, flag, x = torch.cuda.Stream(), ints(i, device="cuda"), torch.zeros(1, device="cuda")
            torch.cuda.synchronize()
            builder = GraphBuilder()
            turn.wait()
            with builder.capture(stream):
                turn.wait()
                x.add_(1)
                turn.wait()
                with builder.when(flag):
                    turn.wait()
                    x.add_(10)
                turn.wait()
                x.add_(100)
            turn.wait()
            run(builder.instantiate(), stream)
            results[i] = x.item()
        except BaseException as error:
            errors.append(error)
            turn.abort()

    threads = [threading.Thread(target=capture, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and results == [101.0, 111.0]


@pytest.mark.gpu
@needs_nodes
def test_what_others_launch_during_a_capture_is_not_recorded(cuda_device):
    """On every stream of torch's pool, and on one of another owner."""
    builder, other = GraphBuilder(), Owner()
    stream, theirs = (own_stream(one, torch.device(cuda_device, 0)) for one in (builder, other))
    pool = [torch.cuda.Stream() for _ in range(64)]
    assert stream.cuda_stream not in {s.cuda_stream for s in (*pool, theirs)}
    x, y = (torch.zeros(1, device="cuda") for _ in range(2))
    torch.cuda.synchronize()
    with builder.capture(stream):
        x.add_(1)
        for one in (*pool, theirs):
            with torch.cuda.stream(one):
                y.add_(1)
            one.synchronize()
        x.add_(1)
    assert y.item() == len(pool) + 1
    run(builder.instantiate(), stream)
    assert x.item() == 2 and y.item() == len(pool) + 1
    assert builder.num_nodes == 2


@pytest.mark.gpu
@needs_nodes
def test_a_graph_of_another_device_than_the_current_one(cuda_device):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    builder = GraphBuilder()
    stream = own_stream(builder, torch.device("cuda", 1))
    x, flag = torch.zeros(1, device="cuda:1"), ints(1, device="cuda:1")
    torch.cuda.synchronize(1)
    with builder.capture(stream), builder.when(flag):
        x.add_(1)
    graph = builder.instantiate()
    assert torch.cuda.current_device() == 0
    graph.upload(stream)
    for _ in range(3):
        graph.launch(stream)
    assert torch.cuda.current_device() == 0
    stream.synchronize()
    assert x.item() == 3


@pytest.mark.gpu
@needs_nodes
def test_replay_on_another_stream(stream):
    flag, x, y = ints(1, device="cuda"), torch.zeros(1, device="cuda"), torch.zeros(1, device="cuda")
    builder = GraphBuilder()
    torch.cuda.synchronize()
    with builder.capture(stream), builder.when(flag):
        x.add_(1)
    graph = builder.instantiate()
    side = torch.cuda.Stream()
    graph.upload(side)
    slow = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(8):
            slow = slow @ slow * 1e-4
        x.fill_(7)
        graph.launch()  # on the current stream, behind the work there
        y.copy_(x)
    side.synchronize()
    assert y.item() == 8
    graph.launch(torch.cuda.default_stream())
    torch.cuda.synchronize()
    assert x.item() == 9
    graph.close()
    with pytest.raises(RuntimeError, match="launch: the graph is closed"):
        graph.launch()


@pytest.mark.gpu
@needs_nodes
def test_survivors_in_a_graph(stream):
    """A small pass: rows leave layer by layer, and the rest is skipped once nobody is left."""
    rows, layers = 40, 5
    lengths = torch.randint(1, 30, (rows,)).tolist()
    args = case(lengths, [True] * rows, rows + 2, sum(lengths) + 9, "cuda")
    start_cu, start_counts = args.cu_seqlens.clone(), args.counts.clone()
    ids = torch.arange(rows + 2, dtype=torch.int32, device="cuda")
    sets = [(args.cu_seqlens, args.counts, ids), (args.out_cu_seqlens, args.out_counts, torch.zeros_like(ids))]
    keeps = torch.zeros(layers, rows + 2, dtype=torch.bool, device="cuda")
    entered = torch.zeros(layers, device="cuda")
    builder = GraphBuilder()

    def layer(i):
        (cu, counts, now), (out_cu, out_counts, then) = sets[i % 2], sets[(i + 1) % 2]
        with builder.when(counts[:1]):
            entered[i : i + 1].add_(1)
            survivors_(keeps[i], cu, counts, [now], out_cu, args.token_dest, out_counts, [then])
            if i + 1 < layers:
                layer(i + 1)

    torch.cuda.synchronize()
    with builder.rehearse(stream):
        layer(0)
    torch.cuda.synchronize()
    with no_allocation(), builder.capture(stream):
        layer(0)
    graph = builder.instantiate()
    for share in (1.0, 0.7, 0.3, 0.0):
        keeps.copy_(torch.rand(layers, rows + 2) < share)
        args.cu_seqlens.copy_(start_cu)
        args.counts.copy_(start_counts)
        ids.copy_(torch.arange(rows + 2))
        entered.zero_()
        torch.cuda.synchronize()
        run(graph, stream)
        left, sizes = list(range(rows)), lengths
        for i in range(layers):
            assert entered[i].item() == (1 if left else 0)
            if not left:
                break
            keep = keeps[i, : len(left)].tolist()
            out_cu, dest, counts, _ = expected(sizes, keep, rows + 2, len(args.token_dest), [])
            left = [row for row, stays in zip(left, keep, strict=True) if stays]
            sizes = [size for size, stays in zip(sizes, keep, strict=True) if stays]
            last = sets[(i + 1) % 2]
        assert last[0].tolist() == out_cu and last[1].tolist() == counts
        assert last[2][: len(left)].tolist() == left
        assert args.token_dest.tolist() == dest
