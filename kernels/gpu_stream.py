"""Products of a decode step: out[r] = f(x[r]) W^T for the live rows, whose list and number are read on the device.

Limited by the bytes of W at the few rows of a step (1 to 64): N K elements, read once, for 2 n N K operations. With
room for one row a program multiplies some rows of W with the vector, in registers; for more rows tiles of W go through
the tensor cores, and come from L2 for every further tile of rows. One row's RMSNorm needs no pass of its own: the sum
of x w W and that of x^2 are taken together.

Tried and left out: for several rows, too, tiles of W loaded before the kernel in front has ended (one row does it). A
tile ahead costs the ring a stage or shared memory that a second program would have: on an H100 a step of LLaMA-7B's
shape took 1 to 5 % longer with 8 and 64 rows, here and in the products for queries, keys and values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.gpu_common import (
    FLOATS,
    HOPPER,
    UNALIGNED,
    TileLimits,
    begin,
    cdiv,
    check_apart,
    check_contiguous,
    check_counts,
    check_device,
    check_float,
    check_like,
    check_rows,
    check_vector,
    check_weight,
    copied_tiles,
    early,
    fitting_tiles,
    jit,
    loaded_ahead,
    on_device,
    runs_kernel,
    tile_limits,
    tl,
    weight_tile,
)

__all__ = [
    "ACTIVATIONS",
    "StreamConfig",
    "StreamWorkspace",
    "rms_norm_math",
    "stream_configs",
    "stream_rows_",
    "stream_rows__ref",
    "stream_workspace",
]

ACTIVATIONS = ("none", "swiglu")


class StreamConfig(NamedTuple):
    """block_m: 1 multiplies one row in registers; else a tile of rows for the tensor cores, 16 or more. registers: the
    most that a thread may have, with one row: how many programs a multiprocessor holds; 0 leaves it to ptxas.
    splits: programs that share a tile's columns of W, so that all multiprocessors load; they meet in the workspace."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 1
    registers: int = 0
    splits: int = 1


class StreamWorkspace(NamedTuple):
    """partial fp32 [splits, rows, features], arrived int32 [tiles], 0 between launches. See ``stream_workspace``."""

    partial: Tensor
    arrived: Tensor


# Best first (H100, LLaMA-7B's products of one row in us, output / gate and up / down: 11.8 / 57.5 / 29.6, 3.0 TB/s):
# widths that are multiples of 2048 and not, and narrow.
_ONE = (
    StreamConfig(1, 4, 2048, 8),
    StreamConfig(1, 4, 1024, 4, registers=128),
    StreamConfig(1, 4, 1024, 4),
    StreamConfig(1, 2, 2048, 4),
)
_ONE_PAIRED = (
    StreamConfig(1, 4, 2048, 8, registers=80),
    StreamConfig(1, 4, 2048, 8),
    StreamConfig(1, 2, 2048, 4, registers=96),
    StreamConfig(1, 2, 2048, 4),
    StreamConfig(1, 4, 1024, 4),
)
_ONE_OTHER = (
    StreamConfig(1, 2, 2048, 4),
    StreamConfig(1, 4, 1024, 4, registers=128),
    StreamConfig(1, 4, 1024, 4),
    StreamConfig(1, 2, 1024, 4),
)
_ONE_NARROW = (StreamConfig(1, 4, 1024, 4), StreamConfig(1, 2, 1024, 4), StreamConfig(1, 4, 512, 2))
# More rows: W by the copy engine in tiles of 64 rows, and not in fewer than 100 programs. us at 8 / 32 / 64 rows alone:
# output 14 / 13.7 / 14.3 (cuBLAS 13.9 / 14.4 / 14.5), gate and up 63 / 65 / 66 (66 / 68 / 71), down 33 / 33 / 34 (36 /
# 36 / 38).
# Asking L2 for the first tiles ahead of ``begin`` gained nothing, and lost up to 12 us a layer.
_MORE = {
    16: (StreamConfig(16, 64, 256, 4, 4), StreamConfig(16, 64, 128, 4, 6), StreamConfig(16, 64, 64, 4, 8)),
    32: (StreamConfig(32, 64, 256, 4, 4), StreamConfig(32, 64, 128, 4, 6), StreamConfig(32, 64, 64, 4, 8)),
    64: (StreamConfig(64, 64, 128, 4, 6), StreamConfig(64, 64, 256, 4, 3), StreamConfig(64, 64, 64, 4, 8)),
}
_SHARED = {
    16: (StreamConfig(16, 64, 128, 4, 4, splits=2), StreamConfig(16, 64, 64, 4, 8, splits=2)),
    32: (StreamConfig(32, 64, 128, 4, 4, splits=2), StreamConfig(32, 64, 256, 4, 3, splits=2)),
    64: (StreamConfig(64, 64, 128, 4, 4, splits=2), StreamConfig(64, 64, 128, 4, 6, splits=2)),
}
_PAIRED = {
    16: (StreamConfig(16, 64, 128, 4, 4), StreamConfig(16, 64, 128, 4, 6), StreamConfig(16, 64, 64, 4, 3)),
    32: (StreamConfig(32, 64, 128, 4, 4), StreamConfig(32, 64, 64, 4, 3)),
    64: (StreamConfig(64, 64, 128, 4, 4), StreamConfig(64, 64, 64, 4, 3)),
}
_FLOAT = (StreamConfig(16, 32, 64, 4, 2),)


