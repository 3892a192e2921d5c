"""Early-exit transformers that save wall-clock time: ``engine.load(checkpoint).run(batch)``."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from engine.api import Engine
from engine.config import DecoderExitConfig, EarlyExitConfig
from engine.criteria import Criterion
from engine.devices import find_device
from engine.executors import executor_class
from engine.generation import DecoderEngine, Generation
from engine.models.decoder import MultiExitDecoder
from engine.models.encoder import MultiExitEncoder
from engine.results import Classification, RunStats

__version__ = "0.1.0"
__all__ = [
    "Classification",
    "Criterion",
    "DecoderEngine",
    "DecoderExitConfig",
    "EarlyExitConfig",
    "Engine",
    "Generation",
    "MultiExitDecoder",
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
    warmup: Sequence[tuple[int, int]] = (),
) -> Engine | DecoderEngine:
    """An engine for a checkpoint, a folder or a hub id: an Engine for an encoder, a DecoderEngine for a decoder.

    device    "auto" (a CUDA device where there is one, else the CPU), or any torch device
    dtype     "auto" (float16 on CUDA, else float32), or float32, float64, bfloat16, float16 by name or as torch.dtype
    executor  "auto" (graph on CUDA, else packed), "packed", "reference", or "graph" (one CUDA graph a pass; of a
              decoder, a step)
    warmup    batches to be ready for, as (rows, tokens in all; of a decoder, of its prompts), each good for half to all
              of its size: compiled and captured now, not by the first call that needs them; of a decoder, for the
              model's own criterion alone. For the graph executor; nothing elsewhere
    Raises ValueError or TypeError for a wrong argument, before anything is read; FileNotFoundError, OSError or
    ValueError that names the file, tensor or key that is wrong.
    """
    from engine.loading import load_model

    executor_class(executor)
    sizes = _sizes(warmup)
    explicit = None if isinstance(dtype, str) and dtype == "auto" else _dtype(dtype)
    chosen_device = find_device(
        device, "cuda" if torch.cuda.is_available() else "cpu", torch.float32 if explicit is None else explicit
    )
    automatic = torch.float16 if chosen_device.type == "cuda" else torch.float32
    model, tokenizer = load_model(checkpoint, dtype=automatic if explicit is None else explicit)
    made = DecoderEngine if isinstance(model, MultiExitDecoder) else Engine
    loaded = made(model.to(chosen_device), tokenizer, executor, private=True)
    for rows, tokens in sizes:
        loaded.warm_up(rows, tokens)
    return loaded


def from_module(
    model: MultiExitEncoder | MultiExitDecoder, tokenizer=None, *, executor: str = "auto"
) -> Engine | DecoderEngine:
    """An engine on a model that somebody else holds, and may go on training.

    A decoder's modules are called as they are. Of an encoder, embeddings, norms and exits are used in place; the
    products of its layers are packed copies that are renewed when the weights change (optimiser steps, ``.to()``,
    ``load_state_dict``, LoRA merges), which every run looks for. Dropout is never applied.
    """
    if isinstance(model, MultiExitDecoder):
        return DecoderEngine(model, tokenizer, executor)
    if not isinstance(model, MultiExitEncoder):
        raise TypeError(f"model must be a MultiExitEncoder or a MultiExitDecoder, got {type(model).__name__}")
    return Engine(model, tokenizer, executor)


def _sizes(warmup: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    sizes = []
    for size in warmup:
        whole = isinstance(size, (tuple, list)) and len(size) == 2
        if not whole or not all(isinstance(n, int) and not isinstance(n, bool) for n in size):
            raise TypeError(f"warmup must hold pairs (rows, tokens), got {size!r}")
        rows, tokens = size
        sizes.append((rows, tokens))
    return sizes


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, str) and dtype in _DTYPES:
        return _DTYPES[dtype]
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    raise ValueError(f"dtype must be auto, {', '.join(_DTYPES)} or the torch.dtype, got {dtype!r}")
