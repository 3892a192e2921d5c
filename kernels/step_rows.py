"""Between two layers of a decode step: who leaves, who goes on, and what the next layer owes those."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.extension import bind
from engine.kernels.survivors import _refuse_overlap

__all__ = ["DECIDE", "LEAVE", "STAY", "step_rows_", "step_rows__ref"]

# Behind a layer: everybody goes on; the policy decides; everybody leaves.
STAY, DECIDE, LEAVE = 0, 1, 2


def _put(out: Tensor, at: Tensor, values: Tensor, chosen: Tensor) -> None:
    """out[at] = values where chosen; how many those are stays on the device."""
    room = torch.cat([out, out.new_zeros(1)])  # the last entry takes what is not chosen
    room[torch.where(chosen, at, len(out)).long()] = values.to(out.dtype)
    out.copy_(room[:-1])


def step_rows__ref(
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
    settled: Tensor | None = None,
) -> None:
    if kind not in (STAY, DECIDE, LEAVE):
        raise ValueError(f"kind must be 0 (everybody goes on), 1 (an exit decides) or 2 (everybody leaves), got {kind}")
    if kind == DECIDE and (partial is None or b2 is None):
        raise ValueError("partial and b2 are missing: an exit decides here (kind 1)")
    if not 0 <= next_layer <= watermarks.shape[1]:
        raise ValueError(f"next_layer must lie in [0, {watermarks.shape[1]}], got {next_layer}")
    read = [order, counts, threshold_logit, script, min_depth, max_depth, positions, block_table]
    read += [x for x in (partial, b2) if x is not None and kind == DECIDE]
    written = [exit_layers, exit_probs, out_order, out_counts, watermarks, owed_slots, owed_positions]
    _refuse_overlap(read, [*written, *([] if settled is None else [settled])])

    rows, room = order.shape[0], owed_slots.shape[0]
    if rows == 0:
        out_counts.zero_()
        return
    place = torch.arange(rows, device=order.device)
    live = place < counts[0]
    ids = torch.where(live, order, 0).long()
    leave, probs = live & (kind == LEAVE), torch.ones(rows, device=order.device)
    if kind == DECIDE:
        z = partial[ids].sum(1) + b2.float()
        forced = max_depth[ids] <= layer
        asked = torch.where(script[ids] > 0, script[ids] <= layer, z > threshold_logit[ids])
        leave = live & (asked | forced) & (min_depth[ids] <= layer)
        probs = torch.where(forced, 1.0, z.sigmoid())
    _put(exit_layers, ids, torch.full_like(ids, layer), leave)
    _put(exit_probs, ids, probs, leave)
    stay = live & ~leave
    _put(out_order, stay.cumsum(0) - 1, ids, stay)
    total = torch.zeros((), dtype=torch.int64, device=order.device)
    if next_layer > 0:
        marks, newest = watermarks[ids, next_layer - 1].long(), positions[ids].long()
        owed = torch.where(stay, (newest - marks).clamp(min=0), 0)
        ends = owed.cumsum(0)
        total = ends[-1].clamp(max=room)
        at = torch.arange(room, device=order.device)
        row = torch.searchsorted(ends, at, right=True).clamp_(max=rows - 1)
        p = torch.where(at < total, marks[row] + at - (ends - owed)[row], 0)
        slots = block_table[ids[row], p // block_size].long() * block_size + p % block_size
        _put(owed_slots, at, slots, at < total)
        _put(owed_positions, at, p, at < total)
        column = watermarks[:, next_layer - 1].clone()
        _put(column, ids, newest + 1, stay)
        watermarks[:, next_layer - 1] = column
    out_counts.copy_(torch.stack([stay.sum(), total]))
    if settled is not None:
        settled += total


_step_rows_ = bind("step_rows_", step_rows__ref)


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
    settled: Tensor | None = None,
) -> None:
    """Behind ``layer`` (1-based; 0: a step begins): rows that leave write their exit, the others go on to ``out_order``
    in their order. Positions that ``next_layer`` (0: there is none) owes those are listed, its watermarks moved on.

    R rows of ``order``; arrays by row id may have more. All contiguous, on one device.
    partial         (R, S) fp32 by row id: z of a row is the sum of its S entries + ``b2``. Only for ``DECIDE``
    b2              (1,) fp32, fp64, fp16 or bf16: a weight, and the one input that is read before the kernel in front
                    has ended. Only for ``DECIDE``
    order, counts   (R,), (2,) int32: counts[0] live rows, their distinct ids first in order; counts[1] is not looked at
    kind            STAY: everybody goes on; DECIDE: an exit decides; LEAVE: everybody leaves, with probability 1
    threshold_logit (R,) fp32, script, min_depth, max_depth (R,) int32, by row id. A row leaves where script <= layer,
                    or with script 0 (or less) where z > threshold_logit (never where z is NaN); at max_depth it has
                    to, with probability 1; below min_depth it may not, whatever the others say
    positions       (R,) int32 by row id: of the rows' newest tokens
    block_table     (R, blocks) int32: position p of row r stands in slot
                    block_table[r, p // block_size] * block_size + p % block_size
    Written, and sharing no memory with each other or with the above (anything else is a ValueError):
    exit_layers, exit_probs      (R,) int32, fp32 by row id: of rows that leave, layer and sigmoid(z)
    out_order, out_counts        (R,), (2,) int32: who goes on, [how many, how many positions are owed]
    watermarks                   (R, L) int32: owed are watermarks[r, next_layer - 1] ... positions[r] - 1; then it is
                                 positions[r] + 1
    owed_slots, owed_positions   (O,) int32: row after row in out_order's order, ascending. The caller gives O at least
                                 the sum of all positions: of more, the first O are listed, and out_counts[1] is O
    settled         (1,) int64 or None: out_counts[1] is added to it
    Entries of the outputs that are not spoken of keep what they held.

    Counts, row ids, positions and watermarks out of range are a ValueError on the CPU; on CUDA counts are clamped, such
    rows and positions left out. No host synchronisation, no allocation, one launch of one block. Bytes moved: about
    4 (S + 12) for each live row, 12 for each owed position.
    """
    _step_rows_(
        partial, b2, order, counts, layer, kind, threshold_logit, script, min_depth, max_depth, exit_layers, exit_probs,
        out_order, out_counts, next_layer, positions, block_table, block_size, watermarks, owed_slots, owed_positions,
        settled,
    )  # fmt: skip
