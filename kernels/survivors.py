"""Who stays after an exit check, in buffers of fixed capacity: what a captured graph removes rows with.

The **rows** layout of ``packing`` with the sizes on the device: capacities are the shapes of the buffers, and
``counts`` (2,) int32 = [live rows, live tokens] says how much of them is live. Nothing is allocated and nothing is read
back, so the op may stand inside a captured graph and inside the body of a conditional node.

Tokens are not moved here: whoever writes hidden states next (residual add + LayerNorm) writes each surviving token to
its new place, ``token_dest``, so that compaction costs no pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels.extension import bind

__all__ = ["Removal", "survivors_"]

_NOWHERE = 1 << 30  # no place of a row or token


class Removal(NamedTuple):
    """``survivors_`` of rows whose one value is their id, for a kernel to do beside its own work
    (``varlen_attention_``): keep, row_ids and what is written. The counts and cu_seqlens are that kernel's.

    Past the live tokens of token_dest, and past the survivors of out_cu_seqlens, anything may stand afterwards.
    """

    keep: Tensor
    row_ids: Tensor
    out_cu_seqlens: Tensor
    token_dest: Tensor
    out_counts: Tensor
    out_row_ids: Tensor

    def run(self, cu_seqlens: Tensor, counts: Tensor) -> None:
        """In torch. What may be anything afterwards is something that nobody can take for a place."""
        survivors__ref(self.keep, cu_seqlens, counts, [self.row_ids], *self[2:5], [self.out_row_ids])
        rows, tokens = self.out_cu_seqlens.shape[0], self.token_dest.shape[0]
        self.out_cu_seqlens[torch.arange(rows, device=counts.device) > self.out_counts[0]] = _NOWHERE
        self.token_dest[torch.arange(tokens, device=counts.device) >= counts[1]] = _NOWHERE


def _refuse_overlap(read: list[Tensor], written: list[Tensor]) -> None:
    spans = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in (*written, *read) if t.numel()]
    outputs = sum(1 for t in written if t.numel())
    for i, (begin, end) in enumerate(spans[:outputs]):
        if any(begin < other_end and other < end for other, other_end in spans[i + 1 :]):
            raise ValueError("outputs must not share memory with other arguments: use other buffers, and swap")


def survivors__ref(
    keep: Tensor,
    cu_seqlens: Tensor,
    counts: Tensor,
    state: Sequence[Tensor],
    out_cu_seqlens: Tensor,
    token_dest: Tensor,
    out_counts: Tensor,
    out_state: Sequence[Tensor],
) -> None:
    cap_rows, cap_tokens = keep.shape[0], token_dest.shape[0]
    if cu_seqlens.shape != (cap_rows + 1,):
        raise ValueError(f"cu_seqlens must have shape [{cap_rows + 1}], got {list(cu_seqlens.shape)}")
    if len(state) != len(out_state):
        raise ValueError(f"out_state must have one tensor for each of the {len(state)} of state, got {len(out_state)}")
    _refuse_overlap([keep, cu_seqlens, counts, *state], [out_cu_seqlens, token_dest, out_counts, *out_state])
    row = torch.arange(cap_rows, device=keep.device)
    live = row < counts[0]
    stays = keep.bool() & live
    lengths = torch.where(stays, cu_seqlens.diff(), 0)
    total = lengths.cumsum(0, dtype=torch.int32)
    # A stable sort puts the survivors first, in their order, without knowing on the host how many there are.
    order = torch.sort(~stays, stable=True).indices
    out_cu_seqlens[:1] = 0
    out_cu_seqlens[1:] = lengths[order].cumsum(0, dtype=torch.int32)
    out_counts[0] = stays.sum()
    out_counts[1] = lengths.sum()
    for value, out in zip(state, out_state, strict=True):
        out.copy_(torch.where(row < out_counts[0], value[order], out))
    if cap_rows == 0:
        token_dest.fill_(-1)
        return
    token = torch.arange(cap_tokens, device=keep.device, dtype=torch.int32)
    ends = torch.where(live, cu_seqlens[1:], torch.iinfo(torch.int32).max)  # past the live rows anything may stand
    row_of = torch.searchsorted(ends, token, right=True).clamp_(max=cap_rows - 1)
    place = token - cu_seqlens[row_of] + (total - lengths)[row_of]
    token_dest.copy_(torch.where((token < counts[1]) & stays[row_of], place, -1))


_survivors_ = bind("survivors_", survivors__ref)


def survivors_(
    keep: Tensor,
    cu_seqlens: Tensor,
    counts: Tensor,
    state: Sequence[Tensor],
    out_cu_seqlens: Tensor,
    token_dest: Tensor,
    out_counts: Tensor,
    out_state: Sequence[Tensor],
) -> None:
    """Remove the live rows whose ``keep`` is zero, keeping the order of the others.

    keep            (cap_rows,) bool, int8 or uint8; entries past the live rows are ignored
    cu_seqlens      (cap_rows + 1,) int32, 0 first; entries past the live rows are ignored
    counts          (2,) int32, live rows and live tokens before
    state           up to 32 tensors (cap_rows,) with items of 4 or 8 bytes: one value of every row
    Written, and sharing no memory with each other or with the above (ping-pong buffers; anything else is a ValueError):
    out_cu_seqlens  (cap_rows + 1,) int32; entries past the survivors repeat the total
    token_dest      (cap_tokens,) int32: where each token goes, -1 where it leaves or is not live
    out_counts      (2,) int32, surviving rows and tokens
    out_state       as ``state``: the survivors' values first; entries past them keep what they held

    Counts and cu_seqlens that contradict each other are a ValueError on the CPU and undefined places on CUDA (never one
    outside token_dest's capacity). No host synchronisation, no allocation, one launch. Bytes, of R live rows with s of
    state each: R (5 + s) in, 4 (cap_rows + cap_tokens) out and s for each survivor.
    """
    _survivors_(keep, cu_seqlens, counts, state, out_cu_seqlens, token_dest, out_counts, out_state)
