"""LayerNorm of sums of rows, over the live rows of a buffer: embeddings, residuals, and residuals on the move.

Limited by bytes: two rows in (three for embeddings, from tables that L2 mostly holds), one out, 6 H bytes a row in 16
bit. A program holds one to four whole rows in registers, so mean and variance (two passes over registers) cost no
further reads. H up to 8 192; meant for 384, 768 and 1 024. ``add_layer_norm_compact_`` writes every surviving token
straight to its place after an exit: the compaction costs no pass of its own, and what leaves is not even loaded.
What a product has left as partial sums (``products``) is added up here: up to four fp32 rows in for one of 16 bit.
Where rows are many and in 16 bit, residuals are the compiled kernel's (``norm_rows``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.exits import add_layer_norm_ref, embed_layer_norm_ref
from engine.kernels.gpu_common import (
    ROWS,
    TOKENS,
    UNALIGNED,
    begin,
    cdiv,
    check_apart,
    check_counts,
    check_float,
    check_rows,
    check_vector,
    check_weight,
    check_which,
    early,
    jit,
    loaded_ahead,
    next_power_of_2,
    on_device,
    runs_kernel,
    shares_of,
    tl,
)
from engine.kernels.norm_rows import norm_rows, norm_rows_problem
from engine.kernels.products import Partials, whole_rows

__all__ = [
    "ROWS",
    "TOKENS",
    "add_layer_norm_compact_",
    "add_layer_norm_compact__ref",
    "add_layer_norm_rows_",
    "add_layer_norm_rows__ref",
    "embed_layer_norm_rows_",
    "embed_layer_norm_rows__ref",
]

_WIDEST = 8192
_INDEX = (torch.int32, torch.int64)
_COMPILED_FROM = 1024  # rows of capacity: fewer are faster with several warps to a row (``_block``)


# --- torch twins -----------------------------------------------------------------------------------------------------


def embed_layer_norm_rows__ref(
    out: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    positions: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    counts: Tensor,
) -> None:
    n = int(counts[TOKENS])
    types = None if token_type_ids is None else token_type_ids[:n]
    out[:n] = embed_layer_norm_ref(
        input_ids[:n], types, positions[:n], word, token_type, position, weight, bias, eps
    )


def add_layer_norm_rows__ref(
    out: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    counts: Tensor,
    which: int,
    residual_index: Tensor | None = None,
    x_index: Tensor | None = None,
    partials: Partials | None = None,
) -> None:
    n = int(counts[which])
    source, x_which = (slice(n), which) if x_index is None else (x_index[:n].long(), TOKENS)
    rows = whole_rows(x, partials, int(counts[x_which]), source)
    others = residual[:n] if residual_index is None else residual[residual_index[:n].long()]
    out[:n] = add_layer_norm_ref(rows, others, weight, bias, eps)


def add_layer_norm_compact__ref(
    out: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    counts_before: Tensor,
    token_dest: Tensor,
    partials: Partials | None = None,
    settled: bool = False,
) -> None:
    live = int(counts_before[TOKENS])
    dest = token_dest[:live].long()
    stay = (dest >= 0).nonzero().squeeze(1)
    out[dest[stay]] = add_layer_norm_ref(
        whole_rows(x, partials, live, stay), residual[stay], weight, bias, eps
    ).to(out.dtype)


# --- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _normalised(x, columns, weight, bias, eps, H: tl.constexpr):
    """x [rows, BLOCK_H] fp32, zeros from column H on."""
    in_row = columns < H
    mean = tl.sum(x, axis=1) / H
    centred = tl.where(in_row[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / H
    scale = 1.0 / tl.sqrt(variance + eps)
    return centred * scale[:, None] * weight.to(tl.float32)[None, :] + bias.to(tl.float32)[None, :]


@jit
def _added_up(sums, shares, here, H: tl.constexpr):
    """Two to four partial sums of each row, all on their way before the first is needed (see ``_block``)."""
    x = tl.load(sums, mask=here, other=0.0)
    for share in tl.static_range(1, 4):
        x += tl.load(sums + share * H, mask=here & (share < shares), other=0.0)
    return x


@jit
def residual_norm(
    x_ptr,
    x_rows,
    x_stride,
    sums_ptr,
    shares,
    residual_ptr,
    residual_rows,
    residual_stride,
    present,
    columns,
    weight,
    bias,
    eps,
    H: tl.constexpr,
    SUMS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """LayerNorm(x + residual) [rows, BLOCK_H] in fp32.

    SUMS says whether rows of x stand in ``shares`` partial sums: "never", "always", or "maybe", while shares > 0. They
    are loaded TOGETHER, or one after the other where a thread has no registers for that."""
    here = present[:, None] & (columns < H)[None, :]
    residual_ptrs = residual_ptr + residual_rows.to(tl.int64)[:, None] * residual_stride + columns[None, :]
    residual = tl.load(residual_ptrs, mask=here, other=0.0)  # widened below: nobody is to wait for it here
    x_ptrs = x_ptr + x_rows.to(tl.int64)[:, None] * x_stride + columns[None, :]
    if SUMS == "never":
        x = tl.load(x_ptrs, mask=here, other=0.0).to(tl.float32)
    else:
        sums = sums_ptr + (x_rows * shares * H)[:, None] + columns[None, :]
        if not TOGETHER:
            x = tl.load(x_ptrs, mask=here & (shares == 0), other=0.0).to(tl.float32)
            for share in range(0, shares):
                x += tl.load(sums + share * H, mask=here, other=0.0)
        elif SUMS == "always":
            x = _added_up(sums, shares, here, H)
        elif shares > 0:  # a branch, since loads of nothing take their time, too
            x = _added_up(sums, shares, here, H)
        else:
            x = tl.load(x_ptrs, mask=here, other=0.0).to(tl.float32)
    return _normalised(x + residual.to(tl.float32), columns, weight, bias, eps, H)


@jit(do_not_specialize=["four", "two"], do_not_specialize_on_alignment=UNALIGNED)
def _add_norm_kernel(
    out_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    counts_ptr,
    x_index_ptr,
    residual_index_ptr,
    dest_ptr,
    sums_ptr,
    four,
    two,
    eps,
    out_stride,
    x_stride,
    residual_stride,
    H: tl.constexpr,
    WHICH: tl.constexpr,
    HAS_X_INDEX: tl.constexpr,
    HAS_RESIDUAL_INDEX: tl.constexpr,
    HAS_DEST: tl.constexpr,
    SETTLED: tl.constexpr,
    SUMS: tl.constexpr,
    X_WHICH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EARLY: tl.constexpr,
):
    live = loaded_ahead(counts_ptr + WHICH)
    shares = 0  # of a row of x
    if SUMS != "never":
        shares = shares_of(loaded_ahead(counts_ptr + X_WHICH), four, two)
    columns = tl.arange(0, BLOCK_H)
    weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0)
    bias = tl.load(bias_ptr + columns, mask=columns < H, other=0.0)
    first = tl.program_id(0) * BLOCK_ROWS
    rows = first + tl.arange(0, BLOCK_ROWS)
    present = rows < live
    dest = rows
    if SETTLED:
        dest = loaded_ahead(dest_ptr + rows, present, -1)
    begin(EARLY)
    if first >= live:
        return
    if HAS_DEST:
        if not SETTLED:
            dest = tl.load(dest_ptr + rows, mask=present, other=-1)
        present = dest >= 0
    x_rows = rows
    if HAS_X_INDEX:
        x_rows = tl.load(x_index_ptr + rows, mask=present, other=0)
    residual_rows = rows
    if HAS_RESIDUAL_INDEX:
        residual_rows = tl.load(residual_index_ptr + rows, mask=present, other=0)
    y = residual_norm(
        x_ptr, x_rows, x_stride, sums_ptr, shares, residual_ptr, residual_rows, residual_stride, present, columns,
        weight, bias, eps, H, SUMS, BLOCK_ROWS == 1,
    )  # fmt: skip
    here = present[:, None] & (columns < H)[None, :]
    out_ptrs = out_ptr + dest.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=here)


@jit
def _embedding(table_ptr, ids, size, columns, here, H: tl.constexpr):
    # An id out of range reads row 0 rather than foreign memory; the host has checked what it could.
    rows = tl.where((ids >= 0) & (ids < size), ids, 0).to(tl.int64)
    return tl.load(table_ptr + rows[:, None] * H + columns[None, :], mask=here, other=0.0).to(tl.float32)


@jit(do_not_specialize=["n_word", "n_type", "n_position"], do_not_specialize_on_alignment=UNALIGNED)
def _embed_norm_kernel(
    out_ptr,
    ids_ptr,
    types_ptr,
    positions_ptr,
    word_ptr,
    token_type_ptr,
    position_ptr,
    weight_ptr,
    bias_ptr,
    counts_ptr,
    eps,
    out_stride,
    n_word,
    n_type,
    n_position,
    H: tl.constexpr,
    HAS_TYPES: tl.constexpr,
    HAS_TYPE_TABLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EARLY: tl.constexpr,
):
    live = loaded_ahead(counts_ptr + 1)
    columns = tl.arange(0, BLOCK_H)
    weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0)
    bias = tl.load(bias_ptr + columns, mask=columns < H, other=0.0)
    begin(EARLY)
    first = tl.program_id(0) * BLOCK_ROWS
    if first >= live:
        return
    rows = first + tl.arange(0, BLOCK_ROWS)
    present = rows < live
    here = present[:, None] & (columns < H)[None, :]
    ids = tl.load(ids_ptr + rows, mask=present, other=0)
    total = _embedding(word_ptr, ids, n_word, columns, here, H)
    places = tl.load(positions_ptr + rows, mask=present, other=0)
    total += _embedding(position_ptr, places, n_position, columns, here, H)
    if HAS_TYPE_TABLE:
        if HAS_TYPES:
            types = tl.load(types_ptr + rows, mask=present, other=0)
            total += _embedding(token_type_ptr, types, n_type, columns, here, H)
        else:
            one = tl.load(token_type_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)
            total += tl.where(here, one[None, :], 0.0)
    y = _normalised(total, columns, weight, bias, eps, H)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=here)


# --- public functions ------------------------------------------------------------------------------------------------


def _block(capacity: int, hidden: int, partials: bool = False) -> dict[str, int]:
    """Eight warps to a row while all programs run at once (a tenth of a norm's time at 128 tokens, from 1 024 on that
    much slower), four rows to four warps once that leaves several programs a multiprocessor: a warp then has a row to
    itself. More variants are up to a tenth faster alone, add nothing to a pass, and each is compiled at the first load.

    partials: told of a limit, ptxas uses it to have all of one row's sums on their way at once. Left alone, it takes 32
    registers and makes three trips to L2."""
    rows = 4 if capacity >= 4096 and hidden <= 1024 else 1
    return {
        "BLOCK_ROWS": rows,
        "BLOCK_H": next_power_of_2(hidden),
        "num_warps": 8 if capacity <= 512 or rows * hidden > 4096 else 4,
        "num_stages": 1,
        **({"maxnreg": 64 if rows == 1 else 80} if partials else {}),
    }


def sums_of(partials: Partials | None, capacity: int) -> str:
    """The kernels' SUMS, for a product with that capacity."""
    if partials is None or partials.two == 0:
        return "never"
    return "always" if capacity <= partials.two else "maybe"


