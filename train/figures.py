"""Figures of a run, from full-depth passes: accuracy, loss and depth of every exit, and the choice of what to ship.

``z`` [N, E-1] are the policy logits of the instances of a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.train import objectives, statistics
from engine.train.phases import ExitCache


def operating_point(cache: ExitCache, z: Tensor, exit_layers: Sequence[int], threshold: float) -> dict[str, Any]:
    """Accuracy and depth of greedy exits at one threshold, decided on paper from one full-depth pass."""
    index = objectives.greedy_exit_index(z, threshold)
    layers = torch.tensor(exit_layers, device=index.device)[index]
    hit = cache.correct.gather(1, index[:, None]).float()
    depth = float(layers.float().mean())
    return {
        "accuracy": float(hit.mean()),
        "mean_depth": depth,
        "saved_layers": 1 - depth / exit_layers[-1],
        "exit_shares": statistics.exit_histogram(layers.cpu(), exit_layers).tolist(),
    }


def choose(points: list[dict[str, Any]], reference: float, max_relative_loss: float) -> dict[str, Any]:
    """The point with the least mean depth whose accuracy is at least (1 - max_relative_loss) * reference.

    Where no point reaches that, the most accurate one (the shallowest of equals), marked ``"reached": False``.
    """
    bar = (1 - max_relative_loss) * reference
    reached = [p for p in points if p["accuracy"] >= bar - 1e-9]
    if reached:
        return {**min(reached, key=lambda p: (p["mean_depth"], -p["accuracy"])), "reached": True}
    return {**max(points, key=lambda p: (p["accuracy"], -p["mean_depth"])), "reached": False}


def exit_figures(cache: ExitCache, exit_layers: Sequence[int], z: Tensor | None = None) -> dict[str, Any]:
    """Per exit: accuracy and loss over all instances, and (Fig. 2) over those that leave there at threshold 0.5."""
    figures: dict[str, Any] = {
        "accuracy": cache.correct.float().mean(0).tolist(),
        "loss": cache.ce.mean(0).tolist(),
    }
    if z is None:
        return figures
    index = objectives.greedy_exit_index(z)
    leaving = torch.nn.functional.one_hot(index, len(exit_layers)).to(cache.ce)
    count = leaving.sum(0)
    hits, losses = (cache.correct * leaving).sum(0) / count, (cache.ce * leaving).sum(0) / count
    figures["greedy"] = {
        **operating_point(cache, z, exit_layers, 0.5),
        "accuracy_of_leaving": [or_none(v) for v in hits.tolist()],
        "loss_of_leaving": [or_none(v) for v in losses.tolist()],
    }
    return figures


def objective(cache: ExitCache, z: Tensor, exit_layers: Sequence[int], alpha: float) -> float:
    """mean(-CE - alpha * depth) of greedy exits at threshold 0.5: what the rounds must improve."""
    index = objectives.greedy_exit_index(z)
    layers = torch.tensor(exit_layers, device=index.device)[index]
    return float((-cache.ce.gather(1, index[:, None])[:, 0] - alpha * layers).mean())


def leave_rates(
    z: Tensor, exit_layers: Sequence[int], thresholds: Sequence[float]
) -> tuple[tuple[float, tuple[float, ...]], ...]:
    """EarlyExitConfig.leave_rates: for every threshold, the share of the rows reaching an exit that leave there."""
    if len(exit_layers) == 1:
        return ()
    rates = []
    for threshold in sorted({0.0, 0.5, *thresholds}):
        left = torch.bincount(objectives.greedy_exit_index(z, threshold), minlength=len(exit_layers))
        reach = left.flip(0).cumsum(0).flip(0)
        shares = (left[:-1] / reach[:-1].clamp(min=1)).tolist()
        rates.append((threshold, tuple(round(share, 4) for share in shares)))
    return tuple(rates)


def or_none(value: float) -> float | None:
    """JSON has no NaN (an exit that nobody takes, a rank correlation of a constant)."""
    return None if value != value else value
