"""CALM's measures of a decode step's rows (Schuster et al. 2022, 3.5), each as a z whose sigmoid is the measure: what
``step_rows_`` compares with logit(threshold) as it does a policy's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.kernels.gpu_common import (
    UNALIGNED,
    begin,
    check_apart,
    check_contiguous,
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

__all__ = [
    "classifier_rows_",
    "classifier_rows__ref",
    "response_rows_",
    "response_rows__ref",
    "saturation_rows_",
    "saturation_rows__ref",
]

_SMALLEST = 1e-8  # of a norm: ``torch.nn.functional.cosine_similarity``


def saturation_rows__ref(z: Tensor, before: Tensor, hidden: Tensor, order: Tensor, counts: Tensor) -> None:
    rows = order[: int(counts[0])].long()
    cosine = F.cosine_similarity(hidden[rows].float(), before[rows].float(), dim=-1, eps=_SMALLEST)
    z[rows, 0] = torch.logit(cosine.clamp(0, 1))
    before[rows] = hidden[rows]


def classifier_rows__ref(z: Tensor, normed: Tensor, weight: Tensor, order: Tensor, counts: Tensor) -> None:
    rows = order[: int(counts[0])].long()
    z[rows, 0] = (normed[rows].float() * weight.float()).sum(1)


def response_rows__ref(z: Tensor, logits: Tensor, order: Tensor, counts: Tensor) -> None:
    rows = order[: int(counts[0])].long()
    first, second = logits[rows].softmax(-1).topk(2, dim=-1).values.unbind(1)
    z[rows, 0] = torch.logit(first - second)


@jit
def _logit(x):
    return tl.log(x) - tl.log(1.0 - x)


@jit(do_not_specialize_on_alignment=UNALIGNED)
def _saturation_kernel(
    z_ptr,
    before_ptr,
    hidden_ptr,
    order_ptr,
    counts_ptr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    SMALLEST: tl.constexpr,
    EARLY: tl.constexpr,
):
    place = tl.program_id(0)
    begin(EARLY)
    if place >= loaded_ahead(counts_ptr):
        return
    row = tl.load(order_ptr + place).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(hidden_ptr + row * H + column, mask=column < H, other=0.0)
    b = tl.load(before_ptr + row * H + column, mask=column < H, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    size = tl.maximum(tl.sqrt(tl.sum(wide * wide, 0)), SMALLEST)
    size_before = tl.maximum(tl.sqrt(tl.sum(b * b, 0)), SMALLEST)
    cosine = tl.sum(wide / size * (b / size_before), 0)
    # A comparison with NaN is false, and it stays NaN: such a row does not leave.
    cosine = tl.where(cosine < 0.0, 0.0, tl.where(cosine > 1.0, 1.0, cosine))
    tl.store(z_ptr + row, _logit(cosine))
    tl.store(before_ptr + row * H + column, x, mask=column < H)


@jit(do_not_specialize_on_alignment=UNALIGNED)
def _classifier_kernel(
    z_ptr,
    normed_ptr,
    weight_ptr,
    order_ptr,
    counts_ptr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    place = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    begin(EARLY)
    if place >= loaded_ahead(counts_ptr):
        return
    row = tl.load(order_ptr + place).to(tl.int64)
    n = tl.load(normed_ptr + row * H + column, mask=column < H, other=0.0).to(tl.float32)
    tl.store(z_ptr + row, tl.sum(n * weight, 0))


@jit(do_not_specialize_on_alignment=UNALIGNED)
def _response_kernel(
    z_ptr,
    logits_ptr,
    order_ptr,
    counts_ptr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    place = tl.program_id(0)
    begin(EARLY)
    if place >= loaded_ahead(counts_ptr):
        return
    row = tl.load(order_ptr + place).to(tl.int64)
    inner = tl.arange(0, BLOCK)
    LEAST: tl.constexpr = -3.0e38  # finite: two of them differ by 0
    most = tl.full((BLOCK,), LEAST, dtype=tl.float32)
    second = tl.full((BLOCK,), LEAST, dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in tl.static_range(0, V, BLOCK):
        column = start + inner
        x = tl.load(logits_ptr + row * V + column, mask=column < V, other=float("-inf"))
        greater = tl.maximum(most, x)
        second = tl.maximum(second, tl.minimum(most, x))
        total = total * tl.exp(most - greater) + tl.exp(x - greater)
        most = greater
    top = tl.max(most, 0)
    here = inner == tl.argmax(most, 0)
    following = tl.max(tl.where(here, second, most), 0)
    gap = (1.0 - tl.exp(following - top)) / tl.sum(total * tl.exp(most - top), 0)
    tl.store(z_ptr + row, _logit(gap))


def _check(z: Tensor, x: Tensor, name: str, order: Tensor, counts: Tensor) -> int:
    """Rows there is room for."""
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"{name} must have shape [rows, at least 1 column], got {list(x.shape)}")
    rows = x.shape[0]
    check_contiguous(**{name: x, "z": z})
    if z.dtype != torch.float32 or z.dim() != 2 or z.shape[0] < rows or z.shape[1] != 1:
        raise ValueError(f"z must be fp32 of shape [{rows} or more, 1], got {z.dtype} {list(z.shape)}")
    if z.device != x.device:
        raise ValueError(f"z must be on {x.device} as {name}, got {z.device}")
    check_apart(z, name, x, "z")
    check_vector("order", order, x, name, torch.int32, rows)
    check_counts("counts", counts, x, name)
    return rows


def _warps(block: int) -> int:
    return 4 if block <= 1024 else 8 if block <= 4096 else 16


def saturation_rows_(z: Tensor, before: Tensor, hidden: Tensor, order: Tensor, counts: Tensor) -> None:
    """Hidden-state saturation: for r = order[i], i < counts[0], z[r] = logit(max(0, cos(hidden[r], before[r]))), and
    before[r] = hidden[r] for the layer that comes.

    z        fp32 (R, 1), contiguous, written; NaN where hidden or before holds one
    before, hidden   (R, H), of one dtype, fp16, bf16 or fp32, contiguous, apart
    order    int32 (R,): distinct rows; counts int32 (2,): counts[0] of them are live
    One program a row, 3 H numbers; limited by latency.
    """
    check_float("hidden", hidden)
    rows = _check(z, hidden, "hidden", order, counts)
    check_rows("before", before, hidden, "hidden", hidden.shape[1], rows)
    check_contiguous(before=before)
    check_apart(before, "hidden", hidden, "before")
    if not runs_kernel(hidden):
        saturation_rows__ref(z, before, hidden, order, counts)
        return
    if rows == 0:
        return
    block = next_power_of_2(hidden.shape[1])
    with on_device(hidden):
        _saturation_kernel[(rows,)](
            z, before, hidden, order, counts, H=hidden.shape[1], BLOCK=block, SMALLEST=_SMALLEST,
            num_warps=_warps(block), **early(hidden),
        )  # fmt: skip


def classifier_rows_(z: Tensor, normed: Tensor, weight: Tensor, order: Tensor, counts: Tensor) -> None:
    """Early-exit classifier: z[r] = weight . normed[r] for r = order[i], i < counts[0]; its bias is ``step_rows_``'s.

    z        fp32 (R, 1), contiguous, written
    normed   (R, H), fp16, bf16 or fp32, contiguous; weight (1, H), fp32 or the dtype of normed
    order    int32 (R,): distinct rows; counts int32 (2,): counts[0] of them are live
    One program a row, 2 H numbers; limited by latency.
    """
    check_float("normed", normed)
    rows = _check(z, normed, "normed", order, counts)
    check_weight("weight", weight, normed, "normed", 1, normed.shape[1])
    if not runs_kernel(normed):
        classifier_rows__ref(z, normed, weight, order, counts)
        return
    if rows == 0:
        return
    block = next_power_of_2(normed.shape[1])
    with on_device(normed):
        _classifier_kernel[(rows,)](
            z, normed, weight, order, counts, H=normed.shape[1], BLOCK=block, num_warps=_warps(block), **early(normed),
        )  # fmt: skip


def response_rows_(z: Tensor, logits: Tensor, order: Tensor, counts: Tensor) -> None:
    """Softmax response: for r = order[i], i < counts[0], z[r] = logit(p1 - p2), the two largest of softmax(logits[r]).

    z        fp32 (R, 1), contiguous, written
    logits   fp32 (R, V), contiguous, V at least 2
    order    int32 (R,): distinct rows; counts int32 (2,): counts[0] of them are live
    One program a row, which reads its 4 V bytes once; limited by latency.
    """
    rows = _check(z, logits, "logits", order, counts)
    words = logits.shape[1]
    if logits.dtype != torch.float32 or words < 2:
        raise ValueError(f"logits must be fp32 with 2 or more columns, got {logits.dtype} {list(logits.shape)}")
    if not runs_kernel(logits):
        response_rows__ref(z, logits, order, counts)
        return
    if rows == 0:
        return
    with on_device(logits):
        _response_kernel[(rows,)](
            z, logits, order, counts, V=words, BLOCK=min(4096, next_power_of_2(words)), num_warps=16, **early(logits),
        )  # fmt: skip
