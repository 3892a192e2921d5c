"""Decode steps as one CUDA graph launch each: exits are decided on the device, and nothing inside a step waits.

A *program* is the sequence of kernels of ``graph_step`` for up to 1, 2, 4, ... rows. Which rows are still on their way,
and what the next layer owes them, are values on the device that every kernel reads: one graph serves any batch that
fits and whatever its rows decide. Conditional nodes stand at stages; behind one at which everybody has left, the rest
of the layers is skipped.

Where a program cannot be captured, steps go the packed way (``GraphDecoder``). Where there is no CUDA device the same
program runs step by step through the kernels' torch twins: what the tests hold against the other executors.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.criteria import log_odds
from engine.decoding.cache import PagedCache, Pages
from engine.decoding.graph_step import Given, Step, StepArena, StepWeights, given_sizes, step_problem, step_weights
from engine.decoding.packed import Done, LaunchedStep, PackedDecoder, StepOutputs, logits_by_exit, step_limits
from engine.decoding.requests import Generating
from engine.executors.weights import WatchedWeights
from engine.kernels.capture import captured, out_of_memory, passing
from engine.kernels.gpu_common import triton
from engine.kernels.graphs import Graph, GraphBuilder, conditional_nodes_problem, own_stream
from engine.models.decoder import MultiExitDecoder

_MAX_ROWS = 64
# A conditional node stands behind exits at multiples of this layer. A node costs 6.5 us where it is taken, an empty
# layer 6 kernels of about 1 us.
_STAGE = 4


def graph_problem(model: MultiExitDecoder) -> str | None:
    """Why steps of this model cannot be programs, or on a CUDA device graphs, or None."""
    if model.device.type == "cuda":
        problem = "triton is not installed" if triton is None else conditional_nodes_problem(model.device)
        if problem is not None:
            return problem
    return step_problem(model)


class GraphDecoder(PackedDecoder):
    """A PackedDecoder whose steps are programs. Through the modules go prompts; steps of more than 64 rows; and, where
    somebody may leave, steps of rows of several criteria, and of softmax where exits have heads of their own.

    A step may be launched behind one whose results nobody has seen yet: ids and watermarks are on the device, places
    and limits are known ahead, so while the host reads what one step came to, the device is at the next.
    Calls from several threads take turns: programs share their buffers.

    Falls back to the packed way where a program cannot be captured: until a run or stream next begins where other
    threads disturbed every attempt, for good after any other error; each with one warning that says why. A step has
    touched nothing of its sequences by then. Out of memory is the caller's: fewer rows may do.
    """

    def __init__(self, model: MultiExitDecoder, cache: PagedCache, watching: bool = True):
        super().__init__(model, cache, "lazy", watching)
        self._step_weights: WatchedWeights[StepWeights] | None = WatchedWeights(model, watching, step_weights)
        # Both None where there is no room for them, and where there will be no programs any more.
        self._current: StepWeights | None = None
        self._arena: StepArena | None = None
        self._without_head = False  # see ``StepWeights.head``
        self._programs: dict[tuple[int, str | None], _Program] = {}
        # Programs that other threads kept from us, until the next ``look``: one for all who are under way, so a stream
        # that begins has a run that goes on try them again.
        self._given_up: set[tuple[int, str | None]] = set()
        self._problem: str | None = None  # why there will be no programs any more
        self._warned: set[bool] = set()  # of what passes; of what is for good: True
        self._under_way: list[_Launched] = []  # steps whose results have not been read, in their order
        self._lock = threading.RLock()

    def watch(self) -> None:
        super().watch()
        weights = self._step_weights
        if weights is not None:
            weights.watching = True

    def look(self) -> None:
        """Programs are made for tensors at fixed places: where those have moved, all are made anew."""
        super().look()
        with self._lock:
            self._wait()
            self._given_up.clear()
            if self._problem is not None:
                return
            found = self._step_weights.current()
            if found is not self._current:
                self._close()
                # There may be no room for the new ones: steps then go the packed way, and the next look tries again.
                self._current = self._arena = None
                longest = self.cache.shape.block_size * self.cache.blocks_for(self.model.config.max_length)
                arena = StepArena(found, self.cache, _MAX_ROWS, longest)
                device = found.embedding.device
                if device.type == "cuda":  # whoever makes a program of them may do so on another stream
                    torch.cuda.current_stream(device).synchronize()
                self._arena, self._without_head, self._current = arena, found.head is None, found

    def _close(self) -> None:
        for program in self._programs.values():
            program.close()
        self._programs = {}

    def _wait(self) -> None:
        """For all steps: their buffers, and what they write in the cache, are then anybody's."""
        for launched in self._under_way:
            launched.wait()
        self._under_way = []

    def prefill(self, rows: list[tuple[Generating, Pages]]) -> StepOutputs:
        with self._lock:
            self._wait()
        return super().prefill(rows)

    def step(self, batch: list[tuple[Generating, Pages]]) -> StepOutputs:
        return self.launch(batch).outputs()

    @torch.inference_mode()
    def launch(self, batch: list[tuple[Generating, Pages]]) -> LaunchedStep:
        requests = [sequence.request for sequence, _ in batch]
        layers = self.model.config.num_layers
        # Where nobody may leave and nothing is owed, the program without exits does the same, whatever the criteria.
        stays = all(
            r.min_depth >= layers and r.script is None and pages.watermarks[-1] == len(sequence) - 1
            for r, (sequence, pages) in zip(requests, batch, strict=True)
        )
        measures = {None} if stays else {"policy" if r.criterion == "scripted" else r.criterion for r in requests}
        # Where the modules are the head, nobody else knows how sure an exit is.
        without_head = "softmax" in measures and self._without_head
        if len(batch) > _MAX_ROWS or len(measures) > 1 or without_head:
            with self._lock:
                self._wait()
            return Done(super().step(batch))
        rows, measure = 1 << (len(batch) - 1).bit_length(), measures.pop()
        with self._lock:
            self._wait()
            program = self._program(rows, measure)
            if program is not None:
                self._under_way = [_Launched(self, program, batch, ahead=0)]
                return self._under_way[0]
        return Done(super().step(batch))

    def _program(self, rows: int, measure: str | None) -> _Program | None:
        """The program of up to ``rows`` rows, made where there is none yet; None where it cannot be had."""
        key = rows, measure
        if key in self._programs:
            return self._programs[key]
        if self._current is None or key in self._given_up:
            return None
        program = _Program(self.model, self._current, self._arena, self.cache, rows, measure)
        try:
            program.capture()
        except BaseException as error:  # Triton's and the compiler's share no base class
            program.close()
            if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, Exception):
                raise
            problem = passing(error)
            if problem is not None:
                self._given_up.add(key)
            elif out_of_memory(error):  # of the driver: torch's allocator holds the rest
                torch.cuda.empty_cache()
                raise torch.OutOfMemoryError(
                    f"a graph could not be made: {error}: run fewer rows, or make the cache smaller (cache_bytes)"
                ) from error
            else:
                problem = self._problem = f"a capture failed ({type(error).__name__}: {error})"
        else:
            self._programs[key] = program
            return program
        for_good = self._problem is not None
        if for_good:
            self._close()
            self._current = self._arena = self._step_weights = None
        if for_good not in self._warned:
            self._warned.add(for_good)
            # The caller of the engine's ``run``.
            warnings.warn(f"the graph executor cannot serve ({problem}): packed serves instead", stacklevel=7)
        return None

    @torch.inference_mode()
    def launch_next(self, launched: LaunchedStep) -> LaunchedStep | None:
        with self._lock:
            if self._under_way != [launched] or not launched.known_ahead:
                return None
            self._under_way.append(_Launched(self, launched.program, launched.batch, ahead=1))
            return self._under_way[-1]


