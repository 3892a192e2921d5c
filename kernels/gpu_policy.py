"""The exit of a decode step: final norm and policy of every live row; and what its head adds to the shared one.

What else stands between two layers costs one more launch: the residual is added where the product in front stores
(``gpu_stream``), the next layer's norm is taken inside its product of queries, keys and values (``gpu_qkv``), and
``step_rows_`` decides, counts who is left and lists what is owed.
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
    check_float,
    check_rows,
    check_vector,
    check_weight,
    early,
    gelu,
    jit,
    loaded_ahead,
    next_power_of_2,
    on_device,
    runs_kernel,
    tl,
)
from engine.kernels.gpu_stream import rms_norm_math

__all__ = ["delta_rows_", "delta_rows__ref", "policy_rows_", "policy_rows__ref", "policy_splits"]

# Neurons of one program: more wait longer for their weights, fewer read the row more often. Several rows a program,
# whose neurons' weights it then reads once, take 22 us for 28 with 128 neurons and 64 rows on an H100, but a step takes
# 2 % more with the 32 neurons that are the default, where they leave too few programs: left out.
_NEURONS = 2


def policy_splits(rows: int, hidden: int, neurons: int) -> int:
    """Programs that share a row's neurons."""
    if min(rows, hidden, neurons) < 1:
        raise ValueError(f"sizes must be at least 1, got {rows}, {hidden}, {neurons}")
    return cdiv(neurons, _NEURONS if rows <= 16 else 4 * _NEURONS)


def policy_rows__ref(
    partial: Tensor,
    normed: Tensor,
    states: Tensor | None,
    hidden: Tensor,
    norm: tuple[Tensor, float],
    policy: tuple[Tensor, Tensor, Tensor] | None,
    order: Tensor,
    slots: Tensor,
    counts: Tensor,
) -> None:
    rows = order[: int(counts[0])].long()
    n = rms_norm_math(hidden[rows], *norm)
    normed[rows] = n
    if states is not None:
        states[slots[rows].long()] = hidden[rows]
    if policy is not None:
        w1, b1, w2 = (p.float() for p in policy)
        share = cdiv(w1.shape[0], partial.shape[1])
        g = F.gelu(F.linear(n.float(), w1, b1)) * w2
        g = F.pad(g, (0, share * partial.shape[1] - g.shape[1]))
        partial[rows] = g.unflatten(1, (-1, share)).sum(2)


@jit(do_not_specialize_on_alignment=UNALIGNED)
def _policy_kernel(
    partial_ptr,
    normed_ptr,
    states_ptr,
    hidden_ptr,
    norm_ptr,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    order_ptr,
    slots_ptr,
    counts_ptr,
    eps,
    H: tl.constexpr,
    P: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARE: tl.constexpr,
    POLICY: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    EARLY: tl.constexpr,
):
    place = tl.program_id(0)
    split = tl.program_id(1)
    column = tl.arange(0, BLOCK_H)
    inside = column < H
    member = tl.arange(0, BLOCK_P)
    neuron = split * SHARE + member
    own = (member < SHARE) & (neuron < P)
    gain = tl.load(norm_ptr + column, mask=inside, other=0.0)
    if POLICY:
        at = neuron.to(tl.int64)[:, None] * H + column[None, :]
        weight = tl.load(w1_ptr + at, mask=own[:, None] & inside[None, :], other=0.0)
        bias = tl.load(b1_ptr + neuron, mask=own, other=0.0).to(tl.float32)
        out_weight = tl.load(w2_ptr + neuron, mask=own, other=0.0).to(tl.float32)
    live = loaded_ahead(counts_ptr)
    row = loaded_ahead(order_ptr + place).to(tl.int64)
    begin(EARLY)
    if place >= live:
        return
    x = tl.load(hidden_ptr + row * H + column, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, 0) / H + eps)
    n = (scaled.to(x.dtype).to(tl.float32) * gain.to(x.dtype).to(tl.float32)).to(x.dtype)
    if split == 0:
        tl.store(normed_ptr + row * H + column, n, mask=inside)
    if STATES:
        if split == SPLITS - 1:
            slot = tl.load(slots_ptr + row).to(tl.int64)
            tl.store(states_ptr + slot * H + column, x, mask=inside)
    if POLICY:
        z = tl.sum(weight.to(tl.float32) * n.to(tl.float32)[None, :], 1) + bias
        tl.store(partial_ptr + row * SPLITS + split, tl.sum(tl.where(own, gelu(z) * out_weight, 0.0), 0))


