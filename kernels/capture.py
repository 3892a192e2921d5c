"""How a program becomes a graph: rehearsed, then captured, again where another thread came in between."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from engine.kernels.graphs import AllocationError, Graph, GraphBuilder, no_allocation

CAPTURES = 5
# Of the process. Whoever rehearses allocates, and may wait for the whole device, which ends any capture; and
# collections are off and on for everybody.
_turn = threading.Lock()


_PATIENCE = 1.0  # seconds


class _Allocator:
    """Torch's, which counts for all threads (``no_allocation``): used by any number of them, or by none while one
    captures. What a thread is inside of already it enters again.

    A capture does not wait longer than ``_PATIENCE``: those inside may have a long batch, or criteria of users who wait
    for something that the capturing thread holds. It is then disturbed, or lucky.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: set[int] = set()  # threads
        self._capturing: int | None = None

    @contextmanager
    def used(self) -> Iterator[None]:
        me = threading.get_ident()
        if me in self._inside or self._capturing == me:
            yield
            return
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._capturing is None)
                self._inside.add(me)
            yield
        finally:
            with self._changed:
                self._inside.discard(me)
                self._changed.notify_all()

    @contextmanager
    def left_alone(self) -> Iterator[None]:
        """One thread at a time; those who come later wait already while it waits for those inside."""
        me = threading.get_ident()
        try:
            with self._changed:
                self._capturing = me
                self._changed.wait_for(lambda: self._inside <= {me}, _PATIENCE)
            yield
        finally:
            with self._changed:
                self._capturing = None
                self._changed.notify_all()


_allocator = _Allocator()
# Around what an encoder's graph executor allocates on its device outside a capture: it waits for captures of other
# threads, and they for it, so that two engines do not end each other's captures time and again.
allocating = _allocator.used

# What a capture says that another thread has ended, or one that another thread's capture keeps from what it needs: by
# CUDA's texts and names, as torch, Triton and ``GraphBuilder`` pass them on, or by torch's code.
_CODES = (900, 901)
_TEXTS = (
    "operation not permitted when stream is capturing",
    "operation failed due to a previous error during capture",
    "StreamCaptureUnsupported",
    "StreamCaptureInvalidated",
    "STREAM_CAPTURE_UNSUPPORTED",
    "STREAM_CAPTURE_INVALIDATED",
    "capture was invalidated",
    "no longer being captured",
)


def passing(error: BaseException) -> str | None:
    """What kept a program from being captured that ended with ``error``, where another time may be luckier, or None."""
    if isinstance(error, AllocationError):
        return "other threads allocate while a graph is captured"
    if getattr(error, "error_code", None) in _CODES or any(text in str(error) for text in _TEXTS):
        return f"a capture was disturbed, perhaps by another thread ({error})"
    return None


def out_of_memory(error: BaseException) -> bool:
    """Of torch's allocator; or of the driver, which has only what that one leaves, and says so in CUDA's words."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def captured(
    builder: GraphBuilder,
    stream: torch.cuda.Stream,
    record: Callable[[Callable[[Tensor], AbstractContextManager[None]]], None],
    after: torch.cuda.Stream | None = None,
) -> Graph:
    """The graph of what ``record(builder.when)`` launches on ``stream``; the builder is closed, whatever happens.

    Rehearsed first, which compiles what is not compiled: buffers are to hold no rows. Inside a capture nothing may
    allocate; tried again where something did or CUDA was disturbed, since it may have been another thread (that is not
    ``allocating``) and a capture is short. Threads take turns. Nothing runs on the stream any more when this
    returns or raises.

    stream  one that nobody else has (``own_stream``): whatever is launched there is recorded
    after   a stream that first comes to the end of what it has been given so far: where the buffers are being made

    What was ``passing`` in all attempts is raised; and whatever else record, compilers or CUDA raise.
    """
    with _turn:
        collecting = gc.isenabled()
        try:
            if after is not None:
                stream.wait_stream(after)
            try:
                with builder.rehearse(stream):
                    record(builder.when)
            finally:
                # Where it failed, what it began still runs, in buffers that the allocator would give to somebody else.
                stream.synchronize()
            with _allocator.left_alone():
                gc.disable()  # what a collection frees may touch the stream that is captured
                for attempt in range(CAPTURES):
                    try:
                        with no_allocation(stream.device), builder.capture(stream):
                            record(builder.when)
                        break
                    except Exception as error:
                        if passing(error) is None:
                            raise
                        builder.abort()
                        if attempt == CAPTURES - 1:
                            raise
            return builder.instantiate()
        finally:
            if collecting:
                gc.enable()
            builder.close()
