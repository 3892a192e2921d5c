"""What a run returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from engine.config import EarlyExitConfig


@dataclass(frozen=True)
class RunStats:
    """Figures of one run.

    mean_depth      mean exit layer over the rows (layers that ran); nan for no rows
    saved_layers    1 - mean_depth / num_layers: a depth figure, not a speed-up
    exit_histogram  {layer: rows that left there}, every exit layer listed
    wall_time_s     from the call to logits, exit layers and exit probabilities on the host, tokenisation included
    """

    rows: int
    tokens: int
    num_layers: int
    mean_depth: float
    saved_layers: float
    exit_histogram: dict[int, int]
    micro_batches: int
    wall_time_s: float


@dataclass(frozen=True, repr=False, eq=False)
class Classification:
    """One entry a row, in the caller's order. N rows, C classes; tensors live on the host.

    labels              class names
    label_ids           int64 [N]
    probabilities       fp32 [N, C], softmax of logits
    logits              fp32 [N, C], of the internal classifier the row left through
    exit_layers         int32 [N], layers that ran for the row, 1 ... num_layers
    exit_probabilities  fp32 [N], sigmoid of the policy logit at the exit; 1 where the row had to leave (the last layer,
                        its max_depth); nan where the criterion computes no policy
    stats               RunStats, of ``tokens``, ``micro_batches`` and ``wall_time_s``

    Labels, probabilities and stats are worked out when they are first asked for.
    """

    logits: Tensor
    exit_layers: Tensor
    exit_probabilities: Tensor
    config: EarlyExitConfig
    tokens: int
    micro_batches: int
    wall_time_s: float

    def __len__(self) -> int:
        return len(self.logits)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self.labels[:3])) + (", ..." if len(self) > 3 else "")
        return f"Classification({len(self)} rows: [{shown}], mean depth {self.stats.mean_depth:.2f})"

    @cached_property
    def label_ids(self) -> Tensor:
        return self.logits.argmax(-1)

    @cached_property
    def labels(self) -> list[str]:
        return list(map(self.config.labels.__getitem__, self.label_ids.tolist()))

    @cached_property
    def probabilities(self) -> Tensor:
        return _softmax(self.logits)

    @cached_property
    def stats(self) -> RunStats:
        config, layers = self.config, self.exit_layers.tolist()
        mean_depth = sum(layers) / len(layers) if layers else math.nan
        return RunStats(
            rows=len(layers),
            tokens=self.tokens,
            num_layers=config.num_layers,
            mean_depth=mean_depth,
            saved_layers=1 - mean_depth / config.num_layers,
            exit_histogram={layer: layers.count(layer) for layer in config.exit_layers},
            micro_batches=self.micro_batches,
            wall_time_s=self.wall_time_s,
        )


def _softmax(logits: Tensor) -> Tensor:
    """Over classes: fp32 [N, C] on the host. torch's softmax and exp wake all threads for anything above one row, which
    takes 6 ms where another process spins on the cores; numpy's exp wakes none, at 25 us more where they are free."""
    if len(logits) <= 1:
        return torch.softmax(logits, -1)
    with np.errstate(all="ignore"):  # the caller's setting is for the caller's arithmetic
        powers = torch.from_numpy(np.exp((logits - logits.amax(-1, True)).numpy()))
    return powers.div_(powers.sum(-1, True))
