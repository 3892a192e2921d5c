"""Moving rows: compaction after exits, gather and scatter, padded batches to packed ones and back.

Two packed layouts, both described by ``cu_seqlens`` (batch + 1,) int32, starting at 0:

* **rows**: the tokens of each sequence stand end to end;
* **lead**: rows 0 .. batch - 1 are the sequences' first tokens, the other tokens of sequence i stand at rows
  batch + cu_seqlens[i] - i up to batch + cu_seqlens[i + 1] - (i + 1). First tokens ``x[:batch]`` and the others
  ``x[batch:]`` are then both contiguous slices. Every sequence has at least one token.

A buffer may have more rows than ``cu_seqlens[-1]``: spare capacity, which the ops leave alone. It lets sizes stay on a
ladder of few values, so that a matrix product is planned once per size and not once per number of survivors.

Values are checked (ValueError, IndexError) on the CPU; on CUDA nothing is read back to be checked, and rows out of
range are skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.extension import bind

__all__ = [
    "compact_lead",
    "compact_rows",
    "gather_rows",
    "pack_lead",
    "prefix_sum",
    "scatter_rows_",
    "unpack_lead",
]


# --- torch twins ---------------------------------------------------------------------------------------------------


def prefix_sum_ref(lengths: Tensor) -> Tensor:
    if lengths.dtype != torch.int32:
        raise ValueError(f"lengths must be int32, got {lengths.dtype}")
    if lengths.device.type == "cpu" and lengths.numel() and int(lengths.min()) < 0:
        raise ValueError(f"lengths must not be negative, got {int(lengths.min())}")
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _row_of(lengths: Tensor, rows: int) -> Tensor:
    """The sequence of each of ``rows`` rows; spare rows behind the last token belong to sequence ``len(lengths)``."""
    spare = rows - lengths.sum(dtype=lengths.dtype).reshape(1)
    return torch.repeat_interleave(torch.cat([lengths, spare.to(lengths.dtype)]), output_size=rows)


def _compact_ref(hidden_states: Tensor, cu_seqlens: Tensor, keep: Tensor, row_of: Tensor):
    """``row_of`` (rows,): the sequence of every row, in the order of the buffer."""
    if keep.shape != (cu_seqlens.shape[0] - 1,):
        raise ValueError(f"keep must have shape [{cu_seqlens.shape[0] - 1}], got {list(keep.shape)}")
    # Stable sorts put the survivors first, in their order, without knowing on the host how many there are.
    rows = torch.sort(~keep, stable=True).indices
    n_active = keep.sum(dtype=torch.int32).reshape(1)
    out_cu_seqlens = prefix_sum_ref(torch.where(keep, cu_seqlens.diff(), 0)[rows])
    tokens = torch.sort(~torch.nn.functional.pad(keep, (0, 1))[row_of], stable=True).indices
    active_rows = torch.where(torch.arange(keep.shape[0], device=keep.device) < n_active, rows, -1)
    return hidden_states[tokens], out_cu_seqlens, active_rows.to(torch.int32), n_active


def compact_rows_ref(hidden_states: Tensor, cu_seqlens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _compact_ref(hidden_states, cu_seqlens, keep, _row_of(cu_seqlens.diff(), hidden_states.shape[0]))


def compact_lead_ref(hidden_states: Tensor, cu_seqlens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = cu_seqlens.shape[0] - 1
    others = _row_of(cu_seqlens.diff() - 1, hidden_states.shape[0] - batch)
    row_of = torch.cat([torch.arange(batch, device=others.device), others])
    return _compact_ref(hidden_states, cu_seqlens, keep, row_of)


def _check_index(index: Tensor, name: str, rows: int) -> None:
    if index.device.type == "cpu":
        bad = ((index < 0) | (index >= rows)).nonzero()
        if bad.numel():
            at = int(bad[0])
            raise IndexError(
                f"index must lie in [0, {rows}), the rows of {name}, got {int(index[at])} at position {at}"
            )


def gather_rows_ref(x: Tensor, index: Tensor) -> Tensor:
    _check_index(index, "x", x.shape[0])
    return x.index_select(0, index)


def scatter_rows__ref(out: Tensor, src: Tensor, index: Tensor) -> None:
    _check_index(index, "out", out.shape[0])
    out.index_copy_(0, index.long(), src)


def pack_lead_ref(padded: Tensor, lengths: Tensor, total_tokens: int | None = None) -> Tensor:
    width = padded.shape[1]
    if lengths.device.type == "cpu" and lengths.numel() and not 1 <= int(lengths.min()) <= int(lengths.max()) <= width:
        raise ValueError(f"lengths must lie between 1 and the width of padded ({width}), got {lengths.tolist()}")
    present = torch.arange(1, width, device=padded.device) < lengths[:, None]
    packed = torch.cat([padded[:, 0], padded[:, 1:][present]]) if width else padded.new_empty((0, *padded.shape[2:]))
    if total_tokens is not None and total_tokens != packed.shape[0]:
        raise ValueError(f"total_tokens must be the sum of lengths ({packed.shape[0]}), got {total_tokens}")
    return packed


def unpack_lead_ref(packed: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    batch = cu_seqlens.shape[0] - 1
    lengths = cu_seqlens.diff()
    if lengths.device.type == "cpu" and batch and int(lengths.max()) > max_seqlen:
        raise ValueError(f"max_seqlen must be at least the longest length, got {max_seqlen} for {int(lengths.max())}")
    if batch == 0 or max_seqlen == 0:
        return packed.new_zeros((batch, max_seqlen, *packed.shape[1:]))
    position = torch.arange(max_seqlen, device=packed.device)
    row = torch.arange(batch, device=packed.device)[:, None]
    source = torch.where(position == 0, row, batch + cu_seqlens[:-1, None] - row + position - 1)
    present = position < lengths[:, None]
    padded = packed[torch.where(present, source, 0)]
    return padded.masked_fill_(~present.reshape(batch, max_seqlen, *[1] * (packed.dim() - 1)), 0)


_prefix_sum = bind("prefix_sum", prefix_sum_ref)
_compact_rows = bind("compact_rows", compact_rows_ref)
_compact_lead = bind("compact_lead", compact_lead_ref)
_gather_rows = bind("gather_rows", gather_rows_ref)
_scatter_rows_ = bind("scatter_rows_", scatter_rows__ref)
_pack_lead = bind("pack_lead", pack_lead_ref)
_unpack_lead = bind("unpack_lead", unpack_lead_ref)


# --- public functions ----------------------------------------------------------------------------------------------


def prefix_sum(lengths: Tensor) -> Tensor:
    """``cu_seqlens`` (batch + 1,) int32 of ``lengths`` (batch,) int32: 0, n_0, n_0 + n_1, ..."""
    return _prefix_sum(lengths)


def compact_rows(hidden_states: Tensor, cu_seqlens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Drop the sequences whose ``keep`` is false, keeping the order of the others.

    hidden_states  (total_tokens or more, ...), any dtype, each row contiguous; sequences end to end, lengths may be 0
    cu_seqlens     (batch + 1,) int32
    keep           (batch,) bool
    Returns the compacted hidden_states in a buffer of the *input* size, its cu_seqlens (entries past n_active repeat
    the total), active_rows (batch,) int32 and n_active (1,) int32; rows of the buffer past the total and entries of
    active_rows past n_active are undefined. No host synchronisation.
    """
    return _compact_rows(hidden_states, cu_seqlens, keep)


def compact_lead(hidden_states: Tensor, cu_seqlens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``compact_rows`` for the lead layout: the survivors' first tokens lead, their other tokens follow."""
    return _compact_lead(hidden_states, cu_seqlens, keep)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]`` for ``index`` (n,) int32 or int64; x (rows, ...), each row contiguous."""
    return _gather_rows(x, index)


def scatter_rows_(out: Tensor, src: Tensor, index: Tensor) -> None:
    """``out[index] = src`` in place. Where an index occurs twice, which row stays is undefined."""
    _scatter_rows_(out, src, index)


def pack_lead(padded: Tensor, lengths: Tensor, total_tokens: int | None = None) -> Tensor:
    """Right-padded ``padded`` (batch, max_seqlen, ...) to the lead layout (total_tokens, ...).

    lengths (batch,) int32, each at least 1. ``total_tokens`` is their sum: on CUDA the caller who knows it saves a host
    synchronisation.
    """
    return _pack_lead(padded, lengths, total_tokens)


def unpack_lead(packed: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Lead layout ``packed`` (total_tokens, ...) to (batch, max_seqlen, ...), zeros behind each sequence."""
    return _unpack_lead(packed, cu_seqlens, max_seqlen)
