"""Attention of one new token of each sequence on its paged keys and values, split over the context (flash-decoding).

Tried and left out: parts chosen on the device by the live count and put together by the last program of a row, one
launch for two. On an H100 a step of LLaMA-7B's shape took 1 % less with 1 row, the same with 8, and 1 to 2 % more with
32 and 64 whose rows leave; a row's rounding would then depend on how many others are left.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.gpu_common import (
    UNALIGNED,
    begin,
    cdiv,
    check_contiguous,
    check_counts,
    check_device,
    check_float,
    check_vector,
    early,
    jit,
    loaded_ahead,
    next_power_of_2,
    on_device,
    runs_kernel,
    tl,
)

__all__ = ["decode_attention_", "decode_attention__ref", "decode_attention_workspace"]

# Programs that read at memory's speed on an H100: two for each multiprocessor where a program has a head's keys to
# itself and parts that wait for each other cost more than they gain; more where heads share them.
_PROGRAMS, _PROGRAMS_SHARED = 256, 1056
_MOST_SPLITS = 16


def decode_attention_workspace(rows: int, num_heads: int, kv_heads: int, head_dim: int, device: torch.device) -> Tensor:
    """fp32 (rows, splits, num_heads, head_dim + 2): weighted values, maximum and sum of every part of a context."""
    programs = _PROGRAMS if num_heads == kv_heads else _PROGRAMS_SHARED
    splits = max(1, min(_MOST_SPLITS, cdiv(programs, max(1, rows * kv_heads))))
    return torch.zeros(rows, splits, num_heads, head_dim + 2, device=device)


def decode_attention__ref(
    out: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    order: Tensor,
    block_table: Tensor,
    positions: Tensor,
    counts: Tensor,
    scale: float,
    block_size: int,
    workspace: Tensor,
) -> None:
    for r in order[: int(counts[0])].tolist():
        places = torch.arange(int(positions[r]) + 1, device=query.device)
        slots = block_table[r].long()[places // block_size] * block_size + places % block_size
        q, k, v = (x.transpose(0, 1)[None] for x in (query[r][None], keys[slots], values[slots]))
        gqa = q.shape[1] != k.shape[1]
        out[r] = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=gqa)[0, :, 0]


@jit
def _put_part(parts_ptr, out_ptr, to, at, column, mine, most, total, weighted, D: tl.constexpr, SPLITS: tl.constexpr):
    """What a part of a context comes to: for ``_whole_kernel``, or all there is."""
    own = mine[:, None] & (column < D)[None, :]
    if SPLITS == 1:
        tl.store(out_ptr + at[:, None] + column[None, :], (weighted / total[:, None]).to(out_ptr.dtype.element_ty), own)
    else:
        tl.store(parts_ptr + to[:, None] + column[None, :], weighted, own)
        tl.store(parts_ptr + to + D, most, mine)
        tl.store(parts_ptr + to + D + 1, total, mine)


@jit
def _tile(
    keys_ptr, values_ptr, block, p, end, kv, column, KV: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    """Keys and values [positions, D] of a head at positions p, which stand in these blocks; which of them are in the
    part."""
    seen = p < end
    slot = block.to(tl.int64) * BLOCK_SIZE + p % BLOCK_SIZE
    at = slot[:, None] * (KV * D) + kv * D + column[None, :]
    mask = seen[:, None] & (column < D)[None, :]
    return tl.load(keys_ptr + at, mask=mask, other=0.0), tl.load(values_ptr + at, mask=mask, other=0.0), seen


@jit
def _blocks(table_ptr, p, end, BLOCK_SIZE: tl.constexpr):
    """The blocks of a row's positions p: on their way while the tile in front is met."""
    return tl.load(table_ptr + p // BLOCK_SIZE, mask=p < end, other=0)


@jit(do_not_specialize_on_alignment=UNALIGNED, do_not_specialize=["blocks"])
def _part_kernel(
    out_ptr,
    query_ptr,
    keys_ptr,
    values_ptr,
    order_ptr,
    table_ptr,
    positions_ptr,
    counts_ptr,
    parts_ptr,
    scale,
    blocks,
    A: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EARLY: tl.constexpr,
):
    kv = tl.program_id(0)
    place = tl.program_id(1)
    split = tl.program_id(2)
    # Positions and block tables stand before a step begins: where a part's keys lie is known before the kernel in front
    # has written the last of them, and one trip to memory is left behind it.
    alive = place < loaded_ahead(counts_ptr)
    row = loaded_ahead(order_ptr + place, alive, 0).to(tl.int64)
    context = loaded_ahead(positions_ptr + row, alive, -1) + 1
    share = tl.cdiv(tl.cdiv(context, SPLITS), BLOCK_C) * BLOCK_C
    start = split * share
    end = tl.minimum(start + share, context)
    inner = tl.arange(0, BLOCK_C)
    p = start + inner
    block = loaded_ahead(table_ptr + row * blocks + p // BLOCK_SIZE, p < end, 0)
    begin(EARLY)
    if not alive:
        return
    LOG2E: tl.constexpr = 1.4426950408889634
    heads: tl.constexpr = A // KV
    member = tl.arange(0, GROUP)
    column = tl.arange(0, BLOCK_D)
    head = kv * heads + member
    mine = member < heads
    own = mine[:, None] & (column < D)[None, :]
    to = ((place * SPLITS + split) * A + head) * (D + 2)
    out_at = row * (A * D) + head * D
    if GROUP == 1:
        # Every place of a tile has a softmax of its own, and they meet once, behind the loop: nothing in it waits for
        # another thread but a score for the eighth of its row.
        q = tl.load(query_ptr + row * (A * D) + kv * D + column, mask=column < D, other=0.0).to(tl.float32)
        q = q * (scale * LOG2E)
        most = tl.full((BLOCK_C,), -1e30, dtype=tl.float32)  # finite: a place may never see a position
        total = tl.zeros((BLOCK_C,), dtype=tl.float32)
        weighted = tl.zeros((BLOCK_C, BLOCK_D), dtype=tl.float32)
        for first in tl.range(start, end, BLOCK_C, num_stages=3):
            p = first + inner
            k, v, seen = _tile(keys_ptr, values_ptr, block, p, end, kv, column, KV, D, BLOCK_SIZE)
            block = _blocks(table_ptr + row * blocks, p + BLOCK_C, end, BLOCK_SIZE)
            scores = tl.where(seen, tl.sum(q[None, :] * k.to(tl.float32), 1), float("-inf"))
            higher = tl.maximum(most, scores)
            kept = tl.exp2(most - higher)
            weights = tl.exp2(scores - higher)
            total = total * kept + weights
            weighted = weighted * kept[:, None] + weights[:, None] * v.to(tl.float32)
            most = higher
        top = tl.max(most, 0)
        factor = tl.exp2(most - top)
        one = tl.zeros((1,), dtype=tl.float32)
        whole = tl.sum(total * factor, 0) + one
        together = tl.sum(weighted * factor[:, None], 0)[None, :]
        _put_part(parts_ptr, out_ptr, to, out_at, column, mine, top / LOG2E + one, whole, together, D, SPLITS)
    else:
        q = tl.load(query_ptr + out_at[:, None] + column[None, :], mask=own, other=0.0).to(tl.float32) * scale
        most = tl.full((GROUP,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((GROUP,), dtype=tl.float32)
        weighted = tl.zeros((GROUP, BLOCK_D), dtype=tl.float32)
        for first in range(start, end, BLOCK_C):
            p = first + inner
            k, v, seen = _tile(keys_ptr, values_ptr, block, p, end, kv, column, KV, D, BLOCK_SIZE)
            k, v = k.to(tl.float32), v.to(tl.float32)
            block = _blocks(table_ptr + row * blocks, p + BLOCK_C, end, BLOCK_SIZE)
            scores = tl.sum(q[:, None, :] * k[None, :, :], 2)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            higher = tl.maximum(most, tl.max(scores, 1))
            kept = tl.exp(most - higher)
            weights = tl.exp(scores - higher[:, None])
            total = total * kept + tl.sum(weights, 1)
            weighted = weighted * kept[:, None] + tl.sum(weights[:, :, None] * v[None, :, :], 1)
            most = higher
        _put_part(parts_ptr, out_ptr, to, out_at, column, mine, most, total, weighted, D, SPLITS)


@jit(do_not_specialize_on_alignment=UNALIGNED)
def _whole_kernel(
    out_ptr,
    parts_ptr,
    order_ptr,
    counts_ptr,
    A: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    place = tl.program_id(0)
    head = tl.program_id(1)
    live = loaded_ahead(counts_ptr)
    row = loaded_ahead(order_ptr + place).to(tl.int64)
    begin(EARLY)
    if place >= live:
        return
    split = tl.arange(0, BLOCK_S)
    column = tl.arange(0, BLOCK_D)
    there = split < SPLITS
    at = ((place * SPLITS + split) * A + head) * (D + 2)
    most = tl.load(parts_ptr + at + D, mask=there, other=float("-inf"))
    total = tl.load(parts_ptr + at + D + 1, mask=there, other=0.0)
    mask = there[:, None] & (column < D)[None, :]
    weighted = tl.load(parts_ptr + at[:, None] + column[None, :], mask=mask, other=0.0)
    factor = tl.exp(most - tl.max(most, 0))
    result = tl.sum(weighted * factor[:, None], 0) / tl.sum(total * factor, 0)
    tl.store(out_ptr + row * (A * D) + head * D + column, result.to(out_ptr.dtype.element_ty), mask=column < D)


def decode_attention_(
    out: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    order: Tensor,
    block_table: Tensor,
    positions: Tensor,
    counts: Tensor,
    scale: float,
    block_size: int,
    workspace: Tensor,
) -> None:
    """out[r] = attention of query[r] on positions 0 ... positions[r] of row r, for r = order[i], i < counts[0].

    out, query   (R, A, d), fp16, bf16 or fp32, contiguous
    keys, values (slots, KV, d), dtype of query, contiguous; KV divides A: A / KV heads share keys (GQA)
    block_table  int32 (R, blocks): position p of row r stands in slot block_table[r, p // block_size] * block_size +
                 p % block_size; positions int32 (R,); order int32 (R,), counts int32 (2,)
    workspace    of ``decode_attention_workspace``
    Several queries of one sequence are rows with one block table, each at its own position: it sees nothing behind.
    Every part of a context, and where there are several, a second launch for the parts together (Dao et al. 2023,
    flash-decoding). Scores and sums in fp32. Limited by the bytes of keys and values, 2 KV d a position. Neither
    positions nor block_table may be written by the kernel directly in front: they are read before it ends.
    """
    check_float("query", query)
    if query.dim() != 3 or keys.dim() != 3 or keys.shape[2] != query.shape[2]:
        raise ValueError(
            f"query must be (R, A, d) and keys (slots, KV, d), got {list(query.shape)}, {list(keys.shape)}"
        )
    rows, heads, d = query.shape
    kv_heads = keys.shape[1]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key heads evenly")
    for name, tensor, like in (("out", out, query), ("values", values, keys)):
        if tensor.shape != like.shape or tensor.dtype != query.dtype:
            raise ValueError(f"{name} must have shape {list(like.shape)} and dtype {query.dtype}, got "
                             f"{list(tensor.shape)}, {tensor.dtype}")  # fmt: skip
    check_contiguous(out=out, query=query, keys=keys, values=values, block_table=block_table, workspace=workspace)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if block_table.dtype != torch.int32 or block_table.dim() != 2 or block_table.shape[0] < rows:
        raise ValueError(f"block_table must be int32 of shape [{rows} or more, blocks], got {block_table.dtype} "
                         f"{list(block_table.shape)}")  # fmt: skip
    for name, tensor in (("out", out), ("keys", keys), ("values", values), ("block_table", block_table),
                         ("workspace", workspace)):  # fmt: skip
        check_device(name, tensor, query, "query")
    check_vector("order", order, query, "query", torch.int32, rows)
    check_vector("positions", positions, query, "query", torch.int32, rows)
    check_counts("counts", counts, query, "query")
    if (
        workspace.dim() != 4
        or workspace.shape[0] < rows
        or workspace.shape[1] < 1
        or workspace.shape[2:] != (heads, d + 2)
        or workspace.dtype != torch.float32
    ):
        raise ValueError(f"workspace must be fp32 of shape [{rows} or more, splits, {heads}, {d + 2}], got "
                         f"{list(workspace.shape)}: see decode_attention_workspace")  # fmt: skip
    if not runs_kernel(query):
        decode_attention__ref(
            out, query, keys, values, order, block_table, positions, counts, scale, block_size, workspace
        )
        return
    if rows == 0:
        return
    splits = workspace.shape[1]
    group = next_power_of_2(heads // kv_heads)
    block_d = next_power_of_2(d)
    # A tile of 4096 numbers each of keys and values; where heads share them, less.
    block_c = max(16, 4096 // block_d) if group == 1 else max(16, 64 // group * 128 // max(block_d, 128))
    with on_device(query):
        _part_kernel[(kv_heads, rows, splits)](
            out, query, keys, values, order, block_table, positions, counts, workspace, scale, block_table.shape[1],
            A=heads, KV=kv_heads, D=d, BLOCK_SIZE=block_size, SPLITS=splits, GROUP=group, BLOCK_D=block_d,
            BLOCK_C=min(block_c, 32), num_warps=4, **early(query),
        )  # fmt: skip
        if splits > 1:
            _whole_kernel[(rows, heads)](
                out, workspace, order, counts, A=heads, D=d, SPLITS=splits, BLOCK_S=next_power_of_2(splits),
                BLOCK_D=block_d, num_warps=2, **early(query),
            )  # fmt: skip
