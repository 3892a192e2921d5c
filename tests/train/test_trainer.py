"""Whole runs on a tiny model: they learn, record what they did, and do the same again after being killed anywhere."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import engine
from engine.train import figures, phases, trainer
from engine.train import run as run_module
from engine.train.card import train_command
from engine.train.config import TrainConfig
from engine.train.data import load_examples
from engine.train.policy_gradient import BEHAVIOURS
from engine.train.run import discard
from engine.train.trainer import Trainer
from tests.tiny import LABELS, assert_same, random_texts, save_backbone, write_task

EXITS, WEIGHTS = "exits.safetensors", "model.safetensors"


class Killed(BaseException):
    """What ctrl-C is: no ``except Exception`` may swallow it."""


@pytest.fixture(scope="module")
def options(backbone_folder, task_folder):
    """Options of a run that takes about a second."""
    return dict(
        backbone=str(backbone_folder),
        data=str(task_folder),
        max_length=32,
        calibration_share=0.2,
        max_rounds=2,
        tolerance=0.0,
        init=dict(epochs=4, batch_size=16, learning_rate=3e-3),
        policy=dict(epochs=4, batch_size=64, learning_rate=1e-2),
        task=dict(epochs=1, batch_size=16, learning_rate=1e-3),
        select=dict(alphas=[0.5, 1.0, 4.0], thresholds=[0.3, 0.5, 0.7]),
    )


def configure(options: dict, output: Path, **changes) -> TrainConfig:
    merged = {**options, "output": str(output)}
    for key, value in changes.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return TrainConfig.from_dict(merged)


def train(options: dict, output: Path, **changes) -> dict:
    return Trainer(configure(options, output, **changes)).run()


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """One uninterrupted run: (output folder, record)."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("whole") / "ck"
    return output, train(options, output)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {f"{path.name}:{name}": value for name, value in load_file(path).items()}
    return found


def assert_same_run(output: Path, record: dict, whole) -> None:
    """Bit-identical weights, and the same figures to the last digit."""
    expected, got = tensors_of(whole[0]), tensors_of(output)
    assert expected.keys() == got.keys()
    different = [name for name in expected if not torch.equal(expected[name], got[name])]
    assert not different, f"{len(different)} tensors differ, e.g. {different[:3]}"
    for key in whole[1]:
        if key != "config":
            assert record[key] == whole[1][key], key
    assert engine.load(output).config == engine.load(whole[0]).config


def accuracy(runner, path: Path) -> tuple[float, float]:
    """Accuracy and mean depth on a labelled file."""
    examples = load_examples(path)
    got = runner.run(examples.texts)
    return float((got.label_ids == examples.label_ids).float().mean()), got.stats.mean_depth


# -- one run -----------------------------------------------------------------------------------------------------


def test_a_run_learns(whole, task_folder):
    """Three classes, so chance is 1/3; and what the record claims is what the checkpoint does."""
    output, record = whole
    runner = engine.load(output)
    for split in ("dev", "test"):
        reached, depth = accuracy(runner, task_folder / f"{split}.jsonl")
        assert reached >= 0.6
        assert record["result"][split]["accuracy"] == pytest.approx(reached, abs=0.03)
        assert record["result"][split]["mean_depth"] == pytest.approx(depth, abs=0.1)
    losses = record["phases"]["init"]["epoch_loss"]
    assert losses[-1] < 0.9 * losses[0]
    assert runner.config.labels == LABELS and runner.config.exit_layers == (1, 2, 3)
    assert runner.config.threshold == record["result"]["threshold"]


