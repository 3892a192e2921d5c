"""CUDA graphs whose conditional nodes decide on the device, recorded from a torch stream.

    builder = GraphBuilder()
    with builder.rehearse(stream):        # every body runs once, uncaptured: autotuning, workspaces, a node budget
        step()
    with builder.capture(stream):
        work()
        with builder.when(counts[:1]):    # read at every replay: the body runs where it is not zero
            more_work()
            with builder.choose(bucket, 3) as cases:
                for k in range(3):
                    with cases.case(k):
                        sized_work(k)
    graph = builder.instantiate()
    graph.launch()

IFs nest to any depth on the one stream; a switch never stands inside another switch. A value is an int32 on the device,
read when the replay reaches the node. Nothing inside a capture may allocate (``no_allocation`` checks) or wait for the
host, and every buffer it touches must outlive the graph. The other half is ``csrc/include/graph.h``, which says why
it is reached through ctypes.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_void_p, pointer
from functools import partial

import torch
from torch import Tensor

from engine.kernels import extension

__all__ = [
    "AllocationError",
    "Cases",
    "Graph",
    "GraphBuilder",
    "builder_problem",
    "conditional_nodes_problem",
    "conditional_nodes_supported",
    "no_allocation",
    "own_stream",
]


class _Batch(ctypes.Structure):
    """GraphBatch of csrc/include/graph.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("executable", "stream", "given", "host_given", "results", "host_results")),
        ("done", c_void_p),
        *((name, c_int64) for name in ("given_bytes", "results_bytes")),
        ("device", c_int32),
    ]


_PROTOTYPES = {
    "new": (c_void_p, []),
    "free": (None, [c_void_p]),
    "begin": (c_char_p, [c_void_p, c_void_p, c_int32]),
    "begin_if": (c_char_p, [c_void_p, c_void_p]),
    "end_if": (c_char_p, [c_void_p]),
    "begin_switch": (c_char_p, [c_void_p, c_void_p, c_int32]),
    "begin_case": (c_char_p, [c_void_p, c_int32]),
    "end_case": (c_char_p, [c_void_p]),
    "end_switch": (c_char_p, [c_void_p]),
    "end": (c_char_p, [c_void_p]),
    "abort": (None, [c_void_p]),
    "counts": (c_char_p, [c_void_p, POINTER(c_int64), POINTER(c_int64)]),
    "instantiate": (c_char_p, [c_void_p, POINTER(c_void_p)]),
    "launch": (c_char_p, [c_void_p, c_void_p, c_int32]),
    "launch_batch": (c_char_p, [POINTER(_Batch)]),
    "upload": (c_char_p, [c_void_p, c_void_p, c_int32]),
    "new_stream": (c_char_p, [c_int32, POINTER(c_void_p)]),
    "destroy": (None, [c_void_p]),
    "supported": (c_int32, [c_int32, c_char_p, c_int32]),
}


def _native() -> dict | str:
    """The functions of graph.h by their short names, or why there are none."""
    return extension.c_functions("graph_", _PROTOTYPES)


