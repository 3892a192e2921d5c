"""What a checkpoint folder holds, told without reading its weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from engine.loading import read_config, resolve_checkpoint


def checkpoint_facts(checkpoint: str) -> dict[str, Any]:
    """Exits, backbone, bytes and parameters of every file, and the figures of the model card; JSON types only."""
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
        "figures": _card_figures(folder / "README.md"),
    }


def _card_figures(card: Path) -> list[dict[str, str]]:
    """The table under "## Figures" of a model card, one mapping a line; empty where there is none."""
    if not card.is_file():
        return []
    section = card.read_text(encoding="utf-8", errors="replace").partition("\n## Figures\n")[2].partition("\n## ")[0]
    lines = [line.strip().strip("|") for line in section.splitlines() if "|" in line]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [dict(zip(rows[0], row, strict=False)) for row in rows[2:]]
