"""Decoder checkpoints: what is written is what is read, whole or as adapter; what is wrong is named."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import engine
from engine.backbones import BackboneReference, file_sha256
from engine.loading import attach_exits, load_model, save_checkpoint
from tests.decoding.tiny import LAYERS, byte_tokenizer, tiny_decoder

PROMPTS = ["why is", "the sky"]


@pytest.fixture
def checkpoint(tmp_path):
    model = tiny_decoder(vocab=258, seed=2)
    return save_checkpoint(model, tmp_path / "lm", byte_tokenizer()), model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["shared", "lora hidden", "lora logits", "own"])
def test_round_trip(tmp_path, head, tied):
    head, _, side = head.partition(" ")
    model = tiny_decoder((2, 4, 5), head, tied=tied, vocab=258, head_side=side or "hidden")
    model.language_model.generation_config.eos_token_id = [7, 9]
    folder = save_checkpoint(model, tmp_path / "lm", byte_tokenizer())
    want = engine.from_module(model, byte_tokenizer()).run(PROMPTS, max_new_tokens=12, ignore_eos=True)
    before = torch.get_rng_state()
    lm = engine.load(folder, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    got = lm.run(PROMPTS, max_new_tokens=12, ignore_eos=True)
    assert (got.token_ids, got.exit_layers, got.texts) == (want.token_ids, want.exit_layers, want.texts)
    assert lm.config == model.config and lm._reader.eos_ids == {7, 9}
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) == (not tied)
    again = save_checkpoint(lm.model, tmp_path / "again", lm.tokenizer)
    for name in ("model.safetensors", "exits.safetensors", "generation_config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert _config(again) == _config(folder)


def _config(folder):
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")  # that of a model made in memory is not said
    return config


def test_an_adapter_and_a_reference(tmp_path, checkpoint):
    """The backbone's folder is referred to by hash; the checkpoint holds the adapter and the exits."""
    folder, _ = checkpoint
    reference = BackboneReference(str(folder), file_sha256(folder / "model.safetensors"))
    model, tokenizer, found = attach_exits(reference, {"exit_layers": (1, 3, 5), "head_rank": 2, "max_length": 100})
    assert found.sha256 == reference.sha256 and model.config.max_length == 100
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model.causal_lm = get_peft_model(model.causal_lm, lora)
    small = save_checkpoint(model.eval(), tmp_path / "small", tokenizer, backbone=reference)
    assert not (small / "model.safetensors").exists()
    want = engine.from_module(model, tokenizer).run(PROMPTS, max_new_tokens=10)
    assert engine.load(small, device="cpu").run(PROMPTS, max_new_tokens=10).token_ids == want.token_ids
    unmerged, _ = load_model(small, merge=False)
    assert engine.from_module(unmerged, tokenizer).run(PROMPTS, max_new_tokens=10).token_ids == want.token_ids
    with pytest.raises(ValueError, match="the backbone carries an adapter: name the weights"):
        save_checkpoint(model, tmp_path / "other")


def test_dtypes(checkpoint):
    folder, _ = checkpoint
    for name, dtype in (("float64", torch.float64), ("bfloat16", torch.bfloat16)):
        lm = engine.load(folder, device="cpu", dtype=name)
        assert lm.model.dtype == dtype and len(lm.run(PROMPTS, max_new_tokens=4).token_ids) == 2


def edit(folder, change):
    data = json.loads((folder / "config.json").read_text())
    change(data)
    (folder / "config.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["early_exit"].update(head="big"), "config.json: head must be one of shared, lora, own, got 'big'"),
        (lambda d: d["early_exit"].update(labels=["a"]), r"config.json: early_exit has unknown keys \['labels'\]"),
        (lambda d: d["early_exit"].pop("exit_layers"), r"config.json: early_exit lacks the keys \['exit_layers'\]"),
        (lambda d: d["early_exit"].update(exit_layers=[1, 4]), r"the last exit must stand at the last layer \(5\)"),
        (lambda d: d["early_exit"].update(head_rank=0), "head_rank must be a positive integer, got 0"),
        (lambda d: d["early_exit"].update(max_length=999), "max_length is 999, the backbone's positions end at 128"),
        (lambda d: d["early_exit"].update(num_layers=4, exit_layers=[4]), "num_layers is 4, the backbone has 5"),
        (lambda d: d.update(model_type="gpt2"), "model_type 'gpt2' is not supported: allowed are .*llama"),
        (
            lambda d: d.update(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "RoPE scaling 'dynamic' changes with the length",
        ),
    ],
)
def test_configs_that_are_wrong(checkpoint, change, message):
    folder, _ = checkpoint
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        engine.load(folder)


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("model", lambda t: t.pop("model.norm.weight"), "model.safetensors lacks the tensor model.norm.weight"),
        ("model", lambda t: t.update(more=torch.zeros(1)), "has tensors that the model does not: more"),
        ("exits", lambda t: t.pop("policies.0.out.bias"), "exits.safetensors lacks the tensor policies.0.out.bias"),
        (
            "exits",
            lambda t: t["policies.0.out.bias"].fill_(float("nan")),
            "tensor policies.0.out.bias holds NaN or infinite values",
        ),
        (
            "model",
            lambda t: t.update({"model.norm.weight": torch.zeros(3)}),
            r"tensor model.norm.weight has shape \[3\], the model needs \[32\]",
        ),
    ],
)
def test_tensors_that_are_wrong(checkpoint, file, change, message):
    folder, _ = checkpoint
    path = folder / f"{file}.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        engine.load(folder)


def test_warmup(checkpoint):
    """Programs of a capacity, with and without exits, are there before anybody asks; nothing elsewhere."""
    lm = engine.load(checkpoint[0], executor="graph", device="cpu", warmup=[(3, 10), (1, 5)])
    assert set(lm._decoder._programs) == {(4, "policy"), (4, None), (1, "policy"), (1, None)}
    engine.load(checkpoint[0], executor="packed", warmup=[(1, 10)])
    for wrong in ((0, 5), (3, 2), (1, 1000)):
        with pytest.raises(ValueError, match=f"{wrong[0]} prompts have .* got {wrong[1]}"):
            engine.load(checkpoint[0], warmup=[wrong])


def test_unknown_executor(checkpoint):
    with pytest.raises(ValueError, match="executor must be one of auto, packed, reference, graph, got 'x'"):
        engine.load(checkpoint[0], executor="x")


def test_exits_at_every_layer_by_default(checkpoint):
    model, _, _ = attach_exits(BackboneReference(str(checkpoint[0])), {})
    assert model.config.exit_layers == tuple(range(1, LAYERS + 1)) and model.config.max_length == 128
    assert all(float(p.b.weight.detach().abs().max()) == 0 for p in model.exits.deltas), "a fresh exit has its own head"
