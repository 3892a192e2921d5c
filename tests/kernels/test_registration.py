"""How the ops sit in torch: opcheck, compilation, streams, graphs, and the way back to the twins."""

import subprocess
import sys
import textwrap
from inspect import signature

import pytest
import torch

from engine.kernels import attention, exits, extension, layer, linear, packing, step_rows
from engine.kernels.decoder import DecoderPlan
from engine.kernels.encoder import EncoderPlan
from tests.kernels import test_decoder, test_step_rows
from tests.kernels.cases import cu_seqlens_of, needs_extension
from tests.kernels.test_encoder import tensors_of

# opcheck compares eager and traced outputs, so an op whose output is undefined in part skips that comparison.
TRACING = ("test_schema", "test_faketensor")
PLAN = ("test_schema", "test_autograd_registration")  # what it returns is another one each time
FULL = (*TRACING, "test_autograd_registration", "test_aot_dispatch_dynamic")

_PLANS: list[EncoderPlan | DecoderPlan] = []  # a handle is good as long as its owner lives


def samples(device="cpu"):
    """(op, arguments, checks) for every op."""

    def randn(*shape, dtype=torch.float32):
        return torch.randn(shape).to(dtype).to(device)

    def ints(*values, dtype=torch.int32):
        return torch.tensor(values, dtype=dtype, device=device)

    cu, lengths = cu_seqlens_of([3, 1, 2], device), ints(3, 1, 2)
    all_kept, some_kept = ints(1, 1, 1, dtype=torch.bool), ints(0, 1, 1, dtype=torch.bool)
    q, k, v = randn(6, 24).split(8, 1)
    bias = randn(2, 7)
    policy = (randn(5, 8), randn(5), randn(1, 5), randn(1))
    ids = ints(1, 2, 0, 1)
    yield "prefix_sum", (lengths,), FULL
    for op in ("compact_rows", "compact_lead"):
        yield op, (randn(6, 4), cu, all_kept), FULL
        yield op, (randn(6, 4, dtype=torch.bfloat16), cu, some_kept), TRACING
    yield "gather_rows", (randn(6, 2, 3), ints(5, 0)), FULL
    yield "gather_rows", (randn(6, 8)[:, 2:5], ints(5, 0, dtype=torch.int64)), FULL
    yield "scatter_rows_", (randn(6, 4), randn(2, 4), ints(5, 0)), FULL
    for keep in (all_kept, some_kept, some_kept.to(torch.int8)):
        state, out_state = [ints(4, 5, 6), randn(3)], [ints(0, 0, 0), randn(3)]
        outs = ints(*[7] * 4), ints(*[7] * 8), ints(7, 7)
        yield "survivors_", (keep, cu, ints(3, 6), state, *outs, out_state), FULL
    for change in ({"layer": 3, "kind": 1, "next_layer": 4}, {"layer": 2, "kind": 0, "next_layer": 3, "settled": None},
                   {"layer": 6, "kind": 2, "next_layer": 0, "partial": None, "b2": None}):  # fmt: skip
        given = {**test_step_rows.case(5, 4), **change}
        given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        yield "step_rows_", tuple(given[k] for k in signature(step_rows.step_rows_).parameters), FULL
    yield "pack_lead", (randn(3, 4, 5), lengths, 6), FULL
    yield "pack_lead", (randn(3, 4, 5), lengths, None), FULL
    yield "unpack_lead", (randn(6, 5), cu, 4), FULL
    for part in (0, 1, 2):
        yield "lead_attention", (q, k, v, cu, None, 2, 0.5, part, None, None), FULL
        yield "lead_attention", (q, k, v, cu, ints(2, 0), 2, 0.5, part, bias, None), FULL
    yield "lead_attention", (q, k, v, cu, ints(2, 0), 2, 0.5, 1, bias, 3), FULL
    yield "exit_policy", (randn(3, 8), None, None, *policy), FULL
    yield "exit_policy", (randn(3, 8), randn(8, 8), randn(8), *policy), FULL
    yield "exit_policy", (randn(3, 8, dtype=torch.float16), None, None, *policy), FULL
    tables = (randn(3, 8), randn(3, 8), randn(3, 8), randn(8), randn(8), 1e-5)
    yield "embed_layer_norm", (ids, ids, ids, *tables), FULL
    yield "embed_layer_norm", (ids.long(), None, ids, tables[0], None, *tables[2:]), FULL
    panels = [linear.pack_panels(randn(n, k)) for n, k in ((8, 8), (21, 8), (8, 21))]
    yield "packed_linear", (randn(3, 8), panels[1], randn(21), 21, True), FULL
    yield "packed_linear", (randn(3, 9)[:, 1:], panels[1], None, 21, False), FULL
    norm = (randn(8), randn(8), 1e-5)
    layer_weights = (panels[0], randn(8), *norm, panels[1], randn(21), panels[2], randn(8), *norm)
    qkv = randn(6, 24)
    yield "finish_layer", (qkv, cu, None, randn(6, 8), 2, 0.5, 2, None, *layer_weights), FULL
    yield "finish_layer", (qkv, cu, ints(2, 0), randn(4, 8), 2, 0.5, 1, bias, *layer_weights), FULL
    encoder = tensors_of(2)  # the CPU's alone
    yield "encoder_plan", tuple(encoder), PLAN
    _PLANS.append(EncoderPlan(encoder))
    ids, types = torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64)
    deep = torch.tensor([1, 2], dtype=torch.int32)
    for rules in ((torch.zeros(2), None, None, None), (None, deep, deep, deep)):
        rest = _PLANS[-1].handle, 3, *rules, torch.tensor([0.5, -1.0]), 2, 6.0
        yield "run_encoder", (ids, types, [4, 2], *rest), FULL
    decoder = test_decoder.tensors_of()
    yield "decoder_plan", tuple(decoder), PLAN
    _PLANS.append(DecoderPlan(decoder))
    step = list(test_decoder.arguments_of().values())
    yield "decode_step", (*step[:8], _PLANS[-1].handle, *step[8:]), FULL
    yield "add_layer_norm", (randn(4, 8), randn(4, 8), randn(8), randn(8), 1e-5), FULL


