"""Accuracy against depth of ConsistentEE and of plain fine-tuning: both data sets, all seeds, every operating point.

    python -m engine.bench.encoder_quality --data DIR --work DIR [--jobs N] [--device cuda]

trains (resumable: a job whose result stands in --work, or in the output file, is not run again) and writes
``bench/results/encoder_quality.json``. Everything is chosen on calibration parts carved from train, averaged over the
seeds: the baseline's variant by accuracy, ConsistentEE's variant, alpha and threshold by the least mean depth among the
points whose accuracy is at least (1 - loss) times the baseline's. Dev and test are reported, never read for a choice.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from engine.bench.record import RESULTS, figure, write_result

SEEDS = (42, 43, 44)
DATASETS = ("stackoverflow", "mcid")
LOSSES = {"no loss": 0.0, "0.5 % relative loss": 0.005, "1 % relative loss": 0.01}
BARS = {"no loss": 0.265, "1 % relative loss": 0.445}
ALPHAS = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
BACKBONE = "sentence-transformers/all-MiniLM-L6-v2"


class Variant(NamedTuple):
    """One way to fine-tune all weights.

    warm      epochs of the last exit alone, ahead of Eq. 2 and counted in epochs
    fast      init.exits_rate and task.exits_rate
    early     init.early_gradient
    folds     teacher.folds
    """

    exits: tuple[int, ...]
    rate: float
    epochs: int
    rounds: int = 1
    warm: int = 0
    pooler: str = "none"
    fast: float = 1.0
    early: float = 1.0
    folds: int = 0

    @property
    def name(self) -> str:
        parts = ["".join(map(str, self.exits)), f"{self.rate:g}", str(self.epochs), str(self.rounds)]
        parts += [f"warm{self.warm}"] * bool(self.warm) + [self.pooler] * (self.pooler != "none")
        parts += [f"fast{self.fast:g}"] * (self.fast != 1) + [f"early{self.early:g}"] * (self.early != 1)
        return "-".join(parts + [f"folds{self.folds}"] * bool(self.folds))


# The same batch size for both methods. M-CID is 15 times smaller: more epochs. An exit at every layer costs accuracy at
# the deep ones, so fewer are tried too.
_ALL = (1, 2, 3, 4, 5, 6)
_BATCH_SIZE = {"stackoverflow": 32, "mcid": 16}
_TEACHER_EPOCHS = {"stackoverflow": 3, "mcid": 20}
_VARIANTS: dict[str, dict[str, list[Variant]]] = {
    "stackoverflow": {
        "exits": [
            Variant(_ALL, 1e-4, 6, fast=10, early=0.5, folds=3),
            Variant(_ALL, 1e-4, 6, fast=10, early=0.2, folds=3),
            Variant((3, 4, 5, 6), 1e-4, 6, warm=3),
            Variant((3, 6), 1e-4, 6, warm=3),
            Variant((3, 4, 5, 6), 1e-4, 4, pooler="per_layer"),
            Variant((3, 4, 5, 6), 1e-4, 4),
            Variant((3, 6), 1e-4, 4),
            Variant((4, 6), 1e-4, 4),
            Variant((3, 4, 5, 6), 5e-5, 6),
            Variant(_ALL, 1e-4, 5, rounds=2),
            Variant(_ALL, 2e-4, 3, rounds=2),
        ],
        "baseline": [
            Variant((6,), 5e-5, 4, rounds=0),
            Variant((6,), 1e-4, 4, rounds=0),
            Variant((6,), 1e-4, 4, rounds=0, fast=10),
        ],
    },
    "mcid": {
        "exits": [
            Variant((3, 4, 5, 6), 1e-4, 40, fast=10, early=0.3, folds=3),
            Variant((3, 4, 5, 6), 1e-4, 40, fast=10, early=0.1, folds=3),
            Variant((3, 4, 5, 6), 1e-4, 30, warm=15),
            Variant((4, 5, 6), 1e-4, 30, warm=15),
            Variant((3, 4, 5, 6), 1e-4, 20, pooler="per_layer"),
            Variant((3, 4, 5, 6), 1e-4, 20, pooler="shared"),
            Variant((3, 4, 5, 6), 1e-4, 20),
            Variant((3, 6), 1e-4, 20),
            Variant((4, 6), 1e-4, 20),
            Variant((3, 4, 5, 6), 5e-5, 40),
            Variant(_ALL, 1e-4, 20, rounds=2),
            Variant(_ALL, 2e-4, 20, rounds=2),
        ],
        "baseline": [
            Variant((6,), 5e-5, 20, rounds=0),
            Variant((6,), 1e-4, 20, rounds=0),
            Variant((6,), 1e-4, 40, rounds=0, fast=10),
        ],
    },
}
_CALIBRATION_SHARE = {"stackoverflow": 0.1, "mcid": 0.2}


def jobs() -> list[dict[str, Any]]:
    """All training runs: {name, dataset, seed, method, variant, options of TrainConfig}."""
    found = []
    for dataset in DATASETS:
        for method, variants in _VARIANTS[dataset].items():
            for v in variants:
                for seed in SEEDS:
                    options: dict[str, Any] = {
                        "backbone": BACKBONE,
                        "seed": seed,
                        "exit_layers": v.exits,
                        "pooler": v.pooler,
                        "calibration_share": _CALIBRATION_SHARE[dataset],
                        "max_rounds": v.rounds,
                        "teacher": dict(
                            folds=v.folds,
                            epochs=_TEACHER_EPOCHS[dataset],
                            batch_size=_BATCH_SIZE[dataset],
                            learning_rate=v.rate,
                        ),
                        "init": dict(
                            epochs=v.epochs,
                            batch_size=_BATCH_SIZE[dataset],
                            learning_rate=v.rate,
                            last_exit_epochs=v.warm,
                            exits_rate=v.fast,
                            early_gradient=v.early,
                        ),
                        "task": dict(
                            batch_size=_BATCH_SIZE[dataset], learning_rate=v.rate / 4, exits_rate=v.fast
                        ),
                        "select": dict(alphas=ALPHAS, thresholds=THRESHOLDS),
                    }
                    name = f"{dataset}-{v.name}-{seed}"
                    job = dict(name=name, dataset=dataset, seed=seed, method=method, variant=v.name, options=options)
                    found.append(job)
    return found


def train_one(job: dict[str, Any], data: Path, work: Path, device: str) -> None:
    """Train one job and write its figures: every operating point on every split."""
    import torch

    from engine.train import phases
    from engine.train.config import TrainConfig
    from engine.train.figures import operating_point
    from engine.train.trainer import Trainer

    torch.set_num_threads(1 if device.startswith("cuda") else torch.get_num_threads())
    output = str(work / "runs" / job["name"])
    options = {**job["options"], "data": str(data / job["dataset"]), "output": output, "device": device}
    started = time.perf_counter()
    trainer = Trainer(TrainConfig.from_dict({**options, "select": {"alphas": []}}))
    record = trainer.run()
    caches = {
        name: phases.measure(trainer.model, getattr(trainer.splits, name)) for name in ("calibration", "dev", "test")
    }
    points = []
    if job["method"] == "exits":
        trainer.config = TrainConfig.from_dict(options)
        train = phases.measure(trainer.model, trainer.splits.train)
        for alpha, multiple in zip(trainer.sweep(train), ALPHAS, strict=True):
            with torch.inference_mode():
                z = {name: phases.policy_logits(trainer.model, cache.states) for name, cache in caches.items()}
            for threshold in THRESHOLDS:
                figures = {n: operating_point(c, z[n], trainer.exit_layers, threshold) for n, c in caches.items()}
                points.append({"alpha": alpha, "alpha_multiple": multiple, "threshold": threshold, **figures})
    else:
        figures = {
            name: {"accuracy": float(cache.correct[:, -1].float().mean()), "mean_depth": 6.0, "saved_layers": 0.0}
            for name, cache in caches.items()
        }
        points.append({"alpha": None, "alpha_multiple": None, "threshold": None, **figures})
    result = {
        **{k: job[k] for k in ("name", "dataset", "seed", "method", "variant")},
        "config": record["config"],
        "sizes": record["sizes"],
        "versions": record["versions"],
        "seconds": time.perf_counter() - started,
        "phases": record["phases"],
        "points": points,
    }
    (work / f"{job['name']}.json").write_text(json.dumps(result))


def train_all(waiting: list[dict[str, Any]], data: Path, work: Path, parallel: int, device: str) -> None:
    """Run the jobs ``waiting``, ``parallel`` at a time, on all GPUs in turn where ``device`` is cuda."""
    import torch

    waiting = list(waiting)
    running: dict[str, subprocess.Popen] = {}
    work.mkdir(parents=True, exist_ok=True)
    devices = itertools.cycle(f"cuda:{i}" for i in range(torch.cuda.device_count())) if device == "cuda" else None
    while waiting or running:
        while waiting and len(running) < parallel:
            job = waiting.pop(0)
            command = [sys.executable, "-m", "engine.bench.encoder_quality", "--one", job["name"]]
            command += ["--data", str(data), "--work", str(work), "--device", next(devices) if devices else device]
            with open(work / f"{job['name']}.log", "w") as log:
                running[job["name"]] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                if process.returncode:
                    print(f"{name} failed:\n{(work / f'{name}.log').read_text()[-800:]}", file=sys.stderr, flush=True)
        time.sleep(0.5)


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Choose on calibration, report on test: for every data set the baseline, and one entry for each allowed loss."""
    from engine.train.statistics import confidence_interval

    chosen: dict[str, Any] = {}
    for dataset in DATASETS:
        rows = [r for r in results if r["dataset"] == dataset]
        baseline = _group(r for r in rows if r["method"] == "baseline")
        exits = _group(r for r in rows if r["method"] == "exits")
        best = max(baseline, key=lambda key: _mean(baseline[key], "calibration", "accuracy"))
        reference = _mean(baseline[best], "calibration", "accuracy")
        entry: dict[str, Any] = {
            "baseline": {
                "variant": best[0],
                "calibration_accuracy": reference,
                "test_accuracy": [p["test"]["accuracy"] for p in baseline[best]],
            }
        }
        for name, loss in LOSSES.items():
            reached = [key for key in exits if _mean(exits[key], "calibration", "accuracy") >= (1 - loss) * reference]
            if not reached:
                entry[name] = None
                continue
            key = min(reached, key=lambda k: _mean(exits[k], "calibration", "mean_depth"))
            points = exits[key]
            baselines = entry["baseline"]["test_accuracy"]
            differences = [p["test"]["accuracy"] - b for p, b in zip(points, baselines, strict=True)]
            entry[name] = {
                "variant": key[0],
                "alpha_multiple": key[1],
                "threshold": key[2],
                "calibration_accuracy": _mean(points, "calibration", "accuracy"),
                "test_accuracy": [p["test"]["accuracy"] for p in points],
                "test_saved_layers": [p["test"]["saved_layers"] for p in points],
                "saved_layers_interval": _interval(confidence_interval([p["test"]["saved_layers"] for p in points])),
                "accuracy_difference_interval": _interval(confidence_interval(differences)),
            }
        chosen[dataset] = entry
    return chosen


