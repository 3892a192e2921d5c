"""Checkpoint folders: what is written comes back, what is damaged is named, and nothing is ever half-written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import engine
from engine import loading
from engine.backbones import BackboneReference, file_sha256
from engine.loading import attach_exits, load_backbone, load_model, save_checkpoint, write_file, write_folder
from tests.tiny import (
    FAMILIES,
    LABELS,
    MAX_LENGTH,
    POOLERS,
    assert_same,
    padded,
    random_rows,
    random_texts,
    save_backbone,
    tiny_backbone,
    tiny_model,
    tiny_tokenizer,
    widen_policies,
)

WEIGHTS, EXITS, CONFIG = "model.safetensors", "exits.safetensors", "config.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
BATCH = padded(random_rows(30, seed=1))


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "damaged"))


def edit_config(folder: Path, name: str = CONFIG, **changes) -> None:
    """Set keys of the early_exit section; a key with __ reaches into a group; None removes."""
    data = json.loads((folder / name).read_text())
    for key, value in changes.items():
        target = data
        *groups, last = key.split("__")
        for group in groups:
            target = target[group]
        if value is None:
            del target[last]
        else:
            target[last] = value
    (folder / name).write_text(json.dumps(data))


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def lora_model(
    folder: Path, adapter_name: str = "default", **options
) -> tuple[engine.MultiExitEncoder, BackboneReference]:
    """A model with a random adapter on the folder's backbone, and the reference that its checkpoint needs."""
    model, _, reference = attach_exits(BackboneReference(str(folder)), dict(labels=LABELS, pooler="shared"))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = LoraConfig(r=3, target_modules=["query", "value", "dense"], init_lora_weights=False, **options)
        model.backbone = get_peft_model(model.backbone, config, adapter_name=adapter_name)
        for linear in model.exits.classifiers:
            torch.nn.init.normal_(linear.weight)
    return widen_policies(model.eval()), reference


@pytest.fixture
def adapter_checkpoint(backbone_folder, tmp_path):
    model, reference = lora_model(backbone_folder)
    return save_checkpoint(model, tmp_path / "adapter", tiny_tokenizer(), reference)


# -- round trips -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exits", [None, (2, 4)], ids=["all exits", "exits 2 and 4"])
@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(family, pooler, exits, tmp_path):
    model = tiny_model(family, pooler, exits, threshold=0.6, policy_hidden_size=7)
    tokenizer = tiny_tokenizer(family)
    texts = random_texts(20, seed=2)
    want = engine.from_module(model, tokenizer).run(texts)
    folder = save_checkpoint(model, tmp_path / "ck", tokenizer)
    loaded = engine.load(folder)
    assert loaded.config == model.config
    assert not loaded.model.training
    assert_same(loaded.run(texts), want, atol=0)
    ours, theirs = model.state_dict(), loaded.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = save_checkpoint(loaded.model, tmp_path / "again", loaded.tokenizer)
    assert {n: h for n, h in fingerprint(again).items() if n.endswith(".safetensors")} == {
        n: h for n, h in fingerprint(folder).items() if n.endswith(".safetensors")
    }
    assert load_model(again)[0].config == model.config


def test_layout_of_a_checkpoint(checkpoint, tmp_path):
    names = {p.name for p in checkpoint.iterdir()}
    assert {CONFIG, WEIGHTS, EXITS, "tokenizer.json"} <= names
    data = json.loads((checkpoint / CONFIG).read_text())
    assert data["model_type"] == "bert" and data["early_exit"]["exit_layers"] == [1, 2, 3, 4]
    assert not any(p.suffix in (".bin", ".pt", ".pkl") for p in checkpoint.iterdir())
    assert all(p.stat().st_mode & 0o777 == 0o644 for p in checkpoint.iterdir())
    assert checkpoint.stat().st_mode & 0o777 == 0o755
    card = save_checkpoint(tiny_model(), tmp_path / "ck", card="# A card\n")
    assert (card / "README.md").read_text() == "# A card\n"


def test_loaded_from_a_string_or_path_and_a_home(checkpoint, monkeypatch, tmp_path):
    want = engine.load(checkpoint).run(BATCH)
    assert_same(engine.load(str(checkpoint)).run(BATCH), want, atol=0)
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert_same(engine.load(f"~/{checkpoint.name}").run(BATCH), want, atol=0)
    monkeypatch.chdir(checkpoint.parent)
    assert_same(engine.load(checkpoint.name).run(BATCH), want, atol=0)


