"""What goes into an executor and what comes out: frozen records, passed as arguments."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from engine.criteria import Criterion


class TokenRow(NamedTuple):
    """One tokenised row: ids, and segment ids where any is not 0."""

    ids: list[int]
    types: list[int] | None


def ladder(n: int, exact: int = 0) -> int:
    """The next allowed row count from ``n`` up: any up to ``exact``, then steps of 1 to 8, 8 to 64, 16 to 256, 32 to
    1 024, then 64.

    exact: ``own_rows``, the counts that our own kernel serves: it plans nothing. oneDNN plans (and compiles) a product
    anew for every row count it has not met: 0.25 to 0.65 ms each, more than the product itself. Survivors come in any
    number; on a ladder there are 60 counts below 2 048, at about 2 % more rows.
    """
    if n <= exact:
        return n
    for limit, step in ((8, 1), (64, 8), (256, 16), (1024, 32)):
        if n <= limit:
            return -(-n // step) * step
    return -(-n // 64) * 64


def capacity(rows: int, tokens: int, exact: int = 0) -> int:
    """Rows of a buffer for ``rows`` sequences of ``tokens`` tokens in all: on the ladder, with room behind the first
    tokens for the others' own step of it."""
    return ladder(rows + ladder(tokens - rows, exact), exact)


def _integers(values: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.tensor, for int32 or int64 and a list that is not empty: 16 us instead of 130 for 450 integers."""
    tensor = torch.frombuffer(array("i" if dtype == torch.int32 else "q", values), dtype=dtype)
    return tensor if device.type == "cpu" else tensor.to(device)


class AtOnce:
    """For executors that are done with a batch when ``run`` returns. batch_layout: how they want it."""

    batch_layout = "lead"

    def submit(self, batch: PackedBatch, options: ExitOptions) -> Callable[[], RowOutputs]:
        """Start a batch; calling what comes back waits for its results: here they are already there."""
        outputs = self.run(batch, options)
        return lambda: outputs


@dataclass(frozen=True)
class PackedBatch:
    """B rows of n_1 ... n_B tokens (T in all) without padding, in the *lead layout*, in buffers of R >= T rows.

    In every [R, ...] buffer rows 0 ... B-1 are the first tokens; the other tokens of row i follow at
    B + (cu_seqlens[i] - i) ... B + (cu_seqlens[i+1] - i - 1). First tokens decide and are classified, the others only
    serve them: each group is one contiguous slice, so that serving the first tokens first costs no gather. Rows from T
    on are spare (``capacity``): they are computed and never read.

    With layout "rows" the tokens of each row stand end to end instead, row i at cu_seqlens[i] ... cu_seqlens[i+1] - 1,
    and there are no spare rows.

    input_ids       int64 [R]
    token_type_ids  int64 [R], None where all are 0
    positions       int64 [R], from the family's first position on
    cu_seqlens      int32 [B + 1]
    lengths         the n_i, on the host
    """

    input_ids: Tensor
    token_type_ids: Tensor | None
    positions: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    layout: str = "lead"

    @classmethod
    def from_rows(
        cls, rows: list[TokenRow], first_position: int, device: torch.device, exact: int = 0, layout: str = "lead"
    ) -> PackedBatch:
        """rows: one or more, none of them empty. exact: see ``ladder``."""
        sequences = [row.ids for row in rows]
        lengths = tuple(map(len, sequences))
        tokens = sum(lengths)
        lead = layout == "lead"
        spare = capacity(len(rows), tokens, exact) - tokens if lead else 0
        count = list(range(first_position, first_position + max(lengths)))

        def pack(sequences: list[list[int]], filler: int) -> Tensor:
            packed = [s[0] for s in sequences] if lead else []
            for s in sequences:
                packed += s[1:] if lead else s
            return _integers(packed + [filler] * spare, torch.int64, device)

        types = None
        if any(row.types is not None for row in rows):
            types = pack([row.types or [0] * len(row.ids) for row in rows], 0)
        return cls(
            input_ids=pack(sequences, sequences[0][0]),
            token_type_ids=types,
            positions=pack([count[:n] for n in lengths], first_position),
            cu_seqlens=_integers([0, *accumulate(lengths)], torch.int32, device),
            lengths=lengths,
            layout=layout,
        )

    def to_lead(self, device: torch.device) -> PackedBatch:
        """This batch in lead layout on ``device``, without spare rows."""
        if self.layout == "lead":
            return self
        starts = self.cu_seqlens[:-1].long()
        others = torch.ones(sum(self.lengths), dtype=torch.bool)
        others[starts] = False
        order = torch.cat([starts, others.nonzero()[:, 0]])
        fields = (self.input_ids, self.token_type_ids, self.positions)
        ids, types, positions = (None if x is None else x[order].to(device) for x in fields)
        return PackedBatch(ids, types, positions, self.cu_seqlens.to(device), self.lengths)


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
    leave_rates  {layer: expected share of the rows reaching it that leave there}. Plans the order of work, and never
                 changes a result beyond rounding
    """

    criterion: Criterion
    threshold: Tensor
    min_depth: Tensor
    max_depth: Tensor
    exit_layers: Tensor | None
    shallowest: int
    deepest: int
    uniform: bool
    leave_rates: Mapping[int, float]

    def begin(self) -> dict[str, Tensor]:
        """The criterion's fresh per-row state. With state, it may write into what it gets: these options serve other
        runs too. Without, one start serves all runs."""
        return self._start if self.criterion.stateless else self._begin()

    @cached_property
    def _start(self) -> dict[str, Tensor]:
        return self._begin()

    def _begin(self) -> dict[str, Tensor]:
        script = None if self.exit_layers is None else self.exit_layers.clone()
        return self.criterion.begin(self.threshold.clone(), script)

    def to(self, device: torch.device) -> ExitOptions:
        """The same on ``device``."""
        if device == self.threshold.device:
            return self
        script = self.exit_layers
        return replace(
            self,
            threshold=self.threshold.to(device),
            min_depth=self.min_depth.to(device),
            max_depth=self.max_depth.to(device),
            exit_layers=None if script is None else script.to(device),
        )

    def reads_exit(self, layer: int) -> bool:
        """Whether the exit at ``layer`` matters to any row: to decide, or because a row's max_depth may end there."""
        if not self.uniform and layer >= self.shallowest:
            return True
        # A criterion with state counts layers: it sees all of them, whatever other rows of the batch allow.
        return self.criterion.may_decide(layer) and (layer >= self.shallowest or not self.criterion.stateless)


class RowOutputs(NamedTuple):
    """One entry a row of the batch, in the batch's order: logits fp32 [B, C], exit_layers int32 [B], exit_probs [B]."""

    logits: Tensor
    exit_layers: Tensor
    exit_probs: Tensor