def test_threads_change_nothing():
    """Shapes large enough for every op to share its work among threads."""
    lengths = torch.randint(1, 60, (80,), dtype=torch.int32)
    total, hidden = int(lengths.sum()), 192
    cu_seqlens, keep = packing.prefix_sum(lengths), torch.rand(80) < 0.7
    qkv, weight = torch.randn(total, 3 * hidden), torch.randn(hidden, hidden)
    q, k, v = qkv.split(hidden, 1)
    b, ids = weight[0], torch.arange(total) % hidden

    def everything():
        packed = packing.compact_lead(qkv, cu_seqlens, keep)
        return (
            attention.lead_attention(q, k, v, cu_seqlens, None, 4, 0.2, attention.ALL_TOKENS),
            attention.lead_attention(q, k, v, cu_seqlens, None, 4, 0.2, attention.FIRST_TOKENS),
            *exits.exit_policy(q.contiguous(), weight, b, weight[:32].contiguous(), b[:32], weight[:1, :32], b[:1]),
            exits.add_layer_norm(q, k, b, b, 1e-5),
            exits.embed_layer_norm(ids, None, ids, weight, None, weight, b, b, 1e-5),
            packing.gather_rows(qkv, ids),
            packing.unpack_lead(qkv, cu_seqlens, 60),
            packed[0][: int(packed[1][-1])],
        )

    torch.set_num_threads(1)
    serial = everything()
    torch.set_num_threads(2)
    for one, two in zip(serial, everything(), strict=True):
        assert torch.equal(one, two)


@needs_extension
def test_every_op_has_a_sample_and_a_fake():
    known = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "consistentee::" in name}
    assert known == {name for name, _, _ in samples()} == set(extension._FAKES)


@needs_extension
@pytest.mark.parametrize("index", range(len(list(samples()))), ids=lambda i: f"{i}-{list(samples())[i][0]}")
def test_opcheck(index, device):
    name, arguments, checks = list(samples(device))[index]
    op = getattr(torch.ops.consistentee, name).default
    torch.library.opcheck(op, arguments, test_utils=checks)


def some_layer(qkv, cu_seqlens, keep, residual, weight, bias, *policy):
    """A slice of an encoder: attention, residual norm, exit check, compaction."""
    size = qkv.shape[1] // 3
    attended = attention.lead_attention(
        qkv[:, :size], qkv[:, size : 2 * size], qkv[:, 2 * size :], cu_seqlens, None, 2, 0.5, attention.ALL_TOKENS
    )
    hidden = exits.add_layer_norm(attended, residual, weight, bias, 1e-5)
    first = hidden[: cu_seqlens.shape[0] - 1].contiguous()
    state, logit = exits.exit_policy(first, None, None, *policy)
    compacted, out_cu_seqlens, _, n_active = packing.compact_lead(hidden, cu_seqlens, keep)
    return compacted * 2, out_cu_seqlens, n_active, state.sum(-1) + logit


