"""Early-exit transformers that save wall-clock time: ``engine.load(checkpoint).run(batch)``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from engine.api import Engine
from engine.config import DecoderExitConfig, EarlyExitConfig
from engine.criteria import Criterion
from engine.devices import find_device
from engine.executors import executor_class
from engine.generation import DecoderEngine, Generation, check_decoder_options
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
    cache_bytes: int | None = None,
    state_copy: str | None = None,
) -> Engine | DecoderEngine:
    """An engine for a checkpoint, a folder or a hub id: an Engine for an encoder, a DecoderEngine for a decoder.

    device       "auto" (a CUDA device where there is one, else the CPU), or any torch device
    dtype        "auto" (float16 on CUDA, else float32), or float32, float64, bfloat16, float16 by name or as
                 torch.dtype
    executor     "auto" (graph on CUDA, else packed), "packed", "reference", or "graph" (one CUDA graph a pass; of a
                 decoder, a step)
    warmup       batches to be ready for, as (rows, tokens in all; of a decoder, of its prompts), each good for half to
                 all of its size: compiled and captured now, not by the first call that needs them; of a decoder, for
                 the model's own criterion alone. For the graph executor; nothing elsewhere
    cache_bytes  of a decoder: memory for keys, values and exit states of all rows together. Default: 1 GiB, or less
                 where the model's longest sequences for 64 rows need less
    state_copy   of a decoder: "lazy" (the default: keys and values of skipped layers are worked out when their layer is
                 next visited) or "eager" (as soon as a token has left; for the packed executor, which "auto" then is)
    Raises ValueError or TypeError for a wrong argument, before anything is read; for cache_bytes or state_copy with an
    encoder, before its weights are read (a hub id's files are here by then), and for cache_bytes without room for one
    block of positions, behind them.
    FileNotFoundError, OSError or ValueError that names the file, tensor or key that is wrong.
    """
    from engine.loading import load_model, read_config, resolve_checkpoint

    executor_class(executor)
    sizes, for_decoders = _sizes(warmup), _for_decoders(executor, cache_bytes, state_copy)
    explicit = None if isinstance(dtype, str) and dtype == "auto" else _dtype(dtype)
    chosen_device = find_device(
        device, "cuda" if torch.cuda.is_available() else "cpu", torch.float32 if explicit is None else explicit
    )
    automatic = torch.float16 if chosen_device.type == "cuda" else torch.float32
    folder = resolve_checkpoint(checkpoint)
    if for_decoders and isinstance(read_config(folder)[1], EarlyExitConfig):
        raise _no_decoder(for_decoders, str(checkpoint))
    model, tokenizer = load_model(folder, dtype=automatic if explicit is None else explicit)
    made = DecoderEngine if isinstance(model, MultiExitDecoder) else Engine
    loaded = made(model.to(chosen_device), tokenizer, executor, private=True, **for_decoders)
    for rows, tokens in sizes:
        loaded.warm_up(rows, tokens)
    return loaded


def from_module(
    model: MultiExitEncoder | MultiExitDecoder,
    tokenizer=None,
    *,
    executor: str = "auto",
    cache_bytes: int | None = None,
    state_copy: str | None = None,
) -> Engine | DecoderEngine:
    """An engine on a model that somebody else holds, and may go on training.

    A decoder's modules are called as they are. Of an encoder, embeddings, norms and exits are used in place; the
    products of its layers are packed copies that are renewed when the weights change (optimiser steps, ``.to()``,
    ``load_state_dict``, LoRA merges), which every run looks for. Dropout is never applied.

    executor, cache_bytes, state_copy  as in ``load``
    Raises TypeError for another model; ValueError for a wrong option, and for cache_bytes or state_copy with an
    encoder.
    """
    if not isinstance(model, (MultiExitEncoder, MultiExitDecoder)):
        raise TypeError(f"model must be a MultiExitEncoder or a MultiExitDecoder, got {type(model).__name__}")
    for_decoders = _for_decoders(executor, cache_bytes, state_copy)
    if isinstance(model, MultiExitDecoder):
        return DecoderEngine(model, tokenizer, executor, **for_decoders)
    if for_decoders:
        raise _no_decoder(for_decoders, "the model")
    return Engine(model, tokenizer, executor)


def _for_decoders(executor: str, cache_bytes: int | None, state_copy: str | None) -> dict[str, Any]:
    """Those of a DecoderEngine's options that were given, checked as far as they can be without a model."""
    given = {"cache_bytes": cache_bytes, "state_copy": state_copy}
    given = {name: value for name, value in given.items() if value is not None}
    if given:
        check_decoder_options(executor, given.get("state_copy", "lazy"), cache_bytes)
    return given


def _no_decoder(given: dict[str, Any], what: str) -> ValueError:
    named = ", ".join(f"{name}={value!r}" for name, value in given.items())
    them = "it" if len(given) == 1 else "them"
    return ValueError(f"{named}: for decoders, and {what} is an encoder, which has no cache: leave {them} out")


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
