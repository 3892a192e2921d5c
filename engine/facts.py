"""What a checkpoint folder holds, told without reading its weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from engine.config import DecoderExitConfig
from engine.loading import read_config, resolve_checkpoint
from engine.reading import read_json

TRAINING = "training.json"
_FIGURES = ("rows", "accuracy_full_depth", "accuracy", "mean_depth", "saved_layers")
_TOKEN_FIGURES = ("tokens", "ce_full", "ce", "mean_depth")


def checkpoint_facts(checkpoint: str) -> dict[str, Any]:
    """Exits, backbone, bytes and parameters of every file, and the figures that training found; JSON types only."""
    folder = resolve_checkpoint(checkpoint)
    backbone, exits, reference = read_config(folder)
    parameters = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                shapes = [file.get_slice(name).get_shape() for name in file.keys()]
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
        parameters[path.name] = sum(math.prod(shape) for shape in shapes)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    return {
        "checkpoint": checkpoint,
        "model_type": backbone.model_type,
        "hidden_size": backbone.hidden_size,
        "early_exit": exits.to_dict(),
        "backbone": None if reference is None else vars(reference),
        "bytes": files,
        "total_bytes": sum(files.values()),
        "parameters": parameters,
        "figures": _training_figures(folder / TRAINING, isinstance(exits, DecoderExitConfig)),
    }


def _training_figures(path: Path, decoder: bool) -> dict[str, dict[str, float]]:
    """{split: figures at the checkpoint's threshold}; empty where no training.json stands in the folder."""
    if not path.is_file():
        return {}
    training = read_json(path)
    try:
        result = training["result"]
        splits = [name for name in ("calibration", "dev", "test") if name in result]
        if decoder:
            found = {name: result[name]["points"][f"{result['threshold']:g}"] for name in splits}
            return {name: {key: point[key] for key in _TOKEN_FIGURES} for name, point in found.items()}
        return {name: {key: result[name][key] for key in _FIGURES} for name in splits}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: result is not what training writes ({error!r}): remove the file") from None
