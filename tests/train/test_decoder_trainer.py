"""A decoder's training run: from instructions to a checkpoint that generates; killed anywhere, it ends the same."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import engine
from engine.backbones import GENERATION, eos_ids
from engine.facts import TRAINING
from engine.train import run as run_module
from engine.train.card import train_command
from engine.train.config import override
from engine.train.decoder_config import DecoderTrainConfig
from engine.train.decoder_trainer import DecoderTrainer
from engine.train.instructions import Instruction
from tests.decoding.tiny import byte_tokenizer, tiny_decoder
from tests.test_cli import call, refused


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone") / "lm"
    model, tokenizer = tiny_decoder(vocab=258, positions=300, seed=5).language_model, byte_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    sizes = {"train": range(24), "dev": range(100, 104), "test": range(200, 204)}
    for split, numbers in sizes.items():
        rows = [{"instruction": f"n {k}", "input": "", "output": "abc"[: 1 + k % 3] * 4} for k in numbers]
        if split == "train":
            rows.append({"instruction": "n 100", "input": "", "output": "leaked"})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def options(backbone, data):
    step = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-2}
    return {
        "backbone": str(backbone), "data": str(data), "exit_layers": [1, 3, 5], "head_rank": 2, "lora_rank": 2,
        "max_length": 250, "alpha": 0.1, "device": "cpu", "answers_only": True,
        "sft": step, "heads": step, "policy": step, "sampled": {**step, "num_samples": 2}, "task": step,
    }  # fmt: skip


def train(options, output):
    return DecoderTrainer(DecoderTrainConfig.from_dict({**options, "output": str(output)})).run()


@pytest.fixture(scope="module")
def whole(backbone, data, tmp_path_factory):
    """One run that nobody disturbed: (folder, record)."""
    torch.set_num_threads(1)  # sums of two threads differ in their last bits, and this is made ahead of ``one_thread``
    step = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-2}
    output = tmp_path_factory.mktemp("whole") / "ck"
    return output, train(
        {"backbone": str(backbone), "data": str(data), "exit_layers": [1, 3, 5], "head_rank": 2, "lora_rank": 2,
         "max_length": 250, "alpha": 0.1, "device": "cpu", "answers_only": True, "sft": step, "heads": step,
         "policy": step, "sampled": {**step, "num_samples": 2}, "task": step},
        output,
    )  # fmt: skip


def test_what_a_run_leaves(whole):
    output, record = whole
    assert list(record["phases"]) == ["sft", "fit", "heads", "policy", "sampled", "task"]
    assert record["sizes"] == {
        "train": 22, "calibration": 2, "dev": 4, "test": 4, "dropped_also_in_dev_or_test": 1,
    }  # fmt: skip
    for split in ("calibration", "dev", "test"):
        points = record["result"][split]["points"]
        assert set(points) == {"0.3", "0.5", "0.7", "0.9"}
        depths = [points[t]["mean_depth"] for t in ("0.3", "0.5", "0.7", "0.9")]
        assert depths == sorted(depths) and 1 <= depths[0] <= depths[-1] <= 5
    lm = engine.load(output, device="cpu")
    assert lm.config.exit_layers == (1, 3, 5) and lm.config.head_rank == 2
    assert len(lm.run(["hello"], max_new_tokens=5, ignore_eos=True).token_ids[0]) == 5
    assert lm.tokenizer.eos_token_id in eos_ids(lm.model.language_model)
    row = Instruction("n 100", "context", "")
    chat = [{"role": "user", "content": row.message}]
    assert lm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == row.prompt
    training = json.loads((output / TRAINING).read_text())
    assert training["result"] == record["result"] and "phases" not in training
    card = (output / "README.md").read_text()
    assert "| test | 0.5 |" in card and "22 instructions for training" in card
    command = train_command(record["config"], DecoderTrainConfig)
    assert command in card
    words = shlex.split(command.replace("\\\n", " "))
    sets = [word for word, before in zip(words, ["", *words], strict=False) if before == "--set"]
    given = {"backbone": words[4], "data": words[2], "output": words[6]}
    assert DecoderTrainConfig.from_dict(override(given, sets)).to_dict() == record["config"]
    assert not (output / "model.safetensors").exists() and (output / "adapter_model.safetensors").exists()
    told = call("info", output).stdout
    assert "llama, 5 layers" in told and f"{record['result']['test']['points']['0.5']['ce']:.4f}" in told


def test_with_calms_classifier(options, tmp_path):
    few = {name: {**options[name], "epochs": 0} for name in ("sft", "sampled", "task")}
    step = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-2}
    record = train({**options, **few, "early_exit_classifier": step}, tmp_path / "ck")
    assert list(record["phases"])[-1] == "early_exit_classifier"
    lm = engine.load(tmp_path / "ck")
    out = lm.run(["ab"], max_new_tokens=5, criterion="classifier", threshold=0.0, ignore_eos=True)
    assert out.exit_layers[0][1:] == [1] * 4
    bare = train({**options, **few, "policy": few["task"]}, tmp_path / "bare")
    assert "early_exit_classifier" not in bare["phases"]


@pytest.mark.parametrize("phase", ["sft", "heads", "policy", "early_exit_classifier"])
def test_bfloat16_trains_as_float32_does(options, tmp_path, phase):
    """Every step sees the weights of the step before, not autocast's first copy of them."""
    few = {name: {**options["sft"], "epochs": 0} for name in ("sft", "heads", "policy", "sampled", "task")}
    few[phase] = {"epochs": 6, "batch_size": 8, "learning_rate": 1e-2}
    losses = {}
    for precision in ("float32", "bfloat16"):
        record = train({**options, **few, "precision": precision}, tmp_path / precision)
        losses[precision] = record["phases"][phase]["epoch_loss"]
    fell = losses["float32"][0] - losses["float32"][-1]
    assert fell > 0
    assert losses["bfloat16"][0] - losses["bfloat16"][-1] == pytest.approx(fell, rel=0.25)