class _Launched:
    """A step on its way. ``batch`` is as it was launched: sequences without the token that this step gives them.

    known_ahead  whether the next step of the same rows needs nothing that only the host can say
    """

    def __init__(self, decoder: GraphDecoder, program: _Program, batch: list[tuple[Generating, Pages]], ahead: int):
        self.program, self.batch = program, batch
        self._decoder = decoder
        self._positions = [len(sequence) - 1 + ahead for sequence, _ in batch]
        requests = [sequence.request for sequence, _ in batch]
        greedy = all(r.sampling.plain_greedy and r.forced is None and not r.keep_logits for r in requests)
        self.known_ahead = (
            greedy
            and program.tells_tokens
            and all(len(s.new) + ahead + 2 <= s.request.max_new_tokens for s, _ in batch)
        )
        self._read = program.launch(batch, ahead, wants_logits=not greedy)
        self._outputs: StepOutputs | None = None

    def wait(self) -> StepOutputs:
        if self._outputs is None:
            self._outputs = self._read()
        return self._outputs

    def outputs(self) -> StepOutputs:
        decoder = self._decoder
        with decoder._lock:
            found = self.wait()
            if self in decoder._under_way:
                decoder._under_way.remove(self)
            for (sequence, pages), position, left in zip(self.batch, self._positions, found.exit_layers, strict=True):
                if sequence.finish_reason is None:  # else it ended in the step in front, and its pages are not its own
                    decoder.settled += sum(position - mark for mark in pages.watermarks[:left])
                    pages.watermarks[:left] = [position + 1] * left
        return found


