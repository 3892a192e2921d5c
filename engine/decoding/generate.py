"""The loop of generation: prompts join, everybody steps, tokens are drawn, finished rows leave."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from engine.decoding.packed import LaunchedStep, PackedDecoder, StepOutputs
from engine.decoding.reference import ReferenceDecoder
from engine.decoding.requests import Generating, NewToken, Request
from engine.decoding.sampling import draw, random_numbers
from engine.decoding.scheduler import Row, Scheduler


def begin(requests: Iterable[Request]) -> list[Generating]:
    """Sequences of which nothing has run yet."""
    return [Generating(r, number, draws=random_numbers(r.sampling.seed)) for number, r in enumerate(requests)]


def take_tokens(sequences: list[Generating], outputs: StepOutputs) -> list[Generating]:
    """Draw every sequence's next token; those that had ended already get none, and are not among the returned."""
    grown = []
    for k, sequence in enumerate(sequences):
        if sequence.finish_reason is not None:
            continue
        request = sequence.request
        if request.keep_logits:
            sequence.logits.append(outputs.logits[k].cpu())
        if request.forced is not None:
            token = request.forced[len(sequence.new)]
        elif outputs.greedy is not None and request.sampling.plain_greedy:
            token = outputs.greedy[k]
        else:
            history = sequence.ids if request.sampling.repetition_penalty != 1.0 else ()
            token = draw(outputs.logits[k], request.sampling, history, sequence.draws)
        sequence.add(NewToken(token, outputs.exit_layers[k], outputs.exit_probs[k]))
        grown.append(sequence)
    return grown


class Steps:
    """Steps of a decoder one after the other, each launched before the results of the one in front of it are read,
    where decoder and rows allow it. A row that then turns out to have ended runs once in vain."""

    def __init__(self, decoder: PackedDecoder):
        self._decoder = decoder
        self._rows: list[Row] = []
        self._launched: LaunchedStep | None = None

    @property
    def under_way(self) -> bool:
        return self._launched is not None

    def take(self, rows: Callable[[], list[Row]], reserve_next: Callable[[], bool]) -> list[Generating]:
        """Sequences that have one token more.

        rows          those of the next step, asked for where none is under way
        reserve_next  whether all of them have room for one position more and may go on together
        """
        if self._launched is None:
            self._rows = rows()
            if not self._rows:
                return []
            self._launched = self._decoder.launch(self._rows)
        launched, following = self._launched, None
        if all(sequence.finish_reason is None for sequence, _ in self._rows) and reserve_next():
            following = self._decoder.launch_next(launched)
        grown = take_tokens([sequence for sequence, _ in self._rows], launched.outputs())
        self._launched = following
        if all(sequence.finish_reason is not None for sequence, _ in self._rows):
            self.close()
        return grown

    def close(self) -> None:
        """Nothing is under way any more."""
        if self._launched is not None:
            self._launched.outputs()
            self._launched = None


@dataclass
class Counts:
    """Of one run. Seconds include the draws: on a device those are what waits for it."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    preemptions: int = 0


def generate_packed(
    decoder: PackedDecoder, sequences: list[Generating], max_rows: int, counts: Counts | None = None
) -> Iterator[list[Generating]]:
    """Continuous batching; after every prefill and every step, the sequences that have one token more.

    ValueError, before anything runs, where a sequence can never have room. The cache is as it was before when the
    iterator ends, or is closed.
    """
    counts = Counts() if counts is None else counts
    decoder.look()
    scheduler = Scheduler(decoder.cache, max_rows)
    for sequence in sequences:
        scheduler.add(sequence)
    return _generate(decoder, scheduler, counts)


def _generate(decoder: PackedDecoder, scheduler: Scheduler, counts: Counts) -> Iterator[list[Generating]]:
    steps = Steps(decoder)
    try:
        while scheduler.unfinished:
            started = time.perf_counter()
            joining = [] if steps.under_way else scheduler.admit()
            grown: list[Generating] = []
            if joining:
                outputs = decoder.prefill(joining)
                fresh = [k for k, (sequence, _) in enumerate(joining) if not sequence.new]
                if fresh:
                    grown = [joining[k][0] for k in fresh]
                    take_tokens(grown, _rows(outputs, fresh))
                    scheduler.retire()
                counts.prefill_s += time.perf_counter() - started
            if grown:
                yield grown
            started = time.perf_counter()
            grown = steps.take(scheduler.step, scheduler.reserve_next)
            if grown:
                scheduler.retire()
                counts.decode_s += time.perf_counter() - started
                yield grown
    finally:
        steps.close()
        counts.preemptions = scheduler.preemptions
        scheduler.abandon()


def generate_reference(
    decoder: ReferenceDecoder, sequences: list[Generating], counts: Counts | None = None
) -> Iterator[list[Generating]]:
    """One sequence after the other, a token at a time."""
    counts = Counts() if counts is None else counts
    for sequence in sequences:
        while sequence.finish_reason is None:
            started = time.perf_counter()
            take_tokens([sequence], decoder.next(sequence))
            seconds = time.perf_counter() - started
            if len(sequence.new) == 1:
                counts.prefill_s += seconds
            else:
                counts.decode_s += seconds
            yield [sequence]


def _rows(outputs: StepOutputs, rows: list[int]) -> StepOutputs:
    index = torch.tensor(rows, device=outputs.logits.device)
    layers, probs = outputs.exit_layers, outputs.exit_probs
    return StepOutputs(outputs.logits[index], [layers[k] for k in rows], [probs[k] for k in rows])
