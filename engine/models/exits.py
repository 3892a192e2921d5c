"""Internal classifiers and policy networks, one pair per exit, and the pooler in front of them.

method: ConsistentEE (AAAI 2024), section "Model"; the shapes of the policy (H -> 32 -> 1, GELU) and the shared pooler
are those of the authors' code, which the paper leaves open.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import EarlyExitConfig

INIT_STD = 0.02


class ExitOutputs(NamedTuple):
    """What all exits say of one batch. B rows, E exits, H hidden size, C classes.

    states         [E, B, H]  what classifier and policy of each exit read (before dropout)
    logits         [B, E, C]  internal classifiers
    policy_logits  [B, E-1]   z_l; sigmoid(z_l) is the exit probability. The last exit has none: it always exits
    """

    states: Tensor
    logits: Tensor
    policy_logits: Tensor


class ExitPolicy(nn.Module):
    """Two-layer MLP H -> P -> 1 with erf-GELU; returns the policy logit z, shape [...]."""

    def __init__(self, hidden_size: int, policy_hidden_size: int):
        super().__init__()
        self.dense = nn.Linear(hidden_size, policy_hidden_size)
        self.out = nn.Linear(policy_hidden_size, 1)

    def forward(self, state: Tensor) -> Tensor:
        return self.out(F.gelu(self.dense(state))).squeeze(-1)


class ExitHeads(nn.Module):
    """All exits of a model: poolers, classifiers (E of them) and policies (E-1: none at the last layer)."""

    def __init__(self, config: EarlyExitConfig, hidden_size: int):
        super().__init__()
        self.config = config
        num_poolers = {"none": 0, "shared": 1, "per_layer": config.num_exits}[config.pooler]
        self.poolers = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(num_poolers))
        self.classifiers = nn.ModuleList(nn.Linear(hidden_size, config.num_labels) for _ in config.exit_layers)
        self.policies = nn.ModuleList(
            ExitPolicy(hidden_size, config.policy_hidden_size) for _ in config.exit_layers[:-1]
        )
        self.dropout = nn.Dropout(config.classifier_dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)

    def pooler(self, exit_index: int) -> nn.Linear | None:
        """The pooler that exit ``exit_index`` (0 ... E-1) reads through, None where it reads the hidden state."""
        if not self.poolers:
            return None
        return self.poolers[exit_index if self.config.pooler == "per_layer" else 0]

    def state(self, exit_index: int, first_token: Tensor) -> Tensor:
        """first_token [..., H], the first token of the exit's layer -> the exit's state [..., H]."""
        pooler = self.pooler(exit_index)
        return first_token if pooler is None else torch.tanh(pooler(first_token))

    def classify(self, exit_index: int, state: Tensor) -> Tensor:
        """Class logits [..., C] of one exit; dropout acts in training mode only."""
        return self.classifiers[exit_index](self.dropout(state))

    def forward(self, first_tokens: list[Tensor]) -> ExitOutputs:
        """first_tokens: E tensors [B, H], one per exit -> what every exit says."""
        states = [self.state(k, h) for k, h in enumerate(first_tokens)]
        logits = torch.stack([self.classify(k, s) for k, s in enumerate(states)], dim=1)
        if self.policies:
            policy_logits = torch.stack([policy(s) for policy, s in zip(self.policies, states, strict=False)], dim=1)
        else:
            policy_logits = logits.new_zeros(logits.shape[0], 0)
        return ExitOutputs(torch.stack(states), logits, policy_logits)

    @torch.no_grad()
    def reset_policies(self, uniform_hazard: bool = False) -> None:
        """Fresh policies: N(0, 0.02^2) weights, zero biases, so that every exit probability starts near 0.5.

        uniform_hazard (ours, not the paper's): bias -ln(E-1-k) at exit k = 0 ... E-2, so that each of the E exits is
        equally likely at the start; with zero biases the reach probability halves per exit and deep policies see
        almost no gradient at first.
        """
        for k, policy in enumerate(self.policies):
            for linear in (policy.dense, policy.out):
                nn.init.normal_(linear.weight, std=INIT_STD)
                nn.init.zeros_(linear.bias)
            if uniform_hazard:
                policy.out.bias.fill_(-math.log(self.config.num_exits - 1 - k))
