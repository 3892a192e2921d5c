"""What goes into an executor and what comes out: frozen records, passed as arguments."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from engine.criteria import Criterion


class TokenRow(NamedTuple):
    """One tokenised row: ids, and segment ids where any is not 0."""

    ids: list[int]
    types: list[int] | None


@dataclass(frozen=True)
class PackedBatch:
    """B rows of n_1 ... n_B tokens (T in all) without padding, in the *lead layout*.

    In every [T, ...] buffer rows 0 ... B-1 are the first tokens; the other tokens of row i follow at
    B + (cu_seqlens[i] - i) ... B + (cu_seqlens[i+1] - i - 1). First tokens decide and are classified, the others only
    serve them: each group is one contiguous slice, so that serving the first tokens first costs no gather.

    input_ids       int64 [T]
    token_type_ids  int64 [T], None where all are 0
    positions       int64 [T], from the family's first position on
    cu_seqlens      int32 [B + 1]
    lengths         the n_i, on the host
    """

    input_ids: Tensor
    token_type_ids: Tensor | None
    positions: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def from_rows(cls, rows: list[TokenRow], first_position: int, device: torch.device) -> PackedBatch:
        """rows: one or more, none of them empty."""
        lengths = tuple(len(row.ids) for row in rows)
        count = range(first_position, first_position + max(lengths))

        def lead(sequences) -> Tensor:
            first = [s[0] for s in sequences]
            return torch.tensor(first + list(chain.from_iterable(s[1:] for s in sequences)), device=device)

        types = None
        if any(row.types is not None for row in rows):
            types = lead([row.types or [0] * len(row.ids) for row in rows])
        return cls(
            input_ids=lead([row.ids for row in rows]),
            token_type_ids=types,
            positions=lead([count[:n] for n in lengths]),
            cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
            lengths=lengths,
        )


@dataclass(frozen=True)
class ExitOptions:
    """How the rows of one batch may leave. B rows; tensors on the executor's device.

    criterion    decides between min_depth and max_depth
    threshold    fp32 [B]
    min_depth    int32 [B]: no row leaves before this layer; the number of layers removes all exits
    max_depth    int32 [B], exit layers: no row goes past this one
    exit_layers  int32 [B], for the scripted criterion
    shallowest, deepest  the least min_depth and the greatest max_depth, on the host
    uniform      every row has the same min_depth and max_depth
    """

    criterion: Criterion
    threshold: Tensor
    min_depth: Tensor
    max_depth: Tensor
    exit_layers: Tensor | None
    shallowest: int
    deepest: int
    uniform: bool


class RowOutputs(NamedTuple):
    """One entry a row of the batch, in the batch's order: logits fp32 [B, C], exit_layers int32 [B], exit_probs [B]."""

    logits: Tensor
    exit_layers: Tensor
    exit_probs: Tensor