def test_the_record_holds_every_figure(whole, options):
    """Issue 2: epoch losses, share of instances per exit, per-layer accuracy and loss (Fig. 2), Spearman (Table 1)."""
    output, returned = whole
    text = Path(f"{output}.run/record.json").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record == json.loads(json.dumps(returned))
    assert record["config"] == configure(options, output).to_dict()
    assert record["exit_layers"] == [1, 2, 3] and record["alpha"] > 0
    assert len(record["backbone"]["sha256"]) == 64
    assert {"torch", "transformers", "python", "consistentee", "device"} <= set(record["versions"])
    assert sum(record["sizes"][k] for k in ("train", "calibration", "dropped_also_in_dev_or_test",
                                            "dropped_also_in_calibration")) == 160  # fmt: skip
    names = list(record["phases"])
    assert names[:3] == ["init", "round1.policy", "round1.task"] and names[-1] == "select"

    init = record["phases"]["init"]
    assert len(init["epoch_loss"]) == 4
    for key in ("spearman_ml_loss", "spearman_ml_forgetting"):
        assert init[key] is None or -1 <= init[key] <= 1
    assert init["spearman_ml_loss"] > 0, "harder instances have the larger loss"
    assert sum(init["memorized_layer_shares"]) == pytest.approx(1)
    assert 0 <= init["never_learned"] <= record["sizes"]["train"]
    for name, phase in record["phases"].items():
        for part in [phase["calibration"], *([phase["train"]] if "train" in phase else [])]:
            assert len(part["accuracy"]) == len(part["loss"]) == 3
            assert all(0 <= a <= 1 for a in part["accuracy"]) and all(x > 0 for x in part["loss"])
        greedy = phase["calibration"]["greedy"]
        assert len(greedy["exit_shares"]) == len(greedy["accuracy_of_leaving"]) == len(greedy["loss_of_leaving"]) == 3
        assert sum(greedy["exit_shares"]) == pytest.approx(1)
        depth = sum(share * layer for share, layer in zip(greedy["exit_shares"], (1, 2, 3), strict=True))
        assert greedy["mean_depth"] == pytest.approx(depth)
        for share, hit in zip(greedy["exit_shares"], greedy["accuracy_of_leaving"], strict=True):
            assert (hit is None) == (share == 0)
        assert "objective" in phase["calibration"], name
        if name.endswith(".task"):
            assert len(phase["epoch_loss"]) == 1
        if name.endswith(".policy"):
            assert len(phase["expected_reward"]) == 4
            assert phase["expected_reward"][-1] > phase["expected_reward"][0]
            assert 0.5 <= phase["decisiveness"] <= 1
    select = record["phases"]["select"]
    assert len(select["points"]) == 9 and select["chosen"]["threshold"] in (0.3, 0.5, 0.7)
    for split in ("calibration", "dev", "test"):
        assert {"rows", "accuracy", "accuracy_full_depth", "mean_depth", "saved_layers", "exit_shares"} <= set(
            record["result"][split]
        )
    assert record["result"]["best_phase"] in names


def test_a_log_line_per_epoch(options, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="engine.train"):
        train(options, tmp_path / "ck", max_rounds=1, select=dict(alphas=[]))
    text = caplog.text
    assert all(f"init epoch {k}/4: loss " in text for k in (1, 2, 3, 4))
    assert "task epoch 1/1: loss " in text and "wrote" in text


def test_the_card_states_command_and_figures(whole, options):
    output, record = whole
    card = (output / "README.md").read_text()
    command = train_command(record["config"], TrainConfig)
    assert command in card and command.startswith("consistentee train ")
    for part in (options["data"], options["backbone"], "init.epochs=4", "policy.batch_size=64"):
        assert part in command
    for split in ("calibration", "dev", "test"):
        assert f"{record['result'][split]['accuracy']:.4f}" in card
    assert record["backbone"]["sha256"] in card
    stored = json.loads((output / "training.json").read_text())
    assert {"config", "sizes", "result", "versions"} <= set(stored) and "phases" not in stored
    assert stored == {key: record[key] for key in stored}
    # The command's options are the run's: parsed again they give the same configuration.
    from engine.train.config import override

    sets = [part.strip()[len("--set "):].strip("'") for part in command.split("\\\n") if "--set" in part]
    rebuilt = override({k: record["config"][k] for k in ("backbone", "data", "output")}, sets)
    assert TrainConfig.from_dict(rebuilt).to_dict() == record["config"]


def test_paths_are_kept_as_they_were_given(options, tmp_path, monkeypatch, backbone_folder, task_folder):
    """Where the files lay on the machine that trained is nobody else's business."""
    shutil.copytree(backbone_folder, tmp_path / "backbone")
    shutil.copytree(task_folder, tmp_path / "task")
    monkeypatch.chdir(tmp_path)
    train({**options, "backbone": "backbone", "data": "task"}, Path("ck"), lora=dict(rank=2), max_rounds=0)
    for path in Path("ck").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path
    config = json.loads(Path("ck/training.json").read_text())["config"]
    assert (config["backbone"], config["data"], config["output"]) == ("backbone", "task", "ck")


def test_the_trained_model_is_the_checkpoint(options, tmp_path):
    """The object that trained and the folder that it wrote say the same, also while it is in training mode."""
    run = Trainer(configure(options, tmp_path / "ck", max_rounds=1))
    run.run()
    texts = random_texts(30, longest=20)
    want = engine.load(tmp_path / "ck").run(texts)
    run.model.train()
    assert_same(engine.from_module(run.model, run.tokenizer).run(texts), want, atol=1e-6)


# -- reproducible ------------------------------------------------------------------------------------------------


def test_same_seed_same_checkpoint(options, tmp_path, whole):
    """Whatever the process has drawn before."""
    torch.manual_seed(987)
    torch.rand(13)
    assert_same_run(tmp_path / "ck", train(options, tmp_path / "ck"), whole)


def test_another_seed_another_checkpoint(options, tmp_path, whole):
    train(options, tmp_path / "ck", seed=43)
    expected, got = tensors_of(whole[0]), tensors_of(tmp_path / "ck")
    assert not any(torch.equal(expected[name], got[name]) for name in expected if name.endswith("dense.weight"))


