"""What a run returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RunStats:
    """Figures of one run.

    mean_depth      mean exit layer over the rows (layers that ran); nan for no rows
    saved_layers    1 - mean_depth / num_layers: a depth figure, not a speed-up
    exit_histogram  {layer: rows that left there}, every exit layer listed
    wall_time_s     from the call to the results, tokenisation included
    """

    rows: int
    tokens: int
    num_layers: int
    mean_depth: float
    saved_layers: float
    exit_histogram: dict[int, int]
    micro_batches: int
    wall_time_s: float


@dataclass(frozen=True)
class Classification:
    """One entry a row, in the caller's order. N rows, C classes; tensors live on the host.

    labels              class names
    label_ids           int64 [N]
    probabilities       fp32 [N, C], softmax of logits
    logits              fp32 [N, C], of the internal classifier the row left through
    exit_layers         int32 [N], layers that ran for the row, 1 ... num_layers
    exit_probabilities  fp32 [N], sigmoid of the policy logit at the exit; 1 where the row had to leave (the last layer,
                        its max_depth); nan where the criterion computes no policy
    """

    labels: list[str]
    label_ids: Tensor
    probabilities: Tensor
    logits: Tensor
    exit_layers: Tensor
    exit_probabilities: Tensor
    stats: RunStats

    def __len__(self) -> int:
        return len(self.labels)
