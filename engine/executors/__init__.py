"""One meaning, several ways to run it: ``reference`` (the oracle), ``packed`` (rows really leave)."""

from __future__ import annotations

from engine.executors.base import ExitOptions, PackedBatch, RowOutputs
from engine.executors.packed import PackedExecutor
from engine.executors.reference import ReferenceExecutor

EXECUTORS = {"packed": PackedExecutor, "reference": ReferenceExecutor}

__all__ = [
    "EXECUTORS",
    "ExitOptions",
    "PackedBatch",
    "PackedExecutor",
    "ReferenceExecutor",
    "RowOutputs",
    "executor_class",
]


def executor_class(name: str) -> type[PackedExecutor] | type[ReferenceExecutor]:
    """The executor of that name; "auto" is packed. ValueError for a name that is none."""
    chosen = "packed" if name == "auto" else name
    if not isinstance(chosen, str) or chosen not in EXECUTORS:
        raise ValueError(f"executor must be one of auto, {', '.join(EXECUTORS)}, got {name!r}")
    return EXECUTORS[chosen]
