"""Every kernel for CUDA over awkward shapes, for a sanitizer to watch. Results are not compared: tests do that.

    compute-sanitizer --tool memcheck  python -m engine.bench.sanitize
    compute-sanitizer --tool racecheck python -m engine.bench.sanitize
    compute-sanitizer --tool initcheck python -m engine.bench.sanitize
    compute-sanitizer --tool synccheck python -m engine.bench.sanitize

torch's caching allocator hides overruns inside its blocks from memcheck, and from initcheck what an earlier owner of a
block has written: set PYTORCH_NO_CUDA_MEMORY_CACHING=1 for both. Only what the ops define is read back, so that
initcheck has nothing to say about spare capacity. ``--only`` runs one group; Triton's are in ``sanitize_triton``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from engine.bench import sanitize_triton
from engine.kernels import attention, exits, extension, graphs, hopper_attention, norm_rows, packing, products
from engine.kernels.capture import captured
from engine.kernels.gpu_common import triton
from engine.kernels.step_rows import DECIDE, LEAVE, STAY, step_rows_
from engine.kernels.survivors import Removal, survivors_

LENGTHS = ([1], [3, 1, 5, 2, 7], [2] * 40, [1, 31, 32, 33, 64, 65, 150], [130] * 9)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SCAN_ROWS = (0, 1, 31, 33, 255, 256, 257, 1023, 1025, 2500)  # around warp, block and round of the scans


def _ints(values, device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def run_packing(device: str) -> None:
    for lengths in LENGTHS:
        sizes = _ints(lengths, device)
        cu_seqlens, total, width = packing.prefix_sum(sizes), sum(lengths), max(lengths) + 2
        for dtype in DTYPES:
            for columns in (1, 7, 384):
                padded = torch.ones(len(lengths), width, columns, device=device).to(dtype)
                x = packing.pack_lead(padded, sizes, total)
                packing.unpack_lead(x, cu_seqlens, width)
                for share in (0.0, 0.5, 1.0):
                    keep = torch.rand(len(lengths), device=device) < share
                    packing.compact_rows(x, cu_seqlens, keep)
                    packing.compact_lead(x, cu_seqlens, keep)
                index = torch.randint(0, total, (2 * total,), device=device)
                packing.scatter_rows_(torch.zeros_like(x), packing.gather_rows(x, index)[:total], index[:total])
    for rows in SCAN_ROWS:
        packing.prefix_sum(torch.ones(rows, dtype=torch.int32, device=device))


def run_survivors(device: str) -> None:
    for rows in SCAN_ROWS:
        for spare in (0, 100):
            for share in (0.0, 0.5, 1.0):
                lengths = torch.randint(0, 9, (rows,)).tolist()
                cap_rows, cap_tokens = rows + spare, sum(lengths) + 7 * spare
                cu_seqlens = packing.prefix_sum(_ints(lengths + [0] * spare, device))
                keep = torch.rand(cap_rows, device=device) < share
                state = [torch.zeros(cap_rows, dtype=dtype, device=device) for dtype in (torch.int32, torch.float64)]
                survivors_(
                    keep,
                    cu_seqlens,
                    _ints([rows, sum(lengths)], device),
                    state,
                    torch.empty_like(cu_seqlens),
                    torch.empty(cap_tokens, dtype=torch.int32, device=device),
                    _ints([0, 0], device),
                    [torch.empty_like(s) for s in state],
                )


def run_step_rows(device: str) -> None:
    """Behind every kind of layer, with lists that are long enough and too short."""
    layers, size, longest = 5, 4, 23
    blocks = longest // size + 1
    for rows in (1, 3, 31, 33, 256, 257, 1025):
        for splits in (1, 13):
            for share in (1.0, 0.4, 0.0):
                for room in (rows * longest, rows // 2):
                    positions = torch.randint(0, longest, (rows,), dtype=torch.int32, device=device)
                    table = torch.randperm(rows * blocks, device=device).to(torch.int32).view(rows, blocks)
                    script = torch.randint(0, layers, (rows,), dtype=torch.int32, device=device)
                    least, most = torch.ones_like(script), torch.full_like(script, layers)
                    marks = torch.randint(0, longest, (rows, layers), dtype=torch.int32, device=device)
                    exits = torch.zeros_like(script), torch.zeros(rows, device=device)
                    order = torch.randperm(rows, device=device).to(torch.int32)
                    counts = _ints([int(rows * share), 7], device)
                    for layer, kind, following in ((0, STAY, 1), (2, DECIDE, 3), (layers, LEAVE, 0)):
                        step_rows_(
                            torch.randn(rows, splits, device=device), torch.zeros(1, device=device), order, counts,
                            layer, kind, torch.zeros(rows, device=device), script, least, most, *exits,
                            torch.empty_like(order), _ints([0, 0], device), following, positions, table, size, marks,
                            _ints([0] * room, device), _ints([0] * room, device),
                            torch.zeros(1, dtype=torch.int64, device=device),
                        )  # fmt: skip


def run_attention(device: str) -> None:
    parts = (attention.FIRST_TOKENS, attention.OTHER_TOKENS, attention.ALL_TOKENS)
    for lengths in LENGTHS:
        cu_seqlens, total = packing.prefix_sum(_ints(lengths, device)), sum(lengths)
        for dtype in DTYPES:
            for heads, d in ((2, 32), (3, 12), (1, 200)):
                query, key, value = torch.randn(total, 3 * heads * d, device=device).to(dtype).split(heads * d, 1)
                bias = torch.randn(heads, 2 * max(lengths) - 1, device=device)
                for part in parts:
                    for rows in (None, _ints([len(lengths) - 1, 0], device)):
                        attention.lead_attention(query, key, value, cu_seqlens, rows, heads, 0.3, part)
                        attention.lead_attention(query, key, value, cu_seqlens, rows, heads, 0.3, part, bias)


def run_hopper_attention(device: str) -> None:
    """Attention on Hopper's own instructions, in every form; elsewhere nothing."""
    if device != "cuda":
        return
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16):
        for lengths in ([1], [3, 1, 16, 33, 50, 17], [64, 65, 100, 128, 2], [9] * 33):
            for heads, d, biased in ((2, 64, False), (2, 64, True), (3, 32, False)):
                tokens, rows = sum(lengths), len(lengths)
                qkv = torch.randn(tokens, 3 * heads * d, device=device).to(dtype)
                out = torch.empty(tokens, heads * d, dtype=dtype, device=device)
                bias = torch.randn(heads, 128, 128, device=device).to(dtype) if biased else None
                problem = hopper_attention.attention_problem(out, qkv, heads, 0.125, max(lengths), bias)
                if problem is not None:
                    continue
                counts, cu_seqlens = _ints([rows, tokens], device), packing.prefix_sum(_ints(lengths, device))
                keep = (torch.rand(rows, generator=generator) < 0.5).to(torch.int8).to(device)
                written = [torch.empty(size, dtype=torch.int32, device=device) for size in (rows + 1, tokens, 2, rows)]
                for removal in (None, Removal(keep, _ints(list(range(rows)), device), *written)):
                    hopper_attention.hopper_attention(
                        out, qkv, cu_seqlens, counts, heads, 0.125, max(lengths), bias, removal
                    )


