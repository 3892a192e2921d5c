"""Early-exit transformers that save wall-clock time: ``engine.load(checkpoint).run(batch)``."""

from __future__ import annotations

import os

import torch

from engine.api import Engine
from engine.config import EarlyExitConfig
from engine.criteria import Criterion
from engine.devices import find_device
from engine.executors import executor_class
from engine.models.encoder import MultiExitEncoder
from engine.results import Classification, RunStats

__version__ = "0.1.0"
__all__ = [
    "Classification",
    "Criterion",
    "EarlyExitConfig",
    "Engine",
    "MultiExitEncoder",
    "RunStats",
    "from_module",
    "load",
]

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    checkpoint: str | os.PathLike,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    executor: str = "auto",
) -> Engine:
    """An engine for a checkpoint: a folder, or a hub id.

    device    "auto" (the CPU: this release's executors are tuned there), or any torch device
    dtype     "auto" (float32), or float32, float64, bfloat16, float16 by name or as torch.dtype
    executor  "auto" (packed), "packed", "reference", or "graph" (one CUDA graph a pass; written and tested step by step
              on the CPU, not measured on a GPU yet)
    Raises ValueError or TypeError for a wrong argument, before anything is read; FileNotFoundError, OSError or
    ValueError that names the file, tensor or key that is wrong.
    """
    from engine.loading import load_model

    executor_class(executor)
    chosen_dtype = _dtype(dtype)
    chosen_device = find_device(device, "cpu", chosen_dtype)
    model, tokenizer = load_model(checkpoint, dtype=chosen_dtype)
    return Engine(model.to(chosen_device), tokenizer, executor, private=True)


def from_module(model: MultiExitEncoder, tokenizer=None, *, executor: str = "auto") -> Engine:
    """An engine on a model that somebody else holds, and may go on training.

    Embeddings, norms and exits are used in place; the layers' products are packed copies that are renewed when the
    weights change (optimiser steps, ``.to()``, ``load_state_dict``, LoRA merges), which every run looks for. Dropout is
    never applied.
    """
    if not isinstance(model, MultiExitEncoder):
        raise TypeError(f"model must be a MultiExitEncoder, got {type(model).__name__}")
    return Engine(model, tokenizer, executor)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, str) and dtype == "auto":
        return torch.float32
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    raise ValueError(f"dtype must be auto, {', '.join(_DTYPES)} or the torch.dtype, got {dtype!r}")
