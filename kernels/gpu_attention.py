"""Attention within packed sequences in the rows layout, the number of sequences read on the device.

All queries: FLOPs 4 T S H for T tokens in sequences of S, on tensor cores in 16 bit; up to some hundreds of tokens a
sequence the bytes of qkv and out (4 T H elements) and the latency of a short loop over the keys limit it instead. One
program serves BLOCK_M queries of one head, scores never leave the chip (online softmax, Milakov and Gimelshein 2018;
tiling of FlashAttention, Dao et al. 2022). First tokens alone: one program a (row, head), no matrix product, limited by
the bytes of K and V (2 T H elements). Meant for head_dim 32 and 64, other sizes are padded to a power of two; 1 to 512
tokens a sequence. Tiles come from ``attention_configs_for``, which ``bench/kernels_h100.py`` sweeps. On Hopper short
sequences have a kernel of their own, ``hopper_attention``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels.gpu_common import (
    UNALIGNED,
    begin,
    cdiv,
    check_apart,
    check_counts,
    check_float,
    check_rows,
    check_vector,
    check_weight,
    early,
    jit,
    loaded_ahead,
    next_power_of_2,
    on_device,
    runs_kernel,
    tl,
)
from engine.kernels.hopper_attention import attention_problem, hopper_attention
from engine.kernels.survivors import Removal, _refuse_overlap

__all__ = [
    "REMOVAL_ROWS",
    "AttentionConfig",
    "attention_configs_for",
    "position_matrix",
    "varlen_attention_",
    "varlen_attention__ref",
]


class AttentionConfig(NamedTuple):
    """block_m: queries of one program (first_only has one); block_n: keys of one step; tail: of a sequence's last step,
    where no more are left (0: there is one kind of step)."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tail: int = 0


REMOVAL_ROWS = 256  # each of which looks at all others
# Of a matrix of position bias: multiples of it. Tiles divide it; the first token's steps may run on into the next rows
# of the same head, whose numbers nobody takes.
_BIAS_SIDE = 128
# Programs of 64 queries up to which steps of 64 keys pay.
_FEW_PROGRAMS = 1024