def figures(chosen: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per bar of the table: mean over the data sets of the saved layers on test."""
    rows = []
    for bar, least in BARS.items():
        entries = [chosen[d][bar] for d in DATASETS]
        value = None
        loss = None
        if all(entries):
            value = sum(sum(e["test_saved_layers"]) / len(SEEDS) for e in entries) / len(DATASETS)
            relative = []
            for dataset, entry in zip(DATASETS, entries, strict=True):
                base = sum(chosen[dataset]["baseline"]["test_accuracy"]) / len(SEEDS)
                relative.append(1 - sum(entry["test_accuracy"]) / len(SEEDS) / base)
            loss = sum(relative) / len(relative)
        rows.append(
            figure(
                f"saved layers at {bar} (chosen on calibration), mean of StackOverflow and M-CID, test",
                value,
                "share of layers",
                f">= {least}",
                value is not None and value >= least,
                relative_accuracy_loss_on_test=loss,
            )
        )
    return rows


_IDENTITY = ("name", "dataset", "seed", "method", "variant")
_SPLITS = ("calibration", "dev", "test")


def compact(result: dict[str, Any]) -> dict[str, Any]:
    """One training as a result file keeps it: options, accuracy by exit and phase, rank correlations, points."""
    ranks = ("spearman_ml_loss", "spearman_ml_forgetting", "memorized_layer_shares", "epoch_loss")
    return {
        **{k: result.get(k) for k in (*_IDENTITY, "sizes", "versions", "seconds")},
        "options": {k: result["config"][k] for k in ("pooler", "exit_layers", "max_rounds", "teacher", "init", "task")},
        "phases": {
            name: {
                "calibration_accuracy_by_exit": [round(x, 4) for x in phase["calibration"]["accuracy"]],
                **{k: phase[k] for k in ranks if k in phase},
            }
            for name, phase in result["phases"].items()
        },
        "point_columns": ["alpha_multiple", "threshold"]
        + [f"{s} {f}" for s in _SPLITS for f in ("accuracy", "mean depth")],
        "points": [
            [p["alpha_multiple"], p["threshold"]]
            + [round(p[s][f], 4) for s in _SPLITS for f in ("accuracy", "mean_depth")]
            for p in result["points"]
        ],
    }


def expand(row: dict[str, Any]) -> dict[str, Any]:
    """What ``summarise`` reads of a training, from its row in a result file (to the row's four decimals)."""
    exits = len(row["phases"]["init"]["calibration_accuracy_by_exit"])
    layers = (row["options"]["exit_layers"] or [exits])[-1]  # no list: an exit at every layer
    points = []
    for alpha_multiple, threshold, *values in row["points"]:
        pairs = zip(_SPLITS, values[::2], values[1::2], strict=True)
        figures = {s: {"accuracy": a, "mean_depth": d, "saved_layers": 1 - d / layers} for s, a, d in pairs}
        points.append({"alpha_multiple": alpha_multiple, "threshold": threshold, **figures})
    return {**{k: row[k] for k in _IDENTITY}, "points": points}


def _group(results) -> dict[tuple, list[dict[str, Any]]]:
    """(variant, alpha multiple, threshold) -> its point of every seed, in the order of SEEDS."""
    groups: dict[tuple, list] = {}
    for result in sorted(results, key=lambda r: SEEDS.index(r["seed"])):
        for point in result["points"]:
            groups.setdefault((result["variant"], point["alpha_multiple"], point["threshold"]), []).append(point)
    return {key: points for key, points in groups.items() if len(points) == len(SEEDS)}


def _mean(points: list[dict[str, Any]], split: str, name: str) -> float:
    return sum(p[split][name] for p in points) / len(points)


def _interval(interval) -> dict[str, Any]:
    return {k: getattr(interval, k) for k in ("estimate", "low", "high", "n", "level", "method")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets stackoverflow and mcid")
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and their figures")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=RESULTS / "encoder_quality.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        job = next(j for j in jobs() if j["name"] == options.one)
        train_one(job, options.data, options.work, options.device)
        return
    rows = json.loads(options.output.read_text())["rows"] if options.output.is_file() else []
    stored = {row["name"]: row for row in rows}
    files = {job["name"]: options.work / f"{job['name']}.json" for job in jobs()}
    waiting = [job for job in jobs() if job["name"] not in stored and not files[job["name"]].is_file()]
    train_all(waiting, options.data, options.work, options.jobs, options.device)
    for name, path in files.items():
        if path.is_file():
            stored[name] = compact(json.loads(path.read_text()))
    missing = [name for name in files if name not in stored]
    if missing:
        sys.exit(f"{len(missing)} of {len(files)} trainings have no result: run again to finish them")
    rows = [stored[name] for name in files]
    chosen = summarise([expand(row) for row in rows])
    write_result(options.output, figures(chosen), rows, chosen=chosen)


if __name__ == "__main__":
    main()