@pytest.mark.parametrize("dtype", ["float64", torch.float64, "bfloat16", torch.float16])
def test_load_in_another_dtype(checkpoint, dtype):
    loaded = engine.load(checkpoint, dtype=dtype)
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert {p.dtype for p in loaded.model.parameters()} == {wanted}
    want = engine.load(checkpoint).run(BATCH, min_depth=4)
    close = dict(rtol=1e-5, atol=3e-5) if wanted == torch.float64 else dict(rtol=0.1, atol=0.3)
    torch.testing.assert_close(loaded.run(BATCH, min_depth=4).logits, want.logits, **close)


def test_load_with_an_executor(checkpoint):
    assert engine.load(checkpoint, executor="reference").executor.name == "reference"
    assert engine.load(checkpoint).executor.name == "packed"


def test_half_precision_files_load_as_fp32(tmp_path):
    model = tiny_model()
    folder = save_checkpoint(model.half(), tmp_path / "ck")
    loaded = engine.load(folder)
    assert loaded.model.dtype == torch.float32
    assert all(torch.equal(a.half(), b) for a, b in zip(loaded.model.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_import_then_export_gives_the_original_tensors(family, tmp_path):
    """The backbone's tensors come out under their names, unchanged; its pooler has become the exits'."""
    original = load_file(save_backbone(tmp_path / "backbone", family) / WEIGHTS)
    model, tokenizer, reference = attach_exits(
        BackboneReference(str(tmp_path / "backbone")), dict(labels=LABELS, pooler="per_layer")
    )
    assert reference.sha256 == file_sha256(tmp_path / "backbone" / WEIGHTS)
    assert model.config.exit_layers == (1, 2, 3) and model.config.max_length == MAX_LENGTH
    assert tokenizer("how to")["input_ids"] == tiny_tokenizer(family)("how to")["input_ids"]
    exported = load_file(save_checkpoint(model, tmp_path / "ck", tokenizer) / WEIGHTS)
    pooler = {name: original.pop(name) for name in list(original) if name.startswith("pooler.")}
    assert len(pooler) == 2
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)
    exits = load_file(tmp_path / "ck" / EXITS)
    assert all(torch.equal(exits[f"poolers.{k}.weight"], pooler["pooler.dense.weight"]) for k in range(3))
    assert all(torch.equal(exits[f"poolers.{k}.bias"], pooler["pooler.dense.bias"]) for k in range(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_backbones_with_heads_of_other_tasks(family, tmp_path):
    """Files of masked language models have a prefix, a head and no pooler; older ones carry index buffers."""
    folder = save_backbone(tmp_path / "plain", family, pooler=False)
    plain = load_file(folder / WEIGHTS)
    head = {"bert": "cls.predictions.bias", "roberta": "lm_head.bias", "mpnet": "lm_head.bias"}[family]
    dressed = {f"{family}.{name}": value for name, value in plain.items()}
    dressed |= {head: torch.zeros(3), f"{family}.embeddings.position_ids": torch.arange(9)[None]}
    save_file(dressed, folder / WEIGHTS)
    loaded = load_backbone(folder)
    assert all(torch.equal(value, plain[name]) for name, value in loaded.state_dict().items())
    assert loaded.state_dict().keys() == plain.keys()
    want = tiny_backbone(family, layers=3)
    batch = padded(random_rows(4, seed=3), pad_id=want.config.pad_token_id)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).last_hidden_state, want(**batch).last_hidden_state)


def test_loading_draws_no_random_number(checkpoint):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = engine.load(checkpoint)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    assert_same(engine.load(checkpoint).run(BATCH), first.run(BATCH), atol=0)


# -- adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, dict(use_rslora=True, lora_alpha=5), dict(layers_to_transform=[0, 2])], ids=str
)
def test_adapter_round_trip(backbone_folder, tmp_path, options):
    """Backbone by reference and hash, adapter and exits: the loaded model says what the trained one said."""
    model, reference = lora_model(backbone_folder, **options)
    want = engine.from_module(model, executor="reference").run(BATCH)
    folder = save_checkpoint(model, tmp_path / "ck", tiny_tokenizer(), reference)
    names = {p.name for p in folder.iterdir()}
    assert {CONFIG, EXITS, ADAPTER, ADAPTER_CONFIG} <= names and WEIGHTS not in names
    backbone = json.loads((folder / CONFIG).read_text())["early_exit"]["backbone"]
    assert backbone == {"source": str(backbone_folder), "sha256": file_sha256(backbone_folder / WEIGHTS)}
    bare, _ = lora_model(backbone_folder, **options)
    with bare.backbone.disable_adapter():
        without = engine.from_module(bare, executor="reference").run(BATCH)
    for executor in ("packed", "reference"):
        got = engine.load(folder, executor=executor).run(BATCH)
        assert got.exit_layers.tolist() == want.exit_layers.tolist()
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    assert float((want.logits - without.logits).abs().max()) > 0.1
    assert not any("lora" in name for name, _ in engine.load(folder).model.named_parameters()), "not merged"
    unmerged, _ = load_model(folder, merge=False)
    assert_same(engine.from_module(unmerged, executor="reference").run(BATCH), want, atol=0)
    assert any(p.requires_grad for name, p in unmerged.named_parameters() if "lora_" in name), "cannot be trained on"
    again = save_checkpoint(unmerged, tmp_path / "again", backbone=reference)
    assert fingerprint(again)[ADAPTER] == fingerprint(folder)[ADAPTER]