def run_norm_rows(device: str) -> None:
    """Add & Norm by the extension in every form; elsewhere nothing."""
    if device != "cuda":
        return
    for dtype in (torch.float16, torch.bfloat16):
        for capacity, hidden in ((1, 8), (9, 384), (300, 768), (1100, 256), (1100, 768)):
            x, residual, out = (torch.randn(capacity, hidden, device=device).to(dtype) for _ in range(3))
            weight, bias = (torch.randn(hidden, device=device).to(dtype) for _ in range(2))
            if norm_rows.norm_rows_problem(out, x, residual, weight, bias) is not None:
                return
            dest = _ints([-1 if i % 3 == 0 else i - 1 - i // 3 for i in range(capacity)], device)
            sums = torch.randn(4 * x.numel(), device=device)
            for live in {0, 1, capacity // 2, capacity}:
                counts = _ints([live], device)
                for partials in (None, products.Partials(sums, live, live), products.Partials(sums, 0, live)):
                    for places, settled in ((None, False), (dest, False), (dest, True)):
                        norm_rows.norm_rows(
                            out, x, residual, weight, bias, 1e-5, counts, capacity, places, settled, partials
                        )


def run_exits(device: str) -> None:
    for dtype in DTYPES:
        for n, hidden, width in ((0, 8, 4), (1, 384, 32), (3, 33, 5), (70, 64, 32), (5, 1, 1)):

            def made(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.randn(shape, device=device).to(dtype)

            first, square, row = made(n, hidden), made(hidden, hidden), made(hidden)
            policy = (made(width, hidden), made(width), made(1, width), made(1))
            exits.exit_policy(first, None, None, *policy)
            exits.exit_policy(first, square, row, *policy)
            exits.add_layer_norm(first, first, row, row, 1e-5)
            ids = torch.arange(n, device=device) % hidden
            exits.embed_layer_norm(ids, None, ids, square, None, square, row, row, 1e-5)
            exits.embed_layer_norm(ids, ids, ids, square, square, square, row, row, 1e-5)


def run_products(device: str) -> None:
    """The Hopper kernel on every path; elsewhere nothing."""
    if device != "cuda":
        return
    # The last has more tiles than programs.
    sizes = (
        (1, 1, 96, 64), (70, 37, 384, 384), (300, 257, 200, 200), (130, 0, 8, 8), (600, 500, 96, 768),
        (9000, 8999, 768, 72),
    )  # fmt: skip
    for dtype in (torch.float16, torch.bfloat16):
        for capacity, live, outputs, inputs in sizes:
            x, weight = (torch.randn(n, inputs, device=device).to(dtype) for n in (capacity, outputs))
            out, bias = torch.empty(capacity, outputs, dtype=dtype, device=device), weight[:, 0].contiguous()
            if products.product_problem(out, x, weight, bias, "none") is not None:
                continue
            for workspace in (products.product_workspace(device), None):
                for path in range(len(products.PATHS)):
                    for gelu in (False, True):
                        products.hopper_product(out, x, weight, bias, _ints([live], device), gelu, workspace, path)
            partials = products.product_partials(products.partials_memory(out), outputs, inputs)
            for path in (None, *range(len(products.PATHS))):
                products.hopper_product(out, x, weight, bias, _ints([live], device), False, None, path, partials)


def run_graph(device: str) -> None:
    """Nested conditional nodes and a switch, replayed with every value. The CPU rehearses."""
    stream = torch.cuda.Stream() if device == "cuda" else None
    builder = graphs.GraphBuilder()
    flags, x = _ints([1, 1, 0], device), torch.zeros(4, device=device)

    def record() -> None:
        with builder.when(flags[:1]):
            x[0:1].add_(1)
            with builder.when(flags[1:2]):
                x[1:2].add_(1)
            with builder.choose(flags[2:], 2) as cases:
                for k in range(2):
                    with cases.case(k):
                        x[2 + k : 3 + k].add_(1)

    if stream is None:
        with builder.rehearse():
            record()
        return
    torch.cuda.synchronize()
    graph = captured(builder, stream, lambda when: record())
    for values in ([1, 1, 0], [1, 0, 1], [0, 1, 0], [1, 1, 9]):
        flags.copy_(_ints(values, device))
        torch.cuda.synchronize()
        graph.launch(stream)
    torch.cuda.synchronize()
    host_flags, host_x = flags.cpu().pin_memory(), torch.empty(4).pin_memory()
    done = torch.cuda.Event()
    launch = graph.batch_launcher(stream, flags, host_flags, x, host_x, done)
    for values in ([1, 1, 0], [0, 1, 0]):
        host_flags.copy_(torch.tensor(values, dtype=torch.int32))
        launch()
        done.synchronize()


def _encoder_passes(device: str, sizes: tuple[list[int], ...], models: tuple[tuple[str, str], ...]) -> None:
    """A small encoder's passes as its engine runs them, one graph each: rows leave by policies and by a script."""
    import engine
    from engine.bench.encoder_competitors import random_batch
    from engine.bench.encoder_session import random_backbone

    dtype = torch.float16 if device == "cuda" else torch.float32
    for family, pooler in models:
        labels = ("yes", "no", "neither")
        config = engine.EarlyExitConfig(4, (1, 2, 3, 4), pooler=pooler, labels=labels, max_length=512)
        module = engine.MultiExitEncoder(random_backbone(family, tiny=True), config).eval().to(device, dtype)
        runner = engine.from_module(module, executor="graph")
        for lengths in sizes:
            batch = random_batch(module, lengths).inputs
            for options in ({}, {"threshold": 1.0}, {"threshold": 0.0}):
                runner.run(batch, **options)
            runner.run(batch, criterion="scripted", exit_layers=[1 + i % 4 for i in range(len(lengths))])


class WithoutLibraries(TorchDispatchMode):
    """torch's products as sums of element by element products: no kernel of cuBLAS, whose writes by the copy engine
    initcheck does not see. It would charge whoever reads them, more often than its memory for reports has room."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, aten = kwargs or {}, torch.ops.aten
        if func in (aten.mm.default, aten.bmm.default):
            return (args[0].unsqueeze(-1) * args[1].unsqueeze(-3)).sum(-2)
        if func is aten.addmm.default and not kwargs:
            return args[0] + (args[1].unsqueeze(-1) * args[2]).sum(-2)
        with self:  # a product may be inside
            found = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if found is NotImplemented else found


def run_steps(device: str) -> None:
    """A small decoder's steps, one graph each, decided and by a script; of four layers, so that there is no node."""
    import engine
    from engine.bench.decoder_h100 import random_decoder, spread

    model = random_decoder("tiny", torch.device(device), torch.float16 if device == "cuda" else torch.float32, 64)
    lm = engine.generation.DecoderEngine(model, executor="graph", cache_bytes=1 << 20)
    for rows in (1, 5):
        prompts = [[3 + i, 7, 9][: 1 + i % 3] for i in range(rows)]
        # For the prompts, which torch's own kernels serve: under synccheck cuDNN's attention does not come to an end.
        with sdpa_kernel(SDPBackend.MATH), WithoutLibraries():
            lm.run(prompts, max_new_tokens=12, ignore_eos=True)
            script = [spread(4, 12, 2.0)] * rows
            lm.run(prompts, max_new_tokens=12, ignore_eos=True, criterion="scripted", exit_layers=script)


def run_passes(device: str) -> None:
    """Whole encoder passes, with and without a pooler and a position bias, of few and of many rows, each in one piece:
    without the conditional node that passes of few rows have."""
    from engine.executors import graph_pass

    models = (("bert", "none"), ("bert", "shared"), ("mpnet", "none"))
    with mock.patch.object(graph_pass, "stage_layers", lambda deepest, rows: deepest + 1):
        _encoder_passes(device, ([1], [3, 1, 33, 2, 7], [5] * 24), models)


def run_nodes(device: str) -> None:
    """Passes and steps with kernels of ours behind a conditional node."""
    from engine.decoding import graph as decoder_graph

    _encoder_passes(device, ([1], [3, 1, 33, 2, 7]), (("bert", "none"),))
    with mock.patch.object(decoder_graph, "_STAGE", 2):
        run_steps(device)


RUNS: dict[str, Callable[[str], None]] = {
    "packing": run_packing,
    "survivors": run_survivors,
    "step rows": run_step_rows,
    "attention": run_attention,
    "hopper attention": run_hopper_attention,
    "norm rows": run_norm_rows,
    "exits and norms": run_exits,
    "products": run_products,
    "graph": run_graph,
    "passes": run_passes,
    "steps": run_steps,
    "nodes": run_nodes,
    **sanitize_triton.RUNS,
}


def problem(name: str, device: str) -> str | None:
    """Why a group cannot run here. On the CPU Triton's run in torch, and need neither Triton nor the extension."""
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    if name in sanitize_triton.RUNS:
        return "triton is not installed" if device == "cuda" and triton is None else None
    if not extension.available():
        return "the extension is not built"
    if device == "cuda" and not extension.cuda_kernels():
        return "the extension has no usable CUDA half"
    if name in ("graph", "passes", "steps", "nodes"):
        return graphs.conditional_nodes_problem() if device == "cuda" else graphs.builder_problem()
    return None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: does this script run at all")
    parser.add_argument("--only", choices=tuple(RUNS), help="one group of ops")
    chosen = parser.parse_args(arguments)
    problems = {name: problem(name, chosen.device) for name in RUNS if chosen.only in (None, name)}
    if all(problems.values()):
        raise SystemExit(f"nothing to sanitize: {next(iter(problems.values()))}")
    for name, reason in problems.items():
        if reason is not None:
            print(f"{name}: left out, {reason}")
            continue
        torch.manual_seed(0)
        RUNS[name](chosen.device)
        if chosen.device == "cuda":
            torch.cuda.synchronize()
        print(f"{name}: ran", flush=True)


if __name__ == "__main__":
    main()