def layer_case(device):
    weights = [torch.randn(shape, device=device) for shape in ((8,), (8,), (5, 8), (5,), (1, 5), (1,))]
    keep = torch.tensor([True, True, True], device=device)
    return (torch.randn(6, 24, device=device), cu_seqlens_of([3, 1, 2], device), keep,
            torch.randn(6, 8, device=device), *weights)  # fmt: skip


@needs_extension
def test_compiles_as_one_graph(device):
    case = layer_case(device)
    compiled = torch.compile(some_layer, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(*case), some_layer(*case), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.gpu
def test_runs_on_the_current_stream(cuda_device):
    stream = torch.cuda.Stream()
    slow = torch.randn(4096, 4096, device=cuda_device)
    x = torch.zeros(4096, 384, device=cuda_device)
    index = torch.randperm(4096, device=cuda_device)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(8):
            slow = slow @ slow * 1e-4
        x.fill_(7.0)
        y = packing.gather_rows(x, index)
    stream.synchronize()
    assert bool((y == 7).all())


@pytest.mark.gpu
def test_replays_in_a_graph(cuda_device):
    """A whole step is captured: nothing in it waits for the host."""
    case = layer_case(cuda_device)
    some_layer(*case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = some_layer(*case)
    case[0].normal_()
    graph.replay()
    torch.cuda.synchronize()
    for ours, expected in zip(outputs, some_layer(*case), strict=True):
        torch.testing.assert_close(ours, expected)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_twins_serve_where_the_extension_is_absent():
    out = run("""
        import pathlib, warnings
        exists = pathlib.Path.exists
        pathlib.Path.exists = lambda self: self.name != "_C.abi3.so" and exists(self)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            from engine.kernels import attention, exits, extension, packing
        said = [str(w.message) for w in caught if "extension" in str(w.message)]
        assert said == ["extension not built: using the torch twins; pip install -e . builds it"], said
        import torch
        assert not extension.available() and extension.cpu_kernels() == "torch"
        print(packing.prefix_sum(torch.tensor([1, 2], dtype=torch.int32)).tolist())
    """)
    assert out.strip() == "[0, 1, 3]"


@needs_extension
def test_twins_serve_cuda_for_ops_of_the_cpu_alone():
    assert linear.packed_linear and layer.finish_layer
    for name in ("packed_linear", "finish_layer"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"consistentee::{name}", "CUDA")


@needs_extension
def test_twins_serve_cuda_where_the_compiled_half_cannot():
    """As on a machine whose driver is older than the CUDA the extension was built with."""
    run("""
        import torch
        from engine.kernels import extension, packing
        extension._twins_for_cuda = True
        op = extension.bind("gather_rows", packing.gather_rows_ref)
        assert op is torch.ops.consistentee.gather_rows.default
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        assert has("consistentee::gather_rows", "CUDA") and has("consistentee::gather_rows", "CPU")
        x = torch.randn(3, 2)
        assert torch.equal(op(x, torch.tensor([2])), x[2:])
    """)


@needs_extension
def test_twins_serve_devices_that_the_compiled_half_is_not_built_for():
    out = run("""
        import warnings
        import torch
        import engine
        from engine.executors import executor_class
        from engine.kernels import extension
        extension._cuda_kernels, told = True, []
        torch.cuda.get_device_capability = lambda device: (8, 0) if device.index == 0 else (7, 5)
        extension._library.impl = lambda name, twin, key, allow_override: told.append((name, key))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            executor_class("packed", torch.device("cuda", 0))
            assert told == [] and extension.cuda_kernels()
            for _ in range(2):
                executor_class("packed", torch.device("cuda", 1))
        assert [name for name, _ in told] == [name for name, _ in extension._bound]
        assert ("compact_lead", "CUDA") in told and not extension.cuda_kernels()
        print(*(w.message for w in caught))
    """)
    assert out.strip() == (
        "the extension is built for compute capability 8.0 and up, cuda:1 has 7.5: CUDA tensors use the torch twins"
    )