# Programs below which more of them load faster: there are 132 multiprocessors on an H100.
_PROGRAMS = 100


def stream_configs(
    rows: int,
    dtype: torch.dtype,
    in_features: int = 2048,
    act: str = "none",
    out_features: int = 16384,
    workspace: bool = False,
    limits: TileLimits = HOPPER,
) -> tuple[StreamConfig, ...]:
    """Candidates for a capacity of ``rows``, the default first. The choice never depends on the live count, so a row's
    sum is taken in one order whoever else is in the step.

    workspace  whether programs may share a tile; limits: of the device, ``tile_limits``"""
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    if rows == 1:
        if in_features % 2048:
            table = _ONE_OTHER if in_features > 2048 else _ONE_NARROW
        else:
            table = _ONE if act == "none" else _ONE_PAIRED
        # Numbers of fp32 take twice the registers: a limit would have some spilled.
        return tuple(config for config in table if dtype != torch.float32 or config.registers == 0)
    if dtype == torch.float32:
        return _FLOAT
    tile = 16 if rows <= 16 else 32 if rows <= 32 else 64
    table = _MORE[tile]
    if act == "swiglu":
        table = _PAIRED[tile]
    elif workspace and cdiv(out_features, 64) < _PROGRAMS:
        table = _SHARED[tile] + table

    def stage_bytes(config: StreamConfig) -> int:
        weights = config.block_n * (2 if act == "swiglu" else 1)
        return 2 * (config.block_m + weights) * config.block_k

    return fitting_tiles(table, stage_bytes, limits)


def stream_workspace(rows: int, features: int, device: torch.device) -> StreamWorkspace:
    """What programs that share a tile of ``stream_rows_`` for up to ``rows`` rows and ``features`` columns need. Of one
    launch at a time; launches behind each other may have the same."""
    if min(rows, features) < 1:
        raise ValueError(f"rows and features must be at least 1, got {rows}, {features}")
    tiles = cdiv(rows, 16) * cdiv(features, 64)
    return StreamWorkspace(
        torch.zeros(2, rows, features, device=device), torch.zeros(tiles, dtype=torch.int32, device=device)
    )


# --- torch twin ------------------------------------------------------------------------------------------------------


def rms_norm_math(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019) as Hugging Face's LLaMA rounds it: the scaled row, then times the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight.to(x.dtype) * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def stream_rows__ref(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    counts: Tensor,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    act: str = "none",
    config: StreamConfig | None = None,
    workspace: StreamWorkspace | None = None,
) -> None:
    rows = order[: int(counts[0])].long()
    read = x[rows] if norm is None else rms_norm_math(x[rows], *norm)
    y = F.linear(read, weight)
    if act == "swiglu":
        gate, up = y.chunk(2, 1)
        y = F.silu(gate) * up
    out[rows] = (y if residual is None else residual[rows] + y).to(out.dtype)


