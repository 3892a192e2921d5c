"""Training steps on real weights: SmolLM2-135M-Instruct, where the package that carries it is installed."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from engine.backbones import BackboneReference
from engine.loading import attach_exits
from engine.train import decoder_phases as phases
from engine.train.instructions import Instruction, TokenizedInstructions
from tests.decoding import test_smollm2

pytestmark = test_smollm2.pytestmark  # slow; skipped where the package is not
EXITS = (10, 20, 30)
ROWS = [
    Instruction("What is the capital of France?", "", "The capital of France is Paris."),
    Instruction("Name three colours.", "", "Red, green and blue."),
    Instruction("Say it in one word.", "The weather is neither warm nor cold.", "Mild."),
    Instruction("How many days does a week have?", "", "A week has seven days."),
]


@pytest.fixture(scope="module")
def trainable():
    """As a run begins: the backbone is frozen, but for an adapter."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    options = {"exit_layers": EXITS, "head": "lora", "head_rank": 32, "max_length": 256}
    backbone = BackboneReference(test_smollm2.SOURCE, test_smollm2.SHA256)
    model, tokenizer, _ = attach_exits(backbone, options)
    for parameter in model.causal_lm.parameters():
        parameter.requires_grad_(False)
    model.causal_lm = get_peft_model(model.causal_lm, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    return model.eval(), TokenizedInstructions.from_instructions(ROWS, tokenizer)


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_each_step_changes_what_it_should(trainable):
    model, data = trainable
    requires = {name: p.requires_grad for name, p in model.named_parameters()}
    fresh, before = phases.measure(model, data), snapshot(model)

    phases.fit_heads(model, data, batch_size=4)
    # The last exit's own head has nothing to come nearer to.
    fitted = {f"exits.deltas.{k}.{factor}.weight" for k in range(2) for factor in "ab"}
    assert changed(model, before) == fitted
    nearer = phases.measure(model, data)
    assert fresh.exit_ce[0] > nearer.exit_ce[0] + 1, "an early exit reads its states no better than before"
    assert nearer.ce_full == pytest.approx(fresh.ce_full, rel=1e-4) and nearer.ce_full < 4.5

    before = snapshot(model)
    (loss,) = phases.train_heads(model, data, phases.HeadOptions(1, 4, 1e-3), seed=0)
    # Of one step: what Eq. 1-2 makes of the losses ahead of it.
    weighted = sum(layer * ce for layer, ce in zip(EXITS, nearer.exit_ce, strict=True)) / sum(EXITS)
    assert math.isfinite(loss) and loss == pytest.approx(weighted, rel=1e-3)
    # B of the last exit's head starts at zero, so its A has no gradient in the first step.
    assert changed(model, before) == fitted | {"exits.deltas.2.b.weight"}

    before, start = snapshot(model), copy.deepcopy(model.exits.policies)
    sets = phases.train_policies(model, data, phases.TokenPolicyOptions(1, 4, 1e-3), (0.0, 1.0), seed=0)
    assert not changed(model, before), "prices side by side leave the model as it is"
    assert [len(policies) for policies in sets] == [2, 2]
    for policies in sets:
        for (name, got), had in zip(policies.named_parameters(), start.parameters(), strict=True):
            assert bool(torch.isfinite(got).all()) and not torch.equal(got, had), name
    assert not torch.equal(sets[0][0].out.bias, sets[1][0].out.bias), "the price of a layer changes nothing"
    assert {name: p.requires_grad for name, p in model.named_parameters()} == requires
