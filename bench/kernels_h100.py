"""The Triton kernels one by one on a CUDA device, against plain torch, torch.compile and cuBLAS, in CUDA graphs.

    python -m engine.bench.kernels_h100 [--models bert-base minilm] [--tokens 128 1024 4096 16384] [--ops linear exit]
                                        [--no-compile] [--no-sweep] [--output bench/results/kernels_h100.json]

Every competitor of an op is captured as one graph of several calls, each on tensors of its own, more bytes together
than L2 holds: weights and activations come from memory (but where one call takes less than 1/64 of L2, such as the exit
of a few rows, they stay in L2, as they would in a pass). Graphs are replayed in turns; the median is of one call.
All sequences have one length and the buffer is full, unless the name says otherwise: "1/4 live" and "none live" run the
kernel's whole grid with a smaller count. "kernel" is what the op chooses, as in a pass: for products on Hopper its own,
while tiles are those of the Triton kernel. Who computes something else than plain torch is refused. GB/s counts every
input once and what is written once, whatever the caches make of it.

The exit beside the norm in front of it is also held to a copy that reads and writes as many bytes, on buffers that
rotate as the op's do: the file's figures are time of the copy / time of the op.

A whole run compiles a few hundred kernels and takes several minutes: choose models and ops to split it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from engine.bench.kernel_timing import COPY, KERNEL, PLAIN, Op, Result, Shape, measure
from engine.bench.record import RESULTS, figure, write_result
from engine.console import show_table
from engine.kernels.exit_rows import ExitDestinations, ExitLimits, classifier_math, policy_math
from engine.kernels.exits import add_layer_norm_ref, embed_layer_norm_ref
from engine.kernels.gpu_attention import attention_configs_for, position_matrix, varlen_attention_
from engine.kernels.gpu_common import ROWS, TOKENS
from engine.kernels.gpu_exit import exit_add_norm_rows_, exit_norm_rows_, exit_rows_
from engine.kernels.gpu_linear import configs_for, linear_math, linear_rows_
from engine.kernels.gpu_norms import (
    add_layer_norm_compact_,
    add_layer_norm_rows_,
    embed_layer_norm_rows_,
)
from engine.kernels.products import product_workspace

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
OPS = ("linear", "attention", "norms", "exit")
_EPS = 1e-12
# Time of the copy / time of the op, at least this at so many tokens of BERT-base in half precision.
_BARS = {"norm + exit": 0.80, "norm + pooler + exit": 0.60}
_BAR_TOKENS = 4096

SHAPES = {
    "bert-base": Shape("bert-base", 768, 12),
    "minilm": Shape("minilm", 384, 12),
    "tiny": Shape("tiny", 32, 2, vocabulary=50, classes=5, neurons=8),
}


# --- the ops ---------------------------------------------------------------------------------------------------------


class _Maker:
    """Tensors for ops of one shape: ``tokens`` tokens in sequences of ``seqlen``, all of them live."""

    def __init__(self, shape: Shape, tokens: int, seqlen: int, dtype: torch.dtype, device: str):
        self.shape, self.dtype, self.device = shape, dtype, device
        self.seqlen = min(seqlen, tokens)
        self.rows = tokens // self.seqlen
        self.tokens = self.rows * self.seqlen

    def randn(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(size, device=self.device).mul_(scale).to(dtype or self.dtype)

    def empty(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(size, dtype=dtype or self.dtype, device=self.device)

    def ints(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)

    def counts(self) -> dict[str, Tensor]:
        rows, tokens = self.rows, self.tokens
        return {
            "counts": self.ints((rows, tokens)),
            "quarter": self.ints((rows // 4, rows // 4 * self.seqlen)),
            "none": self.ints((0, 0)),
        }

    def cu_seqlens(self) -> Tensor:
        return self.ints(range(0, self.tokens + 1, self.seqlen))

    def norm(self) -> dict[str, Tensor]:
        return {"weight": self.randn(self.shape.hidden), "bias": self.randn(self.shape.hidden)}


def _kernel_runs(launch: Callable[[dict[str, Any], Tensor], Result]) -> dict[str, Callable]:
    """The kernel with a full buffer, with a quarter of its rows live, and with none."""
    return {
        KERNEL: lambda t: launch(t, t["counts"]),
        "kernel, 1/4 live": lambda t: launch(t, t["quarter"]),
        "kernel, none live": lambda t: launch(t, t["none"]),
    }


def _config_name(config: Sequence[int]) -> str:
    return "x".join(map(str, config))


def linear_ops(m: _Maker) -> list[Op]:
    hidden = m.shape.hidden
    products = [
        ("qkv", m.tokens, 3 * hidden, hidden, "none", TOKENS),
        ("attention output", m.tokens, hidden, hidden, "none", TOKENS),
        ("up + gelu", m.tokens, 4 * hidden, hidden, "gelu", TOKENS),
        ("down", m.tokens, hidden, 4 * hidden, "none", TOKENS),
        ("first tokens up + gelu", m.rows, 4 * hidden, hidden, "gelu", ROWS),
        ("pooler", m.rows, hidden, hidden, "tanh", ROWS),
    ]
    ops = []
    for name, rows, features, width, act, which in products:

        def make(rows=rows, features=features, width=width) -> dict[str, Any]:
            return {
                "out": m.empty(rows, features),
                "x": m.randn(rows, width),
                "w": m.randn(features, width, scale=width**-0.5),
                "b": m.randn(features),
                "workspace": product_workspace(m.device),
                **m.counts(),
            }

        def launch(t, counts, which=which, act=act, config=None) -> Tensor:
            linear_rows_(t["out"], t["x"], t["w"], t["b"], counts, which, act, config, t["workspace"])
            return t["out"]

        def plain(t, act=act) -> Tensor:
            return linear_math(t["x"], t["w"], t["b"], act)

        def cublas(t) -> Tensor:
            return torch.addmm(t["b"], t["x"], t["w"].t(), out=t["out"])

        def cublas_gelu(t) -> Tensor:
            torch.addmm(t["b"], t["x"], t["w"].t(), out=t["out"])
            return torch.ops.aten.gelu.out(t["out"], out=t["out"])

        runs = {**_kernel_runs(launch), PLAIN: plain}
        if act == "none":
            runs["cuBLAS addmm(out=)"] = cublas
        elif act == "gelu":
            runs["cuBLAS addmm(out=) + gelu"] = cublas_gelu
        configs = {
            _config_name(c): lambda t, c=c, launch=launch: launch(t, t["counts"], config=c)
            for c in configs_for(rows, features, width, m.dtype, act)
        }
        moved = (rows * width + features * width + features + rows * features) * m.dtype.itemsize
        ops.append(Op(f"linear {name}", "linear", make, runs, plain, 2.0 * rows * features * width, moved, configs))
    return ops


def attention_ops(m: _Maker) -> list[Op]:
    hidden, heads = m.shape.hidden, m.shape.num_heads
    scale = (hidden // heads) ** -0.5
    ops = []
    for first_only, biased in ((False, False), (True, False), (False, True)):
        rows = m.rows if first_only else m.tokens

        def make(rows=rows, biased=biased) -> dict[str, Any]:
            made = {"out": m.empty(rows, hidden), "qkv": m.randn(m.tokens, 3 * hidden), "cu": m.cu_seqlens()}
            if biased:  # of MPNet: one number for each distance, which torch takes as a matrix
                bias = position_matrix(m.randn(heads, 2 * m.seqlen - 1))
                made |= {"bias": bias, "matrix": bias[:, : m.seqlen, : m.seqlen].contiguous()}
            return {**made, **m.counts()}

        def launch(t, counts, first_only=first_only, config=None) -> Tensor:
            varlen_attention_(t["out"], t["qkv"], t["cu"], counts, heads, scale, m.seqlen, t.get("bias"),
                              first_only=first_only, config=config)  # fmt: skip
            return t["out"]

        def plain(t, first_only=first_only) -> Tensor:
            # Equal lengths: torch needs no packing, its best case. (The twin goes row by row, and reads on the host.)
            q, k, v = t["qkv"].view(m.rows, m.seqlen, 3, heads, -1).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(
                q[:, :, :1] if first_only else q, k, v, attn_mask=t.get("matrix"), scale=scale
            )
            return attended.transpose(1, 2).reshape(-1, hidden)

        configs = {
            _config_name(c): lambda t, c=c, launch=launch: launch(t, t["counts"], config=c)
            for c in attention_configs_for(m.seqlen, hidden // heads, m.dtype, first_only, m.rows * heads)
        }
        name = "attention" + (", first tokens" if first_only else "") + (" + position bias" if biased else "")
        moved = ((2 if first_only else 3) * m.tokens * hidden + (2 if first_only else 1) * rows * hidden)
        runs = {**_kernel_runs(launch), PLAIN: plain}
        ops.append(
            Op(name, "attention", make, runs, plain, 4.0 * rows * m.seqlen * hidden, moved * m.dtype.itemsize, configs)
        )
    return ops


def norm_ops(m: _Maker) -> list[Op]:
    hidden, size = m.shape.hidden, m.dtype.itemsize

    def make_embed() -> dict[str, Any]:
        ids = torch.randint(0, m.shape.vocabulary, (m.tokens,), device=m.device)
        return {
            "out": m.empty(m.tokens, hidden),
            "ids": ids,
            "types": ids % 2,
            "positions": torch.arange(m.tokens, device=m.device) % m.seqlen,
            "word": m.randn(m.shape.vocabulary, hidden),
            "type": m.randn(2, hidden),
            "position": m.randn(512, hidden),
            **m.norm(),
            **m.counts(),
        }

    def embed(t) -> tuple:
        return (
            t["ids"], t["types"], t["positions"], t["word"], t["type"], t["position"], t["weight"], t["bias"], _EPS
        )  # fmt: skip

    def launch_embed(t, counts) -> Tensor:
        embed_layer_norm_rows_(t["out"], *embed(t), counts)
        return t["out"]

    def make_norm() -> dict[str, Any]:
        # Every second sequence leaves; where its tokens would go, -1.
        row = torch.arange(m.tokens, device=m.device) // m.seqlen
        dest = torch.where(row % 2 == 0, torch.arange(m.tokens, device=m.device) - (row + 1) // 2 * m.seqlen, -1)
        return {
            "out": torch.zeros(m.tokens, hidden, dtype=m.dtype, device=m.device),
            "x": m.randn(m.tokens, hidden),
            "residual": m.randn(m.tokens, hidden),
            "dest": dest.to(torch.int32),
            "stay": (dest >= 0).nonzero().squeeze(1),
            **m.norm(),
            **m.counts(),
        }

    def norm(t) -> tuple:
        return t["x"], t["residual"], t["weight"], t["bias"], _EPS

    def launch_norm(t, counts) -> Tensor:
        add_layer_norm_rows_(t["out"], *norm(t), counts, TOKENS)
        return t["out"]

    def launch_compact(t, counts) -> Tensor:
        add_layer_norm_compact_(t["out"], *norm(t), counts, t["dest"])
        return t["out"][: t["stay"].shape[0]]

    def plain_compact(t) -> Tensor:
        stay = t["stay"]
        return add_layer_norm_ref(t["x"][stay], t["residual"][stay], t["weight"], t["bias"], _EPS)

    def plain_embed(t) -> Tensor:
        return embed_layer_norm_ref(*embed(t))

    def plain_norm(t) -> Tensor:
        return add_layer_norm_ref(*norm(t))

    kept = (m.rows + 1) // 2 * m.seqlen
    row = hidden * size
    return [
        Op("embeddings + norm", "norms", make_embed, {**_kernel_runs(launch_embed), PLAIN: plain_embed}, plain_embed,
           0.0, m.tokens * (2 * row + 24) + 512 * row),
        Op("residual + norm", "norms", make_norm, {**_kernel_runs(launch_norm), PLAIN: plain_norm}, plain_norm,
           0.0, 3 * m.tokens * row),
        Op("residual + norm, half of the rows leave", "norms", make_norm,
           {**_kernel_runs(launch_compact), PLAIN: plain_compact}, plain_compact, 0.0, 3 * kept * row + 4 * m.tokens),
    ]  # fmt: skip


def exit_ops(m: _Maker) -> list[Op]:
    hidden, neurons, classes, rows = m.shape.hidden, m.shape.neurons, m.shape.classes, m.rows

    def make() -> dict[str, Any]:
        cu_seqlens = m.cu_seqlens()
        return {
            "x": m.randn(m.tokens, hidden),
            "residual": m.randn(m.tokens, hidden),
            "state": m.randn(rows, hidden),
            "cu": cu_seqlens,
            "first": cu_seqlens[:-1].long(),
            "policy": (m.randn(neurons, hidden, scale=0.05), m.randn(neurons), m.randn(1, neurons), m.randn(1)),
            "classifier": (m.randn(classes, hidden, scale=0.05), m.randn(classes)),
            "limits": ExitLimits(m.ints(range(rows)), threshold_logit=torch.zeros(rows, device=m.device)),
            "destinations": ExitDestinations(
                m.empty(rows, classes, dtype=torch.float32),
                m.empty(rows, dtype=torch.int32),
                m.empty(rows, dtype=torch.float32),
                m.empty(rows, dtype=torch.int8),
                m.empty(rows, dtype=torch.float32),
            ),
            **m.norm(),
            **m.counts(),
        }

    def make_beside() -> dict[str, Any]:
        return {**make(), "normed": m.empty(m.tokens, hidden)}

    def make_pooled() -> dict[str, Any]:
        pooler = m.randn(hidden, hidden, scale=hidden**-0.5), m.randn(hidden)
        return {**make_beside(), "pooler": pooler, "first_normed": m.empty(rows, hidden)}

    def read(t, state: Tensor) -> Tensor:
        """Plain torch computes the classes of every row: who leaves is known on the device alone."""
        z = policy_math(state, *t["policy"])
        classifier_math(state, *t["classifier"]).masked_fill_((z <= t["limits"].threshold_logit)[:, None], 0.0)
        return z

    def plain_norm(t) -> Tensor:
        first = t["first"]
        return read(t, add_layer_norm_ref(t["x"][first], t["residual"][first], t["weight"], t["bias"], _EPS))

    def plain_state(t) -> Tensor:
        return read(t, t["state"])

    def launch_norm(t, counts, criterion="policy") -> Tensor:
        exit_norm_rows_(
            t["destinations"], t["limits"], t["x"], t["residual"], (t["weight"], t["bias"], _EPS), counts, 3, criterion,
            t["policy"], t["classifier"], t["cu"],
        )  # fmt: skip
        return t["destinations"].exit_logits

    def launch_state(t, counts) -> Tensor:
        exit_rows_(
            t["destinations"], t["limits"], t["state"], counts, 3, "policy", t["policy"], t["classifier"]
        )
        return t["destinations"].exit_logits

    def plain_beside(t) -> Result:
        normed = add_layer_norm_ref(t["x"], t["residual"], t["weight"], t["bias"], _EPS)
        return normed, read(t, normed[t["first"]])

    def plain_pooled(t) -> Result:
        normed = add_layer_norm_ref(t["x"], t["residual"], t["weight"], t["bias"], _EPS)
        return normed, read(t, linear_math(normed[t["first"]], *t["pooler"], "tanh"))

    def launch_beside(t, counts, state: Tensor | None = None) -> Result:
        exit_add_norm_rows_(
            t["destinations"], t["limits"], t["normed"], t["x"], t["residual"], (t["weight"], t["bias"], _EPS), counts,
            3, "policy", t["policy"], t["classifier"], t["cu"] if state is None else None, state,
        )  # fmt: skip
        return t["normed"], t["destinations"].exit_logits

    def launch_pooled(t, counts) -> Result:
        norm = t["weight"], t["bias"], _EPS
        add_layer_norm_rows_(t["first_normed"], t["x"], t["residual"], *norm, counts, ROWS, t["cu"], t["cu"])
        linear_rows_(t["state"], t["first_normed"], *t["pooler"], counts, ROWS, "tanh")
        return launch_beside(t, counts, t["state"])

    weights = (neurons + classes) * hidden * m.dtype.itemsize
    flops = 2.0 * rows * (neurons + classes) * hidden
    row = hidden * m.dtype.itemsize
    confidence = {"kernel, confidence": lambda t: launch_norm(t, t["counts"], "confidence")}
    last = {"kernel, last layer": lambda t: launch_norm(t, t["counts"], "last")}
    return [
        Op("exit, norm inside", "exit", make, {**_kernel_runs(launch_norm), **confidence, **last, PLAIN: plain_norm},
           plain_norm, flops, weights + 2 * rows * row),
        Op("exit, state given", "exit", make, {**_kernel_runs(launch_state), PLAIN: plain_state},
           plain_state, flops, weights + rows * row),
        Op("norm + exit", "exit", make_beside, {**_kernel_runs(launch_beside), PLAIN: plain_beside},
           plain_beside, flops, weights + 3 * m.tokens * row, copied=True),
        Op("norm + pooler + exit", "exit", make_pooled, {**_kernel_runs(launch_pooled), PLAIN: plain_pooled},
           plain_pooled, flops + 2.0 * rows * hidden * hidden, weights + (3 * m.tokens + hidden + 3 * rows) * row,
           copied=True),
    ]  # fmt: skip


_GROUPS: dict[str, Callable[[_Maker], list[Op]]] = {
    "linear": linear_ops,
    "attention": attention_ops,
    "norms": norm_ops,
    "exit": exit_ops,
}


def ops_for(shape: Shape, tokens: int, seqlen: int, dtype: torch.dtype, device: str, groups: Sequence[str]) -> list[Op]:
    maker = _Maker(shape, tokens, seqlen, dtype, device)
    return [op for group in groups for op in _GROUPS[group](maker)]


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One for each bar whose op was timed where the bar stands."""
    here = {"model": "bert-base", "tokens": _BAR_TOKENS, "dtype": "float16", "config": None}
    median = {(r["op"], r["competitor"]): r["median_us"] for r in rows if here.items() <= r.items()}
    found = []
    for name, bar in _BARS.items():
        if (name, COPY) in median:
            value = median[name, COPY] / median[name, KERNEL]
            label = f"{name}, {_BAR_TOKENS} tokens: time of a copy of as many bytes / time"
            found.append(figure(label, value, "ratio of times", f">= {bar:.2f}", value >= bar))
    return found