# --- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@jit
def _part(row, k: tl.constexpr, inner, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns from k on of a vector; only the last part can have less than BLOCK_K of them."""
    if k + BLOCK_K <= K:
        return tl.load(row + k + inner)
    else:
        return tl.load(row + k + inner, mask=inner < K - k, other=0.0)


@jit
def _weights_part(rows, k: tl.constexpr, inner, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The same of rows of W, which nobody reads again before L2 has seen the rest of the model."""
    if k + BLOCK_K <= K:
        return tl.load(rows + k, eviction_policy="evict_first")
    else:
        return tl.load(rows + k, mask=inner[None, :] < K - k, other=0.0, eviction_policy="evict_first")


@jit(do_not_specialize_on_alignment=UNALIGNED)
def _one_row_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    norm_ptr,
    residual_ptr,
    counts_ptr,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    SWIGLU: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACK: tl.constexpr,
    EARLY: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.minimum(columns, N - 1).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    weights = weight_ptr + column[:, None] * K + inner[None, :]
    # No kernel of a step writes weights: the first of them are on their way before the kernel in front ends.
    first = _weights_part(weights, 0, inner, K, BLOCK_K)
    live = loaded_ahead(counts_ptr)
    begin(EARLY)
    if live == 0:
        return
    # The id of a live row is 0, there is no other: nothing waits for the order.
    if RESIDUAL:
        residual = tl.load(residual_ptr + column)  # wanted at the end, and nobody is to wait for it there
    # A load's numbers meet in their thread before anything is kept: sums take an eighth of the registers that way.
    total = tl.zeros((BLOCK_N, BLOCK_K // PACK), dtype=tl.float32)
    total_up = tl.zeros((BLOCK_N, BLOCK_K // PACK), dtype=tl.float32)
    squares = tl.zeros((BLOCK_K // PACK,), dtype=tl.float32)
    for k in tl.static_range(0, K, BLOCK_K):
        x = _part(x_ptr, k, inner, K, BLOCK_K).to(tl.float32)
        if NORM:
            squares += tl.sum(tl.reshape(x * x, (BLOCK_K // PACK, PACK)), 1)
            x *= _part(norm_ptr, k, inner, K, BLOCK_K).to(tl.float32)
        if k == 0:
            weight = first
        else:
            weight = _weights_part(weights, k, inner, K, BLOCK_K)
        total += tl.sum(tl.reshape(weight.to(tl.float32) * x[None, :], (BLOCK_N, BLOCK_K // PACK, PACK)), 2)
        if SWIGLU:
            up = _weights_part(weights + N * K, k, inner, K, BLOCK_K)
            total_up += tl.sum(tl.reshape(up.to(tl.float32) * x[None, :], (BLOCK_N, BLOCK_K // PACK, PACK)), 2)
    y = tl.sum(total, 1)
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        y *= scale
    if SWIGLU:
        y = _silu(y) * (tl.sum(total_up, 1) * scale)
    if RESIDUAL:
        y += residual.to(tl.float32)
    tl.store(out_ptr + columns, y.to(out_ptr.dtype.element_ty), mask=columns < N)


@jit(do_not_specialize_on_alignment=UNALIGNED)
def _rows_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    weight_tiles,
    residual_ptr,
    order_ptr,
    counts_ptr,
    partial_ptr,
    arrived_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    SWIGLU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Tiles of W on the side of the product that has 64 rows a warp group, where they go from shared memory into the
    tensor cores and nowhere else; the few rows of x on the side that may be narrow."""
    block = tl.program_id(0)
    part = tl.program_id(1)
    SHARE: tl.constexpr = (K + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    EXACT: tl.constexpr = K % (SPLITS * BLOCK_K) == 0
    first = block * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    live = loaded_ahead(counts_ptr)
    begin(EARLY)
    for start in range(0, live, BLOCK_M):
        places = start + tl.arange(0, BLOCK_M)
        # Rows that are not there are not read either: any row in their place is one address for all programs at once.
        present = (places < live)[None, :]
        row = tl.load(order_ptr + places, mask=places < live, other=0).to(tl.int64)
        x_ptrs = x_ptr + row[None, :] * K + inner[:, None]
        weights = weight_ptr + tl.minimum(columns, N - 1).to(tl.int64)[:, None] * K + inner[None, :]
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        total_up = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for step in range(0, SHARE, BLOCK_K):
            k = part * SHARE + step
            if EXACT:
                x = tl.load(x_ptrs + k, mask=present, other=0.0)
            else:
                x = tl.load(x_ptrs + k, mask=present & (inner[:, None] < K - k), other=0.0)
            weight = weight_tile(weights, weight_tiles, first, k, inner, K, EXACT, TILES)
            if SWIGLU:
                up = weight_tile(weights + N * K, weight_tiles, N + first, k, inner, K, EXACT, TILES)
            total = tl.dot(weight, x, total, input_precision="ieee")
            if SWIGLU:
                total_up = tl.dot(up, x, total_up, input_precision="ieee")
        if SWIGLU:
            total = _silu(total) * total_up
        places_out = row[None, :] * N + columns[:, None]
        mask = present & (columns < N)[:, None]
        if SPLITS > 1:
            # Who comes last adds up what all have left, in one order, and leaves the count as it was.
            tl.store(partial_ptr + part * (R * N) + places_out, total, mask=mask)
            tl.debug_barrier()  # the count speaks for all threads
            counter = arrived_ptr + start // BLOCK_M * tl.num_programs(0) + block
            last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1
            mask = mask & last
            total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for other in tl.static_range(SPLITS):
                total += tl.load(
                    partial_ptr + other * (R * N) + places_out, mask=mask, other=0.0, cache_modifier=".cg"
                )
            if last:
                tl.store(counter, 0)
        if RESIDUAL:
            total += tl.load(residual_ptr + places_out, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + places_out, total.to(out_ptr.dtype.element_ty), mask=mask)


# --- public function -------------------------------------------------------------------------------------------------


def _check_workspace(workspace: StreamWorkspace, rows: int, features: int, operands: dict[str, Tensor | None]) -> None:
    """What ``stream_workspace`` makes, with room enough, apart from the operands, of which None was not given."""
    partial, arrived = workspace
    x = operands["x"]
    if partial.dtype != torch.float32:
        raise ValueError(f"workspace.partial must be float32, got {str(partial.dtype).removeprefix('torch.')}")
    if partial.dim() != 3 or partial.shape[0] < 1 or partial.shape[1] * partial.shape[2] < rows * features:
        raise ValueError(f"workspace must be of stream_workspace for {rows} rows and {features} columns or more, got a "
                         f"partial of {list(partial.shape)}")  # fmt: skip
    check_device("workspace.partial", partial, x, "x")
    check_contiguous(**{"workspace.partial": partial})
    check_vector("workspace.arrived", arrived, x, "x", torch.int32, 0)
    check_apart(arrived, "workspace.partial", partial, "workspace.arrived")
    for written, tensor in (("workspace.partial", partial), ("workspace.arrived", arrived)):
        for name, operand in operands.items():
            if operand is not None:
                check_apart(tensor, name, operand, written)


def stream_rows_(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    counts: Tensor,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    act: str = "none",
    config: StreamConfig | None = None,
    workspace: StreamWorkspace | None = None,
) -> None:
    """``out[r] = act(f(x[r]) W^T) + residual[r]`` for r = order[i], i < counts[0]; other rows of out are left alone.

    out       (R, N), written: dtype of x or fp32; contiguous; shares no storage with x, but may be the residual itself
    x         (R, K), fp16, bf16 or fp32, contiguous
    weight    (N, K), dtype of x, contiguous. With "swiglu" (2 N, K), gate first: out = silu(gate) * up (Shazeer 2020)
    order     int32 (R,): distinct rows; counts int32 (2,): counts[0] of them are live
    norm      (weight (K,), eps) of an RMSNorm f in front of the product, with room for one row; None: f(x) = x
    residual  (R, N), dtype of x, contiguous
    config    one of ``stream_configs``; None: the first
    workspace  of ``stream_workspace``, for as many rows and columns of out at least, apart from all of the above: a
              product of few columns is then shared by more programs; None: a tile has one program
    Moves the bytes of W once for one tile of rows. Sums in fp32; fp32 products are exact (no TF32).
    """
    check_float("x", x)
    if out.dim() != 2 or x.dim() != 2 or weight.dim() != 2:
        raise ValueError(
            f"out, x and weight must have 2 dimensions, got {list(out.shape)}, {list(x.shape)}, {list(weight.shape)}"
        )
    rows, features = out.shape
    width = x.shape[1]
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if out.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"out must have the dtype of x or be float32, got {out.dtype}")
    check_rows("x", x, x, "x", width, rows)
    if width == 0:
        raise ValueError(f"x must have at least one column, got {list(x.shape)}")
    check_like("weight", weight, x, "x")
    check_weight("weight", weight, x, "x", features * (2 if act == "swiglu" else 1), width)
    check_contiguous(out=out, x=x)
    check_apart(out, "x", x)
    check_vector("order", order, x, "x", torch.int32, rows)
    check_counts("counts", counts, x, "x")
    if norm is not None:
        check_weight("the norm's weight", norm[0], x, "x", width)
        if rows > 1:
            raise ValueError(f"norm is for one row, got room for {rows}: tiles would multiply every weight with it, a "
                             "kernel in front (policy_rows_) every row")  # fmt: skip
    if residual is not None:
        check_like("residual", residual, x, "x")
        check_weight("residual", residual, x, "x", rows, features)
        if out.data_ptr() != residual.data_ptr() or out.dtype != residual.dtype:
            try:
                check_apart(out, "residual", residual)
            except ValueError as error:
                raise ValueError(f"residual must be out itself or apart from it: {error}") from None
    if workspace is not None:
        operands = {"out": out, "x": x, "weight": weight, "order": order, "counts": counts, "residual": residual}
        _check_workspace(workspace, rows, features, {**operands, "norm": None if norm is None else norm[0]})
    if not runs_kernel(x):
        stream_rows__ref(out, x, weight, order, counts, norm, residual, act)
        return
    if rows == 0 or features == 0:
        return
    if config is None:
        form = (width, act, features, workspace is not None, tile_limits(x))
        config = stream_configs(rows, x.dtype, *form)[0]
    if config.block_m == 1 and rows != 1:
        raise ValueError(f"a config with block_m 1 is for one row, got room for {rows}")
    if config.block_m > 1 and norm is not None:
        raise ValueError("tiles take no norm: choose a config with block_m 1, or policy_rows_ in front")
    if config.splits > 1 and (act != "none" or workspace is None):
        raise ValueError("programs can share the tiles of a plain product with a workspace alone: choose splits 1")
    if config.splits > 1:
        tiles = cdiv(rows, config.block_m) * cdiv(features, config.block_n)
        if config.splits * rows * features > workspace.partial.numel() or tiles > workspace.arrived.numel():
            raise ValueError(f"workspace has too little room for {config}: choose fewer splits, or larger tiles")
    weight_of_norm, eps = (None, 0.0) if norm is None else norm
    options = dict(
        N=features, K=width, SWIGLU=act == "swiglu", RESIDUAL=residual is not None, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, num_warps=config.num_warps, **early(x),
    )  # fmt: skip
    grid = (cdiv(features, config.block_n), config.splits)
    with on_device(x):
        if config.block_m == 1:
            limit = {"maxnreg": config.registers} if config.registers else {}
            _one_row_kernel[grid](
                out, x, weight, weight_of_norm, residual, counts, eps, NORM=norm is not None,
                PACK=16 // x.element_size(), **limit, **options,
            )  # fmt: skip
        else:
            tiles = copied_tiles(weight, config.block_n, config.block_k)
            shared = workspace if config.splits > 1 else (None, None)
            _rows_kernel[grid](
                out, x, weight, tiles, residual, order, counts, *shared, R=rows, TILES=tiles is not None,
                SPLITS=config.splits, BLOCK_M=config.block_m, num_stages=config.num_stages, **options,
            )  # fmt: skip
