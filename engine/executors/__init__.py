"""One meaning, several ways to run it: ``reference`` (the oracle), ``packed`` (rows really leave)."""

from engine.executors.base import ExitOptions, PackedBatch, RowOutputs
from engine.executors.packed import PackedExecutor
from engine.executors.reference import ReferenceExecutor

EXECUTORS = {"packed": PackedExecutor, "reference": ReferenceExecutor}

__all__ = ["EXECUTORS", "ExitOptions", "PackedBatch", "PackedExecutor", "ReferenceExecutor", "RowOutputs"]
