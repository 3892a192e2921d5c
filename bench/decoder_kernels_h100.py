"""The kernels of a decode step one by one on a CUDA device at LLaMA-7B's sizes, against plain torch and torch.compile.

    python -m engine.bench.decoder_kernels_h100 [--rows 1 8 32 64] [--context 384] [--no-compile]
    python -m engine.bench.decoder_kernels_h100 --merge FILE ...

writes ``bench/results/decoder_kernels_h100.json``. Measured as ``kernels_h100`` measures: graphs of several calls, each
on tensors of its own, competitors in turns. All rows are live, and have as many positions; "kernel, 1/4 live" runs the
same grid with a smaller count. GB/s counts every input once and what is written once. Weights, keys and values are what
a step waits for: the last column is GB/s over those of the card's data sheet (an H100's: 3350).

"N owed" beside a product of queries, keys and values: keys and values of so many more positions, which that layer still
owes, come out of the same call. Torch multiplies live and owed rows at once, which reads the weight once, too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from engine.bench.kernel_timing import KERNEL, PLAIN, Op, Shape, measure
from engine.bench.record import RESULTS, merged, same_in_all, write_result
from engine.bench.report import memory_bandwidth
from engine.console import show_table
from engine.kernels.gpu_decode_attention import decode_attention_, decode_attention_workspace
from engine.kernels.gpu_greedy import greedy_rows_
from engine.kernels.gpu_measures import classifier_rows_, response_rows_, saturation_rows_
from engine.kernels.gpu_policy import delta_rows_, policy_rows_, policy_splits
from engine.kernels.gpu_qkv import qkv_rows_
from engine.kernels.gpu_qkv_entries import qkv_entries
from engine.kernels.gpu_stream import stream_rows_, stream_workspace
from engine.kernels.step_rows import DECIDE, step_rows_, step_rows__ref

LLAMA = Shape("llama-7b", 4096, 32, vocabulary=32000, neurons=128)
TINY = Shape("tiny", 64, 4, vocabulary=101, neurons=8)
CONTIGUOUS, QUARTER = "torch, contiguous keys and values", "kernel, 1/4 live"
# Of policies: the default, which the shipped and the timed decoders have, and wide ones.
NEURONS = {LLAMA: (32, LLAMA.neurons), TINY: (2, TINY.neurons)}
# Rank and width of what an exit adds to the shared head: at the model's own width, and as the shipped decoder
# (SmolLM2-135M) has it.
DELTAS = {LLAMA: ((128, LLAMA.hidden), (128, 576)), TINY: ((8, TINY.hidden), (8, 48))}
_EXITS = 10  # the shipped decoder's
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
        return {"order": order, "counts": self.counts(self.rows), "quarter": self.counts(self.rows // 4)}

    def counts(self, live: int, owed: int = 0) -> Tensor:
        return torch.tensor([live, owed], dtype=torch.int32, device=self.device)

    def runs(self, launch: Callable[[dict[str, Any], str], Any], plain: Callable) -> dict[str, Callable]:
        """Competitors of an op whose kernel is also timed with a quarter of its rows live, where that is a row.

        launch  gets the tensors and the name of the counts among them
        """
        found = {KERNEL: lambda t: launch(t, "counts"), PLAIN: plain}
        return found | ({QUARTER: lambda t: launch(t, "quarter")} if self.rows >= 4 else {})


def stream_ops(m: _Maker) -> list[Op]:
    hidden, inner, words = m.shape.hidden, _inner(m.shape), m.shape.vocabulary
    item = m.dtype.itemsize

    def op(
        name: str, features: int, width: int, make: dict, launch: Callable, plain: Callable, weights: int,
        quarter: bool = False,
    ) -> Op:  # fmt: skip
        def tensors() -> dict[str, Any]:
            made = {"x": m.randn(m.rows, width), "w": m.randn(weights * features, width, scale=width**-0.5)}
            return {**made, **m.lists(), **{k: f() for k, f in make.items()}}

        n = weights * features * width
        moved = (n + m.rows * (width + 2 * features)) * item
        runs = m.runs(launch, plain) if quarter else {KERNEL: launch, PLAIN: plain}
        return Op(name, "stream", tensors, runs, plain, 2.0 * n * m.rows, moved)

    def run(t: dict[str, Any], out: Tensor, counts: str = "counts", **options: Any) -> Tensor:
        stream_rows_(out, t["x"], t["w"], t["order"], t[counts], **options)
        return out

    def residual(t: dict[str, Any]) -> Tensor:
        return F.linear(t["x"], t["w"]) + t["residual"]

    def gated(t: dict[str, Any]) -> Tensor:
        gate, up = F.linear(_rms(t["x"], t["gain"]) if "gain" in t else t["x"], t["w"]).chunk(2, -1)
        return F.silu(gate) * up

    def into_gated(t: dict[str, Any], counts: str) -> Tensor:
        return run(t, t["out"], counts, act="swiglu", norm=(t["gain"], _EPS) if "gain" in t else None)

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
           into_gated, gated, 2, quarter=True),
        op("down", hidden, inner, rows_of(hidden), into_residual, residual, 1),
        op("head", words, hidden, logits, lambda t: run(t, t["out"]), lambda t: F.linear(t["x"], t["w"]).float(), 1),
    ]  # fmt: skip


def qkv_ops(m: _Maker) -> list[Op]:
    """Without anything owed, and with: to one row as little and as much as a step may bring along, to several as many
    as there are rows."""
    return [_qkv_op(m, owed) for owed in ((0, 1, 16, 128) if m.rows == 1 else (0, m.rows))]


def _qkv_op(m: _Maker, owed: int) -> Op:
    hidden, heads, d = m.shape.hidden, m.shape.num_heads, m.head_dim

    room = qkv_entries(m.rows, heads, heads, d)

    def make() -> dict[str, Any]:
        slots = max(4 * m.rows, 2 * owed)
        entries = m.randn(room, hidden) if room else None
        at = torch.arange(max(m.rows, owed), dtype=torch.int32, device=m.device)
        keys, values = (m.randn(slots, heads, d) for _ in range(2))
        return {
            "entries": entries,
            **m.lists(), "x": m.randn(m.rows, hidden), "w": m.randn(3 * hidden, hidden, scale=hidden**-0.5),
            "gain": m.randn(hidden), "states": m.randn(slots, hidden), "query": m.randn(m.rows, heads, d),
            "keys": keys, "values": values, "cos": m.randn(64, d),
            "sin": m.randn(64, d), "counts": m.counts(m.rows, owed),
            "slots": 2 * at[: m.rows], "positions": at[: m.rows] % 64,
            "owed_slots": 2 * at[:owed] + 1, "owed_positions": at[:owed] % 64,
            # Torch writes into a cache of its own: what a kernel left out would else be there already.
            "plain_keys": keys.clone(), "plain_values": values.clone(),
        }  # fmt: skip

    def kernel(t: dict[str, Any], counts: str) -> tuple[Tensor, ...]:
        qkv_rows_(t["query"], t["keys"], t["values"], t["x"], t["states"], t["w"], (t["gain"], _EPS), t["cos"],
                  t["sin"], t["order"], t["slots"], t["positions"], t["owed_slots"], t["owed_positions"], t[counts],
                  entries=t["entries"])  # fmt: skip
        return t["query"], t["keys"], t["values"]

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def plain(t: dict[str, Any]) -> tuple[Tensor, ...]:
        x, at, places = t["x"], t["positions"].long(), t["slots"].long()
        if owed:
            late = t["owed_slots"].long()
            x, places = torch.cat((x, t["states"][late])), torch.cat((places, late))
            at = torch.cat((at, t["owed_positions"].long()))
        q, k, v = F.linear(_rms(x, t["gain"]), t["w"]).unflatten(-1, (3, heads, d)).unbind(1)
        cos, sin = t["cos"][at][:, None], t["sin"][at][:, None]
        t["plain_keys"][places], t["plain_values"][places] = turned(k, cos, sin), v
        return turned(q[: m.rows], cos[: m.rows], sin[: m.rows]), t["plain_keys"], t["plain_values"]

    runs = {KERNEL: lambda t: kernel(t, "counts"), PLAIN: plain} if owed else m.runs(kernel, plain)
    moved = (3 * hidden * hidden + (4 * m.rows + 3 * owed) * hidden) * m.dtype.itemsize
    flops = (6.0 * m.rows + 4.0 * owed) * hidden * hidden
    name = "norm + q, k, v + RoPE" + (f", {owed} owed" if owed else "")
    return Op(name, "qkv", make, runs, plain, flops, moved)


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

    def kernel(t: dict[str, Any], counts: str) -> Tensor:
        decode_attention_(t["out"], t["query"], t["keys"], t["values"], t["order"], t["table"], t["positions"],
                          t[counts], scale, _BLOCK, t["workspace"])  # fmt: skip
        return t["out"]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q[:, :, None], k, v, scale=scale)[:, :, 0]

    def plain(t: dict[str, Any]) -> Tensor:
        return attention(t["query"], *(t[x][t["places"]].transpose(1, 2) for x in ("keys", "values")))

    runs = m.runs(kernel, plain) | {CONTIGUOUS: lambda t: attention(t["query"], t["k"], t["v"])}
    moved = (2 * m.rows * m.context * heads * d + 2 * m.rows * heads * d) * m.dtype.itemsize
    return [Op(f"paged attention, {m.context} positions", "attention", make, runs, plain, 0.0, moved)]


def policy_op(m: _Maker, neurons: int) -> Op:
    hidden = m.shape.hidden
    splits = policy_splits(m.rows, hidden, neurons)

    def make() -> dict[str, Any]:
        made = {**m.lists(), "x": m.randn(m.rows, hidden), "normed": m.randn(m.rows, hidden), "gain": m.randn(hidden)}
        made |= {"w1": m.randn(neurons, hidden, scale=hidden**-0.5), "b1": m.randn(neurons), "w2": m.randn(1, neurons)}
        made |= {name: m.randn(m.rows, hidden) for name in ("states", "plain_states")}
        return {**made, "partial": torch.zeros(m.rows, splits, device=m.device)}

    def policy(t: dict[str, Any]) -> tuple[Tensor, ...]:
        policy_rows_(t["partial"], t["normed"], t["states"], t["x"], (t["gain"], _EPS), (t["w1"], t["b1"], t["w2"]),
                     t["order"], t["order"], t["counts"])  # fmt: skip
        return t["normed"], t["states"], t["partial"].sum(1)

    def plain(t: dict[str, Any]) -> tuple[Tensor, ...]:
        n = _rms(t["x"], t["gain"])
        t["plain_states"].copy_(t["x"])
        z = F.linear(F.gelu(F.linear(n, t["w1"], t["b1"])), t["w2"])
        return n, t["plain_states"], z[:, 0].float()

    weights = neurons * hidden
    moved = (weights + 3 * m.rows * hidden) * m.dtype.itemsize
    runs = {KERNEL: policy, PLAIN: plain}
    return Op(f"norm + policy of {neurons} neurons", "exit", make, runs, plain, 2.0 * weights * m.rows, moved)


def delta_op(m: _Maker, rank: int, width: int) -> Op:
    """Rows leave through exits in turns."""
    # No factors but those that are read: the sets of tensors must not seem to fill the cache where they do not.
    exits = min(m.rows, _EXITS)

    def make() -> dict[str, Any]:
        made = {"a": m.randn(exits, rank, width, scale=width**-0.5), "b": m.randn(exits, width, rank, scale=rank**-0.5)}
        made |= {"normed": m.randn(m.rows, width), "out": m.randn(m.rows, width)}
        return {**m.lists(), **made, "exit_index": torch.arange(m.rows, dtype=torch.int32, device=m.device) % exits}

    def kernel(t: dict[str, Any]) -> Tensor:
        delta_rows_(t["out"], t["normed"], t["a"], t["b"], t["exit_index"], t["order"], t["counts"])
        return t["out"]

    def plain(t: dict[str, Any]) -> Tensor:
        index, n = t["exit_index"].long(), t["normed"]
        return n + torch.bmm(t["b"][index], torch.bmm(t["a"][index], n[:, :, None]))[:, :, 0]

    at_width = "" if width == m.shape.hidden else f", width {width}"
    moved = 2 * (exits * rank + m.rows) * width * m.dtype.itemsize
    return Op(f"head's low-rank part, rank {rank}{at_width}", "exit", make, {KERNEL: kernel, PLAIN: plain}, plain,
              4.0 * rank * width * m.rows, moved)  # fmt: skip


def step_op(m: _Maker) -> Op:
    """Every other row goes on, from the first; the next layer owes each of those two positions."""
    layers, splits = 32, policy_splits(m.rows, m.shape.hidden, m.shape.neurons)
    stay, owed = -(-m.rows // 2), 2
    written = ("to", "layers", "probs", "counts_to", "marks", "owed", "owed_at")

    def make() -> dict[str, Any]:
        made = {name: m.ints(m.rows, value=value) for name, value in
                {"script": 0, "least": 1, "most": layers, "layers": 0, "to": 0}.items()}  # fmt: skip
        partial = torch.rand(m.rows, splits, device=m.device)
        partial[::2] *= -1
        made |= {"partial": partial, "b2": torch.zeros(1, device=m.device)}
        made |= {"threshold": torch.zeros(m.rows, device=m.device), "probs": torch.zeros(m.rows, device=m.device)}
        made |= {"positions": m.ints(m.rows, value=m.context - 1), "table": m.ints(m.rows, -(-m.context // _BLOCK))}
        made |= {"marks": m.ints(m.rows, layers), "counts_to": m.ints(2)}
        made |= {name: m.ints(m.rows * m.context) for name in ("owed", "owed_at")}
        restore(made)
        return {**m.lists(), **made}

    def restore(t: dict[str, Any]) -> None:
        """Watermarks move on: a second call on the same tensors would find nothing owed."""
        for name in written:
            t[name].zero_()
        t["marks"].fill_(m.context - 1 - owed)

    def runs(function: Callable) -> Callable:
        def call(t: dict[str, Any]) -> tuple[Tensor, ...]:
            function(t["partial"], t["b2"], t["order"], t["counts"], 5, DECIDE, t["threshold"], t["script"], t["least"],
                     t["most"], t["layers"], t["probs"], t["to"], t["counts_to"], 6, t["positions"], t["table"], _BLOCK,
                     t["marks"], t["owed"], t["owed_at"])  # fmt: skip
            return tuple(t[name] for name in written)

        return call

    # What refuses shared memory reads addresses: nothing for torch.compile.
    return Op("who leaves, what is owed", "exit", make, {KERNEL: runs(step_rows_), PLAIN: runs(step_rows__ref)}, None,
              0.0, 4 * (splits + 12) * m.rows + 12 * owed * stay, restore=restore)  # fmt: skip


def exit_ops(m: _Maker) -> list[Op]:
    words = m.shape.vocabulary

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

    return [
        *(policy_op(m, neurons) for neurons in NEURONS[m.shape]),
        *(delta_op(m, rank, width) for rank, width in DELTAS[m.shape]),
        step_op(m),
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
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="combine results; nothing is measured")
    parser.add_argument("--output", type=Path, default=RESULTS / "decoder_kernels_h100.json")
    o = parser.parse_args(arguments)
    if o.merge is not None:
        merge(o.merge, o.output)
        return
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
        row["of_peak"] = None if row["gbps"] is None else 1e9 * row["gbps"] / memory_bandwidth(o.device)
    lines = []
    for r in rows:
        speed = ["-", "-"] if r["gbps"] is None else [f"{r['gbps']:.0f}", f"{r['of_peak']:.2f}"]
        lines.append([r["op"], str(r["rows"]), r["competitor"], f"{r['median_us']:.1f}", *speed])
    show_table(Console(), ["op", "rows", "competitor", "median us", "GB/s", "of peak"], lines, title=shape.name,
               left=("op", "competitor"))  # fmt: skip
    write_result(o.output, [], rows, context=o.context)


def merge(files: Sequence[Path], output: Path) -> None:
    """Rows of all files. ValueError where they were not asked the same."""
    common = same_in_all([json.loads(file.read_text()) for file in files], ("context",))
    rows, about = merged(files, ("op", "model", "dtype", "rows", "competitor", "config"))
    write_result(output, [], rows, **about, **common)


if __name__ == "__main__":
    main()