def _check(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(error.decode())


def builder_problem() -> str | None:
    """Why there is no GraphBuilder, or None. Where there is one it can rehearse, device or not."""
    native = _native()
    return native if isinstance(native, str) else None


def conditional_nodes_problem(device: int | torch.device | None = None) -> str | None:
    """Why graphs with conditional nodes cannot be used on ``device`` (default: the current one), or None."""
    native = _native()
    if isinstance(native, str):
        return native
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not extension.cuda_kernels():
        return "the CUDA half of the extension cannot be used here"
    reason = ctypes.create_string_buffer(256)
    index = device if isinstance(device, int) else getattr(device, "index", None)
    index = torch.cuda.current_device() if index is None else index
    return None if native["supported"](index, reason, len(reason)) else reason.value.decode()


def conditional_nodes_supported(device: int | torch.device | None = None) -> bool:
    return conditional_nodes_problem(device) is None


_streams: dict[int, list[torch.cuda.Stream]] = {}  # by device: those that nobody owns at the moment


def own_stream(owner: object, device: torch.device) -> torch.cuda.Stream:
    """A stream that nobody but ``owner`` has while it lives. RuntimeError where the driver gives none.

    torch hands the streams of its pool out in turns, so that two who hold one need not know of each other; and what one
    of them launches while the other one captures is recorded in its graph, and does not run.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    free = _streams.setdefault(index, [])
    try:
        stream = free.pop()
    except IndexError:
        native, handle = _native(), c_void_p()
        if isinstance(native, str):
            raise RuntimeError(f"no stream can be made: {native}") from None
        error = native["new_stream"](index, byref(handle))
        if error is not None:
            raise RuntimeError(f"CUDA: new stream: {error.decode()}") from None
        stream = torch.cuda.ExternalStream(handle.value, torch.device("cuda", index))
    # Not destroyed: torch's allocator knows memory by its stream, and a new one may come to stand at the same address.
    weakref.finalize(owner, free.append, stream).atexit = False
    return stream


class Graph:
    """A finished graph, ready to be launched any number of times. It keeps the tensors its conditions read alive."""

    def __init__(self, native: dict, executable: c_void_p, device: torch.device, nodes: int, conditionals: int, kept):
        self.num_nodes = nodes  # of the graph and of all bodies
        self.num_conditionals = conditionals
        self.device = device
        self._native, self._executable, self._kept = native, executable, kept
        self._finalizer = weakref.finalize(self, native["destroy"], executable)
        self._finalizer.atexit = False  # the driver may be gone by then, and everything with it

    def launch(self, stream: torch.cuda.Stream | None = None) -> None:
        """Enqueue one run on ``stream`` (default: the current stream of the graph's device)."""
        self._enqueue("launch", stream)

    def batch_launcher(
        self,
        stream: torch.cuda.Stream,
        given: Tensor,
        host_given: Tensor,
        results: Tensor,
        host_results: Tensor,
        done: torch.cuda.Event,
    ) -> Callable[[], None]:
        """A call that copies ``host_given`` in, launches, copies ``results`` out and records ``done``: on ``stream``.

        One call of the driver's library for four of torch's, which take several times as long. Pairs of tensors have
        the same size, host memory is pinned. torch does not know of these copies: whoever owns the host memory waits
        for ``done`` before it goes.
        """
        done.record(stream)  # torch makes the event only now
        call = _Batch(
            self._executable,
            stream.cuda_stream,
            given.data_ptr(),
            host_given.data_ptr(),
            results.data_ptr(),
            host_results.data_ptr(),
            done.cuda_event,
            given.nbytes,
            results.nbytes,
            stream.device.index,
        )
        return partial(self._call, "launch_batch", pointer(call))

    def upload(self, stream: torch.cuda.Stream | None = None) -> None:
        """Bring the graph to the device, which the first launch would do otherwise."""
        self._enqueue("upload", stream)

    def _enqueue(self, name: str, stream: torch.cuda.Stream | None) -> None:
        stream = torch.cuda.current_stream(self.device) if stream is None else stream
        self._call(name, self._executable, stream.cuda_stream, stream.device.index)

    def _call(self, name: str, *arguments) -> None:
        if not self._finalizer.alive:
            raise RuntimeError(f"{name}: the graph is closed")
        error = self._native[name](*arguments)
        if error is not None:
            raise RuntimeError(f"CUDA: {name}: {error.decode()}")

    def close(self) -> None:
        self._finalizer()
        self._kept = ()


class Cases:
    """The bodies of one switch."""

    def __init__(self, builder: GraphBuilder, count: int):
        self._builder, self.count = builder, count

    @contextmanager
    def case(self, index: int) -> Iterator[None]:
        """What runs where the value is ``index``. A case that is never recorded is empty."""
        self._builder._call("begin_case", index)
        yield
        self._builder._call("end_case")


class GraphBuilder:
    """Records one graph at a time. One thread at a time may use a builder; builders know nothing of each other.

    An exception that leaves ``capture`` or ``rehearse`` aborts it: the stream is usable again, what was built is freed.
    Misuse and CUDA's errors are RuntimeErrors, a condition that cannot be read is a ValueError.
    """

    def __init__(self):
        native = _native()
        if isinstance(native, str):
            raise RuntimeError(f"graphs cannot be built: {native}")
        self._functions = native
        self._builder = c_void_p(native["new"]())
        self._device: torch.device | None = None
        self._kept: list[Tensor] = []
        self._finalizer = weakref.finalize(self, native["free"], self._builder)
        self._finalizer.atexit = False

    def _call(self, name: str, *arguments) -> None:
        if not self._finalizer.alive:
            raise RuntimeError(f"{name}: the builder is closed")
        _check(self._functions[name](self._builder, *arguments))

    @contextmanager
    def _recording(self, stream: torch.cuda.Stream | None, rehearse: bool) -> Iterator[GraphBuilder]:
        self._call("begin", None if stream is None else stream.cuda_stream, rehearse)
        self._device = None if stream is None else stream.device
        self._kept = []
        try:
            yield self
            self._call("end")
        except BaseException:
            self.abort()
            raise

    @contextmanager
    def capture(self, stream: torch.cuda.Stream | None = None) -> Iterator[GraphBuilder]:
        """Record what is launched on ``stream`` (default: the current one), which is current inside the block.

        Relaxed mode: only what this block puts on its stream is recorded, other threads and streams go on undisturbed.
        """
        if stream is None:
            stream = torch.cuda.current_stream()
        with torch.cuda.stream(stream), self._recording(stream, rehearse=False):
            yield self

    @contextmanager
    def rehearse(self, stream: torch.cuda.Stream | None = None) -> Iterator[GraphBuilder]:
        """The same block without a capture: every body runs once, whatever its condition; without a stream on the CPU.

        Checks the order of calls, counts the conditional nodes and warms up what a capture must not do.
        """
        current: AbstractContextManager = nullcontext() if stream is None else torch.cuda.stream(stream)
        with current, self._recording(stream, rehearse=True):
            yield self

    @contextmanager
    def when(self, flag: Tensor) -> Iterator[None]:
        """The block runs at a replay where ``flag``, one int32 on the device, is not zero."""
        self._call("begin_if", self._address("flag", flag))
        yield
        self._call("end_if")

    @contextmanager
    def choose(self, value: Tensor, count: int) -> Iterator[Cases]:
        """Of ``count`` cases, the one that ``value`` (one int32) names at a replay; none where it is past the last."""
        self._call("begin_switch", self._address("value", value), count)
        yield Cases(self, count)
        self._call("end_switch")

    def _address(self, name: str, tensor: Tensor) -> int:
        if tensor.dtype != torch.int32 or tensor.numel() != 1:
            raise ValueError(f"{name} must be one int32, got {tensor.dtype} of shape {list(tensor.shape)}")
        if self._device is not None and tensor.device != self._device:
            raise ValueError(f"{name} must be on the device of the stream ({self._device}), got {tensor.device}")
        self._kept.append(tensor)
        return tensor.data_ptr()

    def instantiate(self) -> Graph:
        """The recorded graph as an executable one. The builder may go on to capture another."""
        nodes, conditionals = self._counts()
        executable = c_void_p()
        self._call("instantiate", byref(executable))
        return Graph(self._functions, executable, self._device, nodes, conditionals, tuple(self._kept))

    def _counts(self) -> tuple[int, int]:
        nodes, conditionals = c_int64(), c_int64()
        self._call("counts", byref(nodes), byref(conditionals))
        return nodes.value, conditionals.value

    @property
    def num_nodes(self) -> int:
        """Nodes of the recorded graph and of all its bodies; 0 after a rehearsal."""
        return self._counts()[0]

    @property
    def num_conditionals(self) -> int:
        """Conditional nodes among them, known after a rehearsal too."""
        return self._counts()[1]

    def abort(self) -> None:
        """End whatever capture is in flight and free what was built. Safe in every state."""
        if self._finalizer.alive:
            self._functions["abort"](self._builder)
        self._kept = []

    def close(self) -> None:
        """``abort``, for good. Graphs that were instantiated live on."""
        self._finalizer()
        self._kept = []


def _allocations(device: int | torch.device | None) -> tuple[int, int]:
    stats = torch.cuda.memory_stats(device)
    return stats.get("allocation.all.allocated", 0), stats.get("segment.all.allocated", 0)


class AllocationError(RuntimeError):
    """Memory was asked for where none may be: perhaps by another thread, since the allocator counts for all of them."""


@contextmanager
def no_allocation(device: int | torch.device | None = None) -> Iterator[None]:
    """AllocationError where the block asked torch's caching allocator for memory, freed again or not.

    What is allocated while a graph is captured goes back to the allocator afterwards, and the graph would write into
    what somebody else then holds.
    """
    before = _allocations(device)
    yield
    asked, segments = (now - then for now, then in zip(_allocations(device), before, strict=True))
    if asked or segments:
        raise AllocationError(
            f"{asked} allocations ({segments} new segments) where none may happen: pass out= buffers, and warm up on "
            "the same stream first"
        )
