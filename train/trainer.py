"""ConsistentEE's five steps as one resumable run: init, then rounds of {memorized layer, policy, task}, then selection.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.facts import TRAINING
from engine.loading import save_checkpoint
from engine.models.encoder import MultiExitEncoder
from engine.train import card, figures, objectives, phases, policy_gradient, statistics
from engine.train.config import TrainConfig
from engine.train.data import load_folder
from engine.train.run import ResumableRun
from engine.train.start import fresh_model, make_splits, seed_of

log = logging.getLogger("engine.train")


class Trainer(ResumableRun):
    """One run of a TrainConfig. ``run()`` starts or resumes it and returns the record of all its figures."""

    def __init__(self, config: TrainConfig):
        """Everything that a run needs is read and checked here. Nothing is written before ``run()``."""
        super().__init__(config)
        data = load_folder(config.data)
        self.labels = data.labels
        self.data = {name: s.sha256() if (s := getattr(data, name)) else None for name in ("train", "dev", "test")}
        self.model, self.tokenizer, self.backbone = fresh_model(config, self.labels, self.device)
        self.splits, self.sizes = make_splits(data, self.tokenizer, config)
        self.exit_layers = self.model.config.exit_layers
        grid = objectives.alpha_grid(self.model.config.num_layers, len(self.labels))
        self.alpha = grid[len(grid) // 2] if config.policy.alpha is None else config.policy.alpha

    # -- the run -------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train, resuming where a stopped run of the same configuration left off, and write the checkpoint."""
        c = self.config
        self.record = self._open()
        self._at = ""
        self._phase("init", self._init)
        best = final = "init"
        if len(self.exit_layers) > 1:
            best = final = self._rounds()
            if c.select.alphas:
                self._at, final = best, "select"
                self._phase("select", self._select, keep=best)
        self._restore(final)
        threshold = self.record["phases"][final].get("chosen", {}).get("threshold", 0.5)
        _, z = self._measure("calibration")
        self.model.config = self.model.exits.config = replace(
            self.model.config,
            threshold=threshold,
            leave_rates=figures.leave_rates(z, self.exit_layers, c.select.thresholds),
        )
        self.record["result"] = self._result(best, threshold)
        self._store_record()
        save_checkpoint(
            self.model,
            c.output,
            self.tokenizer,
            self.backbone if c.lora.rank else None,
            card.model_card(self.record, self.model.config),
            extra={TRAINING: card.training_json(self.record)},
        )
        log.info("wrote %s", c.output)
        return self.record

    def _rounds(self) -> str:
        """Rounds of {memorized layer, policy, task} until the calibration objective stops improving; the best phase."""
        c, best, before = self.config, "", None
        for number in range(1, c.max_rounds + 1):
            self._phase(f"round{number}.policy", self._policy, keep=best, first=number == 1)
            name = f"round{number}.task"
            self._phase(name, self._task, keep=best)
            value = self.record["phases"][name]["calibration"]["objective"]
            if before is None or value > self.record["phases"][best]["calibration"]["objective"]:
                best = name
            if before is not None and value - before < c.tolerance * abs(before):
                break
            before = value
        if not best:  # max_rounds 0: policies on the initialised model
            best = "policy"
            self._phase(best, self._policy, first=True)
        return best

    def _init(self) -> dict[str, Any]:
        teacher = self._teacher(self._restart)
        losses, forgetting = phases.train_init(
            self.model, self.splits.train, self.config.init, self._seed("init"), teacher
        )
        cache, _ = self._measure("train")
        memorized = phases.memorized_layers(cache, self.exit_layers).cpu()
        if self.config.policy.ml_refresh == "once":
            self._store("memorized", {"memorized": memorized})
        loss = cache.ce[:, -1].cpu()
        return {
            "epoch_loss": losses,
            "train": figures.exit_figures(cache, self.exit_layers),
            "memorized_layer_shares": statistics.exit_histogram(memorized, self.exit_layers).tolist(),
            "spearman_ml_loss": figures.or_none(statistics.spearman(memorized, loss)),
            "spearman_ml_forgetting": figures.or_none(statistics.spearman(memorized, forgetting.counts)),
            "never_learned": int(forgetting.never_learned.sum()),
        }

    def _policy(self, first: bool) -> dict[str, Any]:
        options, seed = self.config.policy, self._seed(self._running)
        cache, _ = self._measure("train")
        memorized = self._memorized(cache)
        if first:
            torch.manual_seed(seed)
            self.model.exits.reset_policies(options.initialisation == "uniform_hazard")
        values = phases.train_policy(self.model, cache, memorized, options, self.alpha, seed)
        with torch.inference_mode():
            z = phases.policy_logits(self.model, cache.states)
        return {
            "expected_reward": values,
            "decisiveness": figures.or_none(float(policy_gradient.decisiveness(z))),
            "train": figures.exit_figures(cache, self.exit_layers, z),
            "memorized_layer_shares": statistics.exit_histogram(memorized.cpu(), self.exit_layers).tolist(),
        }

    def _memorized(self, train: phases.ExitCache) -> Tensor:
        """Memorized layers of the train split: as ``train`` shows them, or as they were after step 1 (ml_refresh)."""
        if self.config.policy.ml_refresh == "once":
            return self._stored("memorized")["memorized"].to(train.ce.device)
        return phases.memorized_layers(train, self.exit_layers)

    def _task(self) -> dict[str, Any]:
        losses = phases.train_task(
            self.model, self.splits.train, self.config.task, self._seed(self._running), teacher=self._teacher()
        )
        return {"epoch_loss": losses}

    def _teacher(self, restart: Callable[[], None] | None = None) -> phases.Teacher | None:
        """Out-of-fold soft labels, made (with ``restart``, before step 1) where they are not stored yet."""
        options = self.config.teacher
        if not options.folds:
            return None
        stored = self._stored("teacher")
        if stored is None and restart is not None:
            log.info("teacher: %d folds", options.folds)
            found = phases.out_of_fold(self.model, self.splits.train, options, self._seed("teacher"), restart)
            self._store("teacher", {"log_probs": found})
            restart()
            stored = self._stored("teacher")
        return phases.Teacher(stored["log_probs"], options.weight, options.temperature)

    def _restart(self) -> None:
        """Give the model the weights that the run starts from; the phase that is running keeps it unnamed."""
        self._restore("")
        self._holds = None

    def sweep(self, train: phases.ExitCache) -> Iterator[float]:
        """Fresh policies for every alpha of the grid, on one cache; yields alpha while the model holds its policies."""
        self._holds = None
        options = self.config.policy
        memorized = self._memorized(train)
        for multiple in self.config.select.alphas:
            torch.manual_seed(self._seed("select"))
            self.model.exits.reset_policies(options.initialisation == "uniform_hazard")
            phases.train_policy(self.model, train, memorized, options, self.alpha * multiple, self._seed("select"))
            yield self.alpha * multiple

    def _select(self) -> dict[str, Any]:
        """Policies for every alpha on one cache of the best round; alpha and threshold by the calibration part."""
        select = self.config.select
        train, _ = self._measure("train")
        calibration, _ = self._measure("calibration")
        full = float(calibration.correct[:, -1].float().mean())
        reference = full if select.reference == "full_depth" else float(select.reference)
        points, policies = [], {}
        for alpha in self.sweep(train):
            policies[alpha] = {k: v.clone() for k, v in self.model.exits.policies.state_dict().items()}
            with torch.inference_mode():
                z = phases.policy_logits(self.model, calibration.states)
            for threshold in select.thresholds:
                point = figures.operating_point(calibration, z, self.exit_layers, threshold)
                points.append({"alpha": alpha, "threshold": threshold, **point})
        chosen = figures.choose(points, reference, select.max_relative_loss)
        self.model.exits.policies.load_state_dict(policies[chosen["alpha"]])
        return {"points": points, "reference_accuracy": reference, "chosen": chosen}

    def _result(self, best: str, threshold: float) -> dict[str, Any]:
        result: dict[str, Any] = {"best_phase": best, "threshold": threshold}
        for name in ("calibration", "dev", "test"):
            if getattr(self.splits, name) is None:
                continue
            cache, z = self._measure(name)
            result[name] = {
                "rows": len(z),
                "accuracy_full_depth": float(cache.correct[:, -1].float().mean()),
                **figures.operating_point(cache, z, self.exit_layers, threshold),
            }
        return result

    # -- bookkeeping ---------------------------------------------------------------------------------------------

    def _fresh_model(self) -> MultiExitEncoder:
        return fresh_model(self.config, self.labels, self.device)[0]

    def _describe(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "exit_layers": list(self.exit_layers), "sizes": self.sizes}

    def _measured(self, name: str) -> dict[str, Any]:
        calibration, z = self._measure("calibration")
        found = figures.exit_figures(calibration, self.exit_layers, z)
        found["objective"] = figures.objective(calibration, z, self.exit_layers, self.alpha)
        summary = found["greedy"]
        log.info(
            "phase %s: calibration accuracy %.4f at mean depth %.2f (full depth %.4f)",
            name,
            summary["accuracy"],
            summary["mean_depth"],
            found["accuracy"][-1],
        )
        return found

    def _seed(self, phase: str) -> int:
        return seed_of(self.config, phase)

    def _measure(self, split: str) -> tuple[phases.ExitCache, Tensor]:
        """A split's cache and policy logits [N, E-1] under the model as it is."""
        cache = phases.measure(self.model, getattr(self.splits, split), f"measure {split}")
        with torch.inference_mode():
            return cache, phases.policy_logits(self.model, cache.states)