def test_same_seed_on_a_backbone_without_pooler(options, tmp_path):
    """Masked language models bring none: the exits' poolers are drawn, and from the run's seed too."""
    backbone = str(save_backbone(tmp_path / "backbone", pooler=False))
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        train(options, tmp_path / name, backbone=backbone, pooler="shared", max_rounds=1, init=dict(epochs=1))
    a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert any("poolers.0.weight" in name for name in a)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def kill_after_phase(patch, k: int) -> None:
    """Right after phase k (1, 2, ...) is stored."""
    original = run_module.write_file

    def stub(path, text):
        original(path, text)
        if Path(path).name == "record.json" and len(json.loads(text)["phases"]) == k:
            raise Killed

    patch.setattr(run_module, "write_file", stub)


def kill_before_record(patch, k: int) -> None:
    """The weights of phase k are stored, its figures not yet."""
    original, count = run_module.write_folder, [0]

    def stub(folder, write):
        original(folder, write)
        count[0] += Path(folder).name != "memorized"
        if count[0] == k:
            raise Killed

    patch.setattr(run_module, "write_folder", stub)


def kill_at_step(patch, step: int) -> list[int]:
    """In the middle of whatever takes optimiser step number ``step``."""
    original, count = torch.optim.AdamW.step, [0]

    def stub(self, *args, **kwargs):
        count[0] += 1
        if count[0] == step:
            raise Killed
        return original(self, *args, **kwargs)

    patch.setattr(torch.optim.AdamW, "step", stub)
    return count


def resume(options, output, monkeypatch, kill, *arguments) -> dict:
    with monkeypatch.context() as patch:
        kill(patch, *arguments)
        with pytest.raises(Killed):
            train(options, output)
    assert not output.exists(), "a checkpoint was written by an unfinished run"
    torch.manual_seed(len(str(arguments)) + 77)  # another process has another state
    return train(options, output)


@pytest.mark.parametrize(
    "kill, k", [(kill_after_phase, k) for k in range(1, 7)] + [(kill_before_record, k) for k in (1, 3, 6)]
)
def test_kill_behind_a_phase_and_resume(options, tmp_path, whole, monkeypatch, kill, k):
    if k > len(whole[1]["phases"]):
        pytest.skip(f"the run has {len(whole[1]['phases'])} phases")
    assert_same_run(tmp_path / "ck", resume(options, tmp_path / "ck", monkeypatch, kill, k), whole)


