"""What the quality benchmark keeps of a training is enough to choose from, and it chooses on calibration alone."""

from __future__ import annotations

import pytest

from engine.bench import encoder_quality as quality


def result(dataset: str, method: str, variant: str, seed: int, points: list[tuple]) -> dict:
    """points: (alpha multiple, threshold, calibration accuracy, its mean depth, test accuracy, its mean depth)."""
    return {
        **dict(name=f"{dataset}-{variant}-{seed}", dataset=dataset, seed=seed, method=method, variant=variant),
        "config": dict(pooler="none", exit_layers=[3, 6], max_rounds=1, teacher={}, init={}, task={}),
        "phases": {"init": {"calibration": {"accuracy": [0.5, 0.6]}}},
        "points": [
            {
                "alpha_multiple": alpha,
                "threshold": threshold,
                "calibration": {"accuracy": c, "mean_depth": d, "saved_layers": 1 - d / 6},
                "dev": {"accuracy": 0.0, "mean_depth": 6.0, "saved_layers": 0.0},
                "test": {"accuracy": t, "mean_depth": e, "saved_layers": 1 - e / 6},
            }
            for alpha, threshold, c, d, t, e in points
        ],
    }


def results() -> list[dict]:
    found = []
    for dataset in quality.DATASETS:
        for seed in quality.SEEDS:
            found.append(result(dataset, "baseline", "plain", seed, [(None, None, 0.90, 6.0, 0.5, 6.0)]))
            points = [(1.0, 0.5, 0.90, 4.0, 0.1, 4.5), (2.0, 0.5, 0.893, 3.0, 0.9, 3.0), (4.0, 0.5, 0.8, 1.0, 1.0, 1.0)]
            found.append(result(dataset, "exits", "ours", seed, points))
    return found


def test_a_row_of_a_result_file_gives_its_points_back():
    for given in results():
        row = quality.compact(given)
        got = quality.expand(row)
        assert {k: got[k] for k in ("name", "dataset", "seed", "method", "variant")} == {
            k: given[k] for k in ("name", "dataset", "seed", "method", "variant")
        }
        for a, b in zip(got["points"], given["points"], strict=True):
            assert (a["alpha_multiple"], a["threshold"]) == (b["alpha_multiple"], b["threshold"])
            for split in ("calibration", "dev", "test"):
                assert a[split] == pytest.approx(b[split], abs=1e-4)


def test_an_older_row_with_an_exit_at_every_layer():
    row = quality.compact(results()[1])
    row["options"]["exit_layers"] = None
    row["phases"]["init"]["calibration_accuracy_by_exit"] = [0.5] * 6
    assert quality.expand(row)["points"][0]["test"]["saved_layers"] == pytest.approx(1 - 4.5 / 6)


def test_points_are_chosen_on_calibration_and_reported_on_test():
    chosen = quality.summarise([quality.expand(quality.compact(r)) for r in results()])
    for dataset in quality.DATASETS:
        entry = chosen[dataset]
        assert entry["baseline"]["calibration_accuracy"] == pytest.approx(0.9)
        assert entry["no loss"]["alpha_multiple"] == 1.0 and entry["no loss"]["test_accuracy"] == [0.1] * 3
        assert entry["no loss"]["test_saved_layers"] == pytest.approx([1 - 4.5 / 6] * 3)
        assert entry["1 % relative loss"]["alpha_multiple"] == 2.0
        assert entry["0.5 % relative loss"]["alpha_multiple"] == 1.0, "0.893 is more than half a percent below 0.9"
    rows = quality.figures(chosen)
    assert [row["met"] for row in rows] == [False, True]
    assert [row["value"] for row in rows] == pytest.approx([0.25, 0.5])


def test_every_job_has_a_name_of_its_own_and_options_that_are_allowed(tmp_path):
    from engine.train.config import TrainConfig

    jobs = quality.jobs()
    assert len({job["name"] for job in jobs}) == len(jobs)
    for job in jobs:
        TrainConfig.from_dict({**job["options"], "data": "d", "output": str(tmp_path)})
