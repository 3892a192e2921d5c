"""The loop of generation: prompts join, everybody steps, tokens are drawn, finished rows leave."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
        else:
            token = draw(logits, request.sampling, sequence.ids, sequence.draws)
        sequence.add(NewToken(token, outputs.exit_layers[k], outputs.exit_probs[k]))


def generate_packed(
    decoder: PackedDecoder, sequences: list[Generating], max_rows: int
) -> Iterator[list[Generating]]:
    """Continuous batching; after every prefill and every step, the sequences that have one token more.

    The cache is as it was before when the iterator ends, or is closed.
    """
    scheduler = Scheduler(decoder.cache, max_rows)
    for sequence in sequences:
        scheduler.add(sequence)
    try:
        while scheduler.unfinished:
            joining = scheduler.admit()
            if joining:
                outputs = decoder.prefill(joining)
                fresh = [k for k, (sequence, _) in enumerate(joining) if not sequence.new]
                if fresh:
                    grown = [joining[k][0] for k in fresh]
                    take_tokens(grown, _rows(outputs, fresh))
                    scheduler.retire()
                    yield grown
            rows = scheduler.step()
            if rows:
                grown = [sequence for sequence, _ in rows]
                take_tokens(grown, decoder.step(rows))
                scheduler.retire()
                yield grown
    finally:
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