def _check_norm(out: Tensor, weight: Tensor, bias: Tensor) -> int:
    check_float("out", out)
    if out.dim() != 2 or not 1 <= out.shape[1] <= _WIDEST:
        raise ValueError(f"out must have shape [capacity, H] with H from 1 to {_WIDEST}, got {list(out.shape)}")
    check_rows("out", out, out, "out", out.shape[1])
    check_weight("weight", weight, out, "out", out.shape[1])
    check_weight("bias", bias, out, "out", out.shape[1])
    return out.shape[1]


def embed_layer_norm_rows_(
    out: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    positions: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    counts: Tensor,
) -> None:
    """``out[:n] = LayerNorm(word[input_ids] + token_type[token_type_ids] + position[positions])``, n = counts[1].

    out                                   (cap_tokens, H), written; fp16, bf16 or fp32, last dimension contiguous
    input_ids, token_type_ids, positions  (cap_tokens or more,) int32 or int64; token_type_ids None: type 0 throughout
    word, token_type, position            (vocabulary, H), (types, H) or None, (positions, H), dtype of out, contiguous
    weight, bias                          (H,), fp32 or the dtype of out
    counts                                (2,) int32: live rows, live tokens
    Sum and norm are in fp32. Ids out of range read row 0 on the device, and are an IndexError in the twin.
    Bytes, of T live tokens and b a number: 4 T H b, three rows of tables in (L2 holds most) and one out, and the ids.
    """
    hidden = _check_norm(out, weight, bias)
    capacity = out.shape[0]
    check_vector("input_ids", input_ids, out, "out", _INDEX, capacity)
    check_vector("positions", positions, out, "out", _INDEX, capacity)
    if token_type_ids is not None:
        check_vector("token_type_ids", token_type_ids, out, "out", _INDEX, capacity)
        if token_type is None:
            raise ValueError("token_type must be given where token_type_ids is, got None")
    for name, table in (("word", word), ("token_type", token_type), ("position", position)):
        if table is not None:
            check_rows(name, table, out, "out", hidden, 1)
            if not table.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {table.stride()}: call contiguous()")
    check_counts("counts", counts, out, "out")
    if not runs_kernel(out):
        embed_layer_norm_rows__ref(
            out, input_ids, token_type_ids, positions, word, token_type, position, weight, bias, eps, counts
        )
        return
    if capacity == 0:
        return
    block = _block(capacity, hidden)
    with on_device(out):
        _embed_norm_kernel[(cdiv(capacity, block["BLOCK_ROWS"]),)](
            out,
            input_ids,
            token_type_ids,
            positions,
            word,
            token_type,
            position,
            weight,
            bias,
            counts,
            eps,
            out.stride(0),
            word.shape[0],
            0 if token_type is None else token_type.shape[0],
            position.shape[0],
            H=hidden,
            HAS_TYPES=token_type_ids is not None,
            HAS_TYPE_TABLE=token_type is not None,
            **block,
            **early(out),
        )


