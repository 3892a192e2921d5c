"""The products of ``gpu_qkv`` for more entries than a few: several live rows, and what is owed to them or to one.

They go through tl.dot: tiles of weight by tiles of rows, the weight on the side with 16 or more rows and the few tokens
on the one that may be narrow.
The norm costs no pass there: its weight is multiplied into the tile of W, its mean square is summed beside the product.

A large weight and more rows than one: what is multiplied with every element of W costs more than a pass. A launch of
its own writes the entries' norms side by side, as many as there is room for in ``entries``; W goes by the copy engine
from memory into the tensor cores. Entries beyond take the way above, in the same launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from engine.kernels.gpu_common import (
    HOPPER,
    UNALIGNED,
    TileLimits,
    begin,
    fitting_tiles,
    jit,
    tl,
    weight_tile,
)

__all__ = ["EntriesConfig", "entries_configs", "qkv_entries"]


# --- tiles -----------------------------------------------------------------------------------------------------------


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
def _turn(
    query_ptr, keys_ptr, values_ptr, cos_ptr, sin_ptr, first, second, positions, rows, slots, here, pair, head,
    A: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """``_put`` with the angles of these positions."""
    cos, sin, cos_second, sin_second = _angles(cos_ptr, sin_ptr, positions, here & (head < A + KV), pair, HALF)
    _put(
        query_ptr, keys_ptr, values_ptr, first, second, cos, sin, cos_second, sin_second, rows, slots, here, pair, head,
        A, KV, HALF,
    )  # fmt: skip


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
        _turn(
            query_ptr, keys_ptr, values_ptr, cos_ptr, sin_ptr, first, second, positions, rows, slots, here, pair, head,
            A, KV, HALF,
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
        _turn(
            query_ptr, keys_ptr, values_ptr, cos_ptr, sin_ptr, first, second, positions, rows, slots, here, pair, head,
            A, KV, HALF,
        )  # fmt: skip
    if entries > ROOM:
        _tiles(
            query_ptr, keys_ptr, values_ptr, hidden_ptr, states_ptr, weight_ptr, norm_ptr, cos_ptr, sin_ptr, order_ptr,
            slots_ptr, positions_ptr, owed_slots_ptr, owed_positions_ptr, live, owed, ROOM, eps, head, part,
            A, KV, HALF, H, 16, HALF, 32,
        )  # fmt: skip