def test_an_adapter_of_another_name(backbone_folder, tmp_path):
    model, reference = lora_model(backbone_folder, adapter_name="stackoverflow")
    want = engine.from_module(model, executor="reference").run(BATCH)
    folder = save_checkpoint(model, tmp_path / "ck", backbone=reference)
    torch.testing.assert_close(engine.load(folder).run(BATCH).logits, want.logits, rtol=1e-4, atol=1e-4)


def test_a_merged_adapter_is_saved_as_what_it_is(backbone_folder, tmp_path):
    """merge_adapter folds into the weights but keeps the adapter: reference + adapter is still the same model."""
    model, reference = lora_model(backbone_folder)
    want = engine.from_module(model, executor="reference").run(BATCH)
    model.backbone.merge_adapter()
    folder = save_checkpoint(model, tmp_path / "ck", backbone=reference)
    torch.testing.assert_close(engine.load(folder).run(BATCH).logits, want.logits, rtol=1e-4, atol=1e-4)


def test_what_save_wants_to_know(backbone_folder, tmp_path):
    model, reference = lora_model(backbone_folder)
    for missing in (None, BackboneReference(str(backbone_folder))):
        with pytest.raises(ValueError, match="adapter.*backbone=.*sha256"):
            save_checkpoint(model, tmp_path / "ck", backbone=missing)
    with pytest.raises(ValueError, match="reference is for models with an adapter"):
        save_checkpoint(tiny_model(), tmp_path / "ck", backbone=reference)
    assert list(tmp_path.iterdir()) == []


def test_another_backbone_than_the_adapter_was_trained_on(adapter_checkpoint, backbone_folder, tmp_path):
    other = save_backbone(tmp_path / "other", seed=9)
    edit_config(adapter_checkpoint, early_exit__backbone__source=str(other))
    with pytest.raises(ValueError) as caught:
        engine.load(adapter_checkpoint)
    for part in (str(other), file_sha256(other / WEIGHTS), file_sha256(backbone_folder / WEIGHTS)):
        assert part in str(caught.value)
    edit_config(adapter_checkpoint, early_exit__backbone__source=str(tmp_path / "nowhere"))
    with pytest.raises(OSError, match="nowhere does not exist"):
        engine.load(adapter_checkpoint)
    (tmp_path / "empty").mkdir()
    edit_config(adapter_checkpoint, early_exit__backbone__source=str(tmp_path / "empty"))
    with pytest.raises((ValueError, OSError), match="empty.*model.safetensors"):
        engine.load(adapter_checkpoint)


@pytest.mark.parametrize("gone", [(ADAPTER,), (ADAPTER_CONFIG,), (ADAPTER, ADAPTER_CONFIG)], ids=" and ".join)
def test_a_missing_adapter_file_is_an_error(adapter_checkpoint, gone):
    """Never the bare backbone under the adapter's exits: those answers would be wrong, and nobody would know."""
    for name in gone:
        (adapter_checkpoint / name).unlink()
    with pytest.raises((ValueError, OSError), match="adapter"):
        engine.load(adapter_checkpoint)


