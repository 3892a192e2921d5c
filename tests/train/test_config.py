"""Every choice of a run is checked when it is made: an hour of training is no place to find a misspelt word."""

from __future__ import annotations

import dataclasses
import json

import pytest

from engine.backbones import GGUF_PACKAGES
from engine.train.config import (
    RECIPES,
    InitOptions,
    LoraOptions,
    OptimiserOptions,
    PolicyOptions,
    SelectOptions,
    TaskOptions,
    TrainConfig,
    load_recipe,
    override,
)
from engine.train.decoder_config import DecoderTrainConfig

PLACES = dict(backbone="b", data="d", output="o")


def test_defaults_follow_the_method():
    """Closed form, hardness reward, ML every round, greedy indicator, w_l = l."""
    config = TrainConfig(**PLACES)
    policy = config.policy
    assert (policy.method, policy.reward, policy.ml_refresh) == ("closed_form", "hardness", "round")
    assert (policy.behaviour, policy.num_samples, policy.baseline) == ("bernoulli", 8, "leave_one_out")
    assert (config.init.weighting, config.init.epochs, config.task.indicator) == ("layer", 5, "greedy")
    assert (policy.epsilon_start, policy.epsilon_end, policy.epsilon_tau) == (0.05, 0.005, 1000.0)
    assert (config.max_rounds, config.tolerance, config.seed) == (5, 1e-3, 42)
    assert config.lora.rank == 0 and policy.alpha is None and config.exit_layers is None


def test_round_trip_through_json():
    config = TrainConfig(
        **PLACES, exit_layers=[2, 4], lora=LoraOptions(rank=8), select=SelectOptions(alphas=(), reference=0.9),
        policy=PolicyOptions(alpha=0.02, ratio_clip=None),
    )  # fmt: skip
    data = json.loads(json.dumps(config.to_dict()))
    assert TrainConfig.from_dict(data) == config
    assert TrainConfig.from_dict(data).to_dict() == data
    assert TrainConfig.from_dict(PLACES) == TrainConfig(**PLACES)


def test_it_is_frozen():
    groups = PolicyOptions(), SelectOptions(), LoraOptions(), InitOptions(), TaskOptions()
    for options in (TrainConfig(**PLACES), *groups):
        field = dataclasses.fields(options)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(options, field, 1)


@pytest.mark.parametrize(
    "data, error, fragments",
    [
        ({"epochs": 3}, ValueError, ["unknown options ['epochs']", "init", "policy"]),
        ({"init": {"epoch": 3}}, ValueError, ["init has unknown options ['epoch']", "epochs"]),
        ({"policy": {"weighting": "layer"}}, ValueError, ["policy has unknown options ['weighting']"]),
        ({"init": 3}, TypeError, ["init must be a group of options", "int"]),
        ({"lora": [8]}, TypeError, ["lora must be a group of options", "list"]),
        ({"init": None}, TypeError, ["init must be a group of options", "None"]),
    ],
    ids=str,
)
def test_from_dict_names_groups_and_keys(data, error, fragments):
    with pytest.raises(error) as caught:
        TrainConfig.from_dict({**PLACES, **data})
    for fragment in fragments:
        assert fragment in str(caught.value), f"{fragment!r} is not in: {caught.value}"


def test_what_every_run_needs():
    for missing in PLACES:
        with pytest.raises((TypeError, ValueError), match=missing):
            TrainConfig.from_dict({k: v for k, v in PLACES.items() if k != missing})
    with pytest.raises(TypeError, match="train must be a group"):
        TrainConfig.from_dict([])


BAD = [
    ("init", "epochs", -1), ("init", "epochs", 1.5), ("init", "epochs", True), ("init", "epochs", "3"),
    ("init", "batch_size", 0), ("init", "learning_rate", 0.0), ("init", "learning_rate", -1e-3),
    ("init", "learning_rate", "1e-3"), ("init", "learning_rate", float("nan")), ("init", "learning_rate", float("inf")),
    ("init", "weighting", "linear"), ("init", "weighting", None), ("init", "exits_rate", 0.0),
    ("init", "early_gradient", 1.5), ("init", "early_gradient", -0.1), ("task", "exits_rate", "fast"),
    ("teacher", "folds", 1), ("teacher", "folds", -2), ("teacher", "folds", 2.0), ("teacher", "weight", 1.1),
    ("teacher", "temperature", 0.0), ("teacher", "epochs", -1),
    ("task", "indicator", "argmax"), ("task", "epochs", -1), ("task", "batch_size", 0), ("task", "learning_rate", 0),
    ("policy", "method", "closed"), ("policy", "reward", "soft"), ("policy", "alpha", -0.1), ("policy", "alpha", "0.1"),
    ("policy", "alpha", float("nan")), ("policy", "ml_refresh", "never"), ("policy", "initialisation", "ones"),
    ("policy", "warm_start_epochs", -1), ("policy", "entropy_bonus", -0.5), ("policy", "behaviour", "greedy"),
    ("policy", "num_samples", 0), ("policy", "num_samples", 1), ("policy", "baseline", "median"),
    ("policy", "ratio_clip", 0.0), ("policy", "ratio_clip", -1.0), ("policy", "ratio_clip", "10"),
    ("policy", "epsilon_start", 1.5), ("policy", "epsilon_start", -0.1), ("policy", "epsilon_end", 2.0),
    ("policy", "epsilon_tau", 0.0), ("policy", "epsilon_tau", -5.0), ("policy", "epsilon_tau", "slow"),
    ("select", "alphas", [-1.0]), ("select", "alphas", ["a"]), ("select", "thresholds", [1.5]),
    ("select", "thresholds", []), ("select", "max_relative_loss", 1.5), ("select", "max_relative_loss", -0.1),
    ("select", "reference", "best"), ("select", "reference", 1.5),
    ("lora", "rank", -1), ("lora", "rank", 2.0), ("lora", "alpha", 0.0), ("lora", "dropout", 1.5),
]  # fmt: skip


