"""ConsistentEE for decoders as one resumable run: adapter at the last exit, heads, policies, task."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.backbones import BackboneReference, eos_ids
from engine.facts import TRAINING
from engine.loading import attach_exits, save_checkpoint
from engine.models.decoder import MultiExitDecoder
from engine.train import card, decoder_phases
from engine.train.data import split_file
from engine.train.decoder_config import DecoderTrainConfig
from engine.train.instructions import (
    Instruction,
    TokenizedInstructions,
    chat_template,
    load_instructions,
    without,
)
from engine.train.run import ResumableRun, trained_state
from engine.train.start import seed_of

log = logging.getLogger("engine.train")
_STORED = torch.float16  # exits and adapter in a checkpoint: half the size, and an error far below what training moves


class DecoderTrainer(ResumableRun):
    """One run of a DecoderTrainConfig. ``run()`` starts or resumes it and returns the record of all its figures."""

    def __init__(self, config: DecoderTrainConfig):
        """Everything that a run needs is read and checked here. Nothing is written before ``run()``."""
        super().__init__(config)
        folder = Path(config.data)
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; expected one with train, dev and maybe test instructions")
        rows: dict[str, list[Instruction] | None] = {}
        for split in ("train", "dev", "test"):
            file = split_file(folder, split)
            if file is None and split != "test":
                raise ValueError(f"{folder}: no {split} data")
            rows[split] = None if file is None else load_instructions(file)
        self.data = {split: None if r is None else _sha256(r) for split, r in rows.items()}
        self.model, self.tokenizer, self.backbone = self._fresh()
        self.splits, self.sizes = self._split(rows)

    def run(self) -> dict[str, Any]:
        """Train, resuming where a stopped run of the same configuration left off, and write the checkpoint."""
        c = self.config
        self.record = self._open()
        self._at = ""
        if c.lora_rank and c.sft.epochs:
            self._phase("sft", lambda: self._step(decoder_phases.train_last_exit, c.sft))
        if c.heads.fit and (c.head, c.head_side) == ("lora", "hidden"):
            self._phase("fit", self._fit)
        if self.model.head_parameters() and c.heads.epochs:
            self._phase("heads", lambda: self._step(decoder_phases.train_heads, c.heads))
        if len(self.model.config.exit_layers) > 1:
            for name, options in (("policy", c.policy), ("sampled", c.sampled)):
                if options.epochs:
                    self._phase(name, lambda o=options: self._step(decoder_phases.train_policy, o, alpha=c.alpha))
            if c.task.epochs and (self.model.head_parameters() or c.task.adapter):
                self._phase("task", lambda: self._step(decoder_phases.train_task, c.task, threshold=c.threshold))
        if c.early_exit_classifier.epochs and len(self.model.config.exit_layers) > 1:
            step = decoder_phases.train_early_exit_classifier
            self._phase("early_exit_classifier", lambda: self._step(step, c.early_exit_classifier))
        self._restore(self._at)
        self._round()
        self.model.config = self.model.exits.config = replace(self.model.config, threshold=c.threshold)
        self.record["result"] = self._result()
        self._store_record()
        save_checkpoint(
            self.model,
            c.output,
            self.tokenizer,
            self.backbone if c.lora_rank else None,
            _model_card(self.record, self.model),
            extra={TRAINING: card.training_json(self.record)},
            dtype=_STORED,
        )
        log.info("wrote %s", c.output)
        return self.record

    def _round(self) -> None:
        """What has been trained, as the checkpoint's files will hold it: figures are of what is shipped."""
        self._holds = None
        for value in trained_state(self.model).values():
            value.copy_(value.to(_STORED))

    def _fit(self) -> dict[str, Any]:
        with self._precision():
            decoder_phases.fit_heads(self.model, self.splits["train"], self.config.heads.batch_size)
        return {}

    def _step(self, step: Any, options: Any, **more: Any) -> dict[str, Any]:
        seed = seed_of(self.config, self._running)
        with self._precision():
            return {"epoch_loss": step(self.model, self.splits["train"], options, seed=seed, **more)}

    def _result(self) -> dict[str, Any]:
        result: dict[str, Any] = {"threshold": self.config.threshold}
        for split in ("calibration", "dev", "test"):
            if self.splits[split] is not None:
                points = {f"{t:g}": self._figures(split, t) for t in {*self.config.thresholds, self.config.threshold}}
                result[split] = {"rows": len(self.splits[split]), "points": dict(sorted(points.items()))}
        return result

    def _figures(self, split: str, threshold: float) -> dict[str, Any]:
        with self._precision():
            found = asdict(decoder_phases.measure(self.model, self.splits[split], threshold))
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}  # as in JSON

    def _measured(self, name: str) -> dict[str, Any]:
        found = self._figures("calibration", self.config.threshold)
        log.info(
            "phase %s: calibration CE %.4f at mean depth %.2f (full depth %.4f)",
            name,
            found["ce"],
            found["mean_depth"],
            found["ce_full"],
        )
        return found

    @contextmanager
    def _precision(self) -> Iterator[None]:
        if self.config.precision == "bfloat16":
            # Its cache keeps 16-bit copies of trained weights until the context ends: every step would see the first.
            with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
                yield
        else:
            yield

    # -- what a run starts from ----------------------------------------------------------------------------------

    def _describe(self) -> dict[str, Any]:
        exits = list(self.model.config.exit_layers)
        return {"alpha": self.config.alpha, "exit_layers": exits, "sizes": self.sizes}

    def _fresh_model(self) -> nn.Module:
        return self._fresh()[0]

    def _fresh(self) -> tuple[MultiExitDecoder, Any, BackboneReference]:
        c = self.config
        names = ("head", "head_rank", "head_side", "policy_hidden_size", "threshold")
        exits: dict[str, Any] = {name: getattr(c, name) for name in names}
        exits["early_exit_classifier"] = c.early_exit_classifier.epochs > 0
        if c.exit_layers is not None:
            exits["exit_layers"] = c.exit_layers
        torch.manual_seed(seed_of(c, "exits"))
        model, tokenizer, backbone = attach_exits(BackboneReference(c.backbone), exits)
        if not isinstance(model, MultiExitDecoder):
            raise ValueError(f"backbone {c.backbone} is no decoder: its exits are trained as a classifier's")
        if tokenizer is None:
            raise ValueError(f"backbone {c.backbone} has no tokenizer.json: text cannot be read")
        stops = eos_ids(model.language_model)
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
            raise ValueError(
                f"backbone {c.backbone}: training would end answers with the tokenizer's EOS token, id "
                f"{tokenizer.eos_token_id} ({tokenizer.eos_token!r}), but generation stops at the ids {sorted(stops)}: "
                "make eos_token in tokenizer_config.json and eos_token_id in generation_config.json agree"
            )
        tokenizer.chat_template = chat_template(tokenizer)  # of the checkpoint: chats look as what it was trained on
        _compare_tokens(tokenizer)
        for parameter in model.causal_lm.parameters():
            parameter.requires_grad_(False)
        if c.lora_rank:
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(seed_of(c, "lora"))
            options = dict(lora_alpha=c.lora_rank, lora_dropout=0.05, bias="none")
            lora = LoraConfig(r=c.lora_rank, target_modules=list(c.lora_targets), **options)
            model.causal_lm = get_peft_model(model.causal_lm, lora)
        return model.to(self.device), tokenizer, backbone

    def _split(
        self, rows: dict[str, list[Instruction] | None]
    ) -> tuple[dict[str, TokenizedInstructions | None], dict[str, int]]:
        """Calibration is carved from train; train rows whose instruction stands in another part are dropped."""
        c, train = self.config, rows["train"]
        kept = without(train, rows["dev"] or [], rows["test"] or [])
        order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(c.seed)).tolist()
        count = max(1, round(len(kept) * c.calibration_share))
        if len(kept) <= count:
            raise ValueError(f"{c.data}: {len(kept)} training rows are too few to hold some out for calibration")
        held = [kept[i] for i in order[:count]]
        parts: dict[str, list[Instruction] | None] = {
            "train": without(kept, held),
            "calibration": held,
            "dev": rows["dev"],
            "test": rows["test"],
        }

        def tokenise(part: list[Instruction] | None) -> TokenizedInstructions | None:
            if part is None:
                return None
            return TokenizedInstructions.from_instructions(part, self.tokenizer, c.max_length, c.answers_only)

        splits = {name: tokenise(part) for name, part in parts.items()}
        sizes = {name: 0 if part is None else len(part) for name, part in splits.items()}
        sizes["dropped_also_in_dev_or_test"] = len(train) - len(kept)
        return splits, sizes