@pytest.mark.parametrize(
    "keys",
    [
        {"source": "x"}, {"sha256": "x"}, {"source": "x", "sha256": "y", "sha": "z"}, {"source": "x", "sha256": None},
        "x", ["x"],
    ],
    ids=str,
)  # fmt: skip
def test_a_malformed_reference(adapter_checkpoint, keys):
    edit_config(adapter_checkpoint, early_exit__backbone=keys)
    with pytest.raises(ValueError, match="early_exit.backbone must have source and sha256"):
        engine.load(adapter_checkpoint)


def test_damaged_adapters(adapter_checkpoint):
    path = adapter_checkpoint / ADAPTER
    good = path.read_bytes()
    name = sorted(load_file(path))[0]
    for change, fragments in (
        (lambda t: t.pop(name), ["lacks", name]),
        (lambda t: t.update(stray=torch.zeros(2)), ["stray", "does not"]),
        (lambda t: t.update({name: t[name][:-1].clone()}), [name, "shape"]),
        (lambda t: t[name].view(-1)[0].fill_(float("nan")), [name, "NaN"]),
    ):
        edit_tensors(path, change)
        with pytest.raises(ValueError) as caught:
            engine.load(adapter_checkpoint)
        assert all(f in str(caught.value) for f in [ADAPTER, *fragments]), caught.value
        path.write_bytes(good)
    for text in ("{", "[]", '{"peft_type": "LORA", "r": "many"}', '{"r": 3}'):
        (adapter_checkpoint / ADAPTER_CONFIG).write_text(text)
        with pytest.raises(ValueError, match=ADAPTER_CONFIG):
            engine.load(adapter_checkpoint)


def test_adapter_keys_of_another_peft(adapter_checkpoint):
    """Off, a key that this peft lacks means nothing; on, it means another adapter than the one we would run."""
    path = adapter_checkpoint / ADAPTER_CONFIG
    options = json.loads(path.read_text())
    path.write_text(json.dumps({**options, "use_new_trick": False, "new_list": None}))
    engine.load(adapter_checkpoint)
    path.write_text(json.dumps({**options, "use_new_trick": True}))
    with pytest.raises(ValueError, match="adapter_config.json.*use_new_trick.*upgrade peft"):
        engine.load(adapter_checkpoint)


# -- damaged checkpoints -----------------------------------------------------------------------------------------

Missing = (ValueError, OSError)  # a missing file may be a FileNotFoundError


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, EXITS])
def test_missing_files(damaged, name):
    (damaged / name).unlink()
    with pytest.raises(Missing) as caught:
        engine.load(damaged)
    assert name in str(caught.value) and str(damaged) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a tensor file", b"\x00" * 40, None, "cut"], ids=str)
@pytest.mark.parametrize("name", [WEIGHTS, EXITS])
def test_malformed_tensor_files(damaged, name, content):
    path = damaged / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-7] if content is None else whole[: len(whole) // 3] if content == "cut" else content)
    with pytest.raises(ValueError, match="safetensors") as caught:
        engine.load(damaged)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[1]", "null", '"text"', '{"model_type": "bert"}', '{"early_exit": {}}',
        '{"early_exit": [], "model_type": "bert"}',
    ],
)  # fmt: skip
def test_malformed_configs(damaged, text):
    (damaged / CONFIG).write_text(text)
    with pytest.raises((ValueError, TypeError)) as caught:
        engine.load(damaged)
    assert str(damaged / CONFIG) in str(caught.value)


def test_a_config_that_is_not_utf8(damaged):
    (damaged / CONFIG).write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        engine.load(damaged)


