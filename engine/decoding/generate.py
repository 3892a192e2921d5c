"""The loop of generation: prompts join, everybody steps, tokens are drawn, finished rows leave."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from engine.decoding.packed import PackedDecoder, StepOutputs
from engine.decoding.reference import ReferenceDecoder
from engine.decoding.requests import Generating, NewToken, Request
from engine.decoding.sampling import draw, random_numbers
from engine.decoding.scheduler import Scheduler


def begin(requests: Iterable[Request]) -> list[Generating]:
    """Sequences of which nothing has run yet."""
    return [Generating(r, number, draws=random_numbers(r.sampling.seed)) for number, r in enumerate(requests)]


def take_tokens(sequences: list[Generating], outputs: StepOutputs) -> None:
    """Draw every sequence's next token."""
    for k, sequence in enumerate(sequences):
        request, logits = sequence.request, outputs.logits[k]
        if request.keep_logits:
            sequence.logits.append(logits.cpu())
        if request.forced is not None:
            token = request.forced[len(sequence.new)]
        elif outputs.greedy is not None and request.sampling.plain_greedy:
            token = outputs.greedy[k]
        else:
            history = sequence.ids if request.sampling.repetition_penalty != 1.0 else ()
            token = draw(logits, request.sampling, history, sequence.draws)
        sequence.add(NewToken(token, outputs.exit_layers[k], outputs.exit_probs[k]))


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
    try:
        while scheduler.unfinished:
            started = time.perf_counter()
            joining = scheduler.admit()
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
            rows = scheduler.step()
            if rows:
                grown = [sequence for sequence, _ in rows]
                take_tokens(grown, decoder.step(rows))
                scheduler.retire()
                counts.decode_s += time.perf_counter() - started
                yield grown
    finally:
        counts.preemptions = scheduler.preemptions
        scheduler.abandon()


def generate_reference(decoder: ReferenceDecoder, sequences: list[Generating]) -> Iterator[list[Generating]]:
    """One sequence after the other, a token at a time."""
    for sequence in sequences:
        while sequence.finish_reason is None:
            take_tokens([sequence], decoder.next(sequence))
            yield [sequence]


def _rows(outputs: StepOutputs, rows: list[int]) -> StepOutputs:
    index = torch.tensor(rows, device=outputs.logits.device)
    layers, probs = outputs.exit_layers, outputs.exit_probs
    return StepOutputs(outputs.logits[index], [layers[k] for k in rows], [probs[k] for k in rows])
