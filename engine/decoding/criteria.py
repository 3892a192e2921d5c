"""When a token leaves: ConsistentEE's policy, and the measures of CALM (Schuster et al. 2022), its paper's baseline.

Every measure is a number that a threshold in [0, 1] is compared with: a token leaves when it is above, so at 1 nobody
leaves early and at 0 everybody does, but where a measure is exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from engine.criteria import log_odds
from engine.models.decoder import MultiExitDecoder

# softmax: the exit's two largest probabilities, first less second (CALM 3.5, "softmax response"). Costs the whole head
# at every exit. saturation: cosine of the hidden states behind this layer and behind the one before ("hidden-state
# saturation"), negative ones as 0. Costs nothing, and knows nothing of the answer.
# classifier: sigmoid of one linear layer on the final-normed state, the same at every exit, trained to tell whether
# this exit's token is the last one's ("early-exit classifier"); its checkpoint must hold it.
CRITERIA = ("policy", "scripted", "softmax", "saturation", "classifier")


def check_criterion(model: MultiExitDecoder, criterion: str) -> None:
    """ValueError where it is unknown, or the model lacks what it asks for."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    if criterion == "classifier" and not model.config.early_exit_classifier:
        raise ValueError(
            "criterion 'classifier' needs a model with CALM's early-exit classifier, this one has none: train one with "
            "early_exit_classifier.epochs, or choose another criterion"
        )


def measure(
    model: MultiExitDecoder, criterion: str, exit_index: int, n: Tensor, hidden: Tensor, before: Tensor
) -> Tensor:
    """The measure (rows,) in [0, 1] of one exit; for the policy its logit z, to be compared with logit(threshold).

    n, hidden, before (rows, H): final-normed states, and hidden states behind the exit's layer and the one before
    """
    if criterion in ("policy", "scripted"):
        return model.policy_logits(exit_index, n)
    if criterion == "classifier":
        return torch.sigmoid(model.classifier_logits(n))
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if criterion == "saturation":
        return cosine_similarity(hidden.to(wide), before.to(wide), dim=-1).clamp(0, 1)
    top = model.exit_logits(exit_index, n).to(wide).softmax(-1).topk(2, dim=-1).values
    return top[:, 0] - top[:, 1]


def decide(
    model: MultiExitDecoder,
    criterion: str,
    exit_index: int,
    n: Tensor,
    hidden: Tensor,
    before: Tensor,
    thresholds: list[float],
) -> tuple[list[bool], list[float]]:
    """Which rows are above their thresholds, and what they are said to be: exit probabilities, or the measure."""
    found = measure(model, criterion, exit_index, n, hidden, before)
    limits = torch.tensor(thresholds, dtype=torch.float32, device=found.device)
    if criterion in ("policy", "scripted"):
        return (found > log_odds(limits)).tolist(), torch.sigmoid(found).tolist()
    return (found > limits).tolist(), found.tolist()