@pytest.mark.parametrize(
    "change, fragments",
    [
        (dict(early_exit__treshold=0.5), ["unknown keys ['treshold']", "threshold"]),
        (dict(early_exit__labels=None), ["lacks the keys ['labels']"]),
        (dict(early_exit__num_layers=None), ["lacks the keys ['num_layers']"]),
        (dict(early_exit__labels="abc"), ["labels must be a list"]),
        (dict(early_exit__exit_layers=4), ["exit_layers must be a list"]),
        (dict(early_exit__exit_layers=[1, 2, 3]), ["last exit", "4", "[1, 2, 3]"]),
        (dict(early_exit__exit_layers=[1, 2, 3, 5]), ["last exit", "4"]),
        (dict(early_exit__exit_layers=[1, 2, 4]), ["exits.safetensors", "classifiers.3"]),
        (dict(early_exit__num_layers=3, early_exit__exit_layers=[1, 2, 3]), ["num_layers is 3", "4"]),
        (dict(early_exit__threshold=1.5), ["threshold", "[0, 1]", "1.5"]),
        (dict(early_exit__threshold=float("nan")), ["threshold", "nan"]),
        (dict(early_exit__pooler="mean"), ["pooler", "mean"]),
        (dict(early_exit__pooler="none"), ["exits.safetensors", "poolers.0"]),
        (dict(early_exit__pooler="per_layer"), ["exits.safetensors", "poolers.1"]),
        (dict(early_exit__criterion="entropy"), ["criterion", "entropy"]),
        (dict(early_exit__format_version=2), ["format_version", "2", "1"]),
        (dict(early_exit__max_length=MAX_LENGTH + 1), ["max_length", str(MAX_LENGTH + 1), str(MAX_LENGTH)]),
        (dict(early_exit__labels=["a", "b"]), ["exits.safetensors", "classifiers.0", "[3", "[2"]),
        (dict(early_exit__policy_hidden_size=16), ["exits.safetensors", "policies.0.dense", "[32", "[16"]),
        (dict(early_exit=None), ["early_exit", "consistentee train"]),
        (dict(model_type=None), ["model_type"]),
        (dict(model_type="gpt2"), ["gpt2"]),
        (dict(model_type="no-such-model"), ["no-such-model"]),
        (dict(hidden_act="gelu_new"), ["gelu_new"]),
        (dict(vocab_size=121), ["model.safetensors", "word_embeddings", "[120, 32]", "[121, 32]"]),
        (dict(num_hidden_layers=5), ["model.safetensors", "layer.4"]),
        (dict(num_hidden_layers=3), ["model.safetensors", "layer.3"]),
        (dict(intermediate_size=57), ["model.safetensors", "[56", "[57"]),
    ],
    ids=lambda x: str(x)[:60] if isinstance(x, dict) else "",
)  # fmt: skip
def test_wrong_configs(damaged, change, fragments):
    edit_config(damaged, **change)
    with pytest.raises((ValueError, TypeError)) as caught:
        engine.load(damaged)
    for fragment in fragments:
        assert fragment in str(caught.value), f"{fragment!r} is not in: {caught.value}"


@pytest.mark.parametrize("file", [WEIGHTS, EXITS])
def test_tensors_missing_extra_misshapen_not_finite(damaged, file):
    """Each error names file and tensor, and what it had and must have."""
    path = damaged / file
    good = path.read_bytes()
    name = {WEIGHTS: "encoder.layer.2.output.dense.weight", EXITS: "policies.1.dense.weight"}[file]
    shape = list(load_file(path)[name].shape)
    infinite, nan = float("inf"), float("nan")
    for change, fragments in (
        (lambda t: t.pop(name), ["lacks", name]),
        (lambda t: t.update({"stray.weight": torch.zeros(2)}), ["does not", "stray.weight"]),
        (lambda t: t.update({name + "2": t.pop(name)}), [name]),
        (lambda t: t.update({name: t[name].T.contiguous()}), [name, str(shape[::-1]), str(shape)])
        if shape[0] != shape[1]
        else (lambda t: t.update({name: t[name][1:].clone()}), [name, str([shape[0] - 1, shape[1]]), str(shape)]),
        (lambda t: t.update({name: t[name].flatten()}), [name, "shape", str(shape)]),
        (lambda t: t.update({name: t[name].int()}), [name, "dtype", "int32", "float32"]),
        (lambda t: t.update({name: t[name].double() * 1e300}), [name, "range", "float32"]),
        (lambda t: t[name][1].fill_(nan), [name, "NaN or infinite"]),
        (lambda t: t[name][0, 0].fill_(infinite), [name, "NaN or infinite"]),
        (lambda t: t[name][0, 0].fill_(-infinite), [name, "NaN or infinite"]),
    ):
        edit_tensors(path, change)
        with pytest.raises(ValueError) as caught:
            engine.load(damaged)
        for fragment in [file, *fragments]:
            assert fragment in str(caught.value), f"{fragment!r} is not in: {caught.value}"
        path.write_bytes(good)
    assert_same(engine.load(damaged).run(BATCH), engine.load(damaged).run(BATCH), atol=0)


