"""What goes into an executor and what comes out: frozen records, passed as arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.criteria import Criterion


@dataclass(frozen=True, eq=False)
class TokenRows:
    """N tokenised rows end to end, none of them empty: T tokens. Read only: ids may be the caller's own memory.

    numpy, because it costs a third of torch per small operation and starts no threads for a large one.

    ids      int64 [T], contiguous
    types    int64 [T], contiguous, segment ids; None for zeros
    lengths  of each row, N in all
    """

    ids: np.ndarray
    types: np.ndarray | None
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @cached_property
    def cu_seqlens(self) -> np.ndarray:
        """int64 [N + 1]: row i is ids[cu_seqlens[i] : cu_seqlens[i + 1]]."""
        return np.array([0, *accumulate(self.lengths)])

    def positions(self, first: int) -> np.ndarray:
        """int64 [tokens]: each token's place in its row, from ``first`` on."""
        places = np.arange(first, first + self.num_tokens, dtype=np.int64)
        if len(self) > 1:
            places -= np.repeat(self.cu_seqlens[:-1], self.lengths)
        return places

    @cached_property
    def segments(self) -> np.ndarray | None:
        """types, None where all are 0."""
        return self.types if self.types is not None and self.types.any() else None

    def __getitem__(self, rows: slice) -> TokenRows:
        """Neighbouring rows, without copying a token."""
        start, end, _ = rows.indices(len(self))
        tokens = slice(self.cu_seqlens[start], self.cu_seqlens[end])
        types = None if self.types is None else self.types[tokens]
        return TokenRows(self.ids[tokens], types, self.lengths[start:end])

    def take(self, order: np.ndarray) -> TokenRows:
        """All rows in another order."""
        lengths = np.array(self.lengths)[order]
        # The tokens of a row move by as much as its start does.
        moves = self.cu_seqlens[order] - (np.cumsum(lengths) - lengths)
        index = np.arange(len(self.ids)) + np.repeat(moves, lengths)
        return TokenRows(self.ids[index], None if self.types is None else self.types[index], tuple(lengths.tolist()))