# --- the command -----------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["bert-base", "minilm"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 1024, 4096, 16384], help="capacities")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens of every sequence")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp16"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--no-sweep", dest="sweep", action="store_false", help="the default tiles alone")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: the twins, to try the script")
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels_h100.json")
    options = parser.parse_args(arguments)
    if min(options.tokens) < 1 or options.seqlen < 1 or options.repeats < 1:
        parser.error(
            f"tokens, seqlen and repeats must be at least 1, got {options.tokens}, {options.seqlen}, {options.repeats}"
        )
    if options.seqlen > 512:
        parser.error(f"seqlen must be at most 512, the positions of these models, got {options.seqlen}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available; --device cpu tries the script on the torch twins")
    return options


def show(rows: list[dict[str, Any]]) -> None:
    lines = [
        [
            r["op"],
            r["competitor"] if r["config"] is None else r["config"],
            f"{r['median_us']:.1f}",
            f"{r['p10_us']:.1f}",
            f"{r['p90_us']:.1f}",
            "-" if r["tflops"] is None else f"{r['tflops']:.1f}",
            "-" if r["gbps"] is None else f"{r['gbps']:.0f}",
        ]
        for r in rows
    ]
    one = rows[0]
    show_table(
        Console(),
        ["op", "competitor or tile", "median us", "p10", "p90", "TFLOP/s", "GB/s"],
        lines,
        title=f"{one['model']}, {one['tokens']} tokens, {one['dtype']}",
        left=("op", "competitor or tile"),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    with torch.inference_mode():
        for model in options.models:
            for tokens in options.tokens:
                for dtype in (DTYPES[name] for name in options.dtypes):
                    shape, found = SHAPES[model], []
                    for op in ops_for(shape, tokens, options.seqlen, dtype, options.device, options.ops):
                        found += measure(
                            op, shape, tokens, dtype, options.device, options.repeats, options.compile, options.sweep
                        )
                    show(found)
                    rows += found
                    # After every shape: a run that is cut off keeps what it has measured.
                    more = {"seqlen": options.seqlen, "seconds": time.perf_counter() - started}
                    write_result(options.output, figures(rows), rows, **more)


if __name__ == "__main__":
    main()
