"""The engine a user holds: checks a call, cuts it into micro-batches, runs them, puts the rows back in order."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from engine.config import EarlyExitConfig
from engine.criteria import Criterion, make_criterion
from engine.executors import ExitOptions, RowOutputs, executor_class
from engine.executors.base import TokenRows
from engine.inputs import InputReader, join
from engine.kernels.capture import out_of_memory
from engine.models.encoder import MultiExitEncoder
from engine.options import OptionsReader, select_rows
from engine.results import Classification

# Tokens per micro-batch. CPU: activations of one layer stay near the last-level cache of a small machine. CUDA: enough
# for whole rounds of every product, and for launches to weigh nothing.
DEFAULT_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
_ANY_DEVICE_TOKENS = min(DEFAULT_BATCH_TOKENS.values())
_PROGRESS_AFTER_S = 1.0
_Part = tuple[np.ndarray, TokenRows]  # rows of a batch, and their places in it


class Engine:
    """Early-exit inference with one model. Made by ``engine.load`` and ``engine.from_module``.

    Calls from several threads are safe: a run keeps its state to itself.
    """

    def __init__(self, model: MultiExitEncoder, tokenizer=None, executor: str = "auto", *, private: bool = False):
        """private: nobody else holds ``model``, so its weights need no watching until somebody asks for it."""
        self._model = model
        self.tokenizer = tokenizer
        self.executor = executor_class(executor, model.device)(model, watching=not private)
        self._options_reader = OptionsReader()
        backbone = model.encoder_backbone.config
        self._reader = InputReader(
            tokenizer,
            vocab_size=backbone.vocab_size,
            type_vocab_size=backbone.type_vocab_size if model.family.token_types else 1,
            max_length=model.config.max_length,
        )

    @property
    def model(self) -> MultiExitEncoder:
        """The module that is run. Asking for it turns on the look at its weights before every run."""
        self.executor.watch()
        return self._model

    @property
    def config(self) -> EarlyExitConfig:
        """The model's EarlyExitConfig."""
        return self._model.config

    @property
    def device(self) -> torch.device:
        return self._model.device

    def refresh(self) -> None:
        """Read the model's weights again now, whatever the watch on them says."""
        self.executor.refresh()

    def warm_up(self, rows: int, tokens: int) -> None:
        """Be ready for batches of half to all of ``rows`` rows and ``tokens`` tokens in all, at default options: the
        graph executor compiles and captures now. Nothing to do for the others.

        Rows of up to twice the mean length are expected (at least 32 tokens). Everything else is captured when it
        comes. ValueError where no batch has that size.
        """
        most = rows * self.config.max_length
        if not 1 <= rows <= tokens <= most:
            raise ValueError(
                f"a batch of {rows} rows has {max(rows, 1)} to {max(most, 1)} tokens and at least one row, got {tokens}"
            )
        make_ready = getattr(self.executor, "warmup", None)
        if make_ready is None:
            return
        self.executor.look()
        criterion = make_criterion(self.config.criterion)
        options = self._options_reader.options(self.config, 1, criterion, None, None, None, None)
        longest = min(2 * -(-tokens // rows), self.config.max_length)
        try:
            make_ready(rows, max(tokens, longest), longest, options)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"out of memory on {self.device} while getting ready for {rows} rows of {tokens} tokens in all "
                f"({error}): ask for smaller batches, free memory, or load the model in a smaller dtype"
            ) from error

    def __repr__(self) -> str:
        c = self.config
        return (
            f"Engine({self._model.family.model_type}, {c.num_layers} layers, exits at {list(c.exit_layers)}, "
            f"{c.num_labels} classes, executor {self.executor.name}, {self.device}, {self._model.dtype})"
        )

    def run(
        self,
        batch: Any,
        *,
        threshold: float | Sequence[float] | Tensor | None = None,
        min_depth: int | Sequence[int] | Tensor | None = None,
        max_depth: int | Sequence[int] | Tensor | None = None,
        criterion: str | Criterion | None = None,
        exit_layers: Sequence[int] | Tensor | None = None,
        batch_tokens: int | None = None,
        truncation: bool = False,
        progress: bool | None = None,
    ) -> Classification:
        """Classify every row of ``batch``; each leaves at the layer its exit decides.

        batch         list[str], list[tuple[str, str]], or a mapping with input_ids [N, S], attention_mask and
                      token_type_ids (tensors or nested lists; padding at either end is stripped)
        threshold     a row leaves when its exit probability is above this; [0, 1] for the policy. Default: the model's
        min_depth     no row leaves before this layer; the number of layers removes all exits. Default 1
        max_depth     every row has left by this layer, at the deepest exit not beyond it. Default: all layers
        criterion     "policy", "scripted" or a Criterion. Default: the model's
        exit_layers   for "scripted": the layer each row leaves at
        batch_tokens  tokens computed together; rows are sorted by length (of much text: by characters, those that could
                      be too long first, then by tokens among neighbours) and cut by this
        truncation    shorten texts beyond the model's limit instead of refusing them
        progress      show a progress bar; by default on a terminal when the run takes more than a second

        threshold, min_depth, max_depth and exit_layers: one value, or one per row. An empty batch: an empty result.
        Raises ValueError or TypeError before any row is computed. (Much text is tokenised while the device computes
        what came before, but rows that could be too long before anything is; where a tokenizer makes more tokens of a
        text than it has bytes, such a row is found under way.)
        """
        started = time.perf_counter()
        rows = self._reader.open(batch, truncation)
        chosen = make_criterion(self.config.criterion if criterion is None else criterion)
        options = self._options_reader.options(
            self.config, len(rows), chosen, threshold, min_depth, max_depth, exit_layers
        )
        tokens = rows.num_tokens if isinstance(rows, TokenRows) else None  # nobody knows yet
        if batch_tokens is None:
            # Asking a module for its device takes longer than it looks.
            few = tokens is not None and tokens <= _ANY_DEVICE_TOKENS
            batch_tokens = _ANY_DEVICE_TOKENS if few else DEFAULT_BATCH_TOKENS.get(self.device.type, _ANY_DEVICE_TOKENS)
        elif isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int) or batch_tokens < 1:
            raise ValueError(f"batch_tokens must be a positive integer, got {batch_tokens!r}")
        if len(rows):
            self.executor.look()
        if tokens is not None and 0 < tokens <= batch_tokens:
            outputs, micro_batches = self._start(rows, options)(), 1
        else:
            parts = rows.parts() if tokens is None else [(np.arange(len(rows)), rows)]
            outputs, tokens, micro_batches = self._run_all(parts, options, len(rows), batch_tokens, progress)
        return self._results(outputs, tokens, micro_batches, started)

    # -- micro-batches -------------------------------------------------------------------------------------------

    def _start(self, rows: TokenRows, options: ExitOptions) -> Callable[[], RowOutputs]:
        """Start one micro-batch; calling what comes back waits for its results. Too large for memory: in halves."""
        try:
            return self.executor.submit(rows, options)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if len(rows) == 1:
                raise RuntimeError(
                    f"out of memory on {self.device} for a single row of {rows.num_tokens} tokens ({error}): free "
                    "memory, or load the model in a smaller dtype"
                ) from error
        torch.cuda.empty_cache()
        middle = len(rows) // 2
        parts = slice(0, middle), slice(middle, len(rows))
        halves = [self._start(rows[part], select_rows(options, part))() for part in parts]
        # One may have come from packed, on the device.
        outputs = RowOutputs(*(torch.cat([x.cpu() for x in column]) for column in zip(*halves, strict=True)))
        return lambda: outputs

    def _run_all(
        self, parts: Iterable[_Part], options: ExitOptions, rows: int, batch_tokens: int, progress: bool | None
    ) -> tuple[RowOutputs, int, int]:
        """Outputs of all rows in the caller's order, their tokens, and of how many micro-batches.

        parts: of ``rows`` rows in all, to which ``options`` belong
        """
        if rows == 0:
            empty = torch.empty(0, self.config.num_labels), torch.empty(0, dtype=torch.int32), torch.empty(0)
            return RowOutputs(*empty), 0, 0
        found: list[RowOutputs] = []
        order, tokens = [], 0
        bar = tqdm(
            total=rows,
            unit="row",
            disable=not (sys.stderr.isatty() if progress is None else progress),
            delay=_PROGRESS_AFTER_S if progress is None else 0,
        )
        with bar:
            waiting: Callable[[], RowOutputs] | None = None
            # The next one is tokenised, packed and on its way, while the device works on this one.
            for places, micro_batch in _micro_batches(parts, batch_tokens):
                started = self._start(micro_batch, select_rows(options, torch.from_numpy(places)))
                order.append(places)
                tokens += micro_batch.num_tokens
                if waiting is not None:
                    found.append(waiting())
                    bar.update(len(found[-1].logits))
                waiting = started
            found.append(waiting())
            bar.update(len(found[-1].logits))
        place = torch.from_numpy(np.argsort(np.concatenate(order)))
        outputs = RowOutputs(*(torch.cat([x.cpu() for x in column])[place] for column in zip(*found, strict=True)))
        return outputs, tokens, len(found)

    def _results(self, outputs: RowOutputs, tokens: int, micro_batches: int, started: float) -> Classification:
        # Copies made outside inference mode are ordinary tensors, which a caller may compute on with autograd.
        if not outputs[0].is_cpu or (outputs[0].is_inference() and not torch.is_inference_mode_enabled()):
            outputs = [x.clone() if x.is_cpu else x.cpu() for x in outputs]
        logits, exit_layers, exit_probs = outputs
        seconds = time.perf_counter() - started
        return Classification(logits, exit_layers, exit_probs, self.config, tokens, micro_batches, seconds)


