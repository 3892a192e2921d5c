"""Draws follow the distribution they should, and what decides it agrees with Hugging Face."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.decoding.requests import Request, Sampling
from engine.decoding.sampling import draw, kept_probabilities, penalise_, random_numbers


def logits_of(size=40, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def theirs(logits, sampling):
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits[None].double())
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores[0].softmax(0)


OPTIONS = [
    Sampling(1.0),
    Sampling(0.3),
    Sampling(2.5, top_k=5),
    Sampling(1.0, top_p=0.75),
    Sampling(1.0, top_k=40, top_p=0.75),
    Sampling(1.0, top_p=1e-6),
    Sampling(1.0, top_k=1000),
]


@pytest.mark.parametrize("sampling", OPTIONS, ids=str)
def test_probabilities_are_hugging_faces(sampling):
    for seed in range(20):
        logits = logits_of(seed=seed)
        ids, probs = kept_probabilities(logits, sampling)
        ours = torch.zeros(len(logits), dtype=torch.float64)
        ours[ids] = probs
        torch.testing.assert_close(ours, theirs(logits, sampling), rtol=1e-9, atol=1e-12)


def test_a_tiny_temperature_is_greedy():
    """Logits divided by it are infinite, all but the greatest less itself."""
    logits = logits_of()
    for temperature in (1e-308, 5e-324):
        ids, probs = kept_probabilities(logits, Sampling(temperature, top_p=0.9))
        assert (ids.tolist(), probs.tolist()) == ([int(logits.argmax())], [1.0])
        assert draw(logits, Sampling(temperature), (), random_numbers(0)) == int(logits.argmax())


def chi_square(counts, probs):
    """Of counts against probs * n, in its own standard deviations above its mean; tokens expected less than 5 times
    together."""
    n = counts.sum()
    common = probs * n >= 5
    expected = torch.cat([probs[common], probs[~common].sum()[None]]) * n
    seen = torch.cat([counts[common], counts[~common].sum()[None]])
    kept = expected > 0
    statistic = float(((seen - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("sampling", [OPTIONS[0], OPTIONS[2], OPTIONS[4]], ids=str)
def test_draws_follow_the_distribution(sampling):
    logits, numbers = logits_of(seed=3), random_numbers(5)
    drawn = torch.tensor([draw(logits, sampling, (), numbers) for _ in range(20_000)])
    counts = torch.bincount(drawn, minlength=len(logits)).double()
    probs = theirs(logits, sampling)
    assert float(counts[probs == 0].sum()) == 0
    assert chi_square(counts, probs) < 5
    # Negative control: a distribution that is a little warmer would have been noticed.
    warmer = theirs(logits, Sampling(sampling.temperature * 1.1, sampling.top_k, sampling.top_p))
    assert chi_square(counts, warmer) > 5 or bool((warmer[probs == 0] > 0).any())


def test_greedy_takes_the_first_of_the_greatest():
    logits = torch.tensor([0.0, 2.0, 2.0, 1.0])
    assert draw(logits, Sampling(), (), random_numbers(0)) == 1
    assert [int(i) for i in kept_probabilities(logits, Sampling(1.0))[0]] == [1, 2, 3, 0]


def test_top_p_keeps_the_token_that_reaches_it_and_one_at_least():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    for top_p, kept in ((0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (1e-9, 1)):
        assert len(kept_probabilities(logits, Sampling(1.0, top_p=top_p))[0]) == kept


@pytest.mark.parametrize("penalty", [1.0, 1.2, 0.7])
def test_repetition_penalty_is_hugging_faces(penalty):
    logits, history = logits_of(), [3, 3, 7, 0, 39]
    want = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([history]), logits[None].clone())[0]
    torch.testing.assert_close(penalise_(logits.clone(), history, penalty), want)
    before = logits.clone()
    assert draw(logits, Sampling(repetition_penalty=penalty), history, random_numbers(0)) == int(want.argmax())
    assert torch.equal(logits, before)


def test_numpys_numbers_are_numbers():
    given = Sampling(np.float32(0.5), np.int64(7), np.float64(0.75), np.float16(1.5), np.uint64(2**64 - 1))
    assert given == Sampling(0.5, 7, 0.75, 1.5, 2**64 - 1)
    assert [type(value) for value in astuple(given)] == [float, int, float, float, int]
    random_numbers(given.seed)


def test_seeds():
    logits, sampling = logits_of(), Sampling(1.0)

    def draws(seed):
        numbers = random_numbers(seed)
        return [draw(logits, sampling, (), numbers) for _ in range(30)]

    assert draws(1) == draws(1) != draws(2)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(temperature=-0.1), r"temperature must be 0 \(greedy\) or more, got -0.1"),
        (dict(temperature=None), "temperature must be 0 .* got None"),
        (dict(top_k=-1), "top_k must be an integer of at least 0"),
        (dict(top_k=1.5), "top_k must be an integer of at least 0 .* got 1.5"),
        (dict(top_p=0), "top_p must be above 0 and at most 1, got 0"),
        (dict(top_p=1.01), "top_p must be above 0 and at most 1, got 1.01"),
        (dict(temperature=10**400), r"temperature must be 0 \(greedy\) or more, got 1000"),
        (dict(temperature=np.bool_(True)), "temperature must be 0 .* got np.True_"),
        (dict(repetition_penalty=0.0), "repetition_penalty must be from 1e-6 to 1e6, got 0.0"),
        (dict(repetition_penalty=1e-45), "repetition_penalty must be from 1e-6 to 1e6, got 1e-45"),
        (dict(repetition_penalty=1e39), "repetition_penalty must be from 1e-6 to 1e6, got 1e.39"),
        (dict(seed=True), r"seed must be an integer of at least 0 and below 2\*\*64, got True"),
        (dict(seed=np.bool_(True)), "seed must be an integer .* got np.True_"),
        (dict(seed=2**64), "seed must be an integer .* got 18446744073709551616"),
    ],
)
def test_bad_sampling(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(prompt=()), "the prompt is empty"),
        (dict(max_new_tokens=0), "max_new_tokens must be an integer of at least 1, got 0"),
        (dict(script=(1, 2)), "script must have an entry for each of 3 tokens, got 2"),
        (dict(forced=(1, 2, 3)), "forced must have an entry for each of 4 tokens, got 3"),
    ],
)
def test_bad_requests(fields, message):
    with pytest.raises(ValueError, match=message):
        Request(**{"prompt": (1,), "max_new_tokens": 4, **fields})
