"""Gradients of the exit policy: the exact closed form (default) and REINFORCE (ConsistentEE, Eq. 5).

Shapes used throughout: N instances, E exits, K samples. ``z`` (N, E-1) are policy logits, with
pi = sigmoid(z) = P(Exit | state); the last exit is forced and has no policy. ``rewards`` (N, E) are
constants. Half precision is computed in fp32; fp64 stays fp64. J is the expected reward.

Because instances do not interact and the exit only selects which head is read, one full pass gives every
reward, so J can be written out instead of sampled. That closed form is our addition to the paper: exact, no
variance, no baseline. REINFORCE is kept as the paper's own path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

BEHAVIOURS = ("bernoulli", "eps_greedy", "eps_mixture")
BASELINES = ("leave_one_out", "mean", "none")


def exit_log_probs(z: Tensor) -> Tensor:
    """ln P(exit at k), (N, E): ln pi_k + sum_{j<k} ln(1 - pi_j), where pi of the last exit is 1.

    The same number is the log-probability of the trajectory that leaves at k, since a forced exit is no
    action. Sums of logsigmoid, so no saturated logit gives NaN.
    """
    z = _as_float(z)
    log_reach = pad(logsigmoid(-z).cumsum(1), (1, 0))
    return log_reach + pad(logsigmoid(z), (0, 1))


def expected_reward(z: Tensor, rewards: Tensor) -> Tensor:
    """J of every instance, (N,): sum_k P_k R(k). Differentiable in z."""
    _check_pair(z, rewards)
    return (exit_log_probs(z).exp() * rewards.detach()).sum(1)


def policy_value(z: Tensor, rewards: Tensor) -> Tensor:
    """V (N, E), the expected reward of a row that has reached exit k, without gradient.

    V_last = R(last); V_k = pi_k R(k) + (1 - pi_k) V_{k+1}; so V_first = J.
    """
    _check_pair(z, rewards)
    exit_prob = _as_float(z.detach()).sigmoid()
    values = [rewards.detach()[:, -1].to(exit_prob.dtype)]
    for k in reversed(range(z.shape[1])):
        values.append(torch.lerp(values[-1], rewards.detach()[:, k].to(exit_prob.dtype), exit_prob[:, k]))
    return torch.stack(values[::-1], dim=1)


def closed_form_gradient(z: Tensor, rewards: Tensor) -> Tensor:
    """dJ/dz of every instance, (N, E-1): S_k pi_k (1 - pi_k) (R(k) - V_{k+1}), S_k = P(reach k).

    Read: raise pi_k iff leaving now beats the expected value of going on.
    """
    values = policy_value(z, rewards)
    z = _as_float(z.detach())
    log_reach = pad(logsigmoid(-z).cumsum(1), (1, 0))[:, :-1]
    weight = (log_reach + logsigmoid(z) + logsigmoid(-z)).exp()
    return weight * (rewards.detach()[:, :-1] - values[:, 1:])


def closed_form_loss(z: Tensor, rewards: Tensor, entropy_bonus: float = 0.0) -> Tensor:
    """-mean(J) - entropy_bonus * mean(H), a scalar; H is the entropy in nats of the exit distribution.

    H = -sum_k P_k ln P_k = sum_k S_k H(pi_k): undecided policies at exits nobody reaches earn nothing.
    """
    if not (math.isfinite(entropy_bonus) and entropy_bonus >= 0):
        raise ValueError(f"entropy_bonus must be a finite number >= 0, got {entropy_bonus}; 0 turns it off")
    _check_pair(z, rewards)
    log_probs = exit_log_probs(z)
    probs = log_probs.exp()
    objective = (probs * rewards.detach()).sum(1)
    if entropy_bonus:
        # ln P may underflow to -inf where P = 0; the floor keeps 0 * ln 0 at 0, in the gradient too.
        log_probs = log_probs.clamp_min(torch.finfo(log_probs.dtype).min)
        objective = objective - entropy_bonus * (probs * log_probs).sum(1)
    return -objective.mean()


def decisiveness(z: Tensor) -> Tensor:
    """mean max(pi, 1 - pi), a scalar in [0.5, 1]. J is stochastic but inference thresholds pi, so a value well
    below 1 says that the greedy depth may differ from the trained one. NaN where there is no policy (E = 1)."""
    return _as_float(z.detach()).abs().sigmoid().mean()


def bce_warm_start_targets(z: Tensor, rewards: Tensor) -> Tensor:
    """Targets (N, E-1) in {0, 1} for binary cross-entropy on z: 1 where R(k) > V_{k+1} under the current policy.

    This is the sign of the exact gradient without its vanishing weight S_k pi_k (1 - pi_k). Frozen: recompute
    between passes, since V moves with the policy.
    """
    values = policy_value(z, rewards)
    return (rewards.detach()[:, :-1] > values[:, 1:]).to(values.dtype)


def uniform_hazard_bias(exit_count: int) -> Tensor:
    """Policy biases (E-1,), fp32, that make every exit equally likely: -ln(E - l) for the l-th exit, l = 1..E-1.

    Our addition: with the paper's zero biases reach halves at every exit, so deep ones hardly learn at first.
    """
    if exit_count < 1:
        raise ValueError(f"exit_count must be at least 1, got {exit_count}")
    return -torch.arange(exit_count - 1, 0, -1, dtype=torch.float32).log()


@dataclass(frozen=True)
class EpsilonSchedule:
    """epsilon(t) = end + (start - end) exp(-t / tau). The authors count layer calls, not optimiser steps, as t."""

    start: float = 0.05
    end: float = 0.005
    tau: float = 1000.0

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            _check_epsilon(getattr(self, name), name)
        if not self.tau > 0:
            raise ValueError(f"tau must be positive, got {self.tau}")

    def __call__(self, step: int) -> float:
        return self.end + (self.start - self.end) * math.exp(-step / self.tau)


@dataclass(frozen=True, eq=False)
class SampledExits:
    """index (K, N) int64: exit of each sample, 0..E-1. log_behaviour (K, N): log-probability of that trajectory
    under the sampling distribution, or None where no importance ratio is due."""

    index: Tensor
    log_behaviour: Tensor | None = None


@torch.no_grad()
def sample_exits(
    z: Tensor,
    num_samples: int,
    behaviour: str = "bernoulli",
    epsilon: float = 0.0,
    generator: torch.Generator | None = None,
) -> SampledExits:
    """Draw ``num_samples`` exits per instance; ``generator`` lives on z's device.

    bernoulli    act by pi. Unbiased; epsilon must be 0
    eps_greedy   with 1 - epsilon Exit iff pi > 0.5, else a fair coin: the paper's words and the authors' code.
                 Biased, since no ratio corrects it; at epsilon 0 all samples agree and the gradient vanishes
    eps_mixture  act by mu = (1 - epsilon) pi + epsilon / 2 and correct by pi / mu. Unbiased unless clipped (ours)
    """
    if behaviour not in BEHAVIOURS:
        raise ValueError(f"behaviour must be one of {BEHAVIOURS}, got {behaviour!r}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    _check_epsilon(epsilon, "epsilon")
    if behaviour == "bernoulli" and epsilon:
        raise ValueError(f"behaviour 'bernoulli' has no epsilon, got {epsilon}: leave it 0 or use 'eps_mixture'")
    z = _as_float(z)
    greedy_or_policy = (z > 0).to(z.dtype) if behaviour == "eps_greedy" else z.sigmoid()
    exit_prob = (1 - epsilon) * greedy_or_policy + epsilon / 2
    draws = torch.rand(num_samples, *z.shape, generator=generator, device=z.device, dtype=z.dtype)
    index = pad((draws < exit_prob).int(), (0, 1), value=1).argmax(-1)
    if behaviour != "eps_mixture":
        return SampledExits(index)
    log_mu = torch.logaddexp(logsigmoid(z) + _log(1 - epsilon), z.new_tensor(_log(epsilon / 2)))
    log_not_mu = torch.logaddexp(logsigmoid(-z) + _log(1 - epsilon), z.new_tensor(_log(epsilon / 2)))
    log_behaviour = pad(log_not_mu.cumsum(1), (1, 0)) + pad(log_mu, (0, 1))
    return SampledExits(index, log_behaviour.gather(1, index.T).T)


def reinforce_loss(
    z: Tensor,
    rewards: Tensor,
    exits: SampledExits,
    baseline: str = "leave_one_out",
    ratio_clip: float | None = 10.0,
) -> Tensor:
    """-mean over K samples and N instances of w (R - b) ln P(trajectory), a scalar (Eq. 5).

    The trajectory's log-probability is sum ln(1 - pi) plus ln pi of the exit; the forced last exit adds no term
    (the authors' code adds one there, and starts from random noise; we follow the paper).
    b: ``mean`` of the K rewards of the same instance (authors' code, not in the paper; shrinks the gradient by
    (K-1)/K), ``leave_one_out`` (ours, unbiased, needs K >= 2), ``none``.
    w: 1, or min(P / mu, ratio_clip) where the exits carry ``log_behaviour``. P / mu never exceeds
    (1 - epsilon)^-(E-1), 1.76 at epsilon 0.05 and 12 exits, so the default clip seldom acts; None turns it off.
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline must be one of {BASELINES}, got {baseline!r}")
    if ratio_clip is not None and not ratio_clip > 0:
        raise ValueError(f"ratio_clip must be positive or None, got {ratio_clip}")
    _check_pair(z, rewards)
    num_samples, num_rows = exits.index.shape
    if num_rows != len(z):
        raise ValueError(f"exits were sampled for {num_rows} instances, z has {len(z)}")
    if baseline == "leave_one_out" and num_samples < 2:
        raise ValueError("baseline 'leave_one_out' needs num_samples >= 2, got 1: draw more or use 'none'")
    reward = rewards.detach().gather(1, exits.index.T).T
    log_prob = exit_log_probs(z).gather(1, exits.index.T).T
    if baseline == "mean":
        advantage = reward - reward.mean(0)
    elif baseline == "leave_one_out":
        advantage = (reward - reward.mean(0)) * (num_samples / (num_samples - 1))
    else:
        advantage = reward
    if exits.log_behaviour is not None:
        advantage = advantage * (log_prob.detach() - exits.log_behaviour).exp().clamp(max=ratio_clip or math.inf)
    return -(advantage * log_prob).mean()


def _as_float(z: Tensor) -> Tensor:
    if z.ndim != 2:
        raise ValueError(f"policy logits must have shape (N, E-1), got {tuple(z.shape)}")
    return z if z.dtype == torch.float64 else z.float()


def _check_pair(z: Tensor, rewards: Tensor) -> None:
    if z.ndim != 2 or rewards.shape != (z.shape[0], z.shape[1] + 1):
        raise ValueError(
            f"z must be (N, E-1) and rewards (N, E), got {tuple(z.shape)} and {tuple(rewards.shape)}: "
            "the last exit has a reward but no policy logit"
        )


def _check_epsilon(epsilon: float, name: str) -> None:
    if not 0 <= epsilon <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {epsilon}")


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
