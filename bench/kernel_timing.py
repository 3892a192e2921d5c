"""One kernel against plain torch, torch.compile and a copy: what all benchmarks of single kernels share.

Every competitor of an op is captured as one graph of several calls, each on tensors of its own; graphs are replayed in
turns. Without a device the twins are timed the plain way, to try the scripts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.bench.timer import Timing, interleave

KERNEL, PLAIN, COMPILED, COPY = "kernel", "torch", "torch.compile", "copy of as many bytes"
# Largest difference from plain torch that rounding explains, relative to the largest value.
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float32: 1e-4}

Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Shape:
    """A model's sizes, as far as one layer knows them."""

    name: str
    hidden: int
    num_heads: int
    vocabulary: int = 30522
    classes: int = 150
    neurons: int = 32


@dataclass(frozen=True)
class Op:
    """One kernel at one shape.

    make   fresh tensors of one call
    runs   competitor -> what it does with them; returns what it computed. KERNEL and PLAIN are always there
    math   the plain function of the tensors that torch.compile gets, None where there is nothing to compile
    flops, bytes  of one call with a full buffer
    copied        time a copy of as many bytes, too
    restore       gives the tensors back what a call changes that the next would read; ahead of calls, outside the clock
    """

    name: str
    group: str
    make: Callable[[], dict[str, Any]]
    runs: dict[str, Callable[[dict[str, Any]], Result]]
    math: Callable[[dict[str, Any]], Result] | None
    flops: float
    bytes: int
    configs: dict[str, Callable[[dict[str, Any]], Result]] = field(default_factory=dict)
    copied: bool = False
    restore: Callable[[dict[str, Any]], object] | None = None


def _joined(result: Result) -> Tensor:
    return torch.cat([part.flatten().float() for part in (result if isinstance(result, tuple) else (result,))])


def check(op: Op, tensors: dict[str, Any], dtype: torch.dtype, also: Iterable[str] = ()) -> None:
    """RuntimeError where the kernel, or another competitor of the full buffer, differs from plain torch."""

    def run(name: str) -> Tensor:
        if op.restore is not None:
            op.restore(tensors)
        return _joined(op.runs[name](tensors))

    expected = run(PLAIN)
    for name in (KERNEL, *also):
        found = run(name)
        allowed = _TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
        difference = float((found - expected).abs().max())
        if not difference <= allowed:  # not a number, too
            raise RuntimeError(f"{op.name}: {name} differs from plain torch by {difference:.3g}, allowed {allowed:.3g}")


def copies_for(tensors: dict[str, Any], cache_bytes: int) -> int:
    """Sets of tensors that together are twice what the cache holds, 2 to 64."""

    def size(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        return sum(map(size, value)) if isinstance(value, tuple) else 0

    one = sum(size(value) for value in tensors.values())
    return min(64, max(2, math.ceil(2 * cache_bytes / max(1, one))))


def time_on_device(
    runs: dict[str, Callable[[dict[str, Any]], Result]],
    sets: list[dict[str, Any]],
    repeats: int,
    restore: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Timing]:
    """Seconds of one call of each competitor: graphs of one call on every set, replayed in turns; with ``restore`` one
    replay a reading of the clock, and every set restored ahead of it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiled and warm before anything is captured
        for run in runs.values():
            for tensors in sets[:2]:
                run(tensors)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graphs = {}
    for name, run in runs.items():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for tensors in sets:
                run(tensors)
        graphs[name] = graph
    replays = 1 if restore is not None else max(1, 32 // len(sets))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-2, repeats):
        for name in graphs if number % 2 == 0 else reversed(list(graphs)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if restore is not None:
                for tensors in sets:
                    restore(tensors)
            start.record()
            for _ in range(replays):
                graphs[name].replay()
            end.record()
            end.synchronize()
            if number >= 0:
                seconds[name].append(start.elapsed_time(end) * 1e-3 / replays / len(sets))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def time_on_host(
    runs: dict[str, Callable[[dict[str, Any]], Result]],
    sets: list[dict[str, Any]],
    repeats: int,
    restore: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Timing]:
    """The same without a device, so that everything but the graphs can be tried anywhere."""
    calls = {name: lambda run=run: [run(tensors) for tensors in sets] for name, run in runs.items()}
    before = None if restore is None else lambda: [restore(tensors) for tensors in sets]
    measured = interleave(calls, repeats=repeats, warmup=1, before=before)
    return {name: Timing(tuple(s / len(sets) for s in found.timing.seconds)) for name, found in measured.items()}


def measure(
    op: Op, shape: Shape, tokens: int, dtype: torch.dtype, device: str, repeats: int, compiled: bool, sweep: bool
) -> list[dict[str, Any]]:
    """One row a competitor, and one a tile where tiles are swept."""
    on_device = device != "cpu"
    tensors = op.make()
    check(op, tensors, dtype, [name for name in op.runs if name.startswith("cuBLAS")])
    cache = torch.cuda.get_device_properties(0).L2_cache_size if on_device else 1
    sets = [tensors, *(op.make() for _ in range(copies_for(tensors, cache) - 1))]
    runs = dict(op.runs)
    if op.copied:
        for one in sets:  # after the sets have been counted: they hold the op's tensors to the same rotation
            half = op.bytes // 2 // dtype.itemsize
            one["copy"] = tuple(torch.zeros(half, dtype=dtype, device=device) for _ in range(2))
        runs[COPY] = lambda t: t["copy"][0].copy_(t["copy"][1])
    if compiled and op.math is not None:
        torch._dynamo.reset()
        runs[COMPILED] = torch.compile(op.math, dynamic=False)
    timer = time_on_device if on_device else time_on_host
    found = {(name, None): timing for name, timing in timer(runs, sets, repeats, op.restore).items()}
    if sweep:
        for config, run in op.configs.items():
            try:
                found[(KERNEL, config)] = timer({config: run}, sets, repeats, op.restore)[config]
            except Exception as error:  # a tile that this device cannot hold is a finding, not the end of the sweep
                print(f"{op.name} {config}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
    rows = []
    for (name, config), timing in found.items():
        full = "live" not in name
        rows.append(
            {
                "op": op.name,
                "group": op.group,
                "model": shape.name,
                "tokens": tokens,
                "dtype": str(dtype).removeprefix("torch."),
                "competitor": name,
                "config": config,
                "median_us": timing.median * 1e6,
                "p10_us": timing.p10 * 1e6,
                "p90_us": timing.p90 * 1e6,
                "tflops": op.flops / timing.median * 1e-12 if full and op.flops and name != COPY else None,
                "gbps": op.bytes / timing.median * 1e-9 if full else None,
                "copies": len(sets),
            }
        )
    return rows
