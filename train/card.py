"""What a trained checkpoint says of its making: a model card for people, training.json for machines."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import PurePath
from shlex import quote
from typing import Any

import torch

from engine.config import EarlyExitConfig
from engine.train.config import TrainConfig

_RESULT_OF = ("config", "backbone", "data", "sizes", "alpha", "versions", "result")


def training_json(record: dict[str, Any]) -> str:
    """The part of a run's record that belongs to its checkpoint: all but the phases. Paths are as they were given."""
    return json.dumps({key: record[key] for key in _RESULT_OF}, indent=1) + "\n"


def model_card(record: dict[str, Any], exits: EarlyExitConfig) -> str:
    """README.md of a checkpoint: what it is, how it was trained, what it reaches."""
    config, backbone, sizes, result = (record[key] for key in ("config", "backbone", "sizes", "result"))
    lines = [
        "---",
        f"base_model: {backbone['source']}",
        "library_name: consistentee",
        "tags: [early-exit, consistentee]",
        "---",
        "",
        f"# {PurePath(config['output']).name}",
        "",
        f"`{backbone['source']}` ({exits.num_layers} layers, sha256 of its weights `{backbone['sha256']}`) with exits "
        f"at layers {', '.join(map(str, exits.exit_layers))}, trained by ConsistentEE (AAAI 2024) for "
        f"{exits.num_labels} classes.",
        "",
        "```python",
        "import engine",
        f'print(engine.load("{config["output"]}").run(["some text"]).labels)',
        "```",
        "",
        "## Training",
        "",
        "```",
        train_command(config, TrainConfig),
        "```",
        "",
        f"Data: {sizes['train']} rows for training, {sizes['calibration']} held out of train for choosing rounds, "
        f"alpha and threshold; {sizes['dropped_also_in_dev_or_test']} train rows dropped because their text also "
        f"stands in dev or test. Seed {config['seed']}; torch {record['versions']['torch']}, "
        f"{record['versions']['device']}.",
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
                f"| {name} | {r['rows']} | {r['accuracy_full_depth']:.4f} | {r['accuracy']:.4f} "
                f"| {r['mean_depth']:.2f} | {100 * r['saved_layers']:.1f} % |"
            )
    return "\n".join(lines) + "\n"


def train_command(config: dict[str, Any], kind: Callable[..., Any]) -> str:
    """The command line that repeats a run; ``kind`` makes its configuration from backbone, data and output."""
    default = kind(config["backbone"], config["data"], config["output"]).to_dict()
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
