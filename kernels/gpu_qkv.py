"""RMSNorm, the Q, K and V products of a decode step, and RoPE, straight into the queries and the cache.

One call a layer, a launch or two, serves the newest token of every live row and, for keys and values alone, the
positions that this layer still owes: tokens that have left further below, by the hidden state they left with. Bytes at
least: the weight, (A + 2 KV) d H elements, once while n + o is at most one tile; beside it the rows are nothing. So the
product is to stream the weight as fast as memory goes, with one row from before the kernel in front has ended.

A capacity of one row multiplies vectors: a program has all that it needs of the weight on its way at once, in
registers, ahead of ``begin``, and up to 8 owed entries meet it there one by one. More of them, and more rows than one,
go through tl.dot (``gpu_qkv_entries``).
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
)
from engine.kernels.gpu_qkv_entries import (
    EntriesConfig,
    _angles,
    _entries_kernel,
    _norms_kernel,
    _place,
    _put,
    _rows_kernel,
    _tiles,
    _weight_rows,
    entries_configs,
)

__all__ = ["QkvConfig", "qkv_configs", "qkv_rows_", "qkv_rows__ref"]


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
