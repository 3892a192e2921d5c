import json

import pytest
import torch

from engine.train.config import TrainConfig
from engine.train.start import fresh_model, read_record, seed_of
from tests.tiny import LABELS

START = {"config": {"seed": 1, "init": {}}, "backbone": {"sha256": "a"}, "data": {"train": "b", "test": None}}


def test_seeds_differ_by_phase_and_run():
    configs = [TrainConfig("b", "d", "o", seed=seed) for seed in (1, 2)]
    assert len({seed_of(config, phase) for config in configs for phase in ("init", "select", "round1.task")}) == 6


@pytest.mark.parametrize("changes", [dict(pooler="shared"), dict(lora=dict(rank=2)), dict(exit_layers=[2, 3])], ids=str)
def test_fresh_models_are_alike(backbone_folder, changes):
    options = dict(backbone=str(backbone_folder), data="d", output="o", max_length=32, **changes)
    config = TrainConfig.from_dict(options)
    states = []
    for noise in (3, 4):
        torch.manual_seed(noise)
        states.append(fresh_model(config, LABELS, torch.device("cpu"))[0].state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_read_record(tmp_path):
    path = tmp_path / "record.json"
    assert read_record(path, START) is None
    record = {**START, "phases": {"init": {}}, "alpha": 0.1}
    path.write_text(json.dumps(record))
    assert read_record(path, START) == record
    for key, change, says in (
        ("config", {"seed": 2}, r"other options \(seed\)"),
        ("config", {"new": 2}, r"other options \(new\)"),
        ("backbone", {"sha256": "c"}, r"another backbone \(sha256\)"),
        ("data", {"train": "c", "test": "d"}, r"other data \(test, train\)"),
    ):
        with pytest.raises(ValueError, match=says):
            read_record(path, {**START, key: {**START[key], **change}})
    del record["data"]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="other data"):  # written before records named it
        read_record(path, START)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"config": {}, "phases": []}', '{"config": 1, "phases": {}}'])
def test_a_damaged_record_is_named(tmp_path, text):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="record.json"):
        read_record(path, START)