def test_values_beyond_the_range_of_the_chosen_dtype(damaged):
    """Finite in fp32, infinite in fp16: the weights that would run are not finite, and the tensor can be named."""
    edit_tensors(damaged / WEIGHTS, lambda t: t["encoder.layer.0.output.dense.weight"][0, 0].fill_(1e30))
    assert engine.load(damaged).run(BATCH).logits.isfinite().all()
    with pytest.raises(ValueError, match="encoder.layer.0.output.dense.weight"):
        engine.load(damaged, dtype="float16")


def test_several_missing_tensors_are_named_and_counted(damaged):
    edit_tensors(damaged / WEIGHTS, lambda t: [t.pop(name) for name in list(t) if ".layer.1." in name])
    with pytest.raises(ValueError, match=r"lacks the tensors encoder\.layer\.1\..* and \d+ more"):
        engine.load(damaged)


def test_nothing_is_written_into_a_module_unless_all_fits():
    model = tiny_model()
    before = {name: value.clone() for name, value in model.exits.state_dict().items()}
    tensors = {name: torch.ones_like(value) for name, value in before.items()}
    last = sorted(tensors)[-1]
    tensors[last] = torch.full_like(tensors[last], float("nan"))
    with pytest.raises(ValueError, match=last):
        loading.fill_module(model.exits, tensors, "here")
    assert all(torch.equal(value, before[name]) for name, value in model.exits.state_dict().items())


@pytest.mark.parametrize(
    "file, content",
    [(file, content) for file in ("tokenizer.json", "tokenizer_config.json") for content in ("", "{", "[]")]
    + [("tokenizer.json", '{"model": {"type": "None"}}')],
)
def test_a_malformed_tokenizer(damaged, file, content):
    """Some of these transformers can live with; what it cannot is an error that names the file."""
    (damaged / file).write_text(content)
    try:
        loaded = engine.load(damaged)
    except (ValueError, TypeError) as error:
        assert "tokenizer" in str(error) and str(damaged) in str(error)
    else:
        assert loaded.run(["how to join"]).stats.rows == 1


def test_a_checkpoint_without_tokenizer(damaged):
    for path in damaged.glob("tokenizer*"):
        path.unlink()
    runner = engine.load(damaged)
    assert runner.run(BATCH).stats.rows == 30
    with pytest.raises(ValueError, match="tokenizer"):
        runner.run(["how"])


# -- pickles -----------------------------------------------------------------------------------------------------


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was read",))


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "weights.pth", "last.ckpt", "model.pkl"])
def test_a_pickle_file_is_refused_unread(tmp_path, name):
    torch.save({"bomb": _Bomb()}, tmp_path / name)
    with pytest.raises(ValueError, match="pickle") as caught:
        engine.load(tmp_path / name)
    assert name in str(caught.value) and "save_file" in str(caught.value)


def test_some_other_file(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="notes.txt.*folder"):
        engine.load(tmp_path / "notes.txt")


@pytest.mark.parametrize("pickled", [(WEIGHTS,), (EXITS,), (WEIGHTS, EXITS)], ids=" and ".join)
def test_a_folder_of_pickles_is_refused_unread(damaged, pickled):
    """Whatever is pickled, the error says so, and how to convert it: 'holds no exits' would send nobody there."""
    for name in pickled:
        (damaged / name).unlink()
        pickle = {WEIGHTS: "pytorch_model.bin", EXITS: "exits.bin"}[name]
        torch.save({"bomb": _Bomb()}, damaged / pickle)
    with pytest.raises(ValueError, match="pickle") as caught:
        engine.load(damaged)
    assert ".bin" in str(caught.value) and "save_file" in str(caught.value)