def _launch_add_norm(
    out, x, residual, weight, bias, eps, counts, which, capacity, x_index, residual_index, dest, settled, partials
):
    operands = out, x, residual, weight, bias
    if capacity >= _COMPILED_FROM and x_index is None and residual_index is None:
        if norm_rows_problem(*operands, partials) is None:
            norm_rows(*operands, eps, counts[which:], capacity, dest, settled, partials)
            return
    block = _block(capacity, out.shape[1], partials is not None)
    with on_device(out):
        _add_norm_kernel[(cdiv(capacity, block["BLOCK_ROWS"]),)](
            out,
            x,
            residual,
            weight,
            bias,
            counts,
            x_index,
            residual_index,
            dest,
            *((None, 0, 0) if partials is None else partials),
            eps,
            out.stride(0),
            x.stride(0),
            residual.stride(0),
            H=out.shape[1],
            WHICH=which,
            HAS_X_INDEX=x_index is not None,
            HAS_RESIDUAL_INDEX=residual_index is not None,
            HAS_DEST=dest is not None,
            SETTLED=settled,
            SUMS=sums_of(partials, x.shape[0]),
            X_WHICH=which if x_index is None else TOKENS,
            **block,
            **early(out),
        )


def add_layer_norm_rows_(
    out: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    counts: Tensor,
    which: int,
    residual_index: Tensor | None = None,
    x_index: Tensor | None = None,
    partials: Partials | None = None,
) -> None:
    """``out[:n] = LayerNorm(x[:n] + residual[:n])`` with n = counts[which]; rows of out from n on are left alone.

    out             (capacity, H), written; fp16, bf16 or fp32, last dimension contiguous. May be x or residual itself
                    where that one is read without an index
    x, residual     (capacity or more, H), dtype of out, last dimension contiguous
    weight, bias    (H,), fp32 or the dtype of out
    counts          (2,) int32: live rows, live tokens; which: ROWS (0) or TOKENS (1)
    residual_index  (capacity or more,) int32 or None: row i takes residual[residual_index[i]] (cu_seqlens: first
                    tokens)
    x_index         the same for x
    partials        what the product that made x was given, or None: rows of x are taken from there where they are left
                    as sums. That product's live count is counts[which], and counts[1] with x_index
    Sum and norm are in fp32. Bytes, of n rows and b a number: 3 n H b, two rows in and one out, and 4 n of each index;
    a row of x in S partial sums is 4 S H instead of H b.
    """
    hidden = _check_norm(out, weight, bias)
    capacity = out.shape[0]
    for name, rows, index in (("x", x, x_index), ("residual", residual, residual_index)):
        check_rows(name, rows, out, "out", hidden, capacity if index is None else 0)
        if index is not None:
            check_vector(f"{name}_index", index, out, "out", torch.int32, capacity)
            check_apart(out, name, rows)
    check_counts("counts", counts, out, "out")
    check_which(which)
    if partials is not None:
        partials.check(out, "out")
    if not runs_kernel(out):
        add_layer_norm_rows__ref(
            out, x, residual, weight, bias, eps, counts, which, residual_index, x_index, partials
        )
    elif capacity:
        _launch_add_norm(
            out, x, residual, weight, bias, eps, counts, which, capacity, x_index, residual_index, None, False, partials
        )