def test_the_loss_falls(options, tmp_path):
    options = {**options, "sft": {**options["sft"], "epochs": 4}, "heads": {**options["heads"], "epochs": 4}}
    phases = train(options, tmp_path / "ck")["phases"]
    for name in ("sft", "heads"):
        losses = phases[name]["epoch_loss"]
        assert losses[-1] < losses[0]


def same(folder, other):
    for name in ("adapter_model.safetensors", "exits.safetensors"):
        a, b = load_file(Path(folder) / name), load_file(Path(other) / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name


@pytest.mark.parametrize("phase", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("where", ["before the weights", "before the figures"])
def test_killed_and_resumed(options, whole, tmp_path, monkeypatch, phase, where):
    count, original = [0], run_module.write_folder

    def stub(folder, write):
        count[0] += 1
        if count[0] == phase and where == "before the weights":
            raise Killed
        original(folder, write)
        if count[0] == phase:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_folder", stub)
        with pytest.raises(Killed):
            train(options, tmp_path / "ck")
    assert not (tmp_path / "ck").exists()
    record = train(options, tmp_path / "ck")
    same(tmp_path / "ck", whole[0])
    assert record["result"] == whole[1]["result"]


def test_steps_of_no_epochs_are_left_out(options, tmp_path):
    none = {"epochs": 0}
    record = train({**options, "lora_rank": 0, "sampled": none, "task": none}, tmp_path / "ck")
    assert list(record["phases"]) == ["fit", "heads", "policy"]
    assert (tmp_path / "ck" / "model.safetensors").exists()
    record = train({**options, "head": "shared", "exit_layers": [5], "lora_rank": 0}, tmp_path / "one")
    assert list(record["phases"]) == []
    alone = {"epochs": 1, "batch_size": 8, "adapter": True}  # of a shared head an exit has nothing to train
    record = train({**options, "head": "shared", "heads": none, "sampled": none, "task": alone}, tmp_path / "adapter")
    assert list(record["phases"])[-1] == "task"


def test_another_run_is_not_overwritten(options, whole):
    with pytest.raises(ValueError, match=r"holds a run with other options \(alpha\)"):
        train({**options, "alpha": 0.2}, whole[0])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(alpha=-1), "alpha must be a number 0 or more, got -1"),
        (dict(head="big"), "head must be one of shared, lora, own, got 'big'"),
        (dict(threshold=2), r"threshold must be a number in \[0, 1\], got 2"),
        (dict(policy={"context": "sampled"}), "policy.context must be 'full' and sampled.context 'sampled'"),
        (dict(polcy={}), r"train has unknown options \['polcy'\]"),
        (dict(calibration_share=1), r"calibration_share must lie in \(0, 1\), got 1"),
        (dict(precision="int8"), "precision must be one of float32, bfloat16, got 'int8'"),
        (dict(max_length=100), "no row is left: every prompt has 100 tokens or more"),
        (dict(lora_rank=0, task={"epochs": 1, "adapter": True}), "task.adapter trains the backbone's adapter, and"),
        (dict(lora_rank=0, heads={"adapter": True}), "heads.adapter trains the backbone's adapter, and lora_rank is 0"),
        (dict(exit_layers=[1, 9]), r"the last exit must stand at the last layer \(5\)"),
        (dict(data="nowhere"), "nowhere is not a folder"),
    ],
)
def test_what_is_wrong(options, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        DecoderTrainer(DecoderTrainConfig.from_dict({**options, "output": str(tmp_path / "ck"), **change}))
    assert list(tmp_path.iterdir()) == []


def test_answers_must_end_where_generation_does(options, backbone, tmp_path):
    folder = Path(shutil.copytree(backbone, tmp_path / "lm"))
    (folder / GENERATION).write_text('{"eos_token_id": [7, 2]}')
    message = r"the tokenizer's EOS token, id 1 \('</s>'\), but generation stops at the ids \[2, 7\]: make eos_token in"
    with pytest.raises(ValueError, match=message):
        DecoderTrainer(DecoderTrainConfig.from_dict({**options, "backbone": str(folder), "output": "ck"}))


def test_from_the_command_line(options, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({k: v for k, v in options.items() if k not in ("backbone", "data")}))
    output = tmp_path / "ck"
    out = call(
        "train", options["data"], "--backbone", options["backbone"], "--output", output, "--recipe", recipe,
        "--set", "sampled.epochs=0", "--set", "task.epochs=0",
    ).stdout  # fmt: skip
    assert "CE, with exits" in out and "test" in out
    assert engine.load(output, device="cpu").run(["a"], max_new_tokens=2).stats.rows == 1
    assert "alpha must be a number" in refused(
        "train", options["data"], "--backbone", options["backbone"], "--output", output, "--set", "alpha=-1"
    )
