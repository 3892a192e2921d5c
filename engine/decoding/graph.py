"""Decode steps as one CUDA graph launch each: exits are decided on the device, and nothing inside a step waits.

A *program* is the sequence of kernels of ``graph_step`` for up to 1, 2, 4, ... rows. Which rows are still on their way,
and what the next layer owes them, are values on the device that every kernel reads: one graph serves any batch that
fits and whatever its rows decide. Conditional nodes stand at stages; behind one at which everybody has left, the rest
of the layers is skipped.

Where there is no CUDA device the same program runs step by step through the kernels' torch twins: what the tests hold
against the other executors.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from engine.decoding.cache import PagedCache, Pages
from engine.decoding.graph_step import Given, Step, StepArena, StepWeights, given_sizes, step_problem, step_weights
from engine.decoding.packed import PackedDecoder, StepOutputs, logits_by_exit, step_limits
from engine.decoding.requests import Generating
from engine.executors.weights import WatchedWeights
from engine.kernels.gpu_common import triton
from engine.kernels.graphs import Graph, GraphBuilder, conditional_nodes_problem, no_allocation
from engine.models.decoder import MultiExitDecoder

_CRITERIA = ("policy", "scripted")  # what ``step_rows_`` decides by
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
    """A PackedDecoder whose steps are programs; prompts, and criteria that no kernel knows, go through the modules.

    Calls from several threads take turns: programs share their buffers.
    """

    def __init__(self, model: MultiExitDecoder, cache: PagedCache, watching: bool = True):
        super().__init__(model, cache, "lazy", watching)
        self._step_weights = WatchedWeights(model, watching, step_weights)
        self._current: StepWeights | None = None
        self._arena: StepArena | None = None
        self._programs: dict[tuple[int, bool], _Program] = {}
        self._lock = threading.RLock()

    def watch(self) -> None:
        super().watch()
        self._step_weights.watching = True

    def look(self) -> None:
        """Programs are made for tensors at fixed places: where those have moved, all are made anew."""
        super().look()
        with self._lock:
            found = self._step_weights.current()
            if found is not self._current:
                self._close()
                self._current = found
                longest = self.cache.shape.block_size * self.cache.blocks_for(self.model.config.max_length)
                self._arena = StepArena(found, self.cache, _MAX_ROWS, longest)

    def _close(self) -> None:
        for program in self._programs.values():
            program.close()
        self._programs = {}

    @torch.inference_mode()
    def step(self, batch: list[tuple[Generating, Pages]]) -> StepOutputs:
        requests = [sequence.request for sequence, _ in batch]
        if len(batch) > _MAX_ROWS or any(r.criterion not in _CRITERIA for r in requests):
            return super().step(batch)
        layers = self.model.config.num_layers
        # Where nobody may leave and nothing is owed, the program without exits does the same.
        stays = all(
            r.min_depth >= layers and r.script is None and pages.watermarks[-1] == len(sequence) - 1
            for r, (sequence, pages) in zip(requests, batch, strict=True)
        )
        rows = 1 << (len(batch) - 1).bit_length()
        with self._lock:
            program = self._programs.get((rows, not stays))
            if program is None:
                program = self._programs[rows, not stays] = _Program(
                    self.model, self._current, self._arena, self.cache, rows, not stays
                )
            outputs = program.run(batch)
        for (sequence, pages), left in zip(batch, outputs.exit_layers, strict=True):
            position = len(sequence) - 1
            self.settled += sum(position - mark for mark in pages.watermarks[:left])
            pages.watermarks[:left] = [position + 1] * left
        return outputs


class _Program:
    """One captured step, and the host's side of what goes in and comes out."""

    def __init__(
        self,
        model: MultiExitDecoder,
        weights: StepWeights,
        arena: StepArena,
        cache: PagedCache,
        rows: int,
        exits: bool,
    ):
        self._model, self._arena, self._cache, self._layers = model, arena, cache, len(weights.layers)
        blocks = cache.blocks_for(model.config.max_length)
        device = weights.embedding.device
        shapes = given_sizes(rows, self._layers, blocks)
        sizes = {name: -(-int(np.prod(shape)) // 4) * 4 for name, shape in shapes.items()}  # 16 bytes: wide loads
        starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
        total = sum(sizes.values())
        self._device_given = torch.zeros(total, dtype=torch.int32, device=device)
        self._host_given = torch.zeros(total, dtype=torch.int32, pin_memory=device.type == "cuda")

        def fields(flat: Tensor) -> dict[str, Tensor]:
            return {
                name: flat[starts[name] : starts[name] + int(np.prod(shape))].view(shape)
                for name, shape in shapes.items()
            }

        self._host = {name: field.numpy() for name, field in fields(self._host_given).items()}
        self._step = Step(weights, arena, cache, Given(**fields(self._device_given)), exits, _STAGE)
        self._exits = exits
        self._tables: list[list[int]] = [[]] * rows  # what stands in the host's block_table
        self._graph: Graph | None = self._captured() if device.type == "cuda" else None

    def _captured(self) -> Graph:
        device = self._device_given.device
        stream, builder = torch.cuda.Stream(device), GraphBuilder()
        torch.cuda.synchronize(device)
        try:
            # No row is live: what is not written yet is not read, and every kernel is compiled.
            with builder.rehearse(stream):
                self._step.record(builder.when)
            stream.synchronize()
            with no_allocation(device), builder.capture(stream):
                self._step.record(builder.when)
            graph = builder.instantiate()
        finally:
            builder.close()
        graph.upload()
        return graph

    def close(self) -> None:
        if self._graph is not None:
            torch.cuda.synchronize(self._device_given.device)
            self._graph.close()

    def run(self, batch: list[tuple[Generating, Pages]]) -> StepOutputs:
        """Pages have room for the position of each row's newest token."""
        n = len(batch)
        self._fill(batch)
        self._device_given.copy_(self._host_given, non_blocking=True)
        if self._graph is None:
            self._step.record(lambda flag: nullcontext())
        else:
            self._graph.launch()
        a = self._arena
        found = [a.exit_layers[:n], a.exit_probs[:n]]
        if a.logits is not None:
            found.append(a.logits[:n].argmax(1))
        left, probs, *tokens = torch.stack([x.double() for x in found]).tolist()  # the one wait, behind the step
        exit_layers = [int(x) for x in left]
        if a.logits is None:
            return StepOutputs(logits_by_exit(self._model, a.normed[:n], exit_layers), exit_layers, probs)
        return StepOutputs(a.logits[:n].clone(), exit_layers, probs, [int(t) for t in tokens[0]])

    def _fill(self, batch: list[tuple[Generating, Pages]]) -> None:
        h, size = self._host, self._cache.shape.block_size
        n = len(batch)
        h["counts"][:] = n, 0
        positions = [len(sequence) - 1 for sequence, _ in batch]
        h["ids"][:n] = [sequence.new[-1].token_id for sequence, _ in batch]
        h["positions"][:n] = positions
        h["slots"][:n] = [
            pages.blocks[p // size] * size + p % size for (_, pages), p in zip(batch, positions, strict=True)
        ]
        for row, (_, pages) in enumerate(batch):
            if self._tables[row] != pages.blocks:
                h["block_table"][row, : len(pages.blocks)] = pages.blocks
                self._tables[row] = list(pages.blocks)
        if not self._exits:
            return
        limits = step_limits([sequence for sequence, _ in batch], self._layers)
        h["threshold_logit"][:n] = torch.logit(torch.tensor(limits.thresholds)).view(torch.int32).numpy()
        h["script"][:n], h["min_depth"][:n], h["max_depth"][:n] = limits[1:]
        h["watermarks"][:n] = [pages.watermarks for _, pages in batch]
