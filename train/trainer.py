"""ConsistentEE's five steps as one resumable run: init, then rounds of {memorized layer, policy, task}, then selection.

Every phase starts from the stored result of the one before and from its own seed, so a run that is killed and started
again does what an uninterrupted one would have done (bit for bit on a CPU).
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from engine.backbones import BackboneReference
from engine.loading import attach_exits, fill_tensors, read_tensors, save_checkpoint, write_file, write_folder
from engine.models.encoder import MultiExitEncoder
from engine.train import objectives, phases, policy_gradient, statistics
from engine.train.config import TrainConfig
from engine.train.data import DataFolder, TokenizedExamples, drop_leaked, load_folder, split_calibration

log = logging.getLogger("engine.train")
_RECORD, _WEIGHTS = "record.json", "weights.safetensors"


@dataclass(frozen=True, eq=False)
class Splits:
    """train (without the calibration part), calibration, dev and test (None where there is none), tokenised."""

    train: TokenizedExamples
    calibration: TokenizedExamples
    dev: TokenizedExamples
    test: TokenizedExamples | None


class Trainer:
    """One run of a TrainConfig. ``run()`` starts or resumes it and returns the record of all its figures."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.folder = Path(config.output + ".run")
        self.device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        )
        data = load_folder(config.data)
        self.model, self.tokenizer, self.backbone = attach_exits(
            BackboneReference(config.backbone), self._exit_fields(data)
        )
        if self.tokenizer is None:
            raise ValueError(f"backbone {config.backbone} has no tokenizer.json: text cannot be read")
        if config.lora.rank:
            self.model.backbone = _add_lora(self.model.backbone, config)
        self.model.to(self.device)
        torch.manual_seed(self._seed("exits"))
        _reset_exits(self.model, config)
        self.splits, self.sizes = self._tokenise(data)
        exits, labels = self.model.config.exit_layers, self.model.config.num_labels
        grid = objectives.alpha_grid(self.model.config.num_layers, labels)
        self.alpha = grid[len(grid) // 2] if config.policy.alpha is None else config.policy.alpha
        self.exit_layers = exits
        self.record: dict[str, Any] = {}

    def _exit_fields(self, data: DataFolder) -> dict[str, Any]:
        c = self.config
        fields: dict[str, Any] = dict(
            labels=data.labels,
            pooler=c.pooler,
            policy_hidden_size=c.policy_hidden_size,
            classifier_dropout=c.classifier_dropout,
            max_length=c.max_length,
        )
        if c.exit_layers is not None:
            fields["exit_layers"] = c.exit_layers
        return fields

    def _tokenise(self, data: DataFolder) -> tuple[Splits, dict[str, int]]:
        c = self.config
        train, leaked = data.train, 0
        if c.drop_leaked:
            train, leaked = drop_leaked(train, *(s for s in (data.dev, data.test) if s is not None))
        rest, calibration = split_calibration(train, share=c.calibration_share, seed=c.seed)
        rest, repeated = drop_leaked(rest, calibration)

        def tokenise(examples):
            return None if examples is None else TokenizedExamples.from_examples(examples, self.tokenizer, c.max_length)

        sizes = {
            "train": len(rest),
            "calibration": len(calibration),
            "dev": len(data.dev),
            "test": 0 if data.test is None else len(data.test),
            "dropped_also_in_dev_or_test": leaked,
            "dropped_also_in_calibration": repeated,
        }
        return Splits(tokenise(rest), tokenise(calibration), tokenise(data.dev), tokenise(data.test)), sizes

    def _seed(self, phase: str) -> int:
        return zlib.crc32(f"{self.config.seed}/{phase}".encode())

    # -- the run -------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train, resuming where a stopped run of the same configuration left off, and write the checkpoint."""
        c, splits = self.config, self.splits
        self.record = self._open()
        self._at = self._loaded = ""
        self._phase("init", self._init)
        best = "init"
        if len(self.exit_layers) > 1:
            best = self._rounds()
            if c.select.alphas:
                self._at = best
                self._phase("select", self._select, keep=best)
        final = self._at
        self._restore(final)
        threshold = self.record["phases"][final].get("chosen", {}).get("threshold", 0.5)
        self.model.config = self.model.exits.config = replace(
            self.model.config, threshold=threshold, leave_rates=self._leave_rates()
        )
        self.record["result"] = self._final_figures(best, threshold)
        write_file(self.folder / _RECORD, json.dumps(self.record, indent=1))
        save_checkpoint(
            self.model,
            c.output,
            self.tokenizer,
            self.backbone if c.lora.rank else None,
            model_card(self.record, self.model, self.backbone),
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
        losses, forgetting = phases.train_init(self.model, self.splits.train, self.config.init, self._seed("init"))
        cache = phases.measure(self.model, self.splits.train, "measure train")
        memorized = phases.memorized_layers(cache, self.exit_layers)
        counts = forgetting.counts.to(memorized.device)
        loss = cache.ce[:, -1]
        if self.config.policy.ml_refresh == "once":
            write_folder(self.folder / "memorized", lambda f: _save(f, {"memorized": memorized.cpu()}))
        return {
            "epoch_loss": losses,
            "train": _exit_figures(cache, self.exit_layers),
            "memorized_layer_shares": statistics.exit_histogram(memorized.cpu(), self.exit_layers).tolist(),
            "spearman_ml_loss": _or_none(statistics.spearman(memorized.cpu(), loss.cpu())),
            "spearman_ml_forgetting": _or_none(statistics.spearman(memorized.cpu(), counts.cpu())),
            "never_learned": int(forgetting.never_learned.sum()),
        }

    def _policy(self, first: bool) -> dict[str, Any]:
        options = self.config.policy
        cache = phases.measure(self.model, self.splits.train, "measure train")
        if options.ml_refresh == "once":
            memorized = read_tensors(self.folder / "memorized" / _WEIGHTS)["memorized"].to(cache.ce.device)
        else:
            memorized = phases.memorized_layers(cache, self.exit_layers)
        seed = self._seed(self._running)
        if first:
            torch.manual_seed(seed)
            self.model.exits.reset_policies(options.initialisation == "uniform_hazard")
        values = phases.train_policy(self.model, cache, memorized, options, self.alpha, seed)
        with torch.inference_mode():
            z = phases.policy_logits(self.model, cache.states)
        return {
            "expected_reward": values,
            "decisiveness": _or_none(float(policy_gradient.decisiveness(z))),
            "train": _exit_figures(cache, self.exit_layers, z),
            "memorized_layer_shares": statistics.exit_histogram(memorized.cpu(), self.exit_layers).tolist(),
        }

    def _task(self) -> dict[str, Any]:
        losses = phases.train_task(self.model, self.splits.train, self.config.task, self._seed(self._running))
        return {"epoch_loss": losses}

    def sweep(self, train: phases.ExitCache) -> Iterator[float]:
        """Train fresh policies for every alpha of the grid on one cache; yields alpha while the model holds its policy."""
        options = self.config.policy
        memorized = phases.memorized_layers(train, self.exit_layers)
        for multiple in self.config.select.alphas:
            torch.manual_seed(self._seed("select"))
            self.model.exits.reset_policies(options.initialisation == "uniform_hazard")
            phases.train_policy(self.model, train, memorized, options, self.alpha * multiple, self._seed("select"))
            yield self.alpha * multiple

    def _select(self) -> dict[str, Any]:
        """Policies for every alpha on one cache of the best round; alpha and threshold by the calibration part."""
        select = self.config.select
        train = phases.measure(self.model, self.splits.train, "measure train")
        calibration = phases.measure(self.model, self.splits.calibration, "measure calibration")
        full = float(calibration.correct[:, -1].float().mean())
        reference = full if select.reference == "full_depth" else float(select.reference)
        points, policies = [], {}
        for alpha in self.sweep(train):
            policies[alpha] = {k: v.clone() for k, v in self.model.exits.policies.state_dict().items()}
            with torch.inference_mode():
                z = phases.policy_logits(self.model, calibration.states)
            for threshold in select.thresholds:
                point = operating_point(calibration, z, self.exit_layers, threshold)
                points.append({"alpha": alpha, "threshold": threshold, **point})
        chosen = choose(points, reference, select.max_relative_loss)
        self.model.exits.policies.load_state_dict(policies[chosen["alpha"]])
        return {"points": points, "reference_accuracy": reference, "chosen": chosen}

    # -- bookkeeping ---------------------------------------------------------------------------------------------

    def _open(self) -> dict[str, Any]:
        path = self.folder / _RECORD
        config = self.config.to_dict()
        if path.is_file():
            record = json.loads(path.read_text())
            if record["config"] != config:
                changed = sorted(k for k in config if record["config"].get(k) != config[k])
                raise ValueError(
                    f"{self.folder} holds a run with other options ({', '.join(changed)}): remove it, or choose another "
                    "output"
                )
            done = [name for name, phase in record["phases"].items()]
            log.info("resuming %s behind %s", self.folder, done[-1] if done else "the start")
            return record
        return {
            "config": config,
            "backbone": {"source": self.backbone.source, "sha256": self.backbone.sha256},
            "alpha": self.alpha,
            "exit_layers": list(self.exit_layers),
            "sizes": self.sizes,
            "versions": versions(self.device),
            "phases": {},
        }

    def _phase(self, name: str, body, keep: str = "", **kwargs) -> None:
        """Run one phase behind the current one, unless it is stored; store its weights, then its figures.

        Weights of earlier phases are dropped, except those of ``keep``.
        """
        before, self._at = self._at, name
        if name in self.record["phases"]:
            return
        if self._loaded != before:
            self._restore(before)
        log.info("phase %s", name)
        self._running = name
        figures = body(**kwargs)
        calibration = phases.measure(self.model, self.splits.calibration, "measure calibration")
        with torch.inference_mode():
            z = phases.policy_logits(self.model, calibration.states)
        figures["calibration"] = _exit_figures(calibration, self.exit_layers, z)
        figures["calibration"]["objective"] = _objective(calibration, z, self.exit_layers, self.alpha)
        summary = figures["calibration"]["greedy"]
        log.info(
            "phase %s: calibration accuracy %.4f at mean depth %.2f (full depth %.4f)",
            name,
            summary["accuracy"],
            summary["mean_depth"],
            figures["calibration"]["accuracy"][-1],
        )
        write_folder(self.folder / name, lambda f: _save(f, _trained_state(self.model)))
        self.record["phases"][name] = figures
        write_file(self.folder / _RECORD, json.dumps(self.record, indent=1))
        self._loaded = name
        for earlier in set(self.record["phases"]) - {name, keep}:
            shutil.rmtree(self.folder / earlier, ignore_errors=True)

    def _restore(self, phase: str) -> None:
        path = self.folder / phase / _WEIGHTS
        fill_tensors(_trained_state(self.model), read_tensors(path), str(path))
        self._loaded = phase

    def _leave_rates(self) -> tuple[tuple[float, tuple[float, ...]], ...]:
        """EarlyExitConfig.leave_rates of the final policies, on the calibration part."""
        if len(self.exit_layers) == 1:
            return ()
        cache = phases.measure(self.model, self.splits.calibration, "measure calibration")
        with torch.inference_mode():
            z = phases.policy_logits(self.model, cache.states)
        rates = []
        for threshold in sorted({0.0, 0.5, *self.config.select.thresholds}):
            left = torch.bincount(objectives.greedy_exit_index(z, threshold), minlength=len(self.exit_layers))
            reach = left.flip(0).cumsum(0).flip(0)
            rates.append((threshold, tuple(round(float(a / b), 4) if b else 0.0 for a, b in zip(left[:-1], reach))))
        return tuple(rates)

    def _final_figures(self, best: str, threshold: float) -> dict[str, Any]:
        result: dict[str, Any] = {"best_phase": best, "threshold": threshold}
        for name in ("calibration", "dev", "test"):
            data = getattr(self.splits, name)
            if data is None:
                continue
            cache = phases.measure(self.model, data, f"measure {name}")
            with torch.inference_mode():
                z = phases.policy_logits(self.model, cache.states)
            result[name] = {
                "rows": len(data),
                "accuracy_full_depth": float(cache.correct[:, -1].float().mean()),
                **operating_point(cache, z, self.exit_layers, threshold),
            }
        return result


def choose(points: list[dict[str, Any]], reference: float, max_relative_loss: float) -> dict[str, Any]:
    """The point with the least mean depth whose accuracy is at least (1 - max_relative_loss) * reference.

    Where no point reaches that, the most accurate one (the shallowest of equals), marked ``"reached": False``.
    """
    bar = (1 - max_relative_loss) * reference
    reached = [p for p in points if p["accuracy"] >= bar - 1e-9]
    if reached:
        return {**min(reached, key=lambda p: (p["mean_depth"], -p["accuracy"])), "reached": True}
    return {**max(points, key=lambda p: (p["accuracy"], -p["mean_depth"])), "reached": False}


def operating_point(cache: phases.ExitCache, z: Tensor, exit_layers: tuple[int, ...], threshold: float) -> dict[str, Any]:
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


def _exit_figures(cache: phases.ExitCache, exit_layers: tuple[int, ...], z: Tensor | None = None) -> dict[str, Any]:
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
    figures["greedy"] = operating_point(cache, z, exit_layers, 0.5)
    figures["greedy"]["accuracy_of_leaving"] = _nan_to_none((cache.correct * leaving).sum(0) / count)
    figures["greedy"]["loss_of_leaving"] = _nan_to_none((cache.ce * leaving).sum(0) / count)
    return figures


def _nan_to_none(values: Tensor) -> list[float | None]:
    return [_or_none(v) for v in values.tolist()]


def _or_none(value: float) -> float | None:
    """JSON has no NaN (an exit that nobody takes, a rank correlation of a constant)."""
    return None if value != value else value


def _objective(cache: phases.ExitCache, z: Tensor, exit_layers: tuple[int, ...], alpha: float) -> float:
    index = objectives.greedy_exit_index(z)
    layers = torch.tensor(exit_layers, device=index.device)[index]
    return float((-cache.ce.gather(1, index[:, None])[:, 0] - alpha * layers).mean())


def _reset_exits(model: MultiExitEncoder, config: TrainConfig) -> None:
    """Fresh classifiers and policies from the run's seed; poolers keep what the backbone brought."""
    for classifier in model.exits.classifiers:
        torch.nn.init.normal_(classifier.weight, std=0.02)
        torch.nn.init.zeros_(classifier.bias)
    model.exits.reset_policies(config.policy.initialisation == "uniform_hazard")


def _add_lora(backbone: torch.nn.Module, config: TrainConfig) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    names = {"query", "key", "value", "dense", "q", "k", "v", "o"}
    present = {n.rpartition(".")[2] for n, m in backbone.encoder.named_modules() if isinstance(m, torch.nn.Linear)}
    torch.manual_seed(zlib.crc32(f"{config.seed}/lora".encode()))
    return get_peft_model(
        backbone,
        LoraConfig(
            r=config.lora.rank,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules=sorted(names & present),
            bias="none",
        ),
    )


def _trained_state(model: MultiExitEncoder) -> dict[str, Tensor]:
    """What training changes: all tensors, or with an adapter all but the frozen backbone's. Shares storage."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad or name.startswith("exits.")}
    return {name: value for name, value in model.state_dict().items() if name in trained}


def _save(folder: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / _WEIGHTS)


def versions(device: torch.device) -> dict[str, str]:
    """Software and machine that a record was made with."""
    import peft
    import transformers

    import engine

    return {
        "consistentee": engine.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    }


def discard(output: str) -> None:
    """Remove the state of a run, not its checkpoint."""
    shutil.rmtree(Path(output + ".run"), ignore_errors=True)


def model_card(record: dict[str, Any], model: MultiExitEncoder, backbone: BackboneReference) -> str:
    """README.md of a checkpoint: what it is, how it was trained, what it reaches."""
    config, result = record["config"], record["result"]
    exits = model.config
    lines = [
        "---",
        f"base_model: {backbone.source}",
        "library_name: consistentee",
        "tags: [early-exit, consistentee]",
        "---",
        "",
        f"# {Path(config['output']).name}",
        "",
        f"`{backbone.source}` ({exits.num_layers} layers, sha256 of its weights `{backbone.sha256}`) with exits at layers "
        f"{', '.join(map(str, exits.exit_layers))}, trained by ConsistentEE (AAAI 2024) for {exits.num_labels} classes.",
        "",
        "```python",
        "import engine",
        f'print(engine.load("{config["output"]}").run(["some text"]).labels)',
        "```",
        "",
        "## Training",
        "",
        "```",
        train_command(config),
        "```",
        "",
        f"Data: {record['sizes']['train']} rows for training, {record['sizes']['calibration']} held out of train for "
        f"choosing rounds, alpha and threshold; {record['sizes']['dropped_also_in_dev_or_test']} train rows dropped because "
        "their text also stands in dev or test. "
        f"Seed {config['seed']}; torch {record['versions']['torch']}, {record['versions']['device']}.",
        "",
        "## Figures",
        "",
        f"Exit threshold {exits.threshold:g}. Layers are counted, not timed: see `consistentee eval` for times.",
        "",
        "| split | rows | accuracy, full depth | accuracy, with exits | mean depth | saved layers |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in ("calibration", "dev", "test"):
        if name in result:
            r = result[name]
            lines.append(
                f"| {name} | {r['rows']} | {r['accuracy_full_depth']:.4f} | {r['accuracy']:.4f} | {r['mean_depth']:.2f} "
                f"| {100 * r['saved_layers']:.1f} % |"
            )
    return "\n".join(lines) + "\n"


def train_command(config: dict[str, Any]) -> str:
    """The command line that repeats a run."""
    default = TrainConfig(config["backbone"], config["data"], config["output"]).to_dict()
    parts = [
        f"consistentee train {quote(config['data'])} --backbone {quote(config['backbone'])} "
        f"--output {quote(config['output'])}",
    ]
    for key, value in config.items():
        if key in ("backbone", "data", "output") or value == default[key]:
            continue
        if isinstance(value, dict):
            changed = [(f"{key}.{k}", v) for k, v in value.items() if v != default[key][k]]
        else:
            changed = [(key, value)]
        for name, v in changed:
            text = v if isinstance(v, str) else json.dumps(v, separators=(",", ":"))
            parts.append(f"--set {quote(f'{name}={text}')}")
    return " \\\n  ".join(parts)
