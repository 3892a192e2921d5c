"""RMSNorm, the Q, K and V products of a decode step, and RoPE, straight into the queries and the cache.

One call a layer, a launch or two, serves the newest token of every live row and, for keys and values alone, the
positions that this layer still owes: tokens that have left further below, by the hidden state they left with. Bytes at
least: the weight, (A + 2 KV) d H elements, once while n + o is at most one tile; beside it the rows are nothing. So the
product is to stream the weight as fast as memory goes, with one row from before the kernel in front has ended.

A capacity of one row multiplies vectors: a program has all that it needs of the weight on its way at once, in
registers, ahead of ``begin``, and up to 8 owed entries meet it there one by one. More of them, and more rows than one,
go through tl.dot: tiles of weight by tiles of rows, the weight on the side with 16 or more rows and the few tokens on
the one that may be narrow.
The norm costs no pass there: its weight is multiplied into the tile of W, its mean square is summed beside the product.

A large weight and more rows than one: what is multiplied with every element of W costs more than a pass. A launch of
its own writes the entries' norms side by side, as many as there is room for in ``entries``; W goes by the copy engine
from memory into the tensor cores. Entries beyond take the way above, in the same launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.gpu_common import (
    HOPPER,
    UNALIGNED,
    TileLimits,
    begin,
    cdiv,
    check_contiguous,
    check_counts,
    check_float,
    check_like,
    check_vector,
    check_weight,
    copied_tiles,
    early,
    fitting_tiles,
    jit,
    next_power_of_2,
    on_device,
    runs_kernel,
    tile_limits,
    tl,
    weight_tile,
)

__all__ = ["EntriesConfig", "QkvConfig", "entries_configs", "qkv_configs", "qkv_entries", "qkv_rows_", "qkv_rows__ref"]


# --- tiles -----------------------------------------------------------------------------------------------------------


class QkvConfig(NamedTuple):
    """One way to cut the products. A pair is a column j of a head and its partner j + d / 2, which RoPE turns together.

    rows, pairs, block_k        a tile of tl.dot: entries, pairs of weight rows (twice as many rows), columns of W
    num_warps, num_stages       of a program, and of the pipeline that fills such tiles
    vector_pairs, vector_k      the same for one row and up to ``few`` owed entries (a capacity of 1 only)
    """

    rows: int
    pairs: int
    block_k: int
    num_warps: int
    num_stages: int
    vector_pairs: int = 2
    vector_k: int = 4096
    few: int = 8


# The default first. One row: all of a program's weight is in registers, 64 of each thread's, so that four programs a
# multiprocessor have 128 KB on their way; their tiles for owed entries must leave shared memory for four, too.
_ONE_HALF = (
    QkvConfig(32, 32, 64, 4, 4, 2, 4096),
    QkvConfig(16, 16, 128, 4, 4, 2, 4096),
    QkvConfig(16, 32, 64, 4, 4, 2, 4096),
    QkvConfig(16, 16, 128, 4, 4, 4, 2048),
    QkvConfig(16, 16, 128, 4, 4, 1, 4096),
    QkvConfig(16, 16, 128, 4, 4, 2, 2048),
    QkvConfig(16, 16, 128, 8, 4, 4, 4096),
    QkvConfig(32, 16, 64, 4, 6, 2, 4096),
)
_HALF = (
    QkvConfig(32, 32, 128, 4, 4),
    QkvConfig(16, 32, 128, 4, 4),
    QkvConfig(64, 32, 128, 4, 4),
    QkvConfig(64, 32, 64, 4, 6),
    QkvConfig(32, 16, 128, 4, 5),
    QkvConfig(16, 16, 256, 4, 4),
    QkvConfig(64, 8, 128, 4, 4),
    QkvConfig(32, 8, 128, 4, 4),
    QkvConfig(16, 8, 128, 4, 4),
)
_ONE_FLOAT = (QkvConfig(16, 16, 32, 4, 2, 2, 2048), QkvConfig(16, 16, 32, 4, 2, 1, 4096))
_FLOAT = (QkvConfig(16, 16, 32, 4, 2), QkvConfig(32, 16, 32, 4, 2), QkvConfig(16, 8, 32, 4, 2))

class EntriesConfig(NamedTuple):
    """One way to cut the products of norms in ``entries``: one head of W by ``rows`` of them."""

    rows: int
    block_k: int
    num_warps: int
    num_stages: int


# There is room beside the live rows for as many that are owed, since a second tile would read W again: LLaMA-7B's alone
# takes 37 / 38 / 39 / 41 us with tiles of 16 / 32 / 64 / 128.
_ENTRIES = tuple(EntriesConfig(0, *c) for c in ((128, 8, 3), (64, 8, 4), (64, 8, 3)))
_ENTRIES_FLOAT = (EntriesConfig(0, 32, 8, 2),)

# Programs that keep an H100 (132 multiprocessors) busy.
_PROGRAMS = 132


def qkv_configs(
    rows: int, num_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, limits: TileLimits = HOPPER
) -> tuple[QkvConfig, ...]:
    """Candidates for a capacity of ``rows``, the default first. The choice never depends on the live count.

    limits  of the device, ``tile_limits``: where W is not multiplied from shared memory, the widest would be spilled

    A tile has room for owed entries beside the live rows where it can: a second tile reads the weight again, and a
    weight larger than L2 then comes from memory twice."""
    half = dtype != torch.float32
    if rows <= 1:
        return _ONE_HALF if half else _ONE_FLOAT
    table = _HALF if half else _FLOAT
    if not limits.hopper:
        table = tuple(c for c in table if c.rows * c.pairs * c.block_k < 64 * 32 * 128)
    table = fitting_tiles(table, lambda c: dtype.itemsize * (c.rows + 2 * c.pairs) * c.block_k, limits)
    size = 16 if not half else 32 if rows <= 16 else 64

    def programs(config: QkvConfig) -> int:
        return (num_heads + 2 * kv_heads) * cdiv(head_dim // 2, config.pairs)

    # The widest tile that occupies the device; a small model's narrowest, and its rows in more tiles than one.
    fitting = [c for c in table if c.rows == size]
    default = next((c for c in fitting if programs(c) >= _PROGRAMS), None)
    if default is None:
        default = min(table, key=lambda c: (c.pairs, abs(c.rows - size)))
    return default, *(c for c in table if c != default)


def qkv_entries(rows: int, num_heads: int, kv_heads: int, head_dim: int) -> int:
    """Rows of ``entries`` that pay for a capacity of ``rows``; 0 where none do: a small weight, or one of other heads
    than the tiles are for."""
    if rows <= 1 or head_dim != 128 or num_heads + 2 * kv_heads < 64:
        return 0
    return 2 * entries_configs(rows, torch.float16)[0].rows


def entries_configs(rows: int, dtype: torch.dtype, limits: TileLimits = HOPPER) -> tuple[EntriesConfig, ...]:
    """``qkv_configs`` with ``entries``."""
    if dtype == torch.float32:
        return tuple(c._replace(rows=16) for c in _ENTRIES_FLOAT)
    tile = 16 if rows <= 4 else 32 if rows <= 16 else 64 if rows <= 32 else 128
    table = tuple(c._replace(rows=tile) for c in (_ENTRIES if limits.hopper else _ENTRIES[1:]))
    return fitting_tiles(table, lambda c: 2 * (c.rows + 128) * c.block_k, limits)


# --- torch twin ------------------------------------------------------------------------------------------------------


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (Su et al. 2021) of x [n, heads, d] in LLaMA's layout: halves, not pairs."""
    first, second = x.chunk(2, -1)
    return (x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]).to(x.dtype)