def _micro_batches(parts: Iterable[_Part], batch_tokens: int) -> Iterator[_Part]:
    """Rows sorted by length and cut. A part is asked for when those before it fill no more micro-batch; what they leave
    over waits for it, so that only the last micro-batch may be a small one."""
    pool: list[_Part] = []
    tokens = 0
    for part in parts:
        pool.append(part)
        tokens += part[1].num_tokens
        if tokens > batch_tokens:
            *full, rest = _sorted_cuts(pool, batch_tokens)
            pool, tokens = [rest], rest[1].num_tokens
            yield from full
    if pool:
        yield from _sorted_cuts(pool, batch_tokens)


def _sorted_cuts(pool: list[_Part], batch_tokens: int) -> list[_Part]:
    places, rows = np.concatenate([places for places, _ in pool]), join([rows for _, rows in pool])
    order = np.argsort(-np.array(rows.lengths), kind="stable")
    places, rows = places[order], rows.take(order)
    return [(places[cut], rows[cut]) for cut in _cuts(rows.cu_seqlens, batch_tokens)]


def _cuts(cu_seqlens: np.ndarray, batch_tokens: int) -> Iterator[slice]:
    """The rows of each micro-batch: as many neighbours as the token budget holds, and at least one."""
    start, rows = 0, len(cu_seqlens) - 1
    while start < rows:
        end = int(np.searchsorted(cu_seqlens, cu_seqlens[start] + batch_tokens, side="right")) - 1
        end = max(end, start + 1)
        yield slice(start, end)
        start = end
