"""ConsistentEE: the policy network of each layer decides (paper: exit when the policy says Exit, pi > 0.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.criteria.base import Criterion, ExitReading, Swept


def log_odds(probabilities: Tensor) -> Tensor:
    """log(p / (1 - p)): torch.logit's own formula, by operations that do not share 40 numbers among threads.

    torch's threads go on spinning when they have nothing to do, for a millisecond and more: a tokenizer that wants the
    cores for the next part of a batch then takes twice as long (16 cores).
    """
    return torch.log(probabilities / (1 - probabilities))


class Policy(Criterion):
    """Leave when sigmoid(z) > threshold, compared as z > logit(threshold) in fp32.

    0.5 is the trained rule; other thresholds are a cheap knob on one set of weights (ours: the paper trains one policy
    per point of its curves). At 1 nobody leaves before the last layer, at 0 everybody leaves at the first exit.
    """

    name = "policy"
    needs_policy = True
    stateless = True
    swept = Swept(0.0, 1.0, higher_is_deeper=True)
    policy_threshold = "threshold_logit"

    def begin(self, threshold: Tensor, exit_layers: Tensor | None) -> dict[str, Tensor]:
        return {"threshold_logit": log_odds(threshold)}

    def decide(self, reading: ExitReading, state: dict[str, Tensor]) -> Tensor:
        return reading.policy_logits > state["threshold_logit"]