class _Host(NamedTuple):
    """One set of the host's buffers of a program: a step is filled in while the one in front still reads its own."""

    given: Tensor
    fields: dict[str, np.ndarray]
    told: Tensor
    tables: list[list[int]]  # what stands in fields["block_table"]
    done: torch.cuda.Event | None


class _Program:
    """One step, to be captured before it is launched, and the host's side of what goes in and comes out.

    tells_tokens  whether greedy tokens come out, and the next step's ids are in their place
    """

    def __init__(
        self,
        model: MultiExitDecoder,
        weights: StepWeights,
        arena: StepArena,
        cache: PagedCache,
        rows: int,
        measure: str | None,
    ):
        self._model, self._arena, self._cache, self._layers = model, arena, cache, len(weights.layers)
        blocks = cache.blocks_for(model.config.max_length)
        device = weights.embedding.device
        on_gpu = device.type == "cuda"
        shapes = given_sizes(rows, self._layers, blocks)
        sizes = {name: -(-int(np.prod(shape)) // 4) * 4 for name, shape in shapes.items()}  # 16 bytes: wide loads
        starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
        total = sum(sizes.values())

        def fields(flat: Tensor) -> dict[str, Tensor]:
            return {
                name: flat[starts[name] : starts[name] + int(np.prod(shape))].view(shape)
                for name, shape in shapes.items()
            }

        self._device_given = torch.zeros(total, dtype=torch.int32, device=device)
        self._known = starts["watermarks"]  # from there on, a step leaves behind what the next one needs
        self._step = Step(weights, arena, cache, Given(**fields(self._device_given)), measure, _STAGE)
        self._exits, self.tells_tokens = measure is not None, arena.logits is not None
        self._hosts = []
        for _ in range(2):
            given = torch.zeros(total, dtype=torch.int32, pin_memory=on_gpu)
            told = torch.zeros(self._step.told.shape, dtype=torch.int32, pin_memory=on_gpu)
            named = {name: field.numpy() for name, field in fields(given).items()}
            self._hosts.append(_Host(given, named, told, [[]] * rows, torch.cuda.Event() if on_gpu else None))
        self._graph: Graph | None = None

    def capture(self) -> None:
        """Make the graph, where the device has graphs: see ``captured``."""
        device = self._device_given.device
        if device.type != "cuda":
            return
        # By streams: waiting for the device would end whatever another thread captures. Buffers of our own are made on
        # the current one, the arena was ready when it was looked at, and nobody's step is under way.
        # No row is live: what is not written yet is not read.
        builder = GraphBuilder()
        self._graph = captured(
            builder, own_stream(builder, device), self._step.record, after=torch.cuda.current_stream(device)
        )
        self._graph.upload()

    def close(self) -> None:
        """Behind all steps, whose streams the allocator does not know. What was captured has left nothing running."""
        for host in self._hosts:
            self._wait_for(host)
        if self._graph is not None:
            self._graph.close()

    def launch(
        self, batch: list[tuple[Generating, Pages]], ahead: int, wants_logits: bool
    ) -> Callable[[], StepOutputs]:
        """Begin a step; the result waits for it. Pages have room for the position of each row's newest token.

        ahead  1: the step behind the one that was launched last, which is to have been of the same rows. The one in
               front of that has been waited for
        """
        host = self._hosts[0]
        self._hosts.reverse()
        self._fill(host, batch, ahead)
        try:
            return self._enqueue(host, len(batch), ahead, wants_logits)
        except BaseException:
            if host.done is not None:  # nobody will ever ask for what is under way, so nobody would wait for it
                torch.cuda.current_stream(self._device_given.device).synchronize()
            raise

    def _enqueue(self, host: _Host, n: int, ahead: int, wants_logits: bool) -> Callable[[], StepOutputs]:
        given = slice(0, self._known) if ahead else slice(None)
        self._device_given[given].copy_(host.given[given], non_blocking=True)
        if self._graph is None:
            self._step.record(lambda flag: nullcontext())
        else:
            self._graph.launch()
        a = self._arena
        if not self.tells_tokens:
            layers, probs = a.exit_layers[:n].tolist(), a.exit_probs[:n].tolist()
            outputs = StepOutputs(logits_by_exit(self._model, a.normed[:n], layers), layers, probs)
            self._mark(host)

            def finished() -> StepOutputs:
                self._wait_for(host)  # the heads still read the arena, which the next step may have from elsewhere
                return outputs

            return finished
        logits = a.logits[:n].clone() if wants_logits else None
        host.told.copy_(self._step.told, non_blocking=True)
        self._mark(host)

        def read() -> StepOutputs:
            self._wait_for(host)
            told = host.told[:n]
            probs = told[:, 2].contiguous().view(torch.float32)
            return StepOutputs(logits, told[:, 1].tolist(), probs.tolist(), told[:, 0].tolist())

        return read

    def _mark(self, host: _Host) -> None:
        """Here ends what the step does in buffers of the program and the arena."""
        if host.done is not None:
            host.done.record(torch.cuda.current_stream(self._device_given.device))

    def _wait_for(self, host: _Host) -> None:
        """For what was marked."""
        if host.done is not None:
            host.done.synchronize()

    def _fill(self, host: _Host, batch: list[tuple[Generating, Pages]], ahead: int) -> None:
        h, size = host.fields, self._cache.shape.block_size
        n = len(batch)
        h["counts"][:] = n, 0
        positions = [len(sequence) - 1 + ahead for sequence, _ in batch]
        for (_, pages), position in zip(batch, positions, strict=True):
            # No kernel lists what the first layer is owed: every token in front has been there, or is on its way.
            if pages.watermarks[0] != position - ahead:
                raise ValueError(
                    f"the first layer must have {position - ahead} positions in front of a step at position "
                    f"{position}, {ahead} ahead, got {pages.watermarks[0]}"
                )
        h["positions"][:n] = positions
        h["slots"][:n] = [
            pages.blocks[p // size] * size + p % size for (_, pages), p in zip(batch, positions, strict=True)
        ]
        for row, (_, pages) in enumerate(batch):
            if host.tables[row] != pages.blocks:
                h["block_table"][row, : len(pages.blocks)] = pages.blocks
                host.tables[row] = list(pages.blocks)
        if self._exits:
            limits = step_limits([sequence for sequence, _ in batch], self._layers, ahead)
            h["threshold_logit"][:n] = log_odds(torch.tensor(limits.thresholds)).view(torch.int32).numpy()
            h["script"][:n], h["min_depth"][:n], h["max_depth"][:n] = limits[1:]
        if not ahead:
            h["ids"][:n] = [sequence.new[-1].token_id for sequence, _ in batch]
            h["watermarks"][:n] = [pages.watermarks for _, pages in batch]
