"""out[:n] = act(x[:n] W^T + b) for the n live rows of a buffer, n read on the device: the products of a captured pass.

Limited by FLOPs from some hundreds of rows on (2 n N K), below that by the bytes of W (N K elements, read once from
memory and then from L2 by every block of rows) and by latency. Bytes at least: W, n K of x, n N of out. Meant for the
encoder's shapes, N and K from 384 to 3 072, 1 to 16 384 rows. Bias and activation act on the fp32 sums, so the erf
GELU costs no pass of its own. Tiles come from ``configs_for``, which ``bench/kernels_h100.py`` sweeps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.gpu_common import (
    FLOATS,
    ROWS,
    TOKENS,
    UNALIGNED,
    begin,
    cdiv,
    check_apart,
    check_counts,
    check_float,
    check_rows,
    check_weight,
    check_which,
    early,
    gelu,
    jit,
    loaded_ahead,
    on_device,
    runs_kernel,
    tanh,
    tl,
)
from engine.kernels.products import Partials, hopper_product, product_problem

__all__ = ["ACTIVATIONS", "LinearConfig", "ROWS", "TOKENS", "configs_for", "linear_rows_", "linear_rows__ref"]

ACTIVATIONS = ("none", "gelu", "tanh")


# --- tiles -----------------------------------------------------------------------------------------------------------


class LinearConfig(NamedTuple):
    """One way to cut the product. group_m: blocks of rows that walk along W together, so that L2 serves both."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8


# Largest first. 16-bit: at most 147 KB of shared memory, which sm_80 has too. fp32 runs on the ordinary cores (IEEE
# products, no tensor core), where registers set the limit.
_HALF = (
    LinearConfig(128, 256, 64, 8, 3),
    LinearConfig(128, 128, 64, 8, 3),
    LinearConfig(128, 64, 64, 4, 4),
    LinearConfig(64, 128, 64, 4, 4),
    LinearConfig(64, 64, 64, 4, 4),
    LinearConfig(32, 64, 128, 4, 4),
    LinearConfig(32, 32, 128, 4, 4),
    LinearConfig(16, 64, 128, 4, 4),
    LinearConfig(16, 32, 128, 4, 4),
)
_MORE_HALF = (
    LinearConfig(128, 128, 64, 4, 4),
    LinearConfig(64, 256, 64, 8, 3),
    LinearConfig(16, 32, 256, 4, 3),
    LinearConfig(16, 16, 256, 2, 3),
)
_FLOAT = (
    LinearConfig(64, 64, 16, 8, 2),
    LinearConfig(32, 64, 32, 4, 2),
    LinearConfig(32, 32, 32, 4, 2),
    LinearConfig(16, 32, 32, 4, 2),
)

# Programs that keep an H100 (132 multiprocessors) busy; a tile that gives fewer is too large for the product.
_PROGRAMS = 132


def configs_for(
    rows: int, out_features: int, in_features: int, dtype: torch.dtype, act: str = "none"
) -> tuple[LinearConfig, ...]:
    """Candidates for a capacity of ``rows``, the default first: the largest tile that occupies the whole device.

    The choice depends on the capacity and never on the live count, so a row's sum is taken in one order whoever else
    is in the batch. No candidate splits K: sums across programs would need atomics, and come out different every time.
    """
    if rows < 0 or out_features < 1 or in_features < 1:
        raise ValueError(f"a product needs sizes of at least 1 (0 rows are allowed), got {rows}, {out_features}, "
                         f"{in_features}")  # fmt: skip
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    table = _FLOAT if dtype == torch.float32 else _HALF

    def programs(config: LinearConfig) -> int:
        return cdiv(rows, config.block_m) * cdiv(out_features, config.block_n)

    # A block of rows more than half empty computes for nobody, however few programs there are.
    fitting = [c for c in table if c.block_m == 16 or c.block_m < 2 * rows]
    # The largest tile leaves a thread no registers for erf: it spills.
    suited = fitting[1:] if act == "gelu" and fitting[0] == _HALF[0] else fitting
    default = next((c for c in suited if programs(c) >= _PROGRAMS), table[-1])
    more = () if dtype == torch.float32 else _MORE_HALF
    return default, *(c for c in (*fitting, *more) if c != default and (c.block_m == 16 or c.block_m < 2 * rows))


# --- torch twin ------------------------------------------------------------------------------------------------------