def qkv_rows__ref(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    hidden: Tensor,
    states: Tensor,
    weight: Tensor,
    norm: tuple[Tensor, float],
    cos: Tensor,
    sin: Tensor,
    order: Tensor,
    slots: Tensor,
    positions: Tensor,
    owed_slots: Tensor,
    owed_positions: Tensor,
    counts: Tensor,
    config: QkvConfig | EntriesConfig | None = None,
    entries: Tensor | None = None,
) -> None:
    n, o = counts.tolist()
    rows, owed = order[:n].long(), owed_slots[:o].long()
    (_, num_heads, head_dim), kv_heads = query.shape, keys.shape[1]
    places = torch.cat([slots[rows].long(), owed])
    at = torch.cat([positions[rows], owed_positions[:o]]).long()
    gain, eps = norm
    wide = torch.cat([hidden[rows], states[owed]]).float()
    x = gain * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(hidden.dtype)
    x = x.to(hidden.dtype)
    q_weight, kv_weight = weight.split([num_heads * head_dim, 2 * kv_heads * head_dim])
    key, value = F.linear(x, kv_weight).unflatten(-1, (2, kv_heads, head_dim)).unbind(1)
    keys[places], values[places] = _turned(key, cos[at], sin[at]), value
    asked = F.linear(x[:n], q_weight).unflatten(-1, (num_heads, head_dim))
    query[rows] = _turned(asked, cos[at[:n]], sin[at[:n]])


