"""What a run starts from, all checked before any training: its device, data, fresh model and earlier record."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.backbones import BackboneReference
from engine.loading import attach_exits
from engine.models.encoder import MultiExitEncoder
from engine.models.exits import INIT_STD
from engine.reading import read_json
from engine.train.batching import TokenizedExamples
from engine.train.config import TrainConfig
from engine.train.data import DataFolder, drop_leaked, split_calibration


def seed_of(config: TrainConfig, phase: str) -> int:
    """A phase's own seed: it draws the same numbers whether the run was stopped before it or not."""
    return zlib.crc32(f"{config.seed}/{phase}".encode())


# -- data --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Splits:
    """train (without the calibration part), calibration, dev and test (None where there is none), tokenised."""

    train: TokenizedExamples
    calibration: TokenizedExamples
    dev: TokenizedExamples
    test: TokenizedExamples | None


def make_splits(data: DataFolder, tokenizer: Any, config: TrainConfig) -> tuple[Splits, dict[str, int]]:
    """The run's rows, and how many there are in each split and were dropped."""
    train, leaked = data.train, 0
    if config.drop_leaked:
        train, leaked = drop_leaked(train, *(s for s in (data.dev, data.test) if s is not None))
    rest, calibration = split_calibration(train, share=config.calibration_share, seed=config.seed)
    rest, repeated = drop_leaked(rest, calibration)

    def tokenise(examples):
        return None if examples is None else TokenizedExamples.from_examples(examples, tokenizer, config.max_length)

    sizes = {
        "train": len(rest),
        "calibration": len(calibration),
        "dev": len(data.dev),
        "test": 0 if data.test is None else len(data.test),
        "dropped_also_in_dev_or_test": leaked,
        "dropped_also_in_calibration": repeated,
    }
    return Splits(tokenise(rest), tokenise(calibration), tokenise(data.dev), tokenise(data.test)), sizes


# -- the model ---------------------------------------------------------------------------------------------------


def fresh_model(
    config: TrainConfig, labels: Sequence[str], device: torch.device
) -> tuple[MultiExitEncoder, Any, BackboneReference]:
    """(model, tokenizer, backbone with its sha256); what the backbone does not bring is drawn from the run's seed."""
    fields: dict[str, Any] = dict(
        labels=labels,
        pooler=config.pooler,
        policy_hidden_size=config.policy_hidden_size,
        classifier_dropout=config.classifier_dropout,
        max_length=config.max_length,
    )
    if config.exit_layers is not None:
        fields["exit_layers"] = config.exit_layers
    torch.manual_seed(seed_of(config, "exits"))  # of the poolers, where the backbone has none to copy
    model, tokenizer, backbone = attach_exits(BackboneReference(config.backbone), fields)
    if tokenizer is None:
        raise ValueError(f"backbone {config.backbone} has no tokenizer.json: text cannot be read")
    if config.lora.rank:
        model.backbone = _add_lora(model.backbone, config)
    model.to(device)
    torch.manual_seed(seed_of(config, "exits"))
    for classifier in model.exits.classifiers:
        torch.nn.init.normal_(classifier.weight, std=INIT_STD)
        torch.nn.init.zeros_(classifier.bias)
    model.exits.reset_policies(config.policy.initialisation == "uniform_hazard")
    return model, tokenizer, backbone


def _add_lora(backbone: torch.nn.Module, config: TrainConfig) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    names = {"query", "key", "value", "dense", "q", "k", "v", "o"}
    present = {n.rpartition(".")[2] for n, m in backbone.encoder.named_modules() if isinstance(m, torch.nn.Linear)}
    torch.manual_seed(seed_of(config, "lora"))
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


# -- an earlier start --------------------------------------------------------------------------------------------

_SAME = {"config": "other options", "backbone": "another backbone", "data": "other data"}


def read_record(path: Path, start: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a run that began like ``start`` (keys config, backbone, data); None where there is none.

    Raises ValueError where the file is damaged, or names what the recorded run began with and this one does not.
    """
    if not path.exists():
        return None
    record = read_json(path)
    if not all(isinstance(record.get(key), dict) for key in ("config", "phases")):
        raise ValueError(f"{path} is not the record of a run: remove {path.parent}, or choose another output")
    for key, what in _SAME.items():
        stored = record.get(key) or {}
        changed = sorted(n for n in {*stored, *start[key]} if stored.get(n) != start[key].get(n))
        if changed:
            raise ValueError(
                f"{path.parent} holds a run with {what} ({', '.join(changed)}): remove it (train --restart does), or "
                "choose another output"
            )
    return record
