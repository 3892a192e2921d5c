"""Between two layers of a decode step: who leaves, who goes on, and what the next layer owes those."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.gpu_common import (
    UNALIGNED,
    begin,
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

__all__ = ["DECIDE", "LEAVE", "STAY", "step_rows_", "step_rows__ref"]

# Behind a layer: everybody goes on; the policy decides; everybody leaves.
STAY, DECIDE, LEAVE = 0, 1, 2


def step_rows__ref(
    partial, b2, order, counts, layer, kind, threshold_logit, script, min_depth, max_depth, exit_layers, exit_probs,
    out_order, out_counts, next_layer, positions, block_table, block_size, watermarks, owed_slots, owed_positions,
) -> None:  # fmt: skip
    rows = order[: int(counts[0])].long()
    leave = torch.full(rows.shape, kind == LEAVE, dtype=torch.bool, device=rows.device)
    probs = torch.ones(rows.shape, device=rows.device)
    if kind == DECIDE:
        z = partial[rows].sum(1) + b2.float()
        asked = script[rows]
        leave = torch.where(asked > 0, asked <= layer, z > threshold_logit[rows])
        forced = max_depth[rows] <= layer
        probs = torch.where(forced, 1.0, z.sigmoid())
        leave = (leave | forced) & (min_depth[rows] <= layer)
    exit_layers[rows[leave]] = layer
    exit_probs[rows[leave]] = probs[leave]
    stay = rows[~leave]
    out_order[: len(stay)] = stay.to(torch.int32)
    total = 0
    if next_layer:
        for r in stay.tolist():
            owed = torch.arange(int(watermarks[r, next_layer - 1]), int(positions[r]), device=rows.device)
            slots = block_table[r].long()[owed // block_size] * block_size + owed % block_size
            owed_slots[total : total + len(owed)] = slots.to(torch.int32)
            owed_positions[total : total + len(owed)] = owed.to(torch.int32)
            total += len(owed)
            watermarks[r, next_layer - 1] = positions[r] + 1
    out_counts.copy_(torch.tensor([len(stay), total], dtype=torch.int32))


@jit(do_not_specialize_on_alignment=UNALIGNED, do_not_specialize=["layer", "next_layer"])
def _step_kernel(
    partial_ptr,
    b2_ptr,
    order_ptr,
    counts_ptr,
    threshold_ptr,
    script_ptr,
    min_ptr,
    max_ptr,
    exit_layers_ptr,
    exit_probs_ptr,
    out_order_ptr,
    out_counts_ptr,
    positions_ptr,
    table_ptr,
    watermarks_ptr,
    slots_ptr,
    owed_positions_ptr,
    layer,
    next_layer,
    num_layers,
    blocks,
    KIND: tl.constexpr,
    S: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_O: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    place = tl.arange(0, R)
    live = place < loaded_ahead(counts_ptr)
    row = loaded_ahead(order_ptr + place, mask=live, other=0)
    keep = live
    if KIND == 2:
        tl.store(exit_layers_ptr + row, layer + place * 0, mask=live)
        tl.store(exit_probs_ptr + row, 1.0 + 0.0 * place, mask=live)
        keep = live & (place < 0)
    if KIND == 1:
        split = tl.arange(0, BLOCK_S)
        parts = tl.load(
            partial_ptr + row[:, None] * S + split[None, :], mask=live[:, None] & (split < S)[None, :], other=0.0
        )
        z = tl.sum(parts, 1) + tl.load(b2_ptr).to(tl.float32)
        script = tl.load(script_ptr + row, mask=live, other=0)
        above = (z > tl.load(threshold_ptr + row, mask=live, other=0.0)).to(tl.int32)
        leave = tl.where(script > 0, (script <= layer).to(tl.int32), above)
        forced = (tl.load(max_ptr + row, mask=live, other=0) <= layer).to(tl.int32)
        allowed = tl.load(min_ptr + row, mask=live, other=0) <= layer
        leaves = ((leave | forced) != 0) & allowed & live
        prob = tl.where(forced != 0, 1.0, 1.0 / (1.0 + tl.exp(-z)))
        tl.store(exit_layers_ptr + row, layer + place * 0, mask=leaves)
        tl.store(exit_probs_ptr + row, prob, mask=leaves)
        keep = live & (leaves == 0)
    kept = keep.to(tl.int32)
    to = tl.cumsum(kept, 0) - kept
    tl.store(out_order_ptr + to, row, mask=keep)
    tl.store(out_counts_ptr, tl.sum(kept, 0))
    if KIND == 2:
        tl.store(out_counts_ptr + 1, 0)
    else:
        if next_layer > 0:
            position = tl.load(positions_ptr + row, mask=keep, other=0)
            marks = watermarks_ptr + row * num_layers + next_layer - 1
            mark = tl.load(marks, mask=keep, other=0)
            owed = tl.where(keep, tl.maximum(position - mark, 0), 0)
            start = tl.cumsum(owed, 0) - owed
            tl.store(out_counts_ptr + 1, tl.sum(owed, 0))
            tl.store(marks, position + 1, mask=keep)
            within = tl.arange(0, BLOCK_O)
            for first in range(0, tl.max(owed, 0), BLOCK_O):
                k = first + within
                there = k[None, :] < owed[:, None]
                p = mark[:, None] + k[None, :]
                block = tl.load(table_ptr + row[:, None] * blocks + p // BLOCK_SIZE, mask=there, other=0)
                at = start[:, None] + k[None, :]
                tl.store(slots_ptr + at, block * BLOCK_SIZE + p % BLOCK_SIZE, mask=there)
                tl.store(owed_positions_ptr + at, p, mask=there)
        else:
            tl.store(out_counts_ptr + 1, 0)


def step_rows_(
    partial: Tensor | None,
    b2: Tensor | None,
    order: Tensor,
    counts: Tensor,
    layer: int,
    kind: int,
    threshold_logit: Tensor,
    script: Tensor,
    min_depth: Tensor,
    max_depth: Tensor,
    exit_layers: Tensor,
    exit_probs: Tensor,
    out_order: Tensor,
    out_counts: Tensor,
    next_layer: int,
    positions: Tensor,
    block_table: Tensor,
    block_size: int,
    watermarks: Tensor,
    owed_slots: Tensor,
    owed_positions: Tensor,
) -> None:
    """Behind ``layer`` (0: before the first): rows that leave write their exit, the others go to ``out_order``; for
    these, positions that ``next_layer`` (0: there is none) owes are listed and its watermarks moved on.

    partial    fp32 (R, S) by row: their sum + b2 (1,) is the policy's z. Only for ``DECIDE``
    order, counts, out_order, out_counts   int32 (R,), (2,): live rows, and how many; out_counts[1] is how many are owed
    kind       STAY, DECIDE or LEAVE
    threshold_logit fp32 (R,), script, min_depth, max_depth int32 (R,): by row. A row leaves where script <= layer, or
               with script 0 where z is above the threshold; it must at max_depth, and may not before min_depth
    exit_layers int32 (R,), exit_probs fp32 (R,): written for rows that leave; sigmoid(z), 1 where they had to
    positions  int32 (R,), of the rows' newest tokens; block_table int32 (R, blocks), block_size: see ``decode_step``
    watermarks int32 (R, L): row r is owed positions watermarks[r, next_layer - 1] ... positions[r] - 1
    owed_slots, owed_positions  int32 (O,), O at least the sum of all positions
    One program; limited by latency.
    """
    rows = order.shape[0]
    for name, tensor in (("order", order), ("out_order", out_order), ("script", script), ("min_depth", min_depth),
                         ("max_depth", max_depth), ("exit_layers", exit_layers), ("positions", positions)):  # fmt: skip
        check_vector(name, tensor, order, "order", torch.int32, rows)
    for name, tensor in (("counts", counts), ("out_counts", out_counts)):
        check_counts(name, tensor, order, "order")
    for name, tensor in (("threshold_logit", threshold_logit), ("exit_probs", exit_probs)):
        check_vector(name, tensor, order, "order", torch.float32, rows)
    check_vector("owed_slots", owed_slots, order, "order", torch.int32, 0)
    check_vector("owed_positions", owed_positions, order, "order", torch.int32, owed_slots.shape[0])
    for name, tensor in (("block_table", block_table), ("watermarks", watermarks)):
        if tensor.dtype != torch.int32 or tensor.dim() != 2 or tensor.shape[0] < rows or not tensor.is_contiguous():
            raise ValueError(f"{name} must be int32 of shape [{rows} or more, n], contiguous, got {tensor.dtype} "
                             f"{list(tensor.shape)}")  # fmt: skip
    if kind not in (STAY, DECIDE, LEAVE):
        raise ValueError(f"kind must be 0 (stay), 1 (decide) or 2 (leave), got {kind!r}")
    if not 0 <= next_layer <= watermarks.shape[1]:
        raise ValueError(f"next_layer must be 0 to {watermarks.shape[1]}, got {next_layer}")
    if kind == DECIDE and (partial is None or b2 is None):
        raise ValueError("partial and b2 are missing: a policy decides here")
    if out_order.data_ptr() == order.data_ptr() or out_counts.data_ptr() == counts.data_ptr():
        raise ValueError("out_order and out_counts must not be order and counts: give other buffers")
    given = (partial, b2, order, counts)
    limits = (threshold_logit, script, min_depth, max_depth)
    if not runs_kernel(order):
        step_rows__ref(*given, layer, kind, *limits, exit_layers, exit_probs, out_order, out_counts, next_layer,
                       positions, block_table, block_size, watermarks, owed_slots, owed_positions)  # fmt: skip
        return
    if rows == 0:
        return
    block = next_power_of_2(rows)
    splits = 1 if partial is None else partial.shape[1]
    with on_device(order):
        _step_kernel[(1,)](
            *given, *limits, exit_layers, exit_probs, out_order, out_counts, positions, block_table, watermarks,
            owed_slots, owed_positions, layer, next_layer, watermarks.shape[1], block_table.shape[1],
            KIND=kind, S=splits, BLOCK_SIZE=block_size, R=block, BLOCK_S=next_power_of_2(splits),
            BLOCK_O=max(16, 256 // block), num_warps=4, **early(order),
        )  # fmt: skip