def test_kill_within_every_phase_and_resume(options, tmp_path, whole, monkeypatch):
    """In the middle of each phase's optimiser steps, found by counting those of a whole run."""
    marks, steps = [0], [0]
    original = torch.optim.AdamW.step

    def counting(self, *args, **kwargs):
        steps[0] += 1
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", counting)
        stored = run_module.write_folder
        patch.setattr(run_module, "write_folder", lambda *args: (marks.append(steps[0]), stored(*args))[1])
        train(options, tmp_path / "count")
    assert len(marks) == len(whole[1]["phases"]) + 1
    for number, (start, end) in enumerate(zip(marks, marks[1:], strict=False)):
        output = tmp_path / f"ck{number}"
        record = resume(options, output, monkeypatch, kill_at_step, (start + end) // 2 + 1)
        assert_same_run(output, record, whole)


def test_kill_twice(options, tmp_path, whole, monkeypatch):
    output = tmp_path / "ck"
    for kill, argument in ((kill_at_step, 3), (kill_after_phase, 2), (kill_before_record, 1), (kill_after_phase, 4)):
        with monkeypatch.context() as patch:
            kill(patch, argument)
            with pytest.raises(Killed):
                train(options, output)
    assert_same_run(output, train(options, output), whole)


def test_the_same_trainer_after_an_interruption(options, tmp_path, whole, monkeypatch):
    """In a notebook the object lives on, its model half trained."""
    for step in (5, 60):
        run = Trainer(configure(options, tmp_path / f"ck{step}"))
        with monkeypatch.context() as patch:
            kill_at_step(patch, step)
            with pytest.raises(Killed):
                run.run()
        assert_same_run(tmp_path / f"ck{step}", run.run(), whole)


def test_kill_while_the_checkpoint_is_written(options, tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_checkpoint", lambda *args, **kwargs: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train(options, tmp_path / "ck")
    assert_same_run(tmp_path / "ck", train(options, tmp_path / "ck"), whole)


def test_a_killed_process_resumes(options, tmp_path, whole):
    """SIGKILL from outside the interpreter's control: nothing is cleaned up."""
    output = tmp_path / "ck"
    program = (
        "import os, signal, sys, json, torch\n"
        "from engine.train.config import TrainConfig\n"
        "from engine.train.trainer import Trainer\n"
        "torch.set_num_threads(1)\n"
        "step, count = torch.optim.AdamW.step, [0]\n"
        "def stub(self, *a, **k):\n"
        "    count[0] += 1\n"
        "    if count[0] == 45: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, *a, **k)\n"
        "torch.optim.AdamW.step = stub\n"
        "Trainer(TrainConfig.from_dict(json.loads(sys.argv[1]))).run()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, json.dumps(configure(options, output).to_dict())],
        capture_output=True, text=True, timeout=300, cwd=Path(engine.__file__).parent.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr
    done = list(json.loads(Path(f"{output}.run/record.json").read_text())["phases"])
    assert 0 < len(done) < len(whole[1]["phases"])
    assert_same_run(output, train(options, output), whole)


def test_a_finished_run_again_trains_nothing(options, tmp_path, whole, monkeypatch):
    output = Path(shutil.copytree(whole[0], tmp_path / "ck"))
    shutil.copytree(f"{whole[0]}.run", f"{output}.run")
    record = json.loads(Path(f"{output}.run/record.json").read_text())
    record["config"]["output"] = str(output)
    Path(f"{output}.run/record.json").write_text(json.dumps(record))
    shutil.rmtree(output)
    count = kill_at_step(monkeypatch, 10**9)
    assert_same_run(output, train(options, output), whole)
    assert count == [0]


def test_changed_options_do_not_resume(options, tmp_path, monkeypatch):
    output = tmp_path / "ck"
    with monkeypatch.context() as patch:
        kill_after_phase(patch, 1)
        with pytest.raises(Killed):
            train(options, output)
    stored = Path(f"{output}.run/record.json").read_text()
    for changes in (dict(seed=43), dict(init=dict(epochs=5)), dict(pooler="shared")):
        named = next(iter(changes))
        with pytest.raises(ValueError, match=f"other options .*{named}") as caught:
            train(options, output, **changes)
        assert f"{output}.run" in str(caught.value)
        assert Path(f"{output}.run/record.json").read_text() == stored
    discard(str(output))
    assert not Path(f"{output}.run").exists()
    train(options, output, seed=43)


def test_changed_data_or_backbone_does_not_resume(options, tmp_path, monkeypatch, task_folder, backbone_folder):
    """Same options, other bytes behind them: half of each would be neither run."""
    data, backbone = tmp_path / "data", tmp_path / "backbone"
    shutil.copytree(task_folder, data)
    shutil.copytree(backbone_folder, backbone)
    places = dict(data=str(data), backbone=str(backbone))
    with monkeypatch.context() as patch:
        kill_after_phase(patch, 1)
        with pytest.raises(Killed):
            train(options, tmp_path / "ck", **places)
    save_backbone(backbone, seed=8)
    with pytest.raises(ValueError, match="backbone"):
        train(options, tmp_path / "ck", **places)
    shutil.rmtree(backbone)
    shutil.copytree(backbone_folder, backbone)
    write_task(data, {"train": 130}, seed=3)
    with pytest.raises(ValueError, match="data|rows|sizes"):
        train(options, tmp_path / "ck", **places)


def test_stored_weights_that_are_gone_or_damaged(options, tmp_path, monkeypatch):
    output = tmp_path / "ck"
    with monkeypatch.context() as patch:
        kill_after_phase(patch, 1)
        with pytest.raises(Killed):
            train(options, output)
    path = Path(f"{output}.run/init/weights.safetensors")
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match="init/weights.safetensors"):
        train(options, output)
    path.unlink()
    with pytest.raises((ValueError, OSError), match="init.*weights.safetensors"):
        train(options, output)
    path.write_bytes(good)
    train(options, output)


def test_a_cut_record(options, tmp_path, monkeypatch):
    """A record is renamed into place, so a cut one is somebody else's doing; still it is named."""
    output = tmp_path / "ck"
    folder = Path(f"{output}.run")
    folder.mkdir()
    (folder / "record.json").write_text('{"config": {')
    with pytest.raises(ValueError, match="record.json"):
        train(options, output)


# -- variants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooler", ["shared", "per_layer", "none"])
def test_poolers(options, tmp_path, pooler):
    record = train(options, tmp_path / "ck", pooler=pooler, max_rounds=1, select=dict(alphas=[]))
    assert engine.load(tmp_path / "ck").config.pooler == pooler
    losses = record["phases"]["init"]["epoch_loss"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", ["roberta", "mpnet"])
def test_other_families(options, tmp_path, family, task_folder):
    backbone = save_backbone(tmp_path / "backbone", family)
    record = train(options, tmp_path / "ck", backbone=str(backbone), max_rounds=1)
    reached, _ = accuracy(engine.load(tmp_path / "ck"), task_folder / "test.jsonl")
    assert record["result"]["test"]["accuracy"] == pytest.approx(reached, abs=0.03)
    assert record["result"]["test"]["accuracy_full_depth"] > 0.45


@pytest.mark.parametrize("pooler", ["none", "shared"])
def test_lora(options, tmp_path, pooler, backbone_folder):
    """The checkpoint is reference, adapter and exits; loaded it says what the trained model says."""
    run = Trainer(configure(options, tmp_path / "ck", pooler=pooler, lora=dict(rank=4), max_rounds=1))
    before = {n: p.clone() for n, p in run.model.named_parameters()}
    record = run.run()
    names = {p.name for p in (tmp_path / "ck").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", EXITS} <= names and WEIGHTS not in names
    changed = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    assert any("lora_A" in n for n in changed) and any("lora_B" in n for n in changed)
    assert not any("backbone" in n and "lora_" not in n for n in changed), "the frozen backbone has changed"
    texts = random_texts(40, longest=20)
    loaded, trained = engine.load(tmp_path / "ck"), engine.from_module(run.model, run.tokenizer, executor="reference")
    got, want = loaded.run(texts), trained.run(texts)
    assert got.exit_layers.tolist() == want.exit_layers.tolist()
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    assert record["phases"]["init"]["epoch_loss"][-1] < record["phases"]["init"]["epoch_loss"][0]
    assert loaded.config.threshold == record["result"]["threshold"]
    reference = json.loads((tmp_path / "ck" / "config.json").read_text())["early_exit"]["backbone"]
    assert reference == {"source": str(backbone_folder), "sha256": record["backbone"]["sha256"]}


def test_lora_kill_and_resume(options, tmp_path, monkeypatch):
    changes = dict(options, lora=dict(rank=3, dropout=0.1), max_rounds=1)
    whole = tmp_path / "whole", train(changes, tmp_path / "whole")
    for k in (1, 2, 3):
        output = tmp_path / f"ck{k}"
        assert_same_run(output, resume(changes, output, monkeypatch, kill_after_phase, k), whole)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_reinforce(options, tmp_path, behaviour):
    policy = dict(method="reinforce", behaviour=behaviour, num_samples=4, initialisation="zero")
    record = train(options, tmp_path / "ck", max_rounds=1, policy=policy)
    values = record["phases"]["round1.policy"]["expected_reward"]
    assert len(values) == 4 and all(math.isfinite(v) for v in values)
    assert engine.load(tmp_path / "ck").run(["how to join"]).stats.rows == 1


@pytest.mark.parametrize("changes", [
    dict(policy=dict(method="reinforce", baseline="mean", ratio_clip=None)),
    dict(policy=dict(method="reinforce", baseline="none", num_samples=1)),
    dict(policy=dict(reward="vanilla", alpha=0.01)),
    dict(policy=dict(warm_start_epochs=2, entropy_bonus=0.01, initialisation="zero")),
    dict(task=dict(indicator="sample")),
    dict(task=dict(indicator="expected")),
    dict(init=dict(weighting="equal")),
    dict(exit_layers=[1, 3]),
    dict(max_rounds=0),
    dict(drop_leaked=False, classifier_dropout=0.0),
], ids=str)  # fmt: skip
def test_other_options(options, tmp_path, changes):
    record = train({**options, "init": dict(epochs=1)}, tmp_path / "ck", **{"max_rounds": 1, **changes})
    loaded = engine.load(tmp_path / "ck")
    assert list(loaded.config.exit_layers) == list(changes.get("exit_layers", [1, 2, 3]))
    assert record["result"]["test"]["rows"] == 40
    json.loads(Path(tmp_path / "ck.run" / "record.json").read_text(), parse_constant=pytest.fail)


def test_a_single_exit_is_a_plain_classifier(options, tmp_path, task_folder):
    """exit_layers = (L,): no policies and no rounds. The baseline of every comparison."""
    record = train(options, tmp_path / "ck", exit_layers=[3])
    assert list(record["phases"]) == ["init"]
    json.loads(Path(tmp_path / "ck.run" / "record.json").read_text(), parse_constant=pytest.fail)
    runner = engine.load(tmp_path / "ck")
    assert runner.config.exit_layers == (3,) and len(runner.model.exits.policies) == 0
    reached, depth = accuracy(runner, task_folder / "test.jsonl")
    assert depth == 3 and reached >= 0.6
    assert record["result"]["test"] == {
        **record["result"]["test"],
        "accuracy": pytest.approx(reached, abs=0.03),
        "mean_depth": 3.0,
        "saved_layers": 0.0,
    }


def test_memorized_layers_once(options, tmp_path, monkeypatch):
    """ml_refresh: computed after step 1 and kept, or again every round."""
    used, original = [], phases.train_policy

    def spy(model, cache, memorized, *args):
        used.append(memorized.clone())
        return original(model, cache, memorized, *args)

    monkeypatch.setattr(phases, "train_policy", spy)
    for refresh in ("once", "round"):
        used.clear()
        train(options, tmp_path / refresh, policy=dict(ml_refresh=refresh), max_rounds=2, init=dict(epochs=1))
        assert len(used) >= 4
        same = [torch.equal(memorized, used[0]) for memorized in used]
        assert all(same) if refresh == "once" else not all(same), (refresh, same)


def test_memorized_layers_once_after_a_kill(options, tmp_path, monkeypatch):
    changes = {**options, "policy": {**options["policy"], "ml_refresh": "once"}}
    whole = tmp_path / "whole", train(changes, tmp_path / "whole")
    for k in (1, 3):
        output = tmp_path / f"ck{k}"
        assert_same_run(output, resume(changes, output, monkeypatch, kill_after_phase, k), whole)


@pytest.mark.parametrize("reward", ["hardness", "vanilla"])
@pytest.mark.parametrize("weighting", ["layer", "equal"])
def test_losses_and_rewards_are_the_methods(options, tmp_path, weighting, reward):
    """Eq. 1 to 6 on a model that stands still (no dropout, next to no learning rate), by the record's figures."""
    still = dict(epochs=1, learning_rate=1e-12)
    backbone = save_backbone(tmp_path / "b", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    record = train(
        options, tmp_path / "ck", backbone=str(backbone), classifier_dropout=0.0, max_rounds=1,
        init=dict(**still, weighting=weighting), task=still, policy=dict(**still, reward=reward, alpha=0.3),
        select=dict(alphas=[]),
    )  # fmt: skip
    init, policy, task = (record["phases"][name] for name in ("init", "round1.policy", "round1.task"))
    ce = torch.tensor(init["train"]["loss"])
    weights = torch.tensor([1.0, 2.0, 3.0] if weighting == "layer" else [1.0, 1.0, 1.0])
    assert init["epoch_loss"][0] == pytest.approx(float(weights @ ce / weights.sum()), rel=1e-4)
    # Fresh policies make every exit equally likely, to within what their small weights say: depth is 2 on average.
    memorized = torch.tensor(policy["memorized_layer_shares"]) @ torch.tensor([1.0, 2.0, 3.0])
    discount = 1.0 if reward == "vanilla" else 1 - float(memorized) / 3
    assert policy["expected_reward"][0] == pytest.approx(-float(ce.mean()) - 0.3 * discount * 2, abs=0.03)
    greedy = policy["train"]["greedy"]
    left = [s * x for s, x in zip(greedy["exit_shares"], greedy["loss_of_leaving"], strict=True) if s]
    assert task["epoch_loss"][0] == pytest.approx(sum(left), rel=1e-3)
    held = record["phases"]["round1.task"]["calibration"]
    left = [s * x for s, x in zip(held["greedy"]["exit_shares"], held["greedy"]["loss_of_leaving"], strict=True) if s]
    assert held["objective"] == pytest.approx(-sum(left) - 0.3 * held["greedy"]["mean_depth"], rel=1e-3)


@pytest.mark.parametrize("method", ["closed_form", "reinforce"])
def test_alpha_buys_depth(options, tmp_path, method):
    """No price of a layer, and a price that no accuracy is worth."""
    policy = dict(method=method, reward="vanilla", epochs=15, learning_rate=3e-2)
    depths = [
        train(
            options, tmp_path / f"ck{alpha}", max_rounds=1, policy=dict(**policy, alpha=alpha), select=dict(alphas=[])
        )["phases"]["round1.policy"]["train"]["greedy"]["mean_depth"]
        for alpha in (0.0, 3.0)
    ]
    assert depths[1] == pytest.approx(1.0, abs=0.05) and depths[0] > 1.5


def test_the_sweep_trains_a_policy_per_alpha(options, tmp_path):
    select = dict(alphas=[0.0, 1.0, 100.0], thresholds=[0.1, 0.5, 0.9], max_relative_loss=1.0)
    policy = dict(reward="vanilla", epochs=15, learning_rate=3e-2, alpha=0.05)
    record = train(options, tmp_path / "ck", max_rounds=1, select=select, policy=policy)
    points = record["phases"]["select"]["points"]
    assert sorted({p["alpha"] for p in points}) == pytest.approx([0.0, 0.05, 5.0])
    depth = {(p["alpha"], p["threshold"]): p["mean_depth"] for p in points}
    alphas = sorted({p["alpha"] for p in points})
    assert depth[alphas[0], 0.5] > depth[alphas[2], 0.5] == 1.0
    assert all(depth[a, 0.1] <= depth[a, 0.5] <= depth[a, 0.9] for a in alphas)
    chosen = record["phases"]["select"]["chosen"]  # any accuracy will do, so the shallowest
    assert chosen["mean_depth"] == min(depth.values()) and chosen["reached"]
    runner = engine.load(tmp_path / "ck")
    assert runner.run(random_texts(20), truncation=True).stats.mean_depth < 1.5
    assert runner.config.threshold == chosen["threshold"]


def test_what_each_phase_changes(options, tmp_path, monkeypatch):
    """Init and task train everything but the policies, policy trains nothing else; and a round's
    policies go on from those of the round before."""
    stored, original = {}, run_module.write_folder

    def keep(folder, write):
        original(folder, write)
        stored[Path(folder).name] = load_file(Path(folder) / "weights.safetensors")

    started = []
    train_policy = phases.train_policy

    def spy(model, *args):
        started.append({f"exits.policies.{k}": v.clone() for k, v in model.exits.policies.state_dict().items()})
        return train_policy(model, *args)

    monkeypatch.setattr(run_module, "write_folder", keep)
    monkeypatch.setattr(phases, "train_policy", spy)
    train(options, tmp_path / "ck", select=dict(alphas=[]))

    def changed(before: str, after: str) -> set[str]:
        names = {name for name, value in stored[after].items() if not torch.equal(value, stored[before][name])}
        return {"policies" if "exits.policies" in name else "the rest" for name in names}

    assert changed("init", "round1.policy") == changed("round1.task", "round2.policy") == {"policies"}
    assert changed("round1.policy", "round1.task") == {"the rest"}
    assert all(torch.equal(value, stored["round1.task"][name]) for name, value in started[1].items())
    fresh = Trainer(configure(options, tmp_path / "fresh")).model.exits.policies.state_dict()
    assert all(torch.equal(value, stored["init"][f"exits.policies.{name}"]) for name, value in fresh.items())


# -- which round, which point ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alphas", [[], [1.0]], ids=["no sweep", "sweep"])
def test_the_best_round_is_kept(options, tmp_path, monkeypatch, alphas):
    """A second round that is worse by the calibration objective is not what is saved."""
    values = {}

    def objective(cache, z, exit_layers, alpha):
        values[len(values)] = value = -1.0 - len(values)
        return value

    monkeypatch.setattr(figures, "objective", objective)
    stored, original = {}, run_module.write_folder

    def keep(folder, write):
        original(folder, write)
        stored[Path(folder).name] = load_file(Path(folder) / "weights.safetensors")

    monkeypatch.setattr(run_module, "write_folder", keep)
    select = dict(alphas=alphas, thresholds=[0.5])
    record = train(options, tmp_path / "ck", select=select, task=dict(learning_rate=5e-3))
    assert list(record["phases"])[:5] == ["init", "round1.policy", "round1.task", "round2.policy", "round2.task"]
    assert record["result"]["best_phase"] == "round1.task"
    saved = load_file(tmp_path / "ck" / WEIGHTS)
    name = "encoder.layer.0.output.dense.weight"
    assert not torch.equal(stored["round1.task"]["backbone." + name], stored["round2.task"]["backbone." + name])
    assert torch.equal(saved[name], stored["round1.task"]["backbone." + name])
    if not alphas:
        exits = load_file(tmp_path / "ck" / EXITS)
        assert all(torch.equal(exits[n], stored["round1.task"]["exits." + n]) for n in exits)
        assert record["result"]["threshold"] == 0.5


def test_rounds_stop_when_nothing_improves(options, tmp_path, monkeypatch):
    script = iter([-9, -9, -2.0, -9, -1.5, -9, -1.499, -9])  # init, then policy and task of each round
    monkeypatch.setattr(figures, "objective", lambda *args: next(script))
    record = train(options, tmp_path / "ck", max_rounds=5, tolerance=0.01, select=dict(alphas=[]))
    assert [n for n in record["phases"] if n.endswith("task")] == ["round1.task", "round2.task", "round3.task"]
    assert record["result"]["best_phase"] == "round3.task"


def test_selection_reads_the_calibration_part_only(options, tmp_path, whole):
    """dev and test are reported on: other labels there change neither weights nor threshold."""
    data = tmp_path / "data"
    shutil.copytree(options["data"], data)
    for split in ("dev", "test"):
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        for row in rows:
            row["label"] = LABELS[(LABELS.index(row["label"]) + 1) % 3]
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    record = train(options, tmp_path / "ck", data=str(data))
    expected, got = tensors_of(whole[0]), tensors_of(tmp_path / "ck")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert record["phases"] == whole[1]["phases"]
    assert record["result"]["threshold"] == whole[1]["result"]["threshold"]
    assert record["result"]["test"]["accuracy"] < 0.5


def test_leaked_rows_are_dropped(options, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(options["data"], data)
    with open(data / "train.jsonl", "a") as file:
        file.write((data / "test.jsonl").read_text())
    dropped = Trainer(configure(options, tmp_path / "ck", data=str(data))).sizes
    kept = Trainer(configure(options, tmp_path / "ck", data=str(data), drop_leaked=False)).sizes
    assert dropped["dropped_also_in_dev_or_test"] >= 40 and kept["dropped_also_in_dev_or_test"] == 0
    assert kept["train"] + kept["calibration"] + kept["dropped_also_in_calibration"] == 200


# -- what bad input gets -----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_number(options, tmp_path):
    with pytest.raises(ValueError, match="init.*NaN.*learning_rate"):
        train(options, tmp_path / "ck", init=dict(learning_rate=1e25))
    assert not (tmp_path / "ck").exists()
    record = tmp_path / "ck.run" / "record.json"
    assert not record.exists() or json.loads(record.read_text())["phases"] == {}
    with pytest.raises(ValueError, match="task.*NaN.*learning_rate"):
        train(options, tmp_path / "ck2", task=dict(learning_rate=1e25))
    assert not (tmp_path / "ck2").exists()


def test_weights_that_end_in_nan(options, tmp_path, monkeypatch):
    """The last step of an epoch may break what its own loss does not show: the phase must not be stored."""
    original, count = torch.optim.AdamW.step, [0]

    def stub(self, *args, **kwargs):
        original(self, *args, **kwargs)
        count[0] += 1
        if count[0] == 32:  # the last of init's: 128 rows, 4 epochs, 16 a batch
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(math.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", stub)
    run = Trainer(configure(options, tmp_path / "ck"))
    count[0] = 32 - 4 * math.ceil(run.sizes["train"] / 16)
    with pytest.raises(ValueError, match="(?i)nan|finite"):
        run.run()
    assert not (tmp_path / "ck").exists()
    record = tmp_path / "ck.run" / "record.json"
    assert not record.exists() or json.loads(record.read_text())["phases"] == {}


@pytest.mark.parametrize(
    "file, line, number, fragments",
    [
        ("train.jsonl", '{"text": "how", "label": "nonsense"}', 3, ["nonsense"]),
        ("train.jsonl", '{"text": "how", "label": 7}', 5, ["7", "0..2"]),
        ("train.jsonl", '{"text": "how"', 2, ["JSON"]),
        ("dev.jsonl", '{"text": 5, "label": 1}', 4, ["text", "int"]),
        ("test.jsonl", '{"label": 1}', 1, ["text", "missing"]),
        ("test.jsonl", "[1, 2]", 40, ["object"]),
    ],
)
def test_errors_in_data_name_file_and_line(options, tmp_path, file, line, number, fragments):
    data = tmp_path / "data"
    shutil.copytree(options["data"], data)
    lines = (data / file).read_text().splitlines()
    lines[number - 1] = line
    (data / file).write_text("\n".join(lines))
    with pytest.raises(ValueError) as caught:
        train(options, tmp_path / "ck", data=str(data))
    for fragment in [f"{data / file}:{number}", *fragments]:
        assert fragment in str(caught.value), f"{fragment!r} is not in: {caught.value}"
    assert not (tmp_path / "ck.run").exists() and not (tmp_path / "ck").exists()


@pytest.mark.parametrize(
    "changes, fragments",
    [
        (dict(data="/no/such/folder"), ["/no/such/folder"]),
        (dict(backbone="/no/such/backbone"), ["/no/such/backbone"]),
        (dict(exit_layers=[1, 2]), ["last exit", "3", "[1, 2]"]),
        (dict(exit_layers=[0, 3]), ["exit_layers", "[0, 3]"]),
        (dict(exit_layers=[3, 1]), ["exit_layers", "[3, 1]"]),
        (dict(exit_layers=[]), ["exit_layers", "[]"]),
        (dict(pooler="mean"), ["pooler", "mean"]),
        (dict(policy_hidden_size=0), ["policy_hidden_size", "0"]),
        (dict(classifier_dropout=1.5), ["classifier_dropout", "1.5"]),
        (dict(calibration_share=1.0), ["share", "1.0"]),
        (dict(max_length=61), ["max_length", "61", "60"]),
        (dict(calibration_share=0.001), ["calibration"]),
        (dict(device="gpu"), ["device", "gpu"]),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_bad_options_are_found_before_training(options, tmp_path, changes, fragments, monkeypatch):
    monkeypatch.setattr(phases, "train_init", lambda *args: pytest.fail("work was done before the check"))
    with pytest.raises((ValueError, OSError)) as caught:
        train(options, tmp_path / "ck", **changes)
    for fragment in fragments:
        assert fragment in str(caught.value), f"{fragment!r} is not in: {caught.value}"
    assert list(tmp_path.iterdir()) == []


def test_a_backbone_without_tokenizer(options, tmp_path):
    backbone = save_backbone(tmp_path / "backbone")
    (backbone / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer"):
        train(options, tmp_path / "ck", backbone=str(backbone))


def test_an_output_that_cannot_be_written(options, tmp_path, monkeypatch):
    """Found before an hour of training, not after it."""
    (tmp_path / "ck").write_text("a file of mine")
    monkeypatch.setattr(phases, "train_init", lambda *args: pytest.fail("work was done before the check"))
    with pytest.raises((ValueError, OSError), match="ck"):
        train(options, tmp_path / "ck")
    assert (tmp_path / "ck").read_text() == "a file of mine"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("a file of mine")
    with pytest.raises(ValueError, match="thesis is there and is no checkpoint"):
        train(options, tmp_path / "thesis")
    (tmp_path / "out.run").write_text("a file of mine")
    with pytest.raises((ValueError, OSError), match="out.run"):
        train(options, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ck", "out.run", "thesis"]
