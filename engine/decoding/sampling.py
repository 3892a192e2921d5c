"""From logits to the next token, row by row: a row's draw depends on its own logits, history and seed alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.decoding.requests import Sampling


def random_numbers(seed: int) -> torch.Generator:
    """The random numbers of one row, on the host: one for each token that is drawn."""
    return torch.Generator().manual_seed(seed)


def penalise_(logits: Tensor, history: Iterable[int], penalty: float) -> Tensor:
    """In place: logits [V] of the tokens in ``history`` (each counts once) made less likely. See ``Sampling``."""
    if penalty != 1.0:
        seen = torch.tensor(sorted(set(history)), dtype=torch.long, device=logits.device)
        chosen = logits[seen]
        logits[seen] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    return logits


def kept_probabilities(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Token ids and probabilities, most probable first, of what temperature, top_k and top_p leave of logits [V].

    Equal logits: the smaller id first. top_k comes before top_p, as in Hugging Face's generation. They sum to 1.
    """
    values, ids = torch.sort(logits.double(), descending=True, stable=True)
    if sampling.top_k:
        values, ids = values[: sampling.top_k], ids[: sampling.top_k]
    # Less the greatest first: divided by a tiny temperature, logits are infinite, and the softmax of those is nan.
    probs = torch.softmax((values - values[0]) / sampling.temperature, 0)
    if sampling.top_p < 1:
        # A token stays while the mass in front of it has not reached p: the one that reaches it is the last.
        before = probs.cumsum(0) - probs
        kept = int((before < sampling.top_p).sum())
        probs = probs[:kept] / probs[:kept].sum()
        ids = ids[:kept]
    return ids, probs


def draw(logits: Tensor, sampling: Sampling, history: Iterable[int], numbers: torch.Generator) -> int:
    """The next token id. logits fp32 [V], left as they are; history: prompt and continuation so far.

    By inversion: one uniform number, so that what a row draws does not depend on how many tokens are kept.
    """
    if sampling.repetition_penalty != 1.0:
        logits = penalise_(logits.clone(), history, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    ids, probs = kept_probabilities(logits, sampling)
    u = torch.rand((), dtype=torch.float64, generator=numbers)
    place = int(torch.searchsorted(probs.cumsum(0).cpu(), u, right=True))
    return int(ids[min(place, len(ids) - 1)])
