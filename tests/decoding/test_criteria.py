"""CALM's measures beside the policy: what they are, and that every executor decides alike."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import engine
from engine.decoding.criteria import decide, measure
from engine.decoding.requests import Request, decayed, threshold_of
from tests.decoding.test_steps import assert_same, by_reference, by_steps
from tests.decoding.tiny import LAYERS, random_requests, tiny_decoder


def with_classifier(seed, **options):
    model = tiny_decoder(seed=seed, early_exit_classifier=True, **options)
    with torch.no_grad():
        model.exits.early_exit_classifier.weight.normal_(std=0.5)
    return model


def test_measures():
    model = with_classifier(1)
    hidden, before = torch.randn(4, 32), torch.randn(4, 32)
    n = model.final_norm(hidden)
    with torch.no_grad():
        probs = model.exit_logits(2, n).softmax(-1).sort(descending=True).values
        torch.testing.assert_close(measure(model, "softmax", 2, n, hidden, before), probs[:, 0] - probs[:, 1])
        cosine = (hidden * before).sum(-1) / hidden.norm(dim=-1) / before.norm(dim=-1)
        torch.testing.assert_close(measure(model, "saturation", 2, n, hidden, before), cosine.clamp(0, 1))
        assert float(measure(model, "saturation", 2, n, hidden, hidden).min()) == pytest.approx(1.0)
        torch.testing.assert_close(measure(model, "policy", 2, n, hidden, before), model.policy_logits(2, n))
        linear = model.exits.early_exit_classifier
        want = torch.sigmoid((n * linear.weight[0]).sum(-1) + linear.bias)
        torch.testing.assert_close(measure(model, "classifier", 2, n, hidden, before), want)


@pytest.mark.parametrize("criterion", ["policy", "softmax", "saturation", "classifier"])
def test_the_ends_of_the_threshold(criterion):
    model = with_classifier(1)
    hidden = torch.randn(3, 32)
    before, n = hidden + 0.1 * torch.randn(3, 32), model.final_norm(hidden)
    with torch.no_grad():
        for threshold, leaves in ((0.0, True), (1.0, False)):
            assert decide(model, criterion, 0, n, hidden, before, [threshold] * 3)[0] == [leaves] * 3


@pytest.mark.parametrize(
    "criterion, threshold", [("softmax", 0.02), ("softmax", 0.05), ("saturation", 0.6), ("classifier", 0.6)]
)
@pytest.mark.parametrize("decay", [False, True])
def test_executors_decide_alike(criterion, threshold, decay):
    model = with_classifier(4).double()
    options = dict(criterion=criterion, threshold=threshold, decay=decay)
    requests = [replace(r, **options) for r in random_requests(6, seed=7, new=15)]
    want = by_reference(model, requests)
    assert len({t.exit_layer for s in want for t in s.new[1:]}) > 1, "all leave alike"
    for how in ("lazy", "eager"):
        assert_same(by_steps(model, requests, how)[0], want)


def test_criteria_of_one_batch_may_differ():
    """fp32: rows that a step as one op does not know take all rows to the modules."""
    model = with_classifier(4)
    kinds = ["policy", "softmax", "saturation", "classifier"]
    requests = [replace(r, criterion=kind) for r, kind in zip(random_requests(4, seed=3, new=12), kinds, strict=True)]
    together, alone = by_steps(model, requests)[0], [by_steps(model, [r])[0][0] for r in requests]
    assert_same(together, alone, rtol=1e-3, atol=2e-4)


def test_the_decaying_threshold():
    assert decayed(0.8, 0, 50) == pytest.approx(0.8)
    assert decayed(0.8, 50, 50) == pytest.approx(0.8 * (0.9 + 0.1 * math.exp(-4)))
    request = Request((1,), 10, threshold=0.5)
    assert threshold_of(request, 7) == 0.5 and threshold_of(replace(request, decay=True), 7) == decayed(0.5, 7, 10)


def test_from_the_engine():
    model = tiny_decoder(seed=4)
    lm = engine.from_module(model)
    out = lm.run([[3, 4, 5]], max_new_tokens=10, criterion="softmax", threshold=0.0, decay=True)
    assert set(out.exit_layers[0][1:]) == {1} and out.exit_layers[0][0] == LAYERS
    out = lm.run([[3, 4, 5]], max_new_tokens=10, criterion="saturation", threshold=1.0)
    assert set(out.exit_layers[0]) == {LAYERS}
    tokens = list(lm.stream([3, 4, 5], max_new_tokens=6, criterion="softmax", threshold=0.2))
    whole = lm.run([[3, 4, 5]], max_new_tokens=6, criterion="softmax", threshold=0.2)
    assert [t.token_id for t in tokens] == whole.token_ids[0]
    with pytest.raises(ValueError, match="one of policy, scripted, softmax, saturation, classifier, got 'entropy'"):
        lm.run([[3]], criterion="entropy")
    with pytest.raises(ValueError, match="needs a model with CALM's early-exit classifier, this one has none"):
        lm.run([[3]], criterion="classifier")
    with pytest.raises(ValueError, match="exit_layers is for the scripted criterion, got criterion 'softmax'"):
        lm.run([[3]], criterion="softmax", exit_layers=2)
