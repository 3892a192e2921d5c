"""Figures reported about a run: rank correlation, accuracy and depth per exit, intervals. numpy and torch only.

Sequences may be tensors, arrays or lists; they are read on the CPU in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.train.objectives import check_exit_layers


def spearman(a: Tensor | Sequence[float], b: Tensor | Sequence[float]) -> float:
    """Spearman's rho: Pearson correlation of average ranks (ties share their mean rank). NaN if a side is constant."""
    x, y = _vector(a, "a"), _vector(b, "b")
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"spearman needs two sequences of one length >= 2, got {len(x)} and {len(y)}")
    x, y = _average_ranks(x), _average_ranks(y)
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm else math.nan


def accuracy_per_exit(correct: Tensor, exit_index: Tensor | None = None) -> Tensor:
    """Accuracy of each exit, (E,) fp64, of correct (N, E) bool.

    With ``exit_index`` (N,) int64 in 0..E-1 only the rows that leave at an exit count there (the paper's Fig. 2);
    NaN where none does.
    """
    if correct.ndim != 2 or len(correct) == 0 or correct.dtype != torch.bool:
        raise ValueError(f"correct must be bool (N, E) with N >= 1, got {correct.dtype} {tuple(correct.shape)}")
    if exit_index is None:
        return correct.double().mean(0)
    leaves_here = torch.nn.functional.one_hot(exit_index, correct.shape[1]).double()
    return (leaves_here * correct).sum(0) / leaves_here.sum(0)


def exit_histogram(row_exit_layers: Tensor | Sequence[int], exit_layers: Sequence[int]) -> Tensor:
    """Share of rows that leave at each exit, (E,) fp64 summing to 1; rows are given by their exit layer."""
    layers = check_exit_layers(exit_layers)
    rows = torch.from_numpy(_vector(row_exit_layers, "row_exit_layers", non_empty=True))
    hits = rows[:, None] == torch.tensor(layers, dtype=torch.float64)
    if not bool(hits.any(1).all()):
        stray = sorted({int(row) for row in rows[~hits.any(1)]})
        raise ValueError(f"rows left at layers {stray}, which are no exits; exit_layers is {layers}")
    return hits.double().mean(0)


def mean_depth(row_exit_layers: Tensor | Sequence[int]) -> float:
    """Mean exit layer: layers run per row."""
    return float(_vector(row_exit_layers, "row_exit_layers", non_empty=True).mean())


def saved_layers(row_exit_layers: Tensor | Sequence[int], num_layers: int) -> float:
    """1 - mean(exit_layer) / num_layers. A figure of depth: the time saved is smaller and has to be measured."""
    rows = _vector(row_exit_layers, "row_exit_layers", non_empty=True)
    if not 1 <= rows.min() <= rows.max() <= num_layers:
        raise ValueError(f"exit layers must lie in 1..{num_layers}, got {rows.min():g}..{rows.max():g}")
    return 1 - float(rows.mean()) / num_layers


def f1_binary(predictions: Tensor | Sequence[int], labels: Tensor | Sequence[int], positive: int = 1) -> float:
    """F1 of class ``positive``: 2 TP / (2 TP + FP + FN); 0 where the class is neither present nor predicted."""
    predicted = _vector(predictions, "predictions") == positive
    actual = _vector(labels, "labels") == positive
    if len(predicted) != len(actual):
        raise ValueError(f"predictions and labels differ in length: {len(predicted)} and {len(actual)}")
    total = int(predicted.sum()) + int(actual.sum())
    return 2 * int((predicted & actual).sum()) / total if total else 0.0


@dataclass(frozen=True)
class Interval:
    """A point estimate with the interval ``low`` .. ``high``; ``method`` says how it was made, for tables."""

    estimate: float
    low: float
    high: float
    n: int
    level: float
    method: str


def confidence_interval(values: Tensor | Sequence[float], level: float = 0.95) -> Interval:
    """Interval for the mean of independent ``values``, e.g. one accuracy per seed: mean +- t s / sqrt(n).

    Student's t with n - 1 degrees of freedom and the sample deviation s (n - 1), which is what a handful of seeds
    asks for (t = 4.30 at n = 3, where the normal would claim 1.96). It covers the seeds, not the choice of test
    rows: for that see ``paired_bootstrap``. Needs n >= 2.
    """
    _check_level(level)
    x = _vector(values, "values")
    if len(x) < 2:
        raise ValueError(f"an interval over seeds needs at least 2 values, got {len(x)}")
    half = student_t_quantile(level, len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    mean = float(x.mean())
    return Interval(mean, mean - half, mean + half, len(x), level, f"Student t, {len(x) - 1} df")


def student_t_quantile(level: float, degrees: int) -> float:
    """t with P(|T| < t) = level for an integer number of degrees of freedom.

    Bisection on the finite series of Abramowitz & Stegun 26.7.3-4, exact for integer degrees.
    """
    _check_level(level)
    if degrees < 1:
        raise ValueError(f"degrees must be at least 1, got {degrees}")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        theta = (low + high) / 2
        low, high = (theta, high) if _central_t_probability(theta, degrees) < level else (low, theta)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def paired_bootstrap(
    correct_a: Tensor | Sequence[bool],
    correct_b: Tensor | Sequence[bool],
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval for accuracy(a) - accuracy(b) on the same test rows.

    Rows are resampled together, so what both systems get right or wrong cancels. A difference per row is -1, 0 or
    1, hence a resample is one multinomial draw of three counts: the same distribution, without index arrays.
    """
    _check_level(level)
    a, b = _vector(correct_a, "correct_a", non_empty=True), _vector(correct_b, "correct_b", non_empty=True)
    if len(a) != len(b):
        raise ValueError(f"both systems must be judged on the same rows, got {len(a)} and {len(b)}")
    difference = a - b
    n = len(difference)
    if not set(np.unique(np.concatenate([a, b]))) <= {0.0, 1.0}:
        raise ValueError("correct_a and correct_b must be booleans (right or wrong per row)")
    shares = np.array([(difference == sign).mean() for sign in (-1, 0, 1)])
    counts = np.random.default_rng(seed).multinomial(n, shares, size=num_resamples)
    low, high = np.quantile((counts[:, 2] - counts[:, 0]) / n, [(1 - level) / 2, (1 + level) / 2])
    method = f"paired percentile bootstrap, {num_resamples} resamples"
    return Interval(float(difference.mean()), float(low), float(high), n, level, method)


def _average_ranks(x: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last_rank = counts.cumsum()
    return (last_rank - (counts - 1) / 2)[inverse]


def _central_t_probability(theta: float, degrees: int) -> float:
    """P(|T| < sqrt(degrees) tan(theta))."""
    sin, cos = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term, total = (cos if odd else 1.0), 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cos * cos * k / (k + 1)
    return (theta + sin * total) * 2 / math.pi if odd else sin * total


def _vector(values: Tensor | Sequence[float], name: str, non_empty: bool = False) -> np.ndarray:
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values
    vector = np.asarray(array, dtype=np.float64)
    if vector.ndim != 1 or (non_empty and not len(vector)):
        raise ValueError(f"{name} must be a {'non-empty ' if non_empty else ''}vector, got shape {vector.shape}")
    if np.isnan(vector).any():
        raise ValueError(f"{name} has NaN entries: drop or fix them first")
    return vector


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