# --- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _place(block, BLOCKS: tl.constexpr, A: tl.constexpr, KV: tl.constexpr):
    """The head of the weight to which a block belongs, and which part of it. Keys and values come first: they may have
    owed entries, and take longer."""
    head = block // BLOCKS
    return tl.where(head < 2 * KV, A + head, head - 2 * KV), block % BLOCKS


@jit
def _weight_rows(head, part, PAIRS: tl.constexpr, HALF: tl.constexpr):
    """The rows of the weight of PAIRS pairs, partners side by side. Past the end of a head the last pair again."""
    feature = tl.arange(0, 2 * PAIRS)
    pair = tl.minimum(part * PAIRS + feature // 2, HALF - 1)
    return head * (2 * HALF) + pair + (feature % 2) * HALF


@jit
def _angles(cos_ptr, sin_ptr, positions, here, pair, HALF: tl.constexpr):
    """cos and sin of both halves of the pairs, [PAIRS, entries]."""
    at = positions.to(tl.int64)[None, :] * (2 * HALF) + pair
    cos = tl.load(cos_ptr + at, mask=here, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=here, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_ptr + at + HALF, mask=here, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_ptr + at + HALF, mask=here, other=0.0).to(tl.float32)
    return cos, sin, cos_second, sin_second


@jit
def _put(
    query_ptr, keys_ptr, values_ptr, first, second, cos, sin, cos_second, sin_second, rows, slots, here, pair, head,
    A: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """first, second [PAIRS, entries]: both halves of the pairs; turned, unless they are values, and stored."""
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    if head < A + KV:
        if head < A:
            to = query_ptr + (rows.to(tl.int64)[None, :] * A + head) * (2 * HALF) + pair
        else:
            to = keys_ptr + (slots.to(tl.int64)[None, :] * KV + (head - A)) * (2 * HALF) + pair
        tl.store(to, (first * cos - second * sin).to(dtype), mask=here)
        tl.store(to + HALF, (second * cos_second + first * sin_second).to(dtype), mask=here)
    else:
        to = values_ptr + (slots.to(tl.int64)[None, :] * KV + (head - A - KV)) * (2 * HALF) + pair
        tl.store(to, first.to(dtype), mask=here)
        tl.store(to + HALF, second.to(dtype), mask=here)


@jit
def _whose(order_ptr, slots_ptr, positions_ptr, owed_slots_ptr, owed_positions_ptr, entry, present, live):
    """Of the entries that are present: ids of the newest tokens' rows, which those are, cache slots, positions."""
    newest = present & (entry < live)
    late = present & (entry >= live)
    rows = tl.load(order_ptr + entry, mask=newest, other=0)
    slots = tl.load(slots_ptr + rows, mask=newest, other=0)
    slots += tl.load(owed_slots_ptr + entry - live, mask=late, other=0)
    positions = tl.load(positions_ptr + rows, mask=newest, other=0)
    positions += tl.load(owed_positions_ptr + entry - live, mask=late, other=0)
    return rows, newest, slots, positions


@jit
def _tiles(
    query_ptr, keys_ptr, values_ptr, hidden_ptr, states_ptr, weight_ptr, norm_ptr, cos_ptr, sin_ptr, order_ptr,
    slots_ptr, positions_ptr, owed_slots_ptr, owed_positions_ptr, live, owed, begin_at, eps, head, part,
    A: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of the weight with all entries from ``begin_at`` on, ROWS at a time: the live rows, and behind them
    what is owed."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    # Norm weight times W is rounded to fp16, and may be very small there: 2^6 keeps it from fp16's lower end.
    SCALE: tl.constexpr = 64.0 if dtype == tl.float16 else 1.0
    weights = weight_ptr + _weight_rows(head, part, PAIRS, HALF).to(tl.int64) * H
    inner = tl.arange(0, BLOCK_K)
    entries = live
    if head >= A:
        entries += owed
    for start in range(begin_at, entries, ROWS):
        entry = start + tl.arange(0, ROWS)
        present = entry < entries
        rows, newest, slots, positions = _whose(
            order_ptr, slots_ptr, positions_ptr, owed_slots_ptr, owed_positions_ptr, entry, present, live
        )
        x_rows = tl.where(newest, hidden_ptr + rows.to(tl.int64) * H, states_ptr + slots.to(tl.int64) * H)
        total = tl.zeros((2 * PAIRS, ROWS), dtype=tl.float32)
        squares = tl.zeros((ROWS,), dtype=tl.float32)
        coming = tl.load(norm_ptr + inner, mask=inner < H, other=0.0)
        for k in range(0, H, BLOCK_K):
            column = k + inner
            # Too narrow for the pipeline, so one step ahead by hand.
            gain = coming
            coming = tl.load(norm_ptr + column + BLOCK_K, mask=column + BLOCK_K < H, other=0.0)
            if H % BLOCK_K == 0:
                w = tl.load(weights[:, None] + column[None, :], eviction_policy="evict_first")
                x = tl.load(x_rows[None, :] + column[:, None], mask=present[None, :], other=0.0)
            else:
                inside = column < H
                w = tl.load(
                    weights[:, None] + column[None, :], mask=inside[None, :], other=0.0, eviction_policy="evict_first"
                )
                x = tl.load(x_rows[None, :] + column[:, None], mask=present[None, :] & inside[:, None], other=0.0)
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, axis=0)
            if norm_ptr.dtype.element_ty == dtype:
                w = w * (gain * SCALE).to(dtype)[None, :]  # one rounding
            else:
                w = (w.to(tl.float32) * (gain * SCALE)[None, :]).to(dtype)
            total = tl.dot(w, x, total, input_precision="ieee")
        total *= (tl.rsqrt(squares / H + eps) * (1.0 / SCALE))[None, :]
        first, second = tl.split(tl.permute(tl.reshape(total, (PAIRS, 2, ROWS)), (0, 2, 1)))
        pair = (part * PAIRS + tl.arange(0, PAIRS))[:, None]
        here = present[None, :] & (pair < HALF)
        cos, sin, cos_second, sin_second = _angles(cos_ptr, sin_ptr, positions, here & (head < A + KV), pair, HALF)
        _put(
            query_ptr, keys_ptr, values_ptr, first, second, cos, sin, cos_second, sin_second, rows, slots, here, pair,
            head, A, KV, HALF,
        )  # fmt: skip


@jit(do_not_specialize_on_alignment=UNALIGNED)
def _rows_kernel(
    query_ptr, keys_ptr, values_ptr, hidden_ptr, states_ptr, weight_ptr, norm_ptr, cos_ptr, sin_ptr, order_ptr,
    slots_ptr, positions_ptr, owed_slots_ptr, owed_positions_ptr, counts_ptr, eps,
    A: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (HALF + PAIRS - 1) // PAIRS
    head, part = _place(tl.program_id(0), BLOCKS, A, KV)
    begin(EARLY)
    # An exit's decision may stand directly in front: counts, order and what is owed are its work.
    live = tl.load(counts_ptr)
    owed = tl.load(counts_ptr + 1)
    _tiles(
        query_ptr, keys_ptr, values_ptr, hidden_ptr, states_ptr, weight_ptr, norm_ptr, cos_ptr, sin_ptr, order_ptr,
        slots_ptr, positions_ptr, owed_slots_ptr, owed_positions_ptr, live, owed, 0, eps, head, part,
        A, KV, HALF, H, ROWS, PAIRS, BLOCK_K,
    )  # fmt: skip


@jit(do_not_specialize_on_alignment=UNALIGNED)
def _norms_kernel(
    entries_ptr, hidden_ptr, states_ptr, norm_ptr, order_ptr, owed_slots_ptr, counts_ptr, eps,
    H: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    gain = tl.load(norm_ptr + column, mask=column < H, other=0.0)
    begin(EARLY)
    live = tl.load(counts_ptr)
    owed = tl.load(counts_ptr + 1)
    if entry >= live + owed:
        return
    newest = entry < live
    row = tl.load(order_ptr + entry, mask=newest, other=0).to(tl.int64)
    slot = tl.load(owed_slots_ptr + entry - live, mask=entry >= live, other=0).to(tl.int64)
    from_ptr = tl.where(newest, hidden_ptr + row * H, states_ptr + slot * H)
    x = tl.load(from_ptr + column, mask=column < H, other=0.0)
    wide = x.to(tl.float32)
    scaled = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / H + eps)).to(x.dtype).to(tl.float32)
    tl.store(entries_ptr + entry * H + column, (scaled * gain.to(tl.float32)).to(x.dtype), mask=column < H)


@jit(do_not_specialize_on_alignment=UNALIGNED)
def _entries_kernel(
    query_ptr, keys_ptr, values_ptr, hidden_ptr, states_ptr, weight_ptr, norm_ptr, cos_ptr, sin_ptr, order_ptr,
    slots_ptr, positions_ptr, owed_slots_ptr, owed_positions_ptr, counts_ptr, eps, entries_ptr, weight_tiles,
    A: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, H: tl.constexpr, ROOM: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, TILES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One head of W by the norms of ``_norms_kernel``; what these had no room for by ``_tiles``."""
    head, part = _place(tl.program_id(0), 1, A, KV)
    features = tl.arange(0, 2 * HALF)
    pair = tl.arange(0, HALF)[:, None]
    inner = tl.arange(0, BLOCK_K)
    weights = weight_ptr + (head * (2 * HALF) + features).to(tl.int64)[:, None] * H + inner[None, :]
    begin(EARLY)
    live = tl.load(counts_ptr)
    owed = tl.load(counts_ptr + 1)
    entries = live
    if head >= A:
        entries += owed
    held = tl.minimum(entries, ROOM)
    for start in range(0, held, ROWS):
        entry = start + tl.arange(0, ROWS)
        present = entry < held
        rows, newest, slots, positions = _whose(
            order_ptr, slots_ptr, positions_ptr, owed_slots_ptr, owed_positions_ptr, entry, present, live
        )
        # Entries that are not there are not read either: any in their place is one address for all programs at once.
        x_ptrs = entries_ptr + entry[None, :] * H + inner[:, None]
        total = tl.zeros((2 * HALF, ROWS), dtype=tl.float32)
        for k in range(0, H, BLOCK_K):
            if H % BLOCK_K == 0:
                x = tl.load(x_ptrs + k, mask=present[None, :], other=0.0)
            else:
                x = tl.load(x_ptrs + k, mask=present[None, :] & (inner[:, None] < H - k), other=0.0)
            w = weight_tile(weights, weight_tiles, head * (2 * HALF), k, inner, H, H % BLOCK_K == 0, TILES)
            total = tl.dot(w, x, total, input_precision="ieee")
        first, second = tl.split(tl.permute(tl.reshape(total, (2, HALF, ROWS)), (1, 2, 0)))
        here = present[None, :] & (pair < HALF)
        cos, sin, cos_second, sin_second = _angles(cos_ptr, sin_ptr, positions, here & (head < A + KV), pair, HALF)
        _put(
            query_ptr, keys_ptr, values_ptr, first, second, cos, sin, cos_second, sin_second, rows, slots, here, pair,
            head, A, KV, HALF,
        )  # fmt: skip
    if entries > ROOM:
        _tiles(
            query_ptr, keys_ptr, values_ptr, hidden_ptr, states_ptr, weight_ptr, norm_ptr, cos_ptr, sin_ptr, order_ptr,
            slots_ptr, positions_ptr, owed_slots_ptr, owed_positions_ptr, live, owed, ROOM, eps, head, part,
            A, KV, HALF, H, 16, HALF, 32,
        )  # fmt: skip


@jit
def _weight_part(weights, k, column, H: tl.constexpr, VECTOR_K: tl.constexpr):
    if H % VECTOR_K == 0:
        return tl.load(weights[:, None] + (k + column)[None, :], eviction_policy="evict_first")
    inside = (k + column < H)[None, :]
    return tl.load(weights[:, None] + (k + column)[None, :], mask=inside, other=0.0, eviction_policy="evict_first")


@jit
def _vector_part(ptr, k, column, H: tl.constexpr, VECTOR_K: tl.constexpr):
    if H % VECTOR_K == 0:
        return tl.load(ptr + k + column)
    return tl.load(ptr + k + column, mask=k + column < H, other=0.0)


@jit
def _prefetch(ptrs):
    """Have L1 hold what stands there, soon; nothing waits."""
    tl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.b32 $0, 0;", "=r,l", [ptrs], dtype=tl.int32, is_pure=False, pack=1
    )


@jit
def _opaque(halves):
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [halves], dtype=halves.dtype, is_pure=False, pack=2)


@jit(do_not_specialize_on_alignment=UNALIGNED)
def _one_row_kernel(
    query_ptr, keys_ptr, values_ptr, hidden_ptr, states_ptr, weight_ptr, norm_ptr, cos_ptr, sin_ptr, order_ptr,
    slots_ptr, positions_ptr, owed_slots_ptr, owed_positions_ptr, counts_ptr, eps,
    A: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr, VECTOR_PAIRS: tl.constexpr, VECTOR_K: tl.constexpr, FEW: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    BLOCKS: tl.constexpr = (HALF + VECTOR_PAIRS - 1) // VECTOR_PAIRS
    head, part = _place(block, BLOCKS, A, KV)
    weights = weight_ptr + _weight_rows(head, part, VECTOR_PAIRS, HALF).to(tl.int64) * H
    column = tl.arange(0, VECTOR_K)
    # Whether weights and gains are 16 bit wide, and stay where they are for what is owed.
    HELD: tl.constexpr = (
        weight_ptr.dtype.element_ty.primitive_bitwidth == 16 and norm_ptr.dtype.element_ty.primitive_bitwidth == 16
    )
    w = _weight_part(weights, 0, column, H, VECTOR_K)
    gain = _vector_part(norm_ptr, 0, column, H, VECTOR_K)
    begin(EARLY)
    live = tl.load(counts_ptr)
    owed = tl.load(counts_ptr + 1)
    # The id of a live row is 0, there is no other: nothing waits for counts and order.
    x = _vector_part(hidden_ptr, 0, column, H, VECTOR_K)
    if (live > 0) & ((head < A) | (owed <= FEW)):
        only = tl.zeros((1,), dtype=tl.int32)
        slots = tl.load(slots_ptr + only)
        positions = tl.load(positions_ptr + only)
        pair = (part * VECTOR_PAIRS + tl.arange(0, VECTOR_PAIRS))[:, None]
        here = pair < HALF
        # On their way while the weight is; so is the first owed state, which has long gone from L2.
        if EARLY and head >= A:
            if owed > 0:
                state = states_ptr + tl.load(owed_slots_ptr).to(tl.int64) * H
                LINE: tl.constexpr = 1024 // states_ptr.dtype.element_ty.primitive_bitwidth
                LINES: tl.constexpr = (VECTOR_K + LINE - 1) // LINE
                _prefetch(state + tl.minimum(tl.arange(0, LINES) * LINE, H - 1))
        cos, sin, cos_second, sin_second = _angles(cos_ptr, sin_ptr, positions, here & (head < A + KV), pair, HALF)
        wide = x.to(tl.float32)
        scaled = wide * gain.to(tl.float32)
        squares = tl.sum(wide * wide, axis=0)
        total = tl.zeros((2 * VECTOR_PAIRS,), dtype=tl.float32)
        for k in range(VECTOR_K, H, VECTOR_K):
            coming = _weight_part(weights, k, column, H, VECTOR_K)
            total += tl.sum(w.to(tl.float32) * scaled[None, :], axis=1)
            wide = _vector_part(hidden_ptr, k, column, H, VECTOR_K).to(tl.float32)
            scaled = wide * _vector_part(norm_ptr, k, column, H, VECTOR_K).to(tl.float32)
            squares += tl.sum(wide * wide, axis=0)
            w = coming
        total += tl.sum(w.to(tl.float32) * scaled[None, :], axis=1)
        total *= tl.rsqrt(squares / H + eps)
        first, second = tl.split(tl.reshape(total, (VECTOR_PAIRS, 2)))
        _put(
            query_ptr, keys_ptr, values_ptr, first[:, None], second[:, None], cos, sin, cos_second, sin_second, only,
            slots, here, pair, head, A, KV, HALF,
        )  # fmt: skip
        if head >= A:
            # A few owed entries one by one, by the weight that is here already (or in L2, where a row has parts).
            for j in range(0, owed):
                slots = tl.load(owed_slots_ptr + j + only)
                positions = tl.load(owed_positions_ptr + j + only)
                state = states_ptr + tl.load(owed_slots_ptr + j).to(tl.int64) * H
                cos, sin, cos_second, sin_second = _angles(
                    cos_ptr, sin_ptr, positions, here & (head < A + KV), pair, HALF
                )
                squares = tl.sum(tl.zeros((VECTOR_K,), dtype=tl.float32), axis=0)
                total = tl.zeros((2 * VECTOR_PAIRS,), dtype=tl.float32)
                for k in range(0, H, VECTOR_K):
                    if EARLY and H <= VECTOR_K and HELD:
                        # The same numbers, and opaque: else ptxas keeps them as fp32 all along, in twice the registers.
                        part_of_w = _opaque(w)
                        part_of_gain = _opaque(gain)
                    else:
                        part_of_w = _weight_part(weights, k, column, H, VECTOR_K)
                        part_of_gain = _vector_part(norm_ptr, k, column, H, VECTOR_K)
                    wide = _vector_part(state, k, column, H, VECTOR_K).to(tl.float32)
                    squares += tl.sum(wide * wide, axis=0)
                    wide *= part_of_gain.to(tl.float32)
                    total += tl.sum(part_of_w.to(tl.float32) * wide[None, :], axis=1)
                total *= tl.rsqrt(squares / H + eps)
                first, second = tl.split(tl.reshape(total, (VECTOR_PAIRS, 2)))
                _put(
                    query_ptr, keys_ptr, values_ptr, first[:, None], second[:, None], cos, sin, cos_second, sin_second,
                    only, slots, here, pair, head, A, KV, HALF,
                )  # fmt: skip
    else:
        # Keys and values with what is owed, in blocks so wide that most programs have none.
        WIDE: tl.constexpr = (HALF + PAIRS - 1) // PAIRS
        if block < 2 * KV * WIDE:
            _tiles(
                query_ptr, keys_ptr, values_ptr, hidden_ptr, states_ptr, weight_ptr, norm_ptr, cos_ptr, sin_ptr,
                order_ptr, slots_ptr, positions_ptr, owed_slots_ptr, owed_positions_ptr, live, owed, 0, eps,
                A + block // WIDE, block % WIDE, A, KV, HALF, H, ROWS, PAIRS, BLOCK_K,
            )  # fmt: skip


# --- public function -------------------------------------------------------------------------------------------------


def _check_shape(name: str, x: Tensor, like: Tensor, *shape: int | None) -> None:
    """Contiguous, of this shape (None: any size) and of hidden's dtype."""
    if x.dim() != len(shape) or any(a is not None and a != b for a, b in zip(shape, x.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(x.shape)}")
    check_like(name, x, like, "hidden")
    check_contiguous(**{name: x})


def _check_apart(written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """No written tensor shares memory with any other: programs still read and write those. All are contiguous."""
    tensors = {**written, **read}
    spans = [(name, x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for name, x in tensors.items()]
    for i, (name, start, end) in enumerate(spans[: len(written)]):
        for other, from_, to in spans[i + 1 :]:
            if start < to and from_ < end and start < end and from_ < to:
                raise ValueError(f"{name} must not overlap {other} in memory: give another buffer")


def qkv_rows_(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    hidden: Tensor,
    states: Tensor,
    weight: Tensor,
    norm: tuple[Tensor, float],
    cos: Tensor,
    sin: Tensor,
    order: Tensor,
    slots: Tensor,
    positions: Tensor,
    owed_slots: Tensor,
    owed_positions: Tensor,
    counts: Tensor,
    config: QkvConfig | EntriesConfig | None = None,
    entries: Tensor | None = None,
) -> None:
    """Queries, keys and values of the n = counts[0] live rows, and keys and values of the o = counts[1] owed entries:

        for r in order[:n]:  q, k, v = split(W norm(hidden[r]));  query[r] = rope(q, positions[r])
                             keys[slots[r]] = rope(k, positions[r]);  values[slots[r]] = v
        for j < o, s = owed_slots[j]:  k, v likewise from states[s], at owed_positions[j], to keys[s] and values[s]
        norm(x) = gain x rsqrt(mean(x^2) + eps);  rope(x, p) = x cos[p] + concat(-x2, x1) sin[p], x1 and x2 the halves

    query               (R, A, d), written by row id; R is the capacity; fp16, bf16 or fp32
    keys, values        (slots, KV, d) of this layer, written at the slots named and nowhere else
    hidden              (R, H) by row id
    states              (slots, H) as exited tokens left them; read at the owed slots alone
    weight              ((A + 2 KV) d, H): rows of the queries, of the keys, of the values; all these in the dtype of
                        hidden and contiguous
    norm                (gain (H,), eps) of the RMSNorm in front, gain fp32 or in the dtype of hidden
    cos, sin            (positions, d), contiguous, both fp32 or both in the dtype of hidden
    order               (R,) int32: ids of the live rows in its first n entries
    slots, positions    (R,) int32 by row id: cache slot and position of the row's newest token
    owed_slots, owed_positions  (O,) int32: cache slot and position of the owed tokens in their first o entries
    counts              (2,) int32: n, o
    config              a tile of ``qkv_configs``, or with entries of ``entries_configs``; None: the default
    entries             (``qkv_entries`` or any other number, H), dtype of hidden, contiguous, written: room for norms.
                        A launch in front writes them. None: none. Not for a capacity of 1; heads whose size is a
                        power of 2, 16 to 128
    What is written shares no memory with anything else here; what is only read may overlap.
    All int32 arguments and hidden may be the work of the kernel directly in front. Sums are in fp32. Nothing on the
    device checks an id, a slot or a position: no two of the n + o entries may have the same slot, and everything must
    be in range.
    """
    check_float("hidden", hidden)
    if hidden.dim() != 2 or hidden.shape[1] < 1:
        raise ValueError(f"hidden must have shape [rows, H], got {list(hidden.shape)}")
    capacity, width = hidden.shape
    _check_shape("hidden", hidden, hidden, capacity, width)
    if query.dim() != 3 or query.shape[2] < 2 or query.shape[2] % 2:
        raise ValueError(f"query must have shape [{capacity}, heads, an even head_dim], got {list(query.shape)}")
    _, num_heads, head_dim = query.shape
    _check_shape("query", query, hidden, capacity, num_heads, head_dim)
    _check_shape("keys", keys, hidden, None, None, head_dim)
    cache, kv_heads = keys.shape[:2]
    if kv_heads < 1 or num_heads < 1 or num_heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of the key heads, got {num_heads} and {kv_heads}")
    _check_shape("values", values, hidden, cache, kv_heads, head_dim)
    _check_shape("states", states, hidden, cache, width)
    _check_shape("weight", weight, hidden, (num_heads + 2 * kv_heads) * head_dim, width)
    gain, eps = norm
    check_weight("norm", gain, hidden, "hidden", width)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 2 or table.shape[1] != head_dim:
            raise ValueError(f"{name} must have shape [positions, {head_dim}], got {list(table.shape)}")
        check_weight(name, table, hidden, "hidden", *table.shape)
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(f"cos and sin must be alike, got {cos.dtype} {list(cos.shape)}, {sin.dtype} {list(sin.shape)}")
    for name, ids in (("order", order), ("slots", slots), ("positions", positions)):
        check_vector(name, ids, hidden, "hidden", torch.int32, capacity)
    check_vector("owed_slots", owed_slots, hidden, "hidden", torch.int32, 0)
    check_vector("owed_positions", owed_positions, hidden, "hidden", torch.int32, owed_slots.shape[0])
    check_counts("counts", counts, hidden, "hidden")
    written = {"query": query, "keys": keys, "values": values}
    if entries is not None:
        _check_shape("entries", entries, hidden, None, width)
        if capacity == 1:
            raise ValueError("entries are for a capacity of 2 or more, got 1: leave them out")
        if entries.shape[0] < 1:
            raise ValueError("entries must have room for at least 1, got 0: leave them out")
        if head_dim not in (16, 32, 64, 128):
            raise ValueError(f"entries are for a head_dim of 16, 32, 64 or 128, got {head_dim}: leave them out")
        written["entries"] = entries
    wanted = QkvConfig if entries is None else EntriesConfig
    if config is not None and not isinstance(config, wanted):
        place = "without" if entries is None else "with"
        raise ValueError(f"config must be a tile of type {wanted.__name__} {place} entries, got {config!r}")
    _check_apart(
        written,
        {
            "hidden": hidden, "states": states, "weight": weight, "norm": gain, "cos": cos, "sin": sin, "order": order,
            "slots": slots, "positions": positions, "owed_slots": owed_slots, "owed_positions": owed_positions,
            "counts": counts,
        },
    )  # fmt: skip
    tensors = (query, keys, values, hidden, states, weight)
    indices = (order, slots, positions, owed_slots, owed_positions, counts)
    if not runs_kernel(hidden):
        qkv_rows__ref(*tensors, norm, cos, sin, *indices)
        return
    if capacity == 0:
        return
    half, heads = head_dim // 2, num_heads + 2 * kv_heads
    arguments = (*tensors, gain, cos, sin, *indices, eps)
    shape = {"A": num_heads, "KV": kv_heads, "HALF": half, "H": width, **early(hidden)}
    if entries is not None:
        config = entries_configs(capacity, hidden.dtype, tile_limits(hidden))[0] if config is None else config
        tiles = copied_tiles(weight, head_dim, config.block_k)
        with on_device(hidden):
            _norms_kernel[(entries.shape[0],)](
                entries, hidden, states, gain, order, owed_slots, counts, eps, H=width, BLOCK=next_power_of_2(width),
                num_warps=4 if width <= 1024 else 16, **early(hidden),
            )  # fmt: skip
            _entries_kernel[(heads,)](
                *arguments, entries, tiles, ROOM=entries.shape[0], ROWS=config.rows, BLOCK_K=config.block_k,
                TILES=tiles is not None, num_warps=config.num_warps, num_stages=config.num_stages, **shape,
            )  # fmt: skip
        return
    if config is None:
        config = qkv_configs(capacity, num_heads, kv_heads, head_dim, hidden.dtype, tile_limits(hidden))[0]
    pairs = min(config.pairs, max(8, next_power_of_2(half)))
    shape |= {"ROWS": config.rows, "PAIRS": pairs, "BLOCK_K": config.block_k}
    shape |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    with on_device(hidden):
        if capacity == 1:
            vector_pairs = min(config.vector_pairs, next_power_of_2(half), pairs)
            _one_row_kernel[(heads * cdiv(half, vector_pairs),)](
                *arguments,
                **shape,
                VECTOR_PAIRS=vector_pairs,
                VECTOR_K=min(config.vector_k, next_power_of_2(width)),
                FEW=config.few,
                # Four programs of four warps have room on a multiprocessor. Left alone, ptxas takes more for nothing;
                # where the weight is read again for owed entries it needs some more.
                maxnreg=128 if shape["EARLY"] else 168,
            )
        else:
            _rows_kernel[(heads * cdiv(half, pairs),)](*arguments, **shape)
