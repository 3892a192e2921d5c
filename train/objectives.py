"""Losses and rewards of ConsistentEE (AAAI 2024) on plain tensors; no model is known here.

Shapes: N instances, E exits, C classes. ``exit_layers`` are the layer numbers of the exits, ascending in
1..num_layers, the last one num_layers. Depth in every formula is the *layer number*, never the exit index, so
the paper's formulas (an exit at every layer) hold for any list of exits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.train.policy_gradient import exit_log_probs, sample_exits

WEIGHTINGS = ("layer", "equal")
REWARD_KINDS = ("hardness", "vanilla")
INDICATORS = ("greedy", "sample", "expected")

# For 12 layers and 2 classes: spans the values left in the comments of the authors' code.
ALPHAS_12_LAYERS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.09)


def check_exit_layers(
    exit_layers: Sequence[int], num_exits: int | None = None, num_layers: int | None = None
) -> tuple[int, ...]:
    """``exit_layers`` as a tuple of ints; ValueError unless ascending from 1, with the length and last layer given."""
    layers = tuple(int(layer) for layer in exit_layers)
    if not layers or layers[0] < 1 or any(a >= b for a, b in zip(layers, layers[1:], strict=False)):
        raise ValueError(f"exit_layers must be ascending layer numbers from 1 on, got {layers}")
    if num_exits is not None and len(layers) != num_exits:
        raise ValueError(f"exit_layers names {len(layers)} exits {layers}, but the tensor has {num_exits}")
    if num_layers is not None and layers[-1] != num_layers:
        raise ValueError(f"the last exit must be the last layer {num_layers}, got exit_layers {layers}: add it")
    return layers


def cross_entropy_per_exit(logits: Tensor, labels: Tensor) -> Tensor:
    """CE (N, E) in nats, of logits (N, E, C) and labels (N,) int64. Half precision is computed in fp32.

    Per instance, no class weights and no ignored label: a label outside 0..C-1 is an error.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be (N, E, C) and labels (N,), got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[2]:
        raise ValueError(
            f"labels must lie in 0..{logits.shape[2] - 1}, got {int(labels.min())}..{int(labels.max())}"
        )
    log_probs = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    return -log_probs.gather(2, labels[:, None, None].expand(-1, logits.shape[1], 1)).squeeze(2)


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(logits / T)) of every exit, (N, E) in nats (Hinton et al. 2015, sec. 2).

    logits (N, E, C); teacher (N, C) logits or log-probabilities, without gradient; T the temperature.
    """
    if logits.ndim != 3 or teacher.shape != (logits.shape[0], logits.shape[2]):
        raise ValueError(
            f"logits must be (N, E, C) and teacher (N, C), got {tuple(logits.shape)}, {tuple(teacher.shape)}"
        )
    target = (teacher.detach().float() / temperature).log_softmax(-1)[:, None]
    student = (logits.float() / temperature).log_softmax(-1)
    return temperature**2 * (target.exp() * (target - student)).sum(-1)


def weighted_exit_loss(ce: Tensor, exit_layers: Sequence[int], weighting: str = "layer") -> Tensor:
    """Initialisation loss (Eq. 1-2), a scalar: mean over instances of sum_l w_l CE_l / sum_l w_l.

    ``layer``: w_l = l, the paper's. ``equal``: w_l = 1, as DeeBERT and BERxiT train.
    """
    layers = _check_ce(ce, exit_layers)
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {weighting!r}")
    weights = ce.new_tensor(layers if weighting == "layer" else (1,) * len(layers))
    return (ce @ (weights / weights.sum())).mean()


def rewards(
    ce: Tensor,
    exit_layers: Sequence[int],
    alpha: float,
    num_layers: int,
    memorized_layer: Tensor | None = None,
    kind: str = "hardness",
) -> Tensor:
    """Reward (N, E) for leaving at each exit, without gradient (Eq. 3-4).

    vanilla    -CE_l - alpha l
    hardness   -CE_l - alpha (1 - ML / num_layers) l, with memorized_layer ML (N,) in 1..num_layers

    At ML = num_layers there is no pressure to leave early at all. At equal alpha ``hardness`` always presses less
    than ``vanilla``: compare the two at equal mean depth. ``vanilla`` ignores memorized_layer. (The released code
    trains on -CE_l alone, its alpha term commented out; we follow the paper.)
    """
    layers = _check_ce(ce, exit_layers, num_layers)
    if kind not in REWARD_KINDS:
        raise ValueError(f"kind must be one of {REWARD_KINDS}, got {kind!r}")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha must be a finite number >= 0, got {alpha}")
    if not bool(ce.isfinite().all()):
        raise ValueError("ce has NaN or infinite entries: the classifiers diverged, lower the learning rate")
    price = ce.new_tensor(layers) * alpha
    if kind == "vanilla":
        return -ce.detach() - price
    if memorized_layer is None or memorized_layer.shape != ce.shape[:1]:
        given = None if memorized_layer is None else tuple(memorized_layer.shape)
        raise ValueError(
            f"kind 'hardness' needs memorized_layer of shape ({len(ce)},), got {given}: compute it with "
            "hardness.memorized_layer, or use kind 'vanilla'"
        )
    if not 1 <= int(memorized_layer.min()) <= int(memorized_layer.max()) <= num_layers:
        raise ValueError(
            f"memorized_layer must lie in 1..{num_layers}, got "
            f"{int(memorized_layer.min())}..{int(memorized_layer.max())}"
        )
    discount = 1 - memorized_layer.to(ce) / num_layers
    return -ce.detach() - discount[:, None] * price


def greedy_exit_index(policy_logits: Tensor, threshold: float = 0.5) -> Tensor:
    """Exit of each row at inference, (N,) int64 in 0..E-1: first k with sigmoid(z_k) > threshold, else the last.

    Compared in logits (fp32): threshold 0.5 is z > 0 exactly, 1 never leaves early, 0 leaves at the first exit.
    """
    if policy_logits.ndim != 2:
        raise ValueError(f"policy_logits must have shape (N, E-1), got {tuple(policy_logits.shape)}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in [0, 1], got {threshold}")
    if threshold in (0, 1):
        limit = math.inf if threshold == 1 else -math.inf
    else:
        limit = math.log(threshold) - math.log1p(-threshold)
    leaves = policy_logits.float() > limit
    return torch.nn.functional.pad(leaves.int(), (0, 1), value=1).argmax(1)


def task_loss(
    ce: Tensor,
    exit_layers: Sequence[int],
    policy_logits: Tensor,
    indicator: str = "greedy",
    threshold: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Task objective (Eq. 6), a scalar: mean over instances of the CE at the exit the frozen policy takes.

    greedy     the exit of inference at ``threshold`` (default)
    sample     one draw a ~ pi
    expected   sum_k P_k CE_k, the exact expectation of ``sample``

    No gradient reaches policy_logits (N, E-1). An exit that is never taken gets none either: log the exit shares.
    """
    layers = _check_ce(ce, exit_layers)
    if indicator not in INDICATORS:
        raise ValueError(f"indicator must be one of {INDICATORS}, got {indicator!r}")
    z = policy_logits.detach()
    if z.shape != (len(ce), len(layers) - 1):
        raise ValueError(
            f"policy_logits must have shape {(len(ce), len(layers) - 1)} (none at the last exit), got {tuple(z.shape)}"
        )
    if indicator == "expected":
        return (exit_log_probs(z).exp() * ce).sum(1).mean()
    if indicator == "greedy":
        index = greedy_exit_index(z, threshold)
    else:
        index = sample_exits(z, num_samples=1, generator=generator).index[0]
    return ce.gather(1, index[:, None]).mean()


def alpha_grid(num_layers: int, num_labels: int) -> tuple[float, ...]:
    """Values of alpha worth sweeping: the 12-layer grid times 12 / num_layers times ln(num_labels) / ln 2 (ours).

    Both factors keep the price of full depth in the same proportion to the cross-entropy of a guess.
    """
    if num_layers < 1 or num_labels < 2:
        raise ValueError(f"need num_layers >= 1 and num_labels >= 2, got {num_layers} and {num_labels}")
    scale = 12 / num_layers * math.log(num_labels) / math.log(2)
    return tuple(alpha * scale for alpha in ALPHAS_12_LAYERS)


def _check_ce(ce: Tensor, exit_layers: Sequence[int], num_layers: int | None = None) -> tuple[int, ...]:
    if ce.ndim != 2 or len(ce) == 0:
        raise ValueError(f"ce must have shape (N, E) with N >= 1, got {tuple(ce.shape)}")
    return check_exit_layers(exit_layers, ce.shape[1], num_layers)