def test_a_pickled_adapter_is_refused_unread(adapter_checkpoint):
    (adapter_checkpoint / ADAPTER).unlink()
    torch.save({"bomb": _Bomb()}, adapter_checkpoint / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickle.*adapter_model.bin"):
        engine.load(adapter_checkpoint)


def test_a_pickled_backbone_is_refused_unread(adapter_checkpoint, tmp_path):
    folder = save_backbone(tmp_path / "pickled")
    (folder / WEIGHTS).unlink()
    torch.save({"bomb": _Bomb()}, folder / "pytorch_model.bin")
    edit_config(adapter_checkpoint, early_exit__backbone__source=str(folder))
    with pytest.raises((ValueError, OSError), match="safetensors"):
        engine.load(adapter_checkpoint)


# -- names and arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", ""])
def test_no_such_checkpoint(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Missing, match="does not exist|no config.json|holds no"):
        engine.load(name)


def test_hub_ids(checkpoint, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, **_):
        asked.append(name)
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    want = engine.load(checkpoint).run(BATCH)
    assert_same(engine.load("somebody/some-model").run(BATCH), want, atol=0)
    assert asked == ["somebody/some-model"]

    def fails(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(Missing, match="somebody/some-model is neither a folder.*no route to host"):
        engine.load("somebody/some-model")


@pytest.mark.parametrize(
    "arguments, fragments",
    [
        (dict(checkpoint=3), ["checkpoint", "int"]),
        (dict(checkpoint=None), ["checkpoint", "NoneType"]),
        (dict(dtype="int8"), ["dtype", "float32", "int8"]),
        (dict(dtype=torch.int64), ["dtype", "float32", "int64"]),
        (dict(dtype=[torch.float32]), ["dtype", "float32"]),
        (dict(dtype=None), ["dtype", "float32", "None"]),
        (dict(executor="fast"), ["executor", "packed", "graph", "fast"]),
        (dict(device="gpu"), ["device", "gpu"]),
        (dict(device="meta"), ["device", "meta"]),
        (dict(threshold=0.5), ["threshold"]),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_found_before_loading(checkpoint, arguments, fragments, monkeypatch):
    """Loading a large model to then refuse a misspelt word is work done before the check."""
    monkeypatch.setattr(loading, "read_tensors", lambda *args: pytest.fail("work was done before the check"))
    with pytest.raises((ValueError, TypeError)) as caught:
        engine.load(**({"checkpoint": checkpoint} | arguments))
    for fragment in fragments:
        assert fragment in str(caught.value), f"{fragment!r} is not in: {caught.value}"


# -- writing -----------------------------------------------------------------------------------------------------


class _Stop(BaseException):
    """Like KeyboardInterrupt: not an Exception."""


def _fail_at(monkeypatch, place: str, call: int, error: type[BaseException]):
    """The ``call``-th use of ``place`` (1, 2, ...) raises, as a full disk or ctrl-C would."""
    owner, _, name = place.rpartition(".")
    target = {"loading": loading, "os": loading.os, "shutil": loading.shutil, "Path": Path}[owner]
    original, count = getattr(target, name), [0]

    def stub(*args, **kwargs):
        count[0] += 1
        if count[0] == call:
            raise error("disk full")
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, stub)
    return count


# Everything that a write does: tensors twice, texts, permissions, and the renames at its end.
FAILURES = [
    ("loading.save_file", 1), ("loading.save_file", 2), ("Path.write_text", 1), ("Path.write_text", 2),
    ("Path.chmod", 1), ("Path.chmod", 2), ("os.replace", 1), ("os.replace", 2),
]  # fmt: skip


@pytest.mark.parametrize("error", [OSError, _Stop])
@pytest.mark.parametrize("place, call", FAILURES)
def test_a_failure_in_the_middle_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch, place, call, error):
    folder = tmp_path / "ck"
    save_checkpoint(tiny_model(), folder, tiny_tokenizer(), card="old")
    before = fingerprint(tmp_path)
    with monkeypatch.context() as patch:
        count = _fail_at(patch, place, call, error)
        with pytest.raises(error, match="disk full"):
            save_checkpoint(tiny_model(seed=5), folder, tiny_tokenizer(), card="new")
        assert count[0] >= call
    assert fingerprint(tmp_path) == before, "the old checkpoint has changed, or something was left beside it"
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]
    assert_same(engine.load(folder).run(BATCH), engine.from_module(tiny_model()).run(BATCH), atol=0)
    save_checkpoint(tiny_model(seed=5), folder, tiny_tokenizer(), card="new")
    assert_same(engine.load(folder).run(BATCH), engine.from_module(tiny_model(seed=5)).run(BATCH), atol=0)


@pytest.mark.parametrize("place, call", [f for f in FAILURES if f != ("os.replace", 2)])
def test_a_failure_in_the_middle_of_a_first_write_leaves_nothing(tmp_path, monkeypatch, place, call):
    with monkeypatch.context() as patch:
        _fail_at(patch, place, call, OSError)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(tiny_model(), tmp_path / "ck", card="new")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_tokenizer_leaves_nothing(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (Path(folder) / "sub").mkdir()
            raise RuntimeError("cannot be saved")

    with pytest.raises(RuntimeError, match="cannot be saved"):
        save_checkpoint(tiny_model(), tmp_path / "ck", Tokenizer())
    assert list(tmp_path.iterdir()) == []


def test_a_write_replaces_the_whole_folder(tmp_path):
    """Files of the old checkpoint that the new one lacks are gone: a stale adapter must not meet new exits."""
    folder = save_checkpoint(tiny_model(), tmp_path / "ck", tiny_tokenizer(), card="old")
    (folder / ADAPTER).write_text("stale")
    save_checkpoint(tiny_model(seed=2), folder)
    assert {p.name for p in folder.iterdir()} == {CONFIG, WEIGHTS, EXITS}
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]


def test_folders_are_made_and_relative_names_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save_checkpoint(tiny_model(), "a/b/ck")
    assert folder == tmp_path / "a" / "b" / "ck"
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["ck"]
    assert_same(engine.load("a/b/ck").run(BATCH), engine.from_module(tiny_model()).run(BATCH), atol=0)


def test_a_file_in_the_way(tmp_path):
    """A folder cannot take a file's place: the error leaves the file and nothing else."""
    (tmp_path / "ck").write_text("mine")
    with pytest.raises((ValueError, OSError)):
        save_checkpoint(tiny_model(), tmp_path / "ck")
    assert (tmp_path / "ck").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]


