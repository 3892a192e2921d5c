"""How a program becomes a graph: rehearsed, then captured, again where another thread came in between."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from engine.kernels.graphs import AllocationError, Graph, GraphBuilder, no_allocation

CAPTURES = 5


def captured(
    builder: GraphBuilder,
    stream: torch.cuda.Stream,
    record: Callable[[Callable[[Tensor], AbstractContextManager[None]]], None],
    attempts: int = CAPTURES,
) -> Graph:
    """The graph of what ``record(builder.when)`` launches on ``stream``; the builder is closed, whatever happens.

    Rehearsed first, which compiles what is not compiled: buffers are to hold no rows. Inside a capture nothing may
    allocate; tried again where something did, since it may have been another thread and a capture is short.

    AllocationError where something allocated in all attempts; whatever else record, compilers or CUDA raise.
    """
    collecting = gc.isenabled()
    try:
        with builder.rehearse(stream):
            record(builder.when)
        stream.synchronize()
        gc.disable()  # what a collection frees may touch the stream that is captured
        for attempt in range(attempts):
            try:
                with no_allocation(stream.device), builder.capture(stream):
                    record(builder.when)
                break
            except AllocationError:
                builder.abort()
                if attempt == attempts - 1:
                    raise
        return builder.instantiate()
    finally:
        if collecting:
            gc.enable()
        builder.close()