def _sha256(rows: list[Instruction]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for text in (row.instruction, row.input, row.output):
            digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _compare_tokens(tokenizer: Any) -> None:
    """Warn where a chat becomes other tokens than the same instruction in training: texts are equal, but a tokenizer
    may treat what stands behind a BOS token as the middle of a text."""
    asked = Instruction("Name a fruit.", "", "")
    chat = [{"role": "user", "content": asked.message}]
    found = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    if list(found) != tokenizer.encode(asked.prompt):
        warnings.warn(
            "chats with this checkpoint begin with other tokens than it was trained on: the tokenizer reads the "
            "template behind the BOS token as the middle of a text",
            stacklevel=2,
        )


def _model_card(record: dict[str, Any], model: MultiExitDecoder) -> str:
    config, backbone, sizes, result = (record[key] for key in ("config", "backbone", "sizes", "result"))
    exits = model.config
    lines = [
        "---",
        f"base_model: {backbone['source']}",
        "library_name: consistentee",
        "tags: [early-exit, consistentee, text-generation]",
        "---",
        "",
        f"# {Path(config['output']).name}",
        "",
        f"`{backbone['source']}` ({exits.num_layers} layers, sha256 of its weights `{backbone['sha256']}`) with exits "
        f"at layers {', '.join(map(str, exits.exit_layers))}, trained by ConsistentEE (AAAI 2024): every generated "
        "token leaves at the layer its policy chooses.",
        "",
        "```python",
        "import engine",
        f'lm = engine.load("{config["output"]}")',
        'print(lm.run([[{"role": "user", "content": "Why is the sky blue?"}]]).texts)',
        "```",
        "",
        "## Training",
        "",
        "```",
        card.train_command(config, DecoderTrainConfig),
        "```",
        "",
        f"Data: {sizes['train']} instructions for training, {sizes['calibration']} held out of train; "
        f"{sizes['dropped_also_in_dev_or_test']} dropped because their text also stands in dev or test. Seed "
        f"{config['seed']}, alpha {config['alpha']:g}; torch {record['versions']['torch']}, "
        f"{record['versions']['device']}.",
        "",
        "## Figures",
        "",
        "Teacher-forced, contexts at full depth (cross-entropy in nats a token). Layers are counted, not timed.",
        "",
        "| split | threshold | CE, full depth | CE, with exits | mean depth |",
        "| --- | --- | --- | --- | --- |",
    ]
    for split in ("calibration", "dev", "test"):
        for threshold, p in result.get(split, {}).get("points", {}).items():
            lines.append(f"| {split} | {threshold} | {p['ce_full']:.4f} | {p['ce']:.4f} | {p['mean_depth']:.2f} |")
    return "\n".join(lines) + "\n"