def ladder(n: int, exact: bool = False) -> int:
    """The next allowed row count from ``n`` up: steps of 1 to 8, 8 to 64, 16 to 256, 32 to 1 024, then 64; any where
    ``exact``, that is where our own kernel serves: it plans nothing.

    oneDNN plans (and compiles) a product anew for every row count it has not met: 0.25 to 0.65 ms each, more than the
    product itself. Survivors come in any number; on a ladder there are 60 counts below 2 048, at about 2 % more rows.
    """
    if exact:
        return n
    for limit, step in ((8, 1), (64, 8), (256, 16), (1024, 32)):
        if n <= limit:
            return -(-n // step) * step
    return -(-n // 64) * 64


def capacity(rows: int, tokens: int, exact: bool = False) -> int:
    """Rows of a buffer for ``rows`` sequences of ``tokens`` tokens in all: on the ladder, with room behind the first
    tokens for the others' own step of it."""
    return ladder(rows + ladder(tokens - rows, exact), exact)


def _lead_order(cu_seqlens: np.ndarray, size: int) -> np.ndarray:
    """int64 [size]: where the tokens of lead layout stand end to end; spare rows repeat token 0."""
    n, tokens = len(cu_seqlens) - 1, int(cu_seqlens[-1])
    others = np.ones(tokens, bool)
    others[cu_seqlens[:-1]] = False
    order = np.zeros(size, np.int64)
    order[:n], order[n:tokens] = cu_seqlens[:-1], np.flatnonzero(others)
    return order


class AtOnce:
    """For executors that are done with a batch when ``run`` returns."""

    def submit(self, rows: TokenRows, options: ExitOptions) -> Callable[[], RowOutputs]:
        """Start a batch, options on the host; calling what comes back waits for its results: here they are there."""
        outputs = self.run(rows, options)
        return lambda: outputs


@dataclass(frozen=True)
class PackedBatch:
    """B rows of n_1 ... n_B tokens (T in all) without padding, in the *lead layout*, in buffers of R >= T rows.

    In every [R, ...] buffer rows 0 ... B-1 are the first tokens; the other tokens of row i follow at
    B + (cu_seqlens[i] - i) ... B + (cu_seqlens[i+1] - i - 1). First tokens decide and are classified, the others only
    serve them: each group is one contiguous slice, so that serving the first tokens first costs no gather. Rows from T
    on are spare (``capacity``): they are computed and never read.

    input_ids       int64 [R]
    token_type_ids  int64 [R], None where all are 0
    positions       int64 [R], from the family's first position on
    cu_seqlens      int32 [B + 1]
    lengths         the n_i, on the host

    Read only: on a CPU input_ids and token_type_ids may be the caller's own memory.
    """

    input_ids: Tensor
    token_type_ids: Tensor | None
    positions: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def from_rows(cls, rows: TokenRows, first_position: int, device: torch.device, exact: bool = False) -> PackedBatch:
        """rows: one or more. exact: see ``ladder``."""
        n, tokens = len(rows), rows.num_tokens
        cu_seqlens = rows.cu_seqlens.astype(np.int32)
        positions = rows.positions(first_position)
        types, size = rows.segments, capacity(n, tokens, exact)
        order = None  # as they stand: so does one row
        if n > 1 or size > tokens:
            order = _lead_order(cu_seqlens, size)

        def tensor(values: np.ndarray) -> Tensor:
            given = torch.from_numpy(values)
            return given if device.type == "cpu" else given.to(device)

        def pack(values: np.ndarray) -> Tensor:
            return tensor(values if order is None else values[order])

        return cls(
            input_ids=pack(rows.ids),
            token_type_ids=None if types is None else pack(types),
            positions=pack(positions),
            cu_seqlens=tensor(cu_seqlens),
            lengths=rows.lengths,
        )


@dataclass(frozen=True, eq=False)
class ExitOptions:
    """How the rows of one batch may leave. B rows; tensors on the executor's device. A record equals itself alone.

    criterion    decides between min_depth and max_depth
    threshold    fp32 [B]
    min_depth    int32 [B]: no row leaves before this layer; the number of layers removes all exits
    max_depth    int32 [B], exit layers: no row goes past this one
    exit_layers  int32 [B], for the scripted criterion
    shallowest, deepest  the least min_depth and the greatest max_depth, on the host
    uniform      every row has the same min_depth and max_depth
    exits        where exits stand, but for the last layer's
    expect       {layer: expected share of the rows reaching it that leave there} for all of exits. Plans the order of
                 work, and never changes a result beyond rounding
    """

    criterion: Criterion
    threshold: Tensor
    min_depth: Tensor
    max_depth: Tensor
    exit_layers: Tensor | None
    shallowest: int
    deepest: int
    uniform: bool
    exits: tuple[int, ...]
    expect: Callable[[], Mapping[int, float]]

    @cached_property
    def leave_rates(self) -> Mapping[int, float]:
        """``expect``, worked out where somebody plans by it."""
        return self.expect()

    @cached_property
    def reads(self) -> tuple[int, ...]:
        """Layers in front of ``deepest`` whose exit is read."""
        return tuple(layer for layer in self.exits if layer < self.deepest and self.reads_exit(layer))

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

    @cached_property
    def no_comparison(self) -> str | None:
        """Why a kernel that compares policy logits with thresholds, or a script with the layer, cannot decide; None
        where it can."""
        criterion = self.criterion
        if criterion.policy_threshold is None and criterion.name != "scripted":
            return f"criterion {criterion.name!r} is neither a threshold on the policy nor a script"
        if not self.uniform:
            # An exit at which some row's limit may end is read for all rows, and the kernel then decides about all.
            exits = (layer for layer in self.exits if self.shallowest <= layer < self.deepest)
            if not all(map(criterion.may_decide, exits)):
                return f"criterion {criterion.name!r} decides at some exits only, and rows have limits of their own"
        return None

    @cached_property
    def leave_rates_read(self) -> Tensor:
        """fp32 [deepest]: ``leave_rates`` of layers 1 ... deepest; -1 where no exit stands that matters to any row."""
        rates = [-1.0] * self.deepest
        for layer in self.reads:
            rates[layer - 1] = self.leave_rates[layer]
        return torch.tensor(rates)

    @cached_property
    def depth_limits(self) -> tuple[Tensor | None, Tensor | None]:
        """min_depth and max_depth, contiguous; None where ``leave_rates_read`` and ``deepest`` say it all."""
        return (None, None) if self.uniform else (self.min_depth.contiguous(), self.max_depth.contiguous())

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
