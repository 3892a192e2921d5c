"""Figures by hand: three instances, exits at layers 1, 2 and 4."""

import json

import pytest
import torch

from engine.train.figures import choose, exit_figures, leave_rates, objective, operating_point
from engine.train.phases import ExitCache

LAYERS = (1, 2, 4)
# The first leaves at layer 1, the second at 4 (a logit of 0 is no more than the threshold), the third at 1.
Z = torch.tensor([[2.0, -1.0], [-1.0, 0.0], [0.5, 9.0]])
CORRECT = torch.tensor([[True, True, True], [False, True, True], [False, False, True]])
CE = torch.tensor([[0.1, 0.1, 0.1], [2.0, 0.5, 0.2], [3.0, 1.0, 0.5]])
CACHE = ExitCache(torch.zeros(3, 3, 8), CE, CORRECT)


def test_operating_point():
    point = operating_point(CACHE, Z, LAYERS, 0.5)
    assert point["accuracy"] == pytest.approx(2 / 3) and point["mean_depth"] == 2
    assert point["saved_layers"] == 0.5 and point["exit_shares"] == pytest.approx([2 / 3, 0, 1 / 3])
    assert operating_point(CACHE, Z, LAYERS, 1.0)["mean_depth"] == 4
    assert operating_point(CACHE, Z, LAYERS, 0.0)["mean_depth"] == 1


def test_exit_figures():
    figures = exit_figures(CACHE, LAYERS, Z)
    assert figures["accuracy"] == pytest.approx([1 / 3, 2 / 3, 1])
    assert figures["loss"] == pytest.approx([1.7, 1.6 / 3, 0.8 / 3])
    greedy = json.loads(json.dumps(figures["greedy"], allow_nan=False))
    assert greedy["accuracy_of_leaving"] == [0.5, None, 1.0]
    assert greedy["loss_of_leaving"] == [pytest.approx(3.1 / 2), None, pytest.approx(0.2)]
    assert "greedy" not in exit_figures(CACHE, LAYERS)


def test_objective():
    assert objective(CACHE, Z, LAYERS, 0.1) == pytest.approx(-(0.1 + 0.2 + 3.0) / 3 - 0.1 * 2)


def test_leave_rates():
    """Shares of those who reach an exit; none where nobody does."""
    rates = dict(leave_rates(Z, LAYERS, (0.55, 1.0)))
    assert list(rates) == [0.0, 0.5, 0.55, 1.0]
    assert rates[0.0] == (1.0, 0.0) and rates[1.0] == (0.0, 0.0)
    assert rates[0.5] == rates[0.55] == (0.6667, 0.0)
    assert leave_rates(Z[:, :0], (4,), (0.5,)) == ()


def test_choose():
    points = [
        dict(accuracy=a, mean_depth=d, threshold=t)
        for a, d, t in ((0.90, 3.0, 0.9), (0.90, 2.5, 0.7), (0.89, 2.0, 0.5), (0.85, 1.5, 0.3))
    ]
    assert choose(points, 0.90, 0.0) == {**points[1], "reached": True}
    assert choose(points, 0.90, 0.02) == {**points[2], "reached": True}
    assert choose(points, 0.90, 0.10) == {**points[3], "reached": True}
    assert choose(points, 0.95, 0.0) == {**points[1], "reached": False}
