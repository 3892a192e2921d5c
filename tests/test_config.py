"""What a checkpoint says about its exits is checked once, when it is made; and which backbones can carry exits."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import engine
from engine.config import FORMAT_VERSION, EarlyExitConfig
from engine.models.families import family_of
from engine.train.config import TrainConfig
from tests.tiny import FAMILIES, MAX_LENGTH, POOLERS, tiny_backbone

GOOD = dict(num_layers=4, exit_layers=(2, 4), labels=("a", "b", "c"))


def test_defaults_are_the_papers():
    config = EarlyExitConfig(**GOOD)
    assert (config.policy_hidden_size, config.classifier_dropout) == (32, 0.1)
    assert config.pooler == TrainConfig("backbone", "data", "output").pooler
    assert (config.criterion, config.threshold, config.format_version) == ("policy", 0.5, FORMAT_VERSION)
    assert (config.num_exits, config.num_labels) == (2, 3)


def test_it_is_frozen_and_comparable():
    config = EarlyExitConfig(**GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.threshold = 0.9
    assert config == EarlyExitConfig(4, [2, 4], ["a", "b", "c"])
    assert hash(config) == hash(EarlyExitConfig(4, [2, 4], ["a", "b", "c"]))


def test_round_trip_through_json():
    others = dict(pooler="per_layer", threshold=0.7, max_length=99, criterion="scripted", policy_hidden_size=8)
    config = EarlyExitConfig(**GOOD, **others)
    again = EarlyExitConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert set(config.to_dict()) == {f.name for f in dataclasses.fields(EarlyExitConfig)}


@pytest.mark.parametrize(
    "change, error, fragments",
    [
        (dict(num_layers=0), ValueError, ["num_layers", "positive integer", "0"]),
        (dict(num_layers=4.0), ValueError, ["num_layers", "positive integer", "4.0"]),
        (dict(num_layers=True), ValueError, ["num_layers", "positive integer", "True"]),
        (dict(num_layers="4"), ValueError, ["num_layers", "positive integer", "'4'"]),
        (dict(exit_layers=()), ValueError, ["exit_layers", "[]"]),
        (dict(exit_layers=(4, 2)), ValueError, ["ascending", "[4, 2]"]),
        (dict(exit_layers=(2, 2, 4)), ValueError, ["ascending", "[2, 2, 4]"]),
        (dict(exit_layers=(0, 4)), ValueError, ["from 1", "[0, 4]"]),
        (dict(exit_layers=(-1, 4)), ValueError, ["from 1", "[-1, 4]"]),
        (dict(exit_layers=(1, 3)), ValueError, ["last layer", "(4)", "[1, 3]"]),
        (dict(exit_layers=(1, 5)), ValueError, ["last layer", "(4)", "[1, 5]"]),
        (dict(exit_layers=(1.0, 4)), ValueError, ["exit_layers", "1.0"]),
        (dict(exit_layers=(True, 4)), ValueError, ["exit_layers", "True"]),
        (dict(exit_layers=4), (TypeError, ValueError), ["exit_layers", "list"]),
        (dict(exit_layers=None), (TypeError, ValueError), ["exit_layers", "list"]),
        (dict(labels=("a",)), ValueError, ["labels", "two or more"]),
        (dict(labels=()), ValueError, ["labels", "two or more"]),
        (dict(labels=("a", "b", "a")), ValueError, ["labels", "different"]),
        (dict(labels=("a", 1)), TypeError, ["labels", "strings"]),
        (dict(labels=(["a"], "b")), TypeError, ["labels", "strings"]),
        (dict(labels="abc"), (TypeError, ValueError), ["labels", "list"]),
        (dict(labels=None), (TypeError, ValueError), ["labels", "list"]),
        (dict(pooler="mean"), ValueError, ["pooler", "shared, per_layer, none", "mean"]),
        (dict(pooler=None), ValueError, ["pooler", "shared, per_layer, none", "None"]),
        (dict(criterion="entropy"), ValueError, ["criterion", "policy, scripted", "entropy"]),
        (dict(threshold=1.5), ValueError, ["threshold", "[0, 1]", "1.5"]),
        (dict(threshold=-0.01), ValueError, ["threshold", "[0, 1]", "-0.01"]),
        (dict(threshold=float("nan")), ValueError, ["threshold", "[0, 1]", "nan"]),
        (dict(threshold="0.5"), ValueError, ["threshold", "[0, 1]", "'0.5'"]),
        (dict(threshold=True), ValueError, ["threshold", "[0, 1]", "True"]),
        (dict(classifier_dropout=1.1), ValueError, ["classifier_dropout", "[0, 1]", "1.1"]),
        (dict(policy_hidden_size=0), ValueError, ["policy_hidden_size", "positive", "0"]),
        (dict(max_length=0), ValueError, ["max_length", "positive", "0"]),
        (dict(format_version=99), ValueError, ["format_version", "99", str(FORMAT_VERSION)]),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_bad_values(change, error, fragments):
    with pytest.raises(error) as caught:
        EarlyExitConfig(**(GOOD | change))
    for fragment in fragments:
        assert fragment in str(caught.value), f"{fragment!r} is not in: {caught.value}"


def test_expected_leave_rates():
    """Measured at some thresholds, interpolated between, held beyond; unmeasured, every exit is equally likely."""
    config = EarlyExitConfig(**GOOD)
    assert config.expected_leave_rates(0.5) == {2: 0.5}
    config = EarlyExitConfig(3, (1, 2, 3), ("a", "b"), leave_rates=[(0.8, [0.1, 0.2]), (0.4, [0.5, 0.6])])
    expected = (0.4, 0.5, 0.6), (0.8, 0.1, 0.2), (0.6, 0.3, 0.4), (0.0, 0.5, 0.6), (0.99, 0.1, 0.2)
    for threshold, first, second in expected:
        assert config.expected_leave_rates(threshold) == pytest.approx({1: first, 2: second})
    assert config.expected_leave_rates(1.0) == {1: 0.0, 2: 0.0}
    assert EarlyExitConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for wrong in ((0.5, [0.1]), (0.5, [0.1, 1.2]), (1.5, [0.1, 0.2]), (0.5, [0.1, 0.2, 0.3]), (0.5, 0.1), 0.5):
        with pytest.raises((ValueError, TypeError), match="leave_rates"):
            EarlyExitConfig.from_dict(dict(num_layers=3, exit_layers=[1, 2, 3], labels=["a", "b"], leave_rates=[wrong]))


def test_from_dict_names_keys():
    with pytest.raises(ValueError, match=r"early_exit has unknown keys \['exits', 'treshold'\]; known keys are"):
        EarlyExitConfig.from_dict({**GOOD, "treshold": 0.5, "exits": 3})
    with pytest.raises(ValueError, match=r"config.json lacks the keys \['exit_layers', 'labels'\]"):
        EarlyExitConfig.from_dict({"num_layers": 4}, where="config.json")
    with pytest.raises(TypeError, match="early_exit must be a mapping, got list"):
        EarlyExitConfig.from_dict([1])
    for key, value in (("labels", "abc"), ("exit_layers", 4), ("labels", {"a": 1})):
        with pytest.raises(TypeError, match=f"early_exit.{key} must be a list, got {type(value).__name__}"):
            EarlyExitConfig.from_dict({**GOOD, key: value})


# -- models from configs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooler", POOLERS)
def test_parameters_of_the_exits(family, pooler):
    """L classifiers, L - 1 policies H -> 32 -> 1, and 1, L or 0 poolers begun as the pretrained one."""
    backbone = tiny_backbone(family)
    pretrained = backbone.pooler.dense.weight.detach().clone()
    hidden = backbone.config.hidden_size
    model = engine.MultiExitEncoder(backbone, EarlyExitConfig(4, (1, 3, 4), ("a", "b"), pooler, max_length=MAX_LENGTH))
    assert len(model.exits.classifiers) == 3 and len(model.exits.policies) == 2
    assert [tuple(c.weight.shape) for c in model.exits.classifiers] == [(2, hidden)] * 3
    assert sum(p.numel() for p in model.exits.policies[0].parameters()) == hidden * 32 + 32 + 32 + 1
    assert len(model.exits.poolers) == {"shared": 1, "per_layer": 3, "none": 0}[pooler]
    assert all(torch.equal(p.weight, pretrained) for p in model.exits.poolers)
    assert len({p.weight.data_ptr() for p in model.exits.poolers}) == len(model.exits.poolers)
    assert not any("backbone.pooler" in name for name, _ in model.named_parameters())
    phi, theta = model.policy_parameters(), model.task_parameters()
    assert {id(p) for p in phi} | {id(p) for p in theta} == {id(p) for p in model.parameters()}
    assert not {id(p) for p in phi} & {id(p) for p in theta}


def test_fresh_policies():
    """N(0, 0.02^2) weights and zero biases: exit probability near 0.5; or every exit equally likely."""
    config = EarlyExitConfig(4, (1, 2, 3, 4), ("a", "b"), max_length=MAX_LENGTH)
    model = engine.MultiExitEncoder(tiny_backbone(), config)
    for uniform in (False, True):
        model.exits.reset_policies(uniform_hazard=uniform)
        pi = torch.stack([policy(torch.randn(200, 32)).sigmoid().mean() for policy in model.exits.policies])
        want = torch.tensor([1 / 4, 1 / 3, 1 / 2]) if uniform else torch.full((3,), 0.5)
        torch.testing.assert_close(pi, want, rtol=0, atol=0.01)
        weights = torch.cat([policy.dense.weight.flatten() for policy in model.exits.policies])
        assert float(weights.std()) == pytest.approx(0.02, rel=0.1)


def test_model_and_config_must_agree():
    with pytest.raises(ValueError, match="num_layers is 3, the backbone has 4"):
        engine.MultiExitEncoder(tiny_backbone(), EarlyExitConfig(3, (3,), ("a", "b"), max_length=10))
    for family in FAMILIES:
        with pytest.raises(ValueError, match=f"max_length is {MAX_LENGTH + 1}, .* serves {MAX_LENGTH}"):
            engine.MultiExitEncoder(
                tiny_backbone(family), EarlyExitConfig(4, (4,), ("a", "b"), max_length=MAX_LENGTH + 1)
            )


@pytest.mark.parametrize(
    "change, fragments",
    [
        (dict(model_type="gpt2"), ["gpt2", "bert, roberta, mpnet"]),
        (dict(hidden_act="gelu_new"), ["gelu_new", "'gelu'"]),
        (dict(hidden_act="relu"), ["relu", "'gelu'"]),
        (dict(is_decoder=True), ["decoder"]),
        (dict(add_cross_attention=True), ["decoder"]),
        (dict(position_embedding_type="relative_key"), ["relative_key", "absolute"]),
    ],
    ids=str,
)
def test_backbones_that_would_be_another_model(change, fragments):
    config = tiny_backbone().config
    for key, value in change.items():
        object.__setattr__(config, key, value)
    with pytest.raises(ValueError) as caught:
        family_of(config)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


def test_families():
    for name, first, bias in (("bert", 0, False), ("roberta", 2, False), ("mpnet", 2, True)):
        family = family_of(tiny_backbone(name).config)
        assert (family.model_type, family.first_position, family.position_bias) == (name, first, bias)
        assert family.longest(tiny_backbone(name).config) == MAX_LENGTH
