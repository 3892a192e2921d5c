import math

import pytest
import torch

from engine.train.statistics import (
    accuracy_per_exit,
    confidence_interval,
    exit_histogram,
    f1_binary,
    mean_depth,
    paired_bootstrap,
    saved_layers,
    spearman,
    student_t_quantile,
)


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4], [10, 20, 25, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4: covariance 4.5, variances 4.5 and 5
    assert spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    # ranks 2, 2, 2, 4, 5 against 1.5, 3.5, 1.5, 3.5, 5: covariance 7, variances 8 and 9
    assert spearman([0, 0, 0, 1, 2], [5, 7, 5, 7, 9]) == pytest.approx(7 / math.sqrt(72))
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_spearman_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 6, (200,), generator=generator) for _ in range(2))
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


def test_spearman_refuses():
    with pytest.raises(ValueError, match="one length"):
        spearman([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="NaN"):
        spearman([1, math.nan], [1, 2])


def test_accuracy_per_exit():
    correct = torch.tensor([[True, True, False], [False, True, True], [False, False, True], [True, True, True]])
    assert accuracy_per_exit(correct).tolist() == [0.5, 0.75, 0.75]
    where_left = accuracy_per_exit(correct, torch.tensor([0, 0, 2, 2]))
    assert where_left[[0, 2]].tolist() == [0.5, 1] and where_left[1].isnan()
    with pytest.raises(ValueError, match="bool"):
        accuracy_per_exit(torch.ones(2, 2))


def test_depth_figures():
    rows = torch.tensor([2, 2, 6, 4])
    assert exit_histogram(rows, (2, 4, 6)).tolist() == [0.5, 0.25, 0.25]
    assert mean_depth(rows) == 3.5
    assert saved_layers(rows, 6) == pytest.approx(1 - 3.5 / 6)
    with pytest.raises(ValueError, match=r"layers \[4\], which are no exits"):
        exit_histogram(rows, (2, 6))
    with pytest.raises(ValueError, match=r"1\.\.5"):
        saved_layers(rows, 5)
    with pytest.raises(ValueError, match="non-empty"):
        mean_depth([])


def test_f1():
    assert f1_binary([1, 1, 0, 0, 1], [1, 0, 0, 1, 1]) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert f1_binary([1, 1, 0, 0, 1], [1, 0, 0, 1, 1], positive=0) == pytest.approx(0.5)
    assert f1_binary([0, 0], [0, 0]) == 0


@pytest.mark.parametrize(
    "level, degrees, table",
    [(0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 4, 2.776), (0.95, 9, 2.262), (0.99, 5, 4.032), (0.90, 30, 1.697)],
)
def test_student_t_against_the_table(level, degrees, table):
    assert student_t_quantile(level, degrees) == pytest.approx(table, abs=6e-4)


def test_confidence_interval():
    interval = confidence_interval([0.80, 0.82, 0.84])
    assert interval.estimate == pytest.approx(0.82) and interval.n == 3
    assert interval.high - interval.estimate == pytest.approx(4.3027 * 0.02 / math.sqrt(3), rel=1e-4)
    assert interval.method == "Student t, 2 df"
    with pytest.raises(ValueError, match="at least 2 values"):
        confidence_interval([0.8])


def test_confidence_interval_covers_as_often_as_it_says():
    samples = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)).double()
    covered = [i.low < 0 < i.high for i in map(confidence_interval, samples)]
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.015)


def test_paired_bootstrap():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(1000, generator=generator) < 0.8
    b = a.clone()
    b[:40] = False
    interval = paired_bootstrap(a, b)
    share = float((a & ~b).float().mean())
    assert interval.estimate == pytest.approx(share)
    half = 1.96 * math.sqrt(share * (1 - share) / 1000)
    assert interval.low == pytest.approx(share - half, abs=0.003)
    assert interval.high == pytest.approx(share + half, abs=0.003)
    assert interval == paired_bootstrap(a, b)
    same = paired_bootstrap(a, a)
    assert (same.low, same.high) == (0, 0)  # paired: nothing differs, nothing varies
    with pytest.raises(ValueError, match="same rows"):
        paired_bootstrap(a, b[1:])
    with pytest.raises(ValueError, match="booleans"):
        paired_bootstrap([0.5], [1.0])
