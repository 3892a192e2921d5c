"""The kernels of a decode step one by one on a CUDA device at LLaMA-7B's sizes, against plain torch and torch.compile.

    python -m engine.bench.decoder_kernels_h100 [--rows 1 8 32 64] [--context 384] [--no-compile]

writes ``bench/results/decoder_kernels_h100.json``. Measured as ``kernels_h100`` measures: graphs of several calls, each
on tensors of its own, competitors in turns. All rows are live, and have as many positions. GB/s counts every input once
and what is written once. Weights, keys and values are what a step waits for: the last column is GB/s over those of
the card's data sheet (an H100's: 3350).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from engine.bench.kernels_h100 import KERNEL, PLAIN, Op, Shape, measure
from engine.bench.record import RESULTS, write_result
from engine.bench.report import memory_bandwidth
from engine.console import show_table
from engine.kernels.gpu_decode_attention import decode_attention_, decode_attention_workspace
from engine.kernels.gpu_greedy import greedy_rows_
from engine.kernels.gpu_measures import classifier_rows_, response_rows_, saturation_rows_
from engine.kernels.gpu_policy import policy_rows_, policy_splits
from engine.kernels.gpu_qkv import qkv_rows_
from engine.kernels.gpu_qkv_entries import qkv_entries
from engine.kernels.gpu_stream import stream_rows_, stream_workspace
from engine.kernels.step_rows import DECIDE, step_rows_, step_rows__ref

LLAMA = Shape("llama-7b", 4096, 32, vocabulary=32000, neurons=128)
TINY = Shape("tiny", 64, 4, vocabulary=101, neurons=8)
CONTIGUOUS = "torch, contiguous keys and values"
_EPS, _BLOCK = 1e-5, 16


def _inner(shape: Shape) -> int:
    return 11008 if shape is LLAMA else 96


def _rms(x: Tensor, gain: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPS)).to(x.dtype) * gain


class _Maker:
    """Tensors of ops for one number of rows."""

    def __init__(self, shape: Shape, rows: int, context: int, dtype: torch.dtype, device: str):
        self.shape, self.rows, self.context, self.dtype, self.device = shape, rows, context, dtype, device
        self.head_dim = shape.hidden // shape.num_heads

    def randn(self, *size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, device=self.device).mul_(scale).to(self.dtype)

    def ints(self, *size: int, value: int = 0) -> Tensor:
        return torch.full(size, value, dtype=torch.int32, device=self.device)

    def lists(self) -> dict[str, Tensor]:
        order = torch.arange(self.rows, dtype=torch.int32, device=self.device)
        return {"order": order, "counts": torch.tensor([self.rows, 0], dtype=torch.int32, device=self.device)}


def stream_ops(m: _Maker) -> list[Op]:
    hidden, inner, words = m.shape.hidden, _inner(m.shape), m.shape.vocabulary
    item = m.dtype.itemsize

    def op(name: str, features: int, width: int, make: dict, launch: Callable, plain: Callable, weights: int) -> Op:
        def tensors() -> dict[str, Any]:
            made = {"x": m.randn(m.rows, width), "w": m.randn(weights * features, width, scale=width**-0.5)}
            return {**made, **m.lists(), **{k: f() for k, f in make.items()}}

        n = weights * features * width
        moved = (n + m.rows * (width + 2 * features)) * item
        return Op(name, "stream", tensors, {KERNEL: launch, PLAIN: plain}, plain, 2.0 * n * m.rows, moved)

    def run(t: dict[str, Any], out: Tensor, **options: Any) -> Tensor:
        stream_rows_(out, t["x"], t["w"], t["order"], t["counts"], **options)
        return out

    def residual(t: dict[str, Any]) -> Tensor:
        return F.linear(t["x"], t["w"]) + t["residual"]

    def gated(t: dict[str, Any]) -> Tensor:
        gate, up = F.linear(_rms(t["x"], t["gain"]) if "gain" in t else t["x"], t["w"]).chunk(2, -1)
        return F.silu(gate) * up

    def into_residual(t: dict[str, Any]) -> Tensor:
        return run(t, t["out"], residual=t["residual"], workspace=t["shared"])

    def rows_of(n: int) -> dict[str, Callable]:
        made = {"residual": lambda: m.randn(m.rows, n), "out": lambda: m.randn(m.rows, n)}
        return {**made, "shared": lambda: stream_workspace(m.rows, n, torch.device(m.device))}

    # One row has the norm in the product, more have it in a kernel of its own.
    gain = {"gain": lambda: m.randn(hidden)} if m.rows == 1 else {}
    logits = {"out": lambda: torch.zeros(m.rows, words, device=m.device)}
    return [
        op("attention output", hidden, hidden, rows_of(hidden), into_residual, residual, 1),
        op("norm + gate, up" if gain else "gate, up", inner, hidden, {**gain, "out": lambda: m.randn(m.rows, inner)},
           lambda t: run(t, t["out"], act="swiglu", norm=(t["gain"], _EPS) if "gain" in t else None), gated, 2),
        op("down", hidden, inner, rows_of(hidden), into_residual, residual, 1),
        op("head", words, hidden, logits, lambda t: run(t, t["out"]), lambda t: F.linear(t["x"], t["w"]).float(), 1),
    ]  # fmt: skip


def qkv_ops(m: _Maker) -> list[Op]:
    hidden, heads, d = m.shape.hidden, m.shape.num_heads, m.head_dim

    room = qkv_entries(m.rows, heads, heads, d)

    def make() -> dict[str, Any]:
        slots = 4 * m.rows
        entries = m.randn(room, hidden) if room else None
        return {
            "entries": entries,
            **m.lists(), "x": m.randn(m.rows, hidden), "w": m.randn(3 * hidden, hidden, scale=hidden**-0.5),
            "gain": m.randn(hidden), "states": m.randn(slots, hidden), "query": m.randn(m.rows, heads, d),
            "keys": m.randn(slots, heads, d), "values": m.randn(slots, heads, d), "cos": m.randn(64, d),
            "sin": m.randn(64, d), "owed": m.ints(slots),
            "slots": 2 * torch.arange(m.rows, dtype=torch.int32, device=m.device),
            "positions": torch.arange(m.rows, dtype=torch.int32, device=m.device) % 64,
        }  # fmt: skip

    def kernel(t: dict[str, Any]) -> tuple[Tensor, ...]:
        qkv_rows_(t["query"], t["keys"], t["values"], t["x"], t["states"], t["w"], (t["gain"], _EPS), t["cos"],
                  t["sin"], t["order"], t["slots"], t["positions"], t["owed"], t["owed"], t["counts"],
                  entries=t["entries"])  # fmt: skip
        return t["query"], t["keys"], t["values"]

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def plain(t: dict[str, Any]) -> tuple[Tensor, ...]:
        q, k, v = F.linear(_rms(t["x"], t["gain"]), t["w"]).unflatten(-1, (3, heads, d)).unbind(1)
        at, places = t["positions"].long(), t["slots"].long()
        cos, sin = t["cos"][at][:, None], t["sin"][at][:, None]
        t["keys"][places], t["values"][places] = turned(k, cos, sin), v
        return turned(q, cos, sin), t["keys"], t["values"]

    moved = (3 * hidden * hidden + m.rows * 4 * hidden) * m.dtype.itemsize
    flops = 6.0 * hidden * hidden * m.rows
    return [Op("norm + q, k, v + RoPE", "qkv", make, {KERNEL: kernel, PLAIN: plain}, plain, flops, moved)]


def attention_ops(m: _Maker) -> list[Op]:
    heads, d, blocks = m.shape.num_heads, m.head_dim, -(-m.context // _BLOCK)
    scale = d**-0.5

    def make() -> dict[str, Any]:
        slots = m.rows * blocks * _BLOCK
        table = torch.randperm(m.rows * blocks, device=m.device).to(torch.int32).view(m.rows, blocks)
        made = {
            **m.lists(), "query": m.randn(m.rows, heads, d), "out": m.randn(m.rows, heads, d),
            "keys": m.randn(slots, heads, d), "values": m.randn(slots, heads, d), "table": table,
            "positions": m.ints(m.rows, value=m.context - 1),
            "workspace": decode_attention_workspace(m.rows, heads, heads, d, torch.device(m.device)),
        }  # fmt: skip
        at = torch.arange(m.context, device=m.device)
        places = table.long()[:, at // _BLOCK] * _BLOCK + at % _BLOCK
        made["places"] = places
        made["k"], made["v"] = (made[x][places].transpose(1, 2).contiguous() for x in ("keys", "values"))
        return made

    def kernel(t: dict[str, Any]) -> Tensor:
        decode_attention_(t["out"], t["query"], t["keys"], t["values"], t["order"], t["table"], t["positions"],
                          t["counts"], scale, _BLOCK, t["workspace"])  # fmt: skip
        return t["out"]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q[:, :, None], k, v, scale=scale)[:, :, 0]

    def plain(t: dict[str, Any]) -> Tensor:
        return attention(t["query"], *(t[x][t["places"]].transpose(1, 2) for x in ("keys", "values")))

    runs = {KERNEL: kernel, PLAIN: plain, CONTIGUOUS: lambda t: attention(t["query"], t["k"], t["v"])}
    moved = (2 * m.rows * m.context * heads * d + 2 * m.rows * heads * d) * m.dtype.itemsize
    return [Op(f"paged attention, {m.context} positions", "attention", make, runs, plain, 0.0, moved)]


def exit_ops(m: _Maker) -> list[Op]:
    hidden, neurons, words, layers = m.shape.hidden, m.shape.neurons, m.shape.vocabulary, 32
    splits = policy_splits(m.rows, hidden, neurons)

    def policy_tensors() -> dict[str, Any]:
        made = {**m.lists(), "x": m.randn(m.rows, hidden), "normed": m.randn(m.rows, hidden), "gain": m.randn(hidden)}
        made |= {"w1": m.randn(neurons, hidden, scale=hidden**-0.5), "b1": m.randn(neurons), "w2": m.randn(1, neurons)}
        made |= {"states": m.randn(m.rows, hidden), "partial": torch.zeros(m.rows, splits, device=m.device)}
        return made

    def policy(t: dict[str, Any]) -> tuple[Tensor, ...]:
        policy_rows_(t["partial"], t["normed"], t["states"], t["x"], (t["gain"], _EPS), (t["w1"], t["b1"], t["w2"]),
                     t["order"], t["order"], t["counts"])  # fmt: skip
        return t["normed"], t["states"], t["partial"].sum(1)

    def plain_policy(t: dict[str, Any]) -> tuple[Tensor, ...]:
        n = _rms(t["x"], t["gain"])
        t["states"].copy_(t["x"])
        return n, t["states"], F.linear(F.gelu(F.linear(n, t["w1"], t["b1"])), t["w2"])[:, 0].float()

    def greedy_tensors() -> dict[str, Any]:
        made = {"told": m.ints(m.rows, 3), "ids": m.ints(m.rows), "layers": m.ints(m.rows, value=5)}
        probs = torch.rand(m.rows, device=m.device)
        return {**m.lists(), **made, "probs": probs, "logits": torch.randn(m.rows, words, device=m.device)}

    def greedy(t: dict[str, Any]) -> Tensor:
        greedy_rows_(t["told"], t["ids"], t["logits"], t["layers"], t["probs"], t["counts"])
        return t["told"]

    def plain_greedy(t: dict[str, Any]) -> Tensor:
        ids = t["logits"].argmax(1).to(torch.int32)
        t["ids"].copy_(ids)
        return torch.stack([ids, t["layers"], t["probs"].view(torch.int32)], 1)

    def step_tensors() -> dict[str, Any]:
        made = {name: m.ints(m.rows, value=value) for name, value in
                {"script": 0, "least": 1, "most": layers, "layers": 0, "to": 0}.items()}  # fmt: skip
        blocks = -(-m.context // _BLOCK)
        made |= {"partial": torch.randn(m.rows, splits, device=m.device), "b2": torch.zeros(1, device=m.device)}
        made |= {"threshold": torch.zeros(m.rows, device=m.device), "probs": torch.zeros(m.rows, device=m.device)}
        made |= {"positions": m.ints(m.rows, value=m.context - 1), "table": m.ints(m.rows, blocks)}
        made |= {"marks": m.ints(m.rows, layers, value=m.context - 3), "counts_to": m.ints(2)}
        return {**m.lists(), **made, "owed": m.ints(m.rows * m.context), "owed_at": m.ints(m.rows * m.context)}

    def step(function: Callable) -> Callable:
        def call(t: dict[str, Any]) -> tuple[Tensor, ...]:
            function(t["partial"], t["b2"], t["order"], t["counts"], 5, DECIDE, t["threshold"], t["script"], t["least"],
                     t["most"], t["layers"], t["probs"], t["to"], t["counts_to"], 6, t["positions"], t["table"], _BLOCK,
                     t["marks"], t["owed"], t["owed_at"])  # fmt: skip
            return t["to"], t["layers"], t["probs"]

        return call

    item = m.dtype.itemsize
    weights = neurons * hidden
    return [
        Op(f"norm + policy of {neurons} neurons", "exit", policy_tensors, {KERNEL: policy, PLAIN: plain_policy},
           plain_policy, 2.0 * weights * m.rows, (weights + 3 * m.rows * hidden) * item),
        # What refuses shared memory reads addresses: nothing for torch.compile.
        Op("who leaves, what is owed", "exit", step_tensors, {KERNEL: step(step_rows_), PLAIN: step(step_rows__ref)},
           None, 0.0, m.rows * 4 * (splits + 12)),
        Op("greedy token", "exit", greedy_tensors, {KERNEL: greedy, PLAIN: plain_greedy}, plain_greedy, 0.0,
           m.rows * words * 4),
    ]  # fmt: skip


def measure_ops(m: _Maker) -> list[Op]:
    """CALM's measures, which stand where the policy does; softmax response without the head's product in front."""
    hidden, words, item = m.shape.hidden, m.shape.vocabulary, m.dtype.itemsize

    def tensors() -> dict[str, Any]:
        made = {**m.lists(), "z": torch.zeros(m.rows, 1, device=m.device), "x": m.randn(m.rows, hidden)}
        return {**made, "before": m.randn(m.rows, hidden), "w": m.randn(1, hidden, scale=hidden**-0.5)}

    def wide() -> dict[str, Any]:
        logits = torch.randn(m.rows, words, device=m.device)
        return {**m.lists(), "z": torch.zeros(m.rows, 1, device=m.device), "logits": logits}

    def saturation(t: dict[str, Any]) -> Tensor:
        saturation_rows_(t["z"], t["before"], t["x"], t["order"], t["counts"])
        return t["before"]

    def plain_saturation(t: dict[str, Any]) -> Tensor:
        t["z"][:, 0] = F.cosine_similarity(t["x"].float(), t["before"].float(), dim=-1).clamp(0, 1).logit()
        return t["before"].copy_(t["x"])

    def classifier(t: dict[str, Any]) -> Tensor:
        classifier_rows_(t["z"], t["x"], t["w"], t["order"], t["counts"])
        return t["z"]

    def response(t: dict[str, Any]) -> Tensor:
        response_rows_(t["z"], t["logits"], t["order"], t["counts"])
        return t["z"]

    def plain_response(t: dict[str, Any]) -> Tensor:
        top = t["logits"].softmax(-1).topk(2, dim=-1).values
        return (top[:, :1] - top[:, 1:]).logit()

    ops = (
        ("saturation", tensors, saturation, plain_saturation, 3 * m.rows * hidden * item),
        ("early-exit classifier", tensors, classifier, lambda t: F.linear(t["x"], t["w"]).float(),
         (m.rows + 1) * hidden * item),
        ("softmax response", wide, response, plain_response, m.rows * words * 4),
    )  # fmt: skip
    return [
        Op(f"CALM: {name}", "exit", make, {KERNEL: kernel, PLAIN: plain}, plain, 0.0, moved)
        for name, make, kernel, plain, moved in ops
    ]


_GROUPS = (qkv_ops, attention_ops, stream_ops, exit_ops, measure_ops)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--context", type=int, default=384, help="positions of each row")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--device", default="cuda", help="cpu: the twins at a tiny shape, to try the script")
    parser.add_argument("--output", type=Path, default=RESULTS / "decoder_kernels_h100.json")
    o = parser.parse_args(arguments)
    if min(*o.rows, o.context, o.repeats) < 1:
        parser.error(f"rows, context and repeats must be at least 1, got {o.rows}, {o.context}, {o.repeats}")
    on_gpu = o.device != "cpu"
    shape, dtype = (LLAMA, torch.float16) if on_gpu else (TINY, torch.float32)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for count in o.rows:
            maker = _Maker(shape, count, o.context, dtype, o.device)
            for op in (op for group in _GROUPS for op in group(maker)):
                rows += measure(op, shape, count, dtype, o.device, o.repeats, o.compile, sweep=False)
    for row in rows:
        row["rows"] = row.pop("tokens")
        row["of_peak"] = 1e9 * row["gbps"] / memory_bandwidth(o.device)
    lines = [
        [r["op"], str(r["rows"]), r["competitor"], f"{r['median_us']:.1f}", f"{r['gbps']:.0f}", f"{r['of_peak']:.2f}"]
        for r in rows
    ]
    show_table(Console(), ["op", "rows", "competitor", "median us", "GB/s", "of peak"], lines, title=shape.name,
               left=("op", "competitor"))  # fmt: skip
    write_result(o.output, [], rows, context=o.context)


if __name__ == "__main__":
    main()