@pytest.mark.parametrize("group, key, value", BAD, ids=[f"{g}.{k}={v}" for g, k, v in BAD])
def test_bad_values_in_groups(group, key, value):
    """Found here, named; not when the phase that reads them begins."""
    with pytest.raises((ValueError, TypeError)) as caught:
        TrainConfig.from_dict({**PLACES, group: {key: value}})
    assert key in str(caught.value)
    if not isinstance(value, list):
        assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("calibration_share", 0.0), ("calibration_share", -0.1), ("calibration_share", "0.1"), ("max_rounds", -1),
        ("max_rounds", 1.5), ("max_length", 2), ("max_length", "128"), ("tolerance", -0.1), ("exit_layers", 4),
        ("drop_leaked", "no"), ("output", ""),
    ],
)  # fmt: skip
def test_bad_values_of_the_run(key, value):
    """What needs neither model nor data to be seen as wrong (test_trainer.py has what does)."""
    with pytest.raises((ValueError, TypeError)) as caught:
        TrainConfig.from_dict({**PLACES, key: value})
    assert key in str(caught.value)


def test_good_extremes():
    TrainConfig.from_dict(
        {
            **PLACES, "max_rounds": 0, "exit_layers": [12], "max_length": 3, "tolerance": 0.0, "seed": 0,
            "init": {"epochs": 0, "weighting": "equal"}, "task": {"epochs": 0, "indicator": "expected"},
            "policy": {"alpha": 0.0, "ratio_clip": None, "num_samples": 1, "baseline": "none", "epsilon_start": 0.0},
            "select": {"alphas": [], "thresholds": [], "reference": 0.95, "max_relative_loss": 0.01},
        }
    )  # fmt: skip


def test_a_base_class_is_checked_too():
    with pytest.raises(ValueError, match="batch_size"):
        OptimiserOptions(1, 0, 0.1)


# -- recipes and the command line's overrides ---------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPES.glob("*.json")))
def test_shipped_recipes_are_valid(name):
    recipe = load_recipe(name)
    kind = DecoderTrainConfig if recipe["backbone"] in GGUF_PACKAGES else TrainConfig
    kind.from_dict({**PLACES, **recipe})
    assert load_recipe(RECIPES / f"{name}.json") == recipe


def test_recipes_from_files(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"max_rounds": 2}')
    assert load_recipe(path) == load_recipe(str(path)) == {"max_rounds": 2}
    with pytest.raises(FileNotFoundError, match="'nowhere' is neither a file nor one of: .*stackoverflow"):
        load_recipe("nowhere")
    path.write_text('{\n"max_rounds": 2,\n}')
    with pytest.raises(ValueError, match=r"mine\.json:3: not JSON"):
        load_recipe(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="must be a JSON object, got list"):
        load_recipe(path)


def test_override():
    base = {"max_rounds": 1, "init": {"epochs": 5}}
    got = override(base, ["max_rounds=3", "init.epochs=2", "init.weighting=equal", "policy.alpha=null",
                          "select.alphas=[0.5, 1]", "data=a=b", "output=my folder", "exit_layers=[1,3]"])  # fmt: skip
    assert got == {
        "max_rounds": 3, "init": {"epochs": 2, "weighting": "equal"}, "policy": {"alpha": None},
        "select": {"alphas": [0.5, 1]}, "data": "a=b", "output": "my folder", "exit_layers": [1, 3],
    }  # fmt: skip
    assert base == {"max_rounds": 1, "init": {"epochs": 5}}, "the options passed in have changed"
    for wrong in ("max_rounds", "=3", ""):
        with pytest.raises(ValueError, match="key=value"):
            override(base, [wrong])
    with pytest.raises(ValueError, match="max_rounds is not a group"):
        override(base, ["max_rounds.x=3"])
