"""The end of a decode step: every row's greedy token, and what the host is told of it."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.gpu_common import (
    UNALIGNED,
    begin,
    check_apart,
    check_contiguous,
    check_counts,
    check_vector,
    early,
    jit,
    loaded_ahead,
    next_power_of_2,
    on_device,
    runs_kernel,
    tl,
)

__all__ = ["TOLD", "greedy_rows_", "greedy_rows__ref"]

# Columns of ``told``.
TOLD = ("token", "exit_layer", "exit_prob")


def greedy_rows__ref(
    told: Tensor, ids: Tensor, logits: Tensor, exit_layers: Tensor, exit_probs: Tensor, counts: Tensor
) -> None:
    n = int(counts[0])
    if n == 0:
        return
    ids[:n] = logits[:n].argmax(1).to(torch.int32)
    told[:n] = torch.stack([ids[:n], exit_layers[:n], exit_probs[:n].view(torch.int32)], 1)


@jit(do_not_specialize_on_alignment=UNALIGNED)
def _greedy_kernel(
    told_ptr,
    ids_ptr,
    logits_ptr,
    exit_layers_ptr,
    exit_probs_ptr,
    counts_ptr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(0)
    alive = row < loaded_ahead(counts_ptr)
    begin(EARLY)
    if not alive:
        return
    layer = tl.load(exit_layers_ptr + row)
    prob = tl.load(exit_probs_ptr + row)
    inner = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    where = tl.full((BLOCK,), V, dtype=tl.int32)
    for first in tl.static_range(0, V, BLOCK):  # all of it on its way at once
        column = first + inner
        x = tl.load(logits_ptr + row.to(tl.int64) * V + column, mask=column < V, other=float("-inf"))
        # Columns of a place rise: only what is greater takes over, so the first of equals stays.
        greater = x > most
        most = tl.where(greater, x, most)
        where = tl.where(greater, column, where)
    top = tl.max(most, 0)
    token = tl.min(tl.where(most == top, where, V), 0)
    token = tl.minimum(token, V - 1)  # of a row without a finite logit
    tl.store(ids_ptr + row, token)
    tl.store(told_ptr + row * 3, token)
    tl.store(told_ptr + row * 3 + 1, layer)
    tl.store(told_ptr + row * 3 + 2, prob.to(tl.int32, bitcast=True))


def greedy_rows_(
    told: Tensor, ids: Tensor, logits: Tensor, exit_layers: Tensor, exit_probs: Tensor, counts: Tensor
) -> None:
    """For r < counts[0]: ids[r] is the first of the greatest of logits[r], told[r] = (that, exit_layers[r], the bits of
    exit_probs[r]).

    told         (R, 3) int32, contiguous, written: see ``TOLD``; ids (R,) int32, written
    logits       (R, V) fp32, contiguous, no NaN; exit_layers (R,) int32, exit_probs (R,) fp32; counts int32 (2,)
    One program a row: 4 V bytes of it, limited by latency.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32 or logits.shape[1] == 0:
        raise ValueError(
            f"logits must be fp32 of shape (R, V), V at least 1, got {logits.dtype} {list(logits.shape)}"
        )
    rows, words = logits.shape
    check_contiguous(logits=logits, told=told)
    check_vector("ids", ids, logits, "logits", torch.int32, rows)
    check_vector("exit_layers", exit_layers, logits, "logits", torch.int32, rows)
    check_vector("exit_probs", exit_probs, logits, "logits", torch.float32, rows)
    check_counts("counts", counts, logits, "logits")
    if told.dtype != torch.int32 or told.dim() != 2 or told.shape[0] < rows or told.shape[1] != len(TOLD):
        raise ValueError(
            f"told must be int32 of shape [{rows} or more, {len(TOLD)}], got {told.dtype} {list(told.shape)}"
        )
    if told.device != logits.device:
        raise ValueError(f"told must be on {logits.device} as logits, got {told.device}")
    check_apart(told, "logits", logits, "told")
    check_apart(ids, "logits", logits, "ids")
    if not runs_kernel(logits):
        greedy_rows__ref(told, ids, logits, exit_layers, exit_probs, counts)
        return
    if rows == 0:
        return
    with on_device(logits):
        _greedy_kernel[(rows,)](
            told, ids, logits, exit_layers, exit_probs, counts, V=words, BLOCK=min(8192, next_power_of_2(words)),
            num_warps=16, **early(logits),
        )  # fmt: skip