def attention_configs_for(
    max_seqlen: int,
    head_dim: int,
    dtype: torch.dtype,
    first_only: bool = False,
    sequences: int = 1,
) -> tuple[AttentionConfig, ...]:
    """Candidates for so many sequences (rows times heads) of up to ``max_seqlen`` tokens, the default first.

    Steps of 64 keys take 2 us of 7 off a launch of 8 x 128 tokens on an H100, but sequences of 70 tokens pay for keys
    that they do not have: hence the tail. Up to 64 tokens the loop is short enough (1 to 2 % of a pass). Of many
    programs a multiprocessor has room for more where they have fewer registers (a fifth of a launch of 128 x 128 tokens
    at 95 and 139 a thread): steps of 32.
    """
    longest = max(16, next_power_of_2(max_seqlen))
    if first_only:
        tall = min(longest, max(16, 4096 // next_power_of_2(head_dim)))  # 4 096 elements of K and of V a step
        return tuple(AttentionConfig(1, n, 4 if n >= 32 else 2, 2) for n in (tall, tall // 2) if n >= 16)
    if dtype == torch.float32 or head_dim > 128:
        return (AttentionConfig(min(longest, 32), min(longest, 32), 4, 2), AttentionConfig(16, 16, 4, 2))
    wide = [AttentionConfig(128, 64, 8, 3), AttentionConfig(128, 64, 4, 3), AttentionConfig(128, 128, 8, 2)]
    narrow = [AttentionConfig(64, 64, 4, 2, 32), AttentionConfig(64, 64, 4, 3), AttentionConfig(32, 32, 2, 3)]
    if longest <= 64 or sequences * cdiv(max_seqlen, 64) > _FEW_PROGRAMS:
        narrow = [AttentionConfig(64, 32, 4, 3), *narrow[1:]]
    if longest < 64:
        narrow = [AttentionConfig(longest, longest, 4 if longest == 32 else 2, 2)]
    return *narrow, *(wide if longest >= 128 else ())


# --- torch twin ------------------------------------------------------------------------------------------------------


def varlen_attention__ref(
    out: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    counts: Tensor,
    num_heads: int,
    scale: float,
    max_seqlen: int,
    position_bias: Tensor | None = None,
    first_only: bool = False,
    config: AttentionConfig | None = None,
    removal: Removal | None = None,
) -> None:
    wide = torch.promote_types(qkv.dtype, torch.float32)
    n = int(counts[0])
    places = cu_seqlens[: n + 1].tolist()
    for row, (start, end) in enumerate(zip(places, places[1:], strict=False)):
        length = end - start
        if length > max_seqlen:
            raise ValueError(f"max_seqlen must be at least the longest length, got {max_seqlen} for {length} tokens")
        if length <= 0:
            continue
        heads = qkv[start:end].to(wide).unflatten(1, (3, num_heads, -1)).permute(1, 2, 0, 3)
        query, key, value = heads[0][:, :1] if first_only else heads[0], heads[1], heads[2]
        scores = query @ key.transpose(1, 2) * scale
        if position_bias is not None:
            scores = scores + position_bias[:, : query.shape[1], :length].to(wide)
        attended = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1).to(out.dtype)
        if first_only:
            out[row] = attended[0]
        else:
            out[start:end] = attended
    if removal is not None:
        removal.run(cu_seqlens, counts)


# --- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _step(state, query, key_ptrs, value_ptrs, bias_ptrs, at, length, in_head, scale_log2, HAS_BIAS: tl.constexpr):
    """(top, weight_sum, total) of the queries, with the keys at some places more. bias_ptrs: of each query's row."""
    top, weight_sum, total = state
    present = at < length
    key = tl.load(key_ptrs, mask=present[None, :] & in_head[:, None], other=0.0)
    # In units of log 2, where the hardware's exponential is.
    scores = tl.dot(query, key, input_precision="ieee") * scale_log2
    if HAS_BIAS:
        # No mask, which would split the loads: there is an entry wherever a tile reaches, whoever needs it.
        scores += tl.load(bias_ptrs + at[None, :]).to(tl.float32) * 1.4426950408889634
    scores = tl.where(present[None, :], scores, -float("inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    shrink = tl.exp2(top - higher)
    weights = tl.exp2(scores - higher[:, None])
    weight_sum = weight_sum * shrink + tl.sum(weights, axis=1)
    value = tl.load(value_ptrs, mask=present[:, None] & in_head[None, :], other=0.0)
    total = total * shrink[:, None]
    return higher, weight_sum, tl.dot(weights.to(value.dtype), value, total, input_precision="ieee")


@jit
def _find_places(
    removal, cu_seqlens_ptr, row, first, live, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, EARLY: tl.constexpr
):
    """One row's part of a removal, for its tokens from ``first`` on. Everything that is read is loaded ahead."""
    keep_ptr, row_ids_ptr, out_cu_seqlens_ptr, token_dest_ptr, out_counts_ptr, out_row_ids_ptr = removal
    others = tl.arange(0, ROWS)
    keep = loaded_ahead(keep_ptr + others, mask=others < live, other=0).to(tl.int32) != 0
    start = loaded_ahead(cu_seqlens_ptr + others, mask=others < live, other=0)
    length = tl.where(keep, loaded_ahead(cu_seqlens_ptr + others + 1, mask=others < live, other=0) - start, 0)
    in_front = others < row
    place, place_start = tl.sum(tl.where(in_front & keep, 1, 0), 0), tl.sum(tl.where(in_front, length, 0), 0)
    rows, tokens = tl.sum(tl.where(keep, 1, 0), 0), tl.sum(length, 0)
    lives = row < live
    stays = loaded_ahead(keep_ptr + row, mask=lives, other=0).to(tl.int32) != 0
    own_start = loaded_ahead(cu_seqlens_ptr + row, mask=lives, other=0)
    own_length = loaded_ahead(cu_seqlens_ptr + row + 1, mask=lives, other=0) - own_start
    row_id = loaded_ahead(row_ids_ptr + row, mask=lives, other=0)
    begin(EARLY)
    token = first + tl.arange(0, BLOCK_M)
    tl.store(
        token_dest_ptr + own_start + token, tl.where(stays, place_start + token, -1), mask=lives & (token < own_length)
    )
    if first == 0:
        tl.store(out_cu_seqlens_ptr + place + 1, place_start + own_length, mask=stays)
        tl.store(out_row_ids_ptr + place, row_id, mask=stays)
        if row == 0:
            tl.store(out_cu_seqlens_ptr, 0)
            tl.store(out_counts_ptr, rows)
            tl.store(out_counts_ptr + 1, tokens)


@jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=UNALIGNED)
def _attention_kernel(
    out_ptr,
    qkv_ptr,
    cu_seqlens_ptr,
    counts_ptr,
    bias_ptr,
    scale_log2,
    out_stride,
    qkv_stride,
    blocks,
    bias_stride,
    removal,
    HIDDEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    REMOVAL_ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    pid = tl.program_id(0)
    head = tl.program_id(1)
    row = pid // blocks
    live = loaded_ahead(counts_ptr)
    if REMOVAL_ROWS:
        if head * HEAD_DIM == HIDDEN:  # behind the last head
            _find_places(removal, cu_seqlens_ptr, row, (pid % blocks) * BLOCK_M, live, REMOVAL_ROWS, BLOCK_M, EARLY)
            return
    start = loaded_ahead(cu_seqlens_ptr + row)
    length = loaded_ahead(cu_seqlens_ptr + row + 1) - start
    begin(EARLY)
    first = (pid % blocks) * BLOCK_M
    if (row >= live) | (first >= length):
        return

    queries = first + tl.arange(0, BLOCK_M)
    asked = queries < length
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    sequence_ptr = qkv_ptr + start.to(tl.int64) * qkv_stride + head * HEAD_DIM
    query = tl.load(
        sequence_ptr + queries[:, None] * qkv_stride + d[None, :], mask=asked[:, None] & in_head[None, :], other=0.0
    )
    bias_ptrs = bias_ptr
    if HAS_BIAS:
        bias_ptrs = bias_ptr + (head * bias_stride + queries[:, None]) * bias_stride
    top = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    weight_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    whole = length
    if TAIL:
        whole = tl.cdiv(tl.maximum(length - TAIL, 0), BLOCK_N) * BLOCK_N
    keys = tl.arange(0, BLOCK_N)
    key_ptrs = sequence_ptr + HIDDEN + keys[None, :] * qkv_stride + d[:, None]
    value_ptrs = sequence_ptr + 2 * HIDDEN + keys[:, None] * qkv_stride + d[None, :]
    for done in range(0, whole, BLOCK_N):
        top, weight_sum, total = _step(
            (top, weight_sum, total), query, key_ptrs, value_ptrs, bias_ptrs, done + keys, length, in_head, scale_log2,
            HAS_BIAS,
        )  # fmt: skip
        key_ptrs += BLOCK_N * qkv_stride
        value_ptrs += BLOCK_N * qkv_stride
    if TAIL:
        if whole < length:
            last = whole + tl.arange(0, TAIL)
            top, weight_sum, total = _step(
                (top, weight_sum, total), query, sequence_ptr + HIDDEN + last[None, :] * qkv_stride + d[:, None],
                sequence_ptr + 2 * HIDDEN + last[:, None] * qkv_stride + d[None, :], bias_ptrs, last, length, in_head,
                scale_log2, HAS_BIAS,
            )  # fmt: skip
    total = total / weight_sum[:, None]
    out_ptrs = out_ptr + (start + queries).to(tl.int64)[:, None] * out_stride + head * HEAD_DIM + d[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=asked[:, None] & in_head[None, :])


@jit(do_not_specialize_on_alignment=UNALIGNED)
def _first_token_kernel(
    out_ptr,
    qkv_ptr,
    cu_seqlens_ptr,
    counts_ptr,
    bias_ptr,
    scale_log2,
    out_stride,
    qkv_stride,
    bias_stride,
    HIDDEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    live = loaded_ahead(counts_ptr)
    start = loaded_ahead(cu_seqlens_ptr + row)
    length = loaded_ahead(cu_seqlens_ptr + row + 1) - start
    begin(EARLY)
    if (row >= live) | (length <= 0):
        return

    keys = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    sequence_ptr = qkv_ptr + start.to(tl.int64) * qkv_stride + head * HEAD_DIM
    query = tl.load(sequence_ptr + d, mask=in_head, other=0.0).to(tl.float32) * scale_log2
    key_ptrs = sequence_ptr + HIDDEN + keys[:, None] * qkv_stride + d[None, :]
    # One running maximum for all keys; sums are kept for each key of the block and added up once, behind the loop.
    top = -float("inf")
    weight_sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
    totals = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for done in range(0, length, BLOCK_N):
        present = keys < length - done
        here = present[:, None] & in_head[None, :]
        key = tl.load(key_ptrs, mask=here, other=0.0).to(tl.float32)
        value = tl.load(key_ptrs + HIDDEN, mask=here, other=0.0).to(tl.float32)
        scores = tl.sum(key * query[None, :], axis=1)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + head * bias_stride * bias_stride + done + keys)
            scores += bias.to(tl.float32) * 1.4426950408889634
        scores = tl.where(present, scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, axis=0))
        shrink = tl.exp2(top - higher)
        weights = tl.exp2(scores - higher)
        weight_sums = weight_sums * shrink + weights
        totals = totals * shrink + weights[:, None] * value
        top = higher
        key_ptrs += BLOCK_N * qkv_stride
    total = tl.sum(totals, axis=0) / tl.sum(weight_sums, axis=0)
    out_ptrs = out_ptr + row.to(tl.int64) * out_stride + head * HEAD_DIM + d
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=in_head)


# --- public functions -------------------------------------------------------------------------------------------------


def position_matrix(table: Tensor) -> Tensor:
    """(num_heads, P, P) as ``varlen_attention_`` takes it from (num_heads, 2 * M - 1), whose entry (j - i) + M - 1 is
    that of query position i and key position j; P is M rounded up. Beyond M there are zeros, which nobody needs.

    A matrix is read 16 bytes at a time, where every number of the table is a load of its own.
    """
    reach = (table.shape[1] + 1) // 2
    place = torch.arange(reach, device=table.device)
    side = cdiv(reach, _BIAS_SIDE) * _BIAS_SIDE
    matrix = table.new_zeros(table.shape[0], side, side)
    matrix[:, :reach, :reach] = table[:, place - place[:, None] + reach - 1]
    return matrix


def _check_removal(removal: Removal, out: Tensor, qkv: Tensor, cu_seqlens: Tensor, counts: Tensor) -> None:
    """token_dest has a place for every token of qkv, the others are of their own size; none is written into another."""
    rows = cu_seqlens.shape[0] - 1
    sizes = Removal(rows, rows, rows + 1, qkv.shape[0], 2, rows)
    for name, size in sizes._asdict().items():
        dtypes = (torch.bool, torch.int8, torch.uint8) if name == "keep" else torch.int32
        vector = getattr(removal, name)
        check_vector(f"{name} of a removal", vector, counts, "counts", dtypes, size)
        if name != "token_dest" and len(vector) != size:
            raise ValueError(f"{name} of a removal must have shape [{size}], got {list(vector.shape)}")
    _refuse_overlap([*removal[:2], cu_seqlens, counts, out, qkv], list(removal[2:]))


def varlen_attention_(
    out: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    counts: Tensor,
    num_heads: int,
    scale: float,
    max_seqlen: int,
    position_bias: Tensor | None = None,
    first_only: bool = False,
    config: AttentionConfig | None = None,
    removal: Removal | None = None,
) -> None:
    """softmax(scale * Q K^T + bias) V within each of the counts[0] live sequences, every token seeing all of its own.

    out            (cap_tokens, H), written at the live tokens; with first_only (cap_rows, H), row i for the first token
                   of sequence i. fp16, bf16 or fp32, last dimension contiguous; shares no storage with qkv
    qkv            (cap_tokens, 3 H) in the rows layout: queries, keys, values side by side; dtype of out
    cu_seqlens     (cap_rows + 1,) int32; past counts[0] anything may stand
    counts         (2,) int32: live rows, live tokens
    num_heads      divides H; scale: of the scores
    max_seqlen     host integer that no length exceeds (queries from there on would not be served, keys
                   perhaps not seen)
    position_bias  (num_heads, P, P), contiguous, fp32 or the dtype of out, or None; P a multiple of 128, at least
                   max_seqlen. Entry (h, i, j) is added to the scaled score of query position i and key position j
                   (MPNet: ``position_matrix``)
    first_only     only each sequence's first token asks: with all or one, one cu_seqlens tells queries and keys
    config         of ``attention_configs_for``, for Triton's kernel; None: Hopper's own where it serves
                   (``hopper_attention``), else Triton's with its default
    removal        ``survivors_`` on these counts and cu_seqlens beside it, in programs of their own, which hides that
                   one's launch: of at most REMOVAL_ROWS rows, not with first_only
    Scores and sums are in fp32; in 16 bit the weights are rounded to the dtype of out before they meet V (not with
    first_only). A row's result does not depend on the other rows.
    """
    check_float("out", out)
    if out.dim() != 2:
        raise ValueError(f"out must have shape [tokens or rows, H], got {list(out.shape)}")
    hidden = out.shape[1]
    if num_heads < 1 or hidden % num_heads:
        raise ValueError(f"num_heads must divide the width of out, got {num_heads} for a width of {hidden}")
    if max_seqlen < 1:
        raise ValueError(f"max_seqlen must be at least 1, got {max_seqlen}")
    check_vector("cu_seqlens", cu_seqlens, out, "out", torch.int32, 1)
    cap_rows, head_dim = cu_seqlens.shape[0] - 1, hidden // num_heads
    check_rows("qkv", qkv, out, "out", 3 * hidden)
    check_rows("out", out, out, "out", hidden, cap_rows if first_only else qkv.shape[0])
    check_apart(out, "qkv", qkv)
    check_counts("counts", counts, out, "out")
    side = 0
    if position_bias is not None:
        side = position_bias.shape[-1]
        if side < max_seqlen or side % _BIAS_SIDE:
            raise ValueError(
                f"position_bias must be [{num_heads}, P, P], P a multiple of {_BIAS_SIDE} and at least max_seqlen "
                f"({max_seqlen}), got {list(position_bias.shape)}"
            )
        check_weight("position_bias", position_bias, out, "out", num_heads, side, side)
    if removal is not None:
        if first_only or cap_rows > REMOVAL_ROWS:
            raise ValueError(
                f"a removal takes all tokens' attention and at most {REMOVAL_ROWS} rows, got first_only={first_only} "
                f"and {cap_rows} rows"
            )
        _check_removal(removal, out, qkv, cu_seqlens, counts)
    if not runs_kernel(out):
        varlen_attention__ref(
            out, qkv, cu_seqlens, counts, num_heads, scale, max_seqlen, position_bias, first_only, None, removal
        )
        return
    if cap_rows == 0 or hidden == 0:
        return
    if config is None and not first_only:
        if attention_problem(out, qkv, num_heads, scale, max_seqlen, position_bias) is None:
            hopper_attention(out, qkv, cu_seqlens, counts, num_heads, scale, max_seqlen, position_bias, removal)
            return
    if config is None:
        config = attention_configs_for(max_seqlen, head_dim, out.dtype, first_only, cap_rows * num_heads)[0]
    pointers = (out, qkv, cu_seqlens, counts, position_bias, scale * math.log2(math.e), out.stride(0), qkv.stride(0))
    sizes = dict(
        HIDDEN=hidden,
        HEAD_DIM=head_dim,
        HAS_BIAS=position_bias is not None,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **early(out),
    )
    with on_device(out):
        if first_only:
            _first_token_kernel[(cap_rows, num_heads)](*pointers, side, **sizes)
        else:
            blocks = cdiv(max_seqlen, config.block_m)
            own, among = num_heads, 0
            if removal is not None:  # two forms, each of which has to be compiled
                own, among = num_heads + 1, 32 if cap_rows <= 32 else REMOVAL_ROWS
            _attention_kernel[(cap_rows * blocks, own)](
                *pointers, blocks, side, removal, BLOCK_M=config.block_m, TAIL=config.tail, REMOVAL_ROWS=among, **sizes
            )