def add_layer_norm_compact_(
    out: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    counts_before: Tensor,
    token_dest: Tensor,
    partials: Partials | None = None,
    settled: bool = False,
) -> None:
    """``out[token_dest[t]] = LayerNorm(x[t] + residual[t])`` for the tokens t < counts_before[1] that stay.

    out            (cap_tokens, H), written at the destinations alone; fp16, bf16 or fp32; overlaps neither x nor
                   residual
    x, residual    (cap_tokens, H), dtype of out, last dimension contiguous: one size, which is also the grid's
    weight, bias   (H,), fp32 or the dtype of out
    counts_before  (2,) int32: live rows and tokens *before* the exit
    token_dest     (cap_tokens or more,) int32: a row of out, each at most once, or -1 for a token that leaves: it is
                   not loaded
    partials       as in ``add_layer_norm_rows_``
    settled        token_dest was written further in front than by the kernel in front: it is loaded before that ends
    Sum and norm are in fp32. Bytes, of T live tokens, K that stay and b a number: 4 T of token_dest and 3 K H b, two
    rows in and one out; a row of x in S partial sums is 4 S H instead of H b.
    """
    hidden = _check_norm(out, weight, bias)
    capacity = x.shape[0]
    check_rows("x", x, out, "out", hidden)
    check_rows("residual", residual, out, "out", hidden, capacity)
    check_vector("token_dest", token_dest, out, "out", torch.int32, capacity)
    check_counts("counts_before", counts_before, out, "out")
    check_apart(out, "x", x)
    check_apart(out, "residual", residual)
    if partials is not None:
        partials.check(out, "out")
    if not runs_kernel(out):
        add_layer_norm_compact__ref(out, x, residual, weight, bias, eps, counts_before, token_dest, partials)
    elif capacity:
        where = None, None, token_dest, settled
        _launch_add_norm(out, x, residual, weight, bias, eps, counts_before, TOKENS, capacity, *where, partials)