def policy_rows_(
    partial: Tensor,
    normed: Tensor,
    states: Tensor | None,
    hidden: Tensor,
    norm: tuple[Tensor, float],
    policy: tuple[Tensor, Tensor, Tensor] | None,
    order: Tensor,
    slots: Tensor,
    counts: Tensor,
) -> None:
    """For r = order[i], i < counts[0]: normed[r] = n = RMSNorm(hidden[r]), states[slots[r]] = hidden[r], and partial[r]
    whose sum is w2 gelu(w1 n + b1): the policy's z (ConsistentEE, two-layer MLP on n) but for its last bias.

    All of it is written whether a row leaves or not: what counts is what the exit writes through which it leaves.

    partial  fp32 (R, S), S of ``policy_splits``; normed, hidden (R, H); states (slots, H) or None; fp16, bf16 or fp32
    norm     (weight (H,), eps), the model's final RMSNorm; policy (w1 (P, H), b1 (P,), w2 (1, P)) or None: no z
    order, slots  int32 (R,); counts int32 (2,)
    P H weights and 4 H of a row, in 16 bit; limited by latency.
    """
    check_float("hidden", hidden)
    rows, width = hidden.shape
    check_rows("normed", normed, hidden, "hidden", width, rows)
    if states is not None:
        check_rows("states", states, hidden, "hidden", width)
    check_contiguous(hidden=hidden, normed=normed, states=states)
    check_weight("the norm's weight", norm[0], hidden, "hidden", width)
    neurons, splits = 1, 1
    if policy is not None:
        neurons = policy[0].shape[0]
        for name, tensor, shape in zip(
            ("w1", "b1", "w2"), policy, ((neurons, width), (neurons,), (1, neurons)), strict=True
        ):
            check_weight(name, tensor, hidden, "hidden", *shape)
        splits = partial.shape[1]
        if partial.dtype != torch.float32 or partial.shape[0] < rows or not partial.is_contiguous():
            raise ValueError(f"partial must be fp32 of shape [{rows} or more, splits], contiguous, got {partial.dtype} "
                             f"{list(partial.shape)}")  # fmt: skip
    check_vector("order", order, hidden, "hidden", torch.int32, rows)
    check_vector("slots", slots, hidden, "hidden", torch.int32, rows)
    check_counts("counts", counts, hidden, "hidden")
    if not runs_kernel(hidden):
        policy_rows__ref(partial, normed, states, hidden, norm, policy, order, slots, counts)
        return
    if rows == 0:
        return
    share, block = cdiv(neurons, splits), next_power_of_2(width)
    weights = (None,) * 3 if policy is None else policy
    with on_device(hidden):
        _policy_kernel[(rows, splits)](
            partial, normed, states, hidden, norm[0], *weights, order, slots, counts,
            norm[1], H=width, P=neurons, SPLITS=splits, SHARE=share, POLICY=policy is not None,
            STATES=states is not None, BLOCK_H=block, BLOCK_P=next_power_of_2(share),
            num_warps=4 if block <= 1024 else 8 if block * next_power_of_2(share) <= 16384 else 16, **early(hidden),
        )  # fmt: skip


def delta_rows__ref(
    out: Tensor, normed: Tensor, a: Tensor, b: Tensor, exit_index: Tensor, order: Tensor, counts: Tensor
) -> None:
    rows = order[: int(counts[0])].long()
    index = exit_index[rows].long()
    inner = torch.einsum("nkh,nh->nk", a[index], normed[rows])
    out[rows] = normed[rows] + torch.einsum("nhk,nk->nh", b[index], inner)


@jit(do_not_specialize_on_alignment=UNALIGNED)
def _delta_kernel(
    out_ptr,
    normed_ptr,
    a_ptr,
    b_ptr,
    index_ptr,
    order_ptr,
    counts_ptr,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,
):
    place = tl.program_id(0)
    begin(EARLY)
    if place >= loaded_ahead(counts_ptr):
        return
    row = tl.load(order_ptr + place).to(tl.int64)
    exit = tl.load(index_ptr + row).to(tl.int64)
    rank = tl.arange(0, BLOCK_K)
    inner = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for h in range(0, H, STEP):
        column = h + tl.arange(0, STEP)
        mask = (rank < K)[:, None] & (column < H)[None, :]
        a = tl.load(a_ptr + exit * (K * H) + rank[:, None] * H + column[None, :], mask=mask, other=0.0)
        n = tl.load(normed_ptr + row * H + column, mask=column < H, other=0.0)
        inner += tl.sum(a.to(tl.float32) * n.to(tl.float32)[None, :], 1)
    for h in range(0, H, STEP):
        column = h + tl.arange(0, STEP)
        mask = (column < H)[:, None] & (rank < K)[None, :]
        b = tl.load(b_ptr + exit * (K * H) + column[:, None] * K + rank[None, :], mask=mask, other=0.0)
        n = tl.load(normed_ptr + row * H + column, mask=column < H, other=0.0).to(tl.float32)
        y = n + tl.sum(b.to(tl.float32) * inner[None, :], 1)
        tl.store(out_ptr + row * H + column, y.to(out_ptr.dtype.element_ty), mask=column < H)


def delta_rows_(
    out: Tensor, normed: Tensor, a: Tensor, b: Tensor, exit_index: Tensor, order: Tensor, counts: Tensor
) -> None:
    """out[r] = n + b[e] (a[e] n), n = normed[r], e = exit_index[r], for r = order[i], i < counts[0]: what the shared
    head then reads, so that logits are W (n + B A n) with the factors of the exit that a row left through.

    out, normed  (R, H), fp16, bf16 or fp32; a (E, K, H), b (E, H, K), dtype of normed; exit_index, order int32 (R,)
    One program a row, 2 K H weights each; limited by latency.
    """
    check_float("normed", normed)
    rows, width = normed.shape
    check_rows("out", out, normed, "normed", width, rows)
    if a.dim() != 3 or a.shape[2] != width:
        raise ValueError(f"a must have shape [E, K, {width}], got {list(a.shape)}")
    check_weight("a", a, normed, "normed", *a.shape)
    check_weight("b", b, normed, "normed", a.shape[0], width, a.shape[1])
    check_contiguous(out=out, normed=normed)
    check_vector("exit_index", exit_index, normed, "normed", torch.int32, rows)
    check_vector("order", order, normed, "normed", torch.int32, rows)
    check_counts("counts", counts, normed, "normed")
    if not runs_kernel(normed):
        delta_rows__ref(out, normed, a, b, exit_index, order, counts)
        return
    if rows == 0:
        return
    with on_device(normed):
        _delta_kernel[(rows,)](
            out, normed, a, b, exit_index, order, counts, H=width, K=a.shape[1],
            BLOCK_K=next_power_of_2(a.shape[1]), STEP=64, num_warps=8, **early(normed),
        )  # fmt: skip
