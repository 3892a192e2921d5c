"""One meaning, several ways to run it: ``reference`` (the oracle), ``packed`` (rows really leave), ``graph`` (CUDA)."""

from __future__ import annotations

import torch

from engine.executors.base import AtOnce, ExitOptions, PackedBatch, RowOutputs
from engine.executors.packed import PackedExecutor
from engine.executors.reference import ReferenceExecutor
from engine.kernels.extension import prepare

EXECUTORS = ("packed", "reference", "graph")

__all__ = [
    "AtOnce",
    "EXECUTORS",
    "ExitOptions",
    "PackedBatch",
    "PackedExecutor",
    "ReferenceExecutor",
    "RowOutputs",
    "executor_class",
]


def executor_class(name: str, device: torch.device | None = None) -> type:
    """The executor of that name; "auto" is graph on CUDA, packed elsewhere. ValueError for a name that is none."""
    if device is not None:
        prepare(device)
    chosen = name
    if name == "auto":
        chosen = "graph" if device is not None and device.type == "cuda" else "packed"
    if chosen == "graph":  # brings triton along: not for those who do not ask
        from engine.executors.graph import GraphExecutor

        return GraphExecutor
    if not isinstance(chosen, str) or chosen not in EXECUTORS:
        raise ValueError(f"executor must be one of auto, {', '.join(EXECUTORS)}, got {name!r}")
    return {"packed": PackedExecutor, "reference": ReferenceExecutor}[chosen]
