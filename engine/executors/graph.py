"""A whole pass as one CUDA graph launch: decisions stay on the device, rows that leave are removed, nothing waits.

A *program* is the fixed sequence of kernels (``graph_pass``) for one capacity (rows, tokens, longest row); the live
counts are values on the device that every kernel reads (``kernels/gpu_*``), so one graph serves any batch up to its
capacity and whatever is left of it behind each exit. Conditional nodes stand at stages: behind one at which no row is
left, the rest of the pass is skipped; between two, empty kernels return at once.

Where there is no CUDA device the same program runs step by step through the kernels' torch twins: what the tests hold
against the other executors.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.executors.base import ExitOptions, RowOutputs, TokenRows
from engine.executors.graph_pass import Arena, Capacity, Pass, Steps
from engine.executors.packed import PackedExecutor
from engine.executors.weights import EncoderWeights, PlainLinear, WatchedWeights, derive
from engine.kernels.capture import allocating, captured, out_of_memory, passing
from engine.kernels.exit_rows import ExitDestinations
from engine.kernels.gpu_common import triton
from engine.kernels.graphs import Graph, GraphBuilder, conditional_nodes_problem, own_stream
from engine.models.encoder import MultiExitEncoder

T = TypeVar("T")
_MAX_PROGRAMS = 512  # each takes some of the host, too
# Of the device's memory, for all programs; beyond it, those used longest ago go.
_MEMORY_SHARE = 0.25
_GRAPH_BYTES = 1 << 20  # of the device for one graph, about
_LONGEST_PAUSE = 1024  # batches between two attempts at captures that are always disturbed


def capacity_for(rows: int, tokens: int, longest: int, max_length: int) -> Capacity:
    """The program that serves a batch: rows and tokens on a ladder of powers of two and what stands halfway between (a
    step of at most 1.5; what is too much costs programs that return at once), the longest row on powers of two."""
    return Capacity(_up(rows, 1), _up(tokens, 64), min(_power(longest, 32), max(max_length, longest)))


def _power(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())


def _up(n: int, least: int) -> int:
    power = _power(n, least)
    between = power // 4 * 3
    return between if n <= between and between >= least else power


class _Slot:
    """Host memory of one batch in flight, both ways. segments: fields of what is given; results: rows and classes.

    launch  puts the batch on its way, where a graph does
    """

    launch: Callable[[], None] | None = None

    def __init__(
        self, words: int, segments: dict[str, slice], results: tuple[int, int], first_position: int, pinned: bool
    ):
        rows, labels = results
        self._first_position = first_position
        self.given = torch.zeros(words, dtype=torch.int32, pin_memory=pinned)
        self.results = torch.zeros(rows * (labels + 2), dtype=torch.int32, pin_memory=pinned)
        self.done = torch.cuda.Event() if pinned else None
        logits, self._exit_layers, probs = np.split(self.results.numpy(), [rows * labels, rows * (labels + 1)])
        self._logits, self._exit_probs = logits.view(np.float32).reshape(rows, labels), probs.view(np.float32)
        # Written through numpy: torch's copies share even small work among threads.
        whole = self.given.numpy()
        self._fields = {name: whole[segment] for name, segment in segments.items()}
        self._fields["row_ids"][:] = np.arange(rows)
        self._filled: tuple[ExitOptions, int] | None = None
        self._lengths: tuple[int, ...] = ()  # whose cu_seqlens and positions it holds
        self._types = False  # whether it holds token types other than 0

    def fill(self, rows: TokenRows, options: ExitOptions) -> None:
        """The batch, and how its rows may leave: unless it is what the slot already holds (read-only records)."""
        fields, n, tokens = self._fields, len(rows), rows.num_tokens
        fields["counts"][:] = n, tokens
        fields["input_ids"][:tokens] = rows.ids
        if rows.lengths != self._lengths:
            fields["cu_seqlens"][: n + 1] = rows.cu_seqlens
            fields["positions"][:tokens] = rows.positions(self._first_position)
            self._lengths = rows.lengths
        if rows.segments is not None:
            fields["token_type_ids"][:tokens] = rows.segments
        elif self._types:
            fields["token_type_ids"][:] = 0
        self._types = rows.segments is not None
        if self._filled is not None and self._filled[0] is options and self._filled[1] == n:
            return

        def put(name: str, values: Tensor) -> None:
            fields[name][: len(values)] = values.numpy()

        put("min_depth", options.min_depth)
        put("max_depth", options.max_depth)
        if options.exit_layers is not None:
            put("script", options.exit_layers)
        name = options.criterion.policy_threshold
        if name is not None:
            put("threshold_logit", options.begin()[name].view(torch.int32))
        self._filled = options, n

    def take(self, n: int) -> RowOutputs:
        """Copies of the first rows, each in memory of its own."""
        found = self._logits, self._exit_layers, self._exit_probs
        return RowOutputs(*(torch.from_numpy(values[:n].copy()) for values in found))

    def __del__(self) -> None:
        # A batch that nobody waited for may still be on its way into this memory.
        if self.launch is not None:
            self.done.synchronize()


class _Place:
    """Owns the stream of an executor as long as its model stands on one device."""


@contextmanager
def _always(flag: Tensor) -> Iterator[None]:
    """Stands for ``GraphBuilder.when`` where nothing is captured: every body runs, and finds no rows where there are
    none."""
    yield


class _Program:
    """The pass for one capacity: buffers that never move, and the graph that works on them."""

    def __init__(
        self,
        weights: EncoderWeights,
        arena: Arena,
        capacity: Capacity,
        steps: Steps,
        num_labels: int,
        first_position: int,
    ):
        self.capacity, self.arena, self._first_position = capacity, arena, first_position
        device, rows, tokens = weights.word.device, capacity.rows, capacity.tokens
        self.device, self.num_labels = device, num_labels
        self.graph: Graph | None = None
        self._free: list[_Slot] = []
        # What the host gives, in one piece: a segment a field, each at a multiple of 16 bytes.
        sizes = {"counts": 2, "cu_seqlens": rows + 1, "row_ids": rows, "min_depth": rows, "max_depth": rows,
                 "threshold_logit": rows, "script": rows, "input_ids": tokens, "positions": tokens,
                 "token_type_ids": tokens}  # fmt: skip
        self._segments: dict[str, slice] = {}
        end = 0
        for name, size in sizes.items():
            self._segments[name] = slice(end, end + size)
            end += -(-size // 4) * 4
        self._given = torch.zeros(end, dtype=torch.int32, device=device)  # a pass leaves it as it is
        self._holds: Tensor | None = None  # which replayer's batch
        given = {name: self._given[segment] for name, segment in self._segments.items()}

        def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._results = ints(rows * (num_labels + 2))
        logits, layers, probs = self._results.split([rows * num_labels, rows, rows])
        out = ExitDestinations(
            logits=logits.view(torch.float32).view(rows, num_labels),
            exit_layers=layers,
            exit_probs=probs.view(torch.float32),
            keep=ints(rows, dtype=torch.int8),
        )
        self._pass = Pass(weights, arena, capacity, steps, given, out)

    def capture(self, stream: torch.cuda.Stream) -> None:
        """Rehearse (compiles what is not compiled, on no rows), then capture: see ``captured``."""
        builder = GraphBuilder()
        self.graph = captured(builder, own_stream(builder, self.device), self._pass.record, after=stream)
        self.graph.upload(stream)

    def submit(self, rows: TokenRows, options: ExitOptions, stream: torch.cuda.Stream | None) -> Callable:
        """Put one batch on the stream. Calling what comes back waits for it and returns its RowOutputs."""
        try:
            slot = self._free.pop()
        except IndexError:
            slot = self._slot(stream)
        slot.fill(rows, options)
        self._holds = None
        if slot.launch is not None:
            slot.launch()
        else:
            self._given.copy_(slot.given)
            self._pass.record(_always)
            slot.results.copy_(self._results)
        n = len(rows)
        results: list[RowOutputs] = []

        def outputs() -> RowOutputs:
            if results:  # the slot has gone back: it may hold another batch
                return results[0]
            if slot.done is not None:
                slot.done.synchronize()
            found = slot.take(n)
            results.append(found)
            self._free.append(slot)
            return found

        return outputs

    def replayer(
        self, rows: TokenRows, options: ExitOptions, stream: torch.cuda.Stream, lock: threading.Lock
    ) -> Callable[[], None]:
        slot = self._slot(None)
        slot.fill(rows, options)
        given = slot.given.to(self.device)

        def launch() -> None:
            with lock:
                if self._holds is not given:
                    with torch.cuda.stream(stream):
                        self._given.copy_(given)
                    self._holds = given
                self.graph.launch(stream)

        return launch

    def _slot(self, stream: torch.cuda.Stream | None) -> _Slot:
        results = self.capacity.rows, self.num_labels
        pinned = stream is not None
        slot = _Slot(self._given.shape[0], self._segments, results, self._first_position, pinned)
        if stream is not None:
            slot.launch = self.graph.batch_launcher(
                stream, self._given, slot.given, self._results, slot.results, slot.done
            )
        return slot

    @property
    def bytes(self) -> int:
        """Of its own on the device, without the arena."""
        graph = 0 if self.graph is None else _GRAPH_BYTES
        return self._given.nbytes + self._results.nbytes + self._pass.bytes + graph


class GraphExecutor:
    """Runs a MultiExitEncoder whose device is a GPU, in fp16, bf16 or fp32. Batches and options stay on the host.

    Falls back to ``packed`` where graphs cannot serve: for good without conditional nodes or after a capture that
    failed; where other threads disturbed every attempt to capture, for one batch, and each time that it happens again
    for twice as many before the next attempt; and for a criterion that is neither a policy threshold nor a script, and
    float64. Each of the three with one warning that says why.
    """

    name = "graph"

    def __init__(self, model: MultiExitEncoder, watching: bool = True):
        self._model = model
        self.weights = WatchedWeights(model, watching, partial(derive, product=PlainLinear), in_place=True)
        self._packed: PackedExecutor | None = None
        self._warned: set[str] = set()
        self._lock = threading.Lock()
        self._programs: OrderedDict[tuple[Capacity, Steps], _Program] = OrderedDict()
        self._warm: set[tuple[Capacity, Steps]] = set()  # what was asked for ahead
        # Of what batches have asked for: whose program serves it, its own or a larger one's.
        self._known: dict[tuple[Capacity, Steps], tuple[Capacity, Steps]] = {}
        self._held: EncoderWeights | None = None  # what the programs are made of
        self._disturbed, self._pause = 0, 0  # captures in a row; batches before the next attempt
        self._forget()
        self._place(model.device)

    def _forget(self) -> None:
        """Give back what all programs hold."""
        self._programs.clear()
        self._warm.clear()
        self._known.clear()
        self._arena: Arena | None = None

    def _place(self, device: torch.device) -> None:
        self._problem: str | None = None
        self._stream: torch.cuda.Stream | None = None
        self._here = _Place()
        if device.type == "cuda":
            self._problem = conditional_nodes_problem(device)
            if self._problem is None and triton is None:
                self._problem = "triton is not installed"
            if self._problem is None:
                self._stream = own_stream(self._here, device)
        self._device = device

    def watch(self) -> None:
        """From now on somebody else may change the module: ``look`` reads all weights."""
        self.weights.watching = True
        if self._packed is not None:
            self._packed.watch()

    def look(self) -> None:
        """See what somebody else has done to the module. Graphs are captured anew where something else than values has
        changed. Waits for the device: once for all batches of a run."""
        if not self.weights.watching:
            return
        with torch.inference_mode(), self._lock, allocating():
            if self._model.device != self._device:
                self._drop()
                self._place(self._model.device)
            if self._held is not None:  # else they are derived when a program is made
                with self._own_stream():
                    self._hold(self._with_room(self.weights.current))
            if self._packed is not None:
                self._packed.look()

    def refresh(self) -> None:
        """Read the module's weights again now; for graphs see ``look``."""
        with torch.inference_mode(), self._lock, allocating():
            if self._held is not None:
                with self._own_stream():
                    self._hold(self._with_room(self.weights.refresh))
            if self._packed is not None:
                self._packed.refresh()

    def _drop(self) -> None:
        """``_forget``, and the weights that programs were made of."""
        self._forget()
        self._held = None
        self.weights.drop()

    def _derive(self) -> None:
        """Hold the weights of the last look, derived where there are none. What it refuses is the caller's to mend."""
        if self._held is None or self.weights.held() is not self._held:
            with allocating():
                self._hold(self._with_room(self.weights.held))

    def _hold(self, weights: EncoderWeights) -> None:
        """Programs are of these weights, or go."""
        if weights is not self._held:
            self._programs.clear()
            self._known.clear()
            self._held = weights

    def run(self, rows: TokenRows, options: ExitOptions) -> RowOutputs:
        """Exit layer, exit probability and class logits of every row, on the host. Waits once, for the results."""
        return self.submit(rows, options)()

    def submit(self, rows: TokenRows, options: ExitOptions) -> Callable[[], RowOutputs]:
        """Start a batch; calling what comes back waits for its results. Batches run in the order they were started."""
        asked = self._key(len(rows), rows.num_tokens, max(rows.lengths), options)
        with self._lock:
            key = self._known.get(asked)
            # The short way: whose program is there has nothing to wait for on the caller's stream.
            if key is not None and options.no_comparison is None:
                self._programs.move_to_end(key)
                return self._programs[key].submit(rows, options, self._stream)
        with torch.inference_mode(), self._lock:
            problem = self._trouble(options)
            kind = "options"
            if problem is None:
                with self._own_stream():
                    self._derive()
                    made = self._made(lambda: self._program(asked))
                    if not isinstance(made, str):
                        return made.submit(rows, options, self._stream)
                    problem, kind = made, "passing"
            if self._problem is not None:
                kind = "for good"
        return self._fall_back(problem, kind, rows, options)

    def _trouble(self, options: ExitOptions) -> str | None:
        """Why graphs cannot serve these options, or None."""
        return self._problem or _unserved(self._model, options)

    def _with_room(self, work: Callable[[], T]) -> T:
        """What ``work`` returns. Where memory is short it costs all programs; OutOfMemoryError where that is not
        enough, which is the caller's: a smaller batch may do."""
        try:
            return work()
        except Exception as error:
            if not out_of_memory(error):
                raise
            if not self._programs and not self._warm:
                self._arena = None
                raise torch.OutOfMemoryError(f"with no graph left: {error}") from error
            self._forget()
        with allocating():
            torch.cuda.empty_cache()  # the error is gone by now, and with it what its frames held
        return self._with_room(work)

    def _made(self, make: Callable[[], _Program | str]) -> _Program | str:
        """What ``make`` returns; or why the program cannot be had, which is then this executor's problem (but for what
        other threads did)."""
        try:
            return self._with_room(make)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton's and the compiler's share no base class
            disturbed = passing(error)
            if disturbed is not None:
                self._disturbed += 1
                self._pause = min(2 ** (self._disturbed - 1) - 1, _LONGEST_PAUSE)
                return disturbed
            if self._stream is None:
                raise
            self._drop()
            self._problem = f"a capture failed ({type(error).__name__}: {error})"
            return self._problem

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """The executor's stream, behind what the caller's stream has been given so far: weights may just be written.

        Buffers made inside belong to that stream: a program that is dropped while its last batch runs frees memory
        that nobody else gets before the batch is done.
        """
        if self._stream is None:
            yield
            return
        theirs = torch.cuda.current_stream(self._stream.device)
        if not theirs.query():  # asking is cheaper than an event, and an engine mostly finds nothing to wait for
            self._stream.wait_stream(theirs)
        with torch.cuda.stream(self._stream):
            yield

    def warmup(self, rows: int, tokens: int, longest: int, options: ExitOptions) -> None:
        """Make the program of a batch of that size ready; it then serves all batches from half of that size on (rows
        and tokens, whatever their longest row up to ``longest``). Where a capture fails, the first run says so."""
        with torch.inference_mode(), self._lock:
            if self._trouble(options) is None:
                key = self._key(rows, tokens, longest, options)
                with self._own_stream():
                    self._derive()
                    self._made(lambda: self._program_at(key))
                self._warm.add(key)

    def replayer(self, rows: TokenRows, options: ExitOptions) -> Callable[[], None]:
        """For benchmarks: the batch stands on the device; every call launches its pass again, and waits for nothing."""
        with torch.inference_mode(), self._lock, self._own_stream():
            self._derive()
            program = self._program(self._key(len(rows), rows.num_tokens, max(rows.lengths), options))
            if isinstance(program, str):
                raise RuntimeError(f"no graph can be replayed: {program}")
            with allocating():
                return program.replayer(rows, options, self._stream, self._lock)

    def _program(self, asked: tuple[Capacity, Steps]) -> _Program | str:
        key = asked if asked in self._programs else self._covering(asked) or asked
        program = self._program_at(key)
        if not isinstance(program, str) and program.graph is not None:
            self._known[asked] = key
        return program

    def _program_at(self, key: tuple[Capacity, Steps]) -> _Program | str:
        """The program, made where it is new; or why that is not tried at the moment."""
        program = self._programs.get(key)
        if program is None:
            if self._pause > 0:
                self._pause -= 1
                return f"captures were disturbed {self._disturbed} times in a row"
            (capacity, steps), weights = key, self._held
            labels = self._model.config.num_labels
            first_position = self._model.family.first_position
            with allocating():
                program = _Program(weights, self._room(capacity, weights), capacity, steps, labels, first_position)
            if self._stream is not None:
                program.capture(self._stream)
            self._disturbed = 0
            self._programs[key] = program
            while len(self._programs) > 1 and (self._bytes() > self._limit() or len(self._programs) > _MAX_PROGRAMS):
                oldest, _ = self._programs.popitem(last=False)
                self._warm.discard(oldest)  # smaller ones may fit
                self._known.clear()
            if self._bytes() > self._limit():
                self._arena = None  # this one's alone is too large: others get a smaller one, and it is the next to go
        self._programs.move_to_end(key)
        return program

    def _key(self, rows: int, tokens: int, longest: int, options: ExitOptions) -> tuple[Capacity, Steps]:
        criterion = "policy" if options.criterion.policy_threshold is not None else "scripted"
        capacity = capacity_for(rows, tokens, longest, self._model.config.max_length)
        return capacity, Steps(criterion, options.reads, options.deepest)

    def _covering(self, key: tuple[Capacity, Steps]) -> tuple[Capacity, Steps] | None:
        """The smallest program that was asked for ahead and is not too large: up to twice the rows and tokens."""
        (rows, tokens, longest), steps = key
        found = [
            (have, others)
            for have, others in self._warm
            if others == steps
            and rows <= have.rows <= 2 * rows
            and tokens <= have.tokens <= 2 * tokens
            and longest <= have.longest
        ]
        return min(found, key=lambda candidate: candidate[0].tokens, default=None)

    def _bytes(self) -> int:
        """Device memory of all programs. One keeps the arena it was captured with when a larger one comes."""
        arenas = {id(p.arena): p.arena.bytes for p in self._programs.values()}
        return sum(arenas.values()) + sum(p.bytes for p in self._programs.values())

    def _limit(self) -> float:
        if self._stream is None:
            return float("inf")
        return _MEMORY_SHARE * torch.cuda.get_device_properties(self._stream.device).total_memory

    def _room(self, capacity: Capacity, weights: EncoderWeights) -> Arena:
        tokens = max(capacity.tokens, capacity.rows)
        have, word = self._arena, weights.word
        wide = max(layer.intermediate.weight.shape[0] for layer in weights.layers)
        fits = have is not None and have.tokens >= tokens and have.inner.shape[1] >= wide
        if fits:
            hidden = have.hidden
            fits = (hidden.shape[1], hidden.dtype, hidden.device) == (word.shape[1], word.dtype, word.device)
        if not fits:
            self._arena = Arena(tokens, word.shape[1], wide, word)
        return self._arena

    def _fall_back(self, problem: str, kind: str, rows: TokenRows, options: ExitOptions) -> Callable[[], RowOutputs]:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"the graph executor cannot serve ({problem}): packed serves instead", stacklevel=4)
        with allocating():
            if self._packed is None:
                self._packed = PackedExecutor(self._model, self.weights.watching)
            return self._packed.submit(rows, options)


def _unserved(model: MultiExitEncoder, options: ExitOptions) -> str | None:
    if model.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"its kernels take float16, bfloat16 and float32, not {str(model.dtype).removeprefix('torch.')}"
    return options.no_comparison