def linear_math(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """The formula alone, for rows that are all live. Products of half precision accumulate in fp32."""
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if act == "gelu":
        return F.gelu(y)
    return y.tanh() if act == "tanh" else y


def linear_rows__ref(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    counts: Tensor,
    which: int,
    act: str = "none",
    config: LinearConfig | None = None,
    workspace: Tensor | None = None,
    partials: Partials | None = None,
) -> None:
    n = int(counts[which])
    y = linear_math(x[:n], weight, bias, act)
    shares = 0 if partials is None else partials.shares(n)
    if shares == 0:
        out[:n] = y
    else:
        sums = partials.sums[: n * shares * out.shape[1]].view(n, shares, -1)
        sums[:, 0], sums[:, 1:] = y, 0


# --- kernel ----------------------------------------------------------------------------------------------------------


@jit(do_not_specialize_on_alignment=UNALIGNED)
def _linear_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    counts_ptr,
    out_stride,
    x_stride,
    weight_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    WHICH: tl.constexpr,
    ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EARLY: tl.constexpr,
):
    live = loaded_ahead(counts_ptr + WHICH)
    begin(EARLY)
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(live, BLOCK_M)
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    # The order below counts live blocks alone, so the idle programs are the last ones of the grid.
    if pid >= blocks_m * blocks_n:
        return
    group = pid // (GROUP_M * blocks_n)
    group_first = group * GROUP_M
    group_size = tl.minimum(blocks_m - group_first, GROUP_M)
    within = pid % (GROUP_M * blocks_n)
    block_m = group_first + within % group_size
    block_n = within // group_size

    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns beyond the edge repeat the last one (nobody stores them): loads then need no mask for them.
    source = tl.minimum(rows, live - 1)
    column = tl.minimum(columns, N - 1)
    inner = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + source.to(tl.int64)[:, None] * x_stride + inner[None, :]
    weight_ptrs = weight_ptr + column.to(tl.int64)[None, :] * weight_stride + inner[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=inner[None, :] < K - k, other=0.0)
            weight = tl.load(weight_ptrs, mask=inner[:, None] < K - k, other=0.0)
        total = tl.dot(x, weight, total, input_precision="ieee")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    if HAS_BIAS:
        total += tl.load(bias_ptr + column).to(tl.float32)[None, :]
    if ACT == "gelu":
        total = gelu(total)
    if ACT == "tanh":
        total = tanh(total)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=(rows < live)[:, None] & (columns < N)[None, :])


# --- public function -------------------------------------------------------------------------------------------------


def linear_rows_(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    counts: Tensor,
    which: int,
    act: str = "none",
    config: LinearConfig | None = None,
    workspace: Tensor | None = None,
    partials: Partials | None = None,
) -> None:
    """``out[:n] = act(x[:n] @ weight^T + bias)`` with n = counts[which]; rows of out from n on are left alone.

    out     (capacity, N), written; fp16, bf16 or fp32, last dimension contiguous, any row stride; shares no storage
            with x
    x       (capacity or more, K), dtype of out, last dimension contiguous
    weight  (N, K), dtype of out, as in nn.Linear; last dimension contiguous
    bias    (N,), fp32 or the dtype of out, or None
    counts  (2,) int32: live rows, live tokens, neither above the capacity; which: ROWS (0) or TOKENS (1)
    act     "none", "gelu" (erf form) or "tanh"; acts on the fp32 sum before it is rounded
    config  a tile of ``configs_for`` for the Triton kernel. None: the Hopper kernel of ``products`` where it serves,
            else the Triton kernel with its default
    workspace  of ``product_workspace``: lets the Hopper kernel share few rows' sums among programs. No two launches
            that may run at once may have the same
    partials  of ``product_partials``, for the Hopper kernel alone: with few live rows it leaves partial sums there and
            nothing in out; whoever reads the result is given the same partials and adds them up. No activation then
    Sums are in fp32, fp32 products exact (no TF32). A row's result does not depend on the values of the other rows; on
    their number only by the order of a sum, where the Hopper kernel shares it.
    Bytes at least, of n live rows and b a number: (N K + n K + n N) b, W and x once in and out once out; a row of out
    left in S partial sums is 4 S N instead of N b.
    """
    check_float("out", out)
    if out.dim() != 2:
        raise ValueError(f"out must have shape [capacity, features], got {list(out.shape)}")
    if weight.dim() != 2 or weight.shape[0] != out.shape[1] or weight.shape[1] < 1:
        raise ValueError(f"weight must have shape [{out.shape[1]}, K], got {list(weight.shape)}")
    capacity, (features, width) = out.shape[0], weight.shape
    check_rows("out", out, out, "out", features)
    check_rows("weight", weight, out, "out", width)
    check_rows("x", x, out, "out", width, capacity)
    check_apart(out, "x", x)
    if bias is not None:
        check_weight("bias", bias, out, "out", features)
    check_counts("counts", counts, out, "out")
    check_which(which)
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if partials is not None:
        partials.check(out, "out")
        if act != "none":
            raise ValueError(f"partials have no activation: act must be none beside them, got {act!r}")
    if not runs_kernel(out):
        linear_rows__ref(out, x, weight, bias, counts, which, act, partials=partials)
        return
    if capacity == 0 or features == 0:
        return
    problem = "config asks for the Triton kernel" if config else product_problem(out, x, weight, bias, act)
    if problem is None:
        hopper_product(out, x, weight, bias, counts[which:], act == "gelu", workspace, partials=partials)
        return
    if partials is not None:
        raise ValueError(f"the Hopper kernel alone leaves partials, and does not serve here: {problem}")
    config = configs_for(capacity, features, width, out.dtype, act)[0] if config is None else config
    grid = (cdiv(capacity, config.block_m) * cdiv(features, config.block_n),)
    with on_device(out):
        _linear_kernel[grid](
            out,
            x,
            weight,
            bias,
            counts,
            out.stride(0),
            x.stride(0),
            weight.stride(0),
            N=features,
            K=width,
            WHICH=which,
            ACT=act,
            HAS_BIAS=bias is not None,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **early(out),
        )