@pytest.mark.parametrize("name", ["results", ".", ""])
def test_a_folder_that_is_no_checkpoint_is_not_replaced(tmp_path, monkeypatch, name):
    """Replacing means deleting: somebody's results, or the whole working directory, are not ours to delete."""
    (tmp_path / "cwd" / "results").mkdir(parents=True)
    (tmp_path / "cwd" / "results" / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "cwd")
    with pytest.raises((ValueError, OSError)):
        save_checkpoint(tiny_model(), name)
    assert (tmp_path / "cwd" / "results" / "notes.txt").read_text() == "mine"
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == [
        "cwd", "cwd/results", "cwd/results/notes.txt",
    ]  # fmt: skip


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(save_checkpoint(tiny_model(), tmp_path / "ck", card="old"))
    save_checkpoint(tiny_model(seed=2), tmp_path / "link", card="new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "ck" / "README.md").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ck", "link"]


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.exits.classifiers[1].bias[0] = float("nan")
    with pytest.raises(ValueError, match="classifiers.1.bias holds NaN"):
        save_checkpoint(model, tmp_path / "ck")
    with pytest.raises(TypeError, match="MultiExitDecoder, got Linear"):
        save_checkpoint(torch.nn.Linear(2, 2), tmp_path / "ck")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "ck").mkdir()
    assert engine.load(save_checkpoint(tiny_model(), tmp_path / "ck")).run(BATCH).stats.rows == 30


def test_write_folder_and_write_file(tmp_path, monkeypatch):
    write_file(tmp_path / "deep" / "record.json", "one")
    write_file(tmp_path / "deep" / "record.json", b"two")
    assert (tmp_path / "deep" / "record.json").read_text() == "two"
    assert (tmp_path / "deep" / "record.json").stat().st_mode & 0o777 == 0o644
    for place in ("os.replace", "os.fsync", "os.chmod"):
        with monkeypatch.context() as patch:
            _fail_at(patch, place, 1, _Stop)
            with pytest.raises(_Stop):
                write_file(tmp_path / "deep" / "record.json", "three")
        assert [p.name for p in (tmp_path / "deep").iterdir()] == ["record.json"]
        assert (tmp_path / "deep" / "record.json").read_text() == "two"
    write_folder(tmp_path / "folder", lambda f: (f / "x").write_text("1"))
    write_folder(tmp_path / "folder", lambda f: (f / "y").write_text("2"))
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["y"]


def test_the_model_is_not_changed_by_saving(tmp_path):
    model = tiny_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_checkpoint(model, tmp_path / "ck")
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert os.environ.get("HF_HUB_OFFLINE") == "1"
