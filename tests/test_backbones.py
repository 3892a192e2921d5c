"""Backbones whose tensors are spread over shards: the same model as from one file, and what is wrong is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import engine
from engine.backbones import (
    CONFIG,
    GENERATION,
    INDEX,
    WEIGHTS,
    BackboneReference,
    converted,
    eos_ids,
    load_backbone,
    weight_files,
)
from engine.loading import attach_exits, load_tokenizer, save_checkpoint, write_json
from tests.decoding.tiny import VOCAB, byte_tokenizer, tiny_decoder
from tests.tiny import FAMILIES, LABELS, assert_same, padded, random_rows, tiny_backbone, tiny_tokenizer

SHARD_SIZE = 20_000  # bytes: 4 shards or more of every tiny model
ROPES = {
    "llama": {"rope_type": "default", "rope_theta": 100.0},
    "llama linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    "llama yarn": {
        "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32,
    },
}  # fmt: skip
DECODERS = [f"{name}{tied}" for name in ROPES for tied in ("", " tied")]


def save(folder: Path, kind: str, sharded: bool, seed: int = 0) -> Path:
    """A Hugging Face folder of a tiny model: an encoder's family, or a decoder."""
    if kind in FAMILIES:
        model, tokenizer = tiny_backbone(kind, layers=3, seed=seed), tiny_tokenizer(kind)
    else:
        rope, tied = ROPES[kind.removesuffix(" tied")], kind.endswith("tied")
        model = tiny_decoder(rope=rope, tied=tied, vocab=258, seed=seed).language_model
        tokenizer = byte_tokenizer()
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE if sharded else "1GB")
    tokenizer.save_pretrained(folder)
    assert (folder / INDEX).is_file() == sharded and (folder / WEIGHTS).is_file() != sharded
    assert not sharded or len(shards_of(folder)) >= 4
    return folder


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*-of-*.safetensors"))


def attach(folder: Path, kind: str):
    model, tokenizer, reference = attach_exits(
        BackboneReference(str(folder)), dict(labels=LABELS) if kind in FAMILIES else dict(head="shared")
    )
    return model.eval(), tokenizer, reference


@pytest.fixture(params=["bert", "llama"])
def sharded(request, tmp_path):
    return save(tmp_path / "sharded", request.param, sharded=True)


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


# -- the same model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*FAMILIES, *DECODERS])
def test_shards_are_the_model_of_one_file(kind, tmp_path):
    one, many = (save(tmp_path / name, kind, name == "many") for name in ("one", "many"))
    want, got = load_backbone(one), load_backbone(many)
    assert not got.training and {p.dtype for p in got.parameters()} == {torch.float32}
    ours, theirs = got.state_dict(), want.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    hugging_face = (AutoModel if kind in FAMILIES else AutoModelForCausalLM).from_pretrained(many).eval()
    batch = padded(random_rows(4, seed=3), pad_id=want.config.pad_token_id or 0)
    if kind not in FAMILIES:
        batch = {"input_ids": torch.randint(VOCAB, (4, 60), generator=torch.Generator().manual_seed(1))}
    with torch.no_grad():
        outputs = [model(**batch)[0] for model in (got, want, hugging_face)]
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[2])


def test_a_checkpoint_that_somebody_sharded(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "many"))
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / WEIGHTS).unlink()
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    batch = padded(random_rows(9, seed=1))
    got, want = engine.load(folder, device="cpu").run(batch), engine.load(checkpoint, device="cpu").run(batch)
    assert got.exit_layers.tolist() == want.exit_layers.tolist() and torch.equal(got.logits, want.logits)
    (folder / "model-2-of-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="names 2 shards, of which 1 are not in its folder"):
        engine.load(folder)


@pytest.mark.parametrize("kind", ["bert", "llama tied"])
def test_an_adapter_on_shards(kind, tmp_path):
    """Attached, trained, saved by reference and loaded again, it says what the model in memory said."""
    folder = save(tmp_path / "many", kind, sharded=True)
    model, tokenizer, reference = attach(folder, kind)
    part, targets = ("backbone", ["query", "value"]) if kind == "bert" else ("causal_lm", ["q_proj", "v_proj"])
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    setattr(model, part, get_peft_model(getattr(model, part), lora))
    small = save_checkpoint(model.eval(), tmp_path / "small", tokenizer, reference)
    assert json.loads((small / CONFIG).read_text())["early_exit"]["backbone"]["sha256"] == reference.sha256
    want, got = engine.from_module(model, tokenizer), engine.load(small, device="cpu")
    if kind == "bert":
        batch = padded(random_rows(9, seed=1))
        assert_same(got.run(batch), want.run(batch), atol=1e-4)
    else:
        options = dict(max_new_tokens=10, ignore_eos=True)
        assert got.run(["why is"], **options).token_ids == want.run(["why is"], **options).token_ids

    damage(shards_of(folder)[1])
    with pytest.raises(ValueError, match=f"sha256 of .*{INDEX} and its shards is .*, the checkpoint was trained on "):
        engine.load(small)


def test_a_checkpoint_ends_answers_as_it_says(tmp_path):
    """Not as its backbone does, which may end them with another token."""
    folder = save(tmp_path / "lm", "llama", sharded=False)
    assert eos_ids(load_backbone(folder)) == {2}
    own = tmp_path / "checkpoint"
    own.mkdir()
    shutil.copy(folder / CONFIG, own)
    for given, want in ([7, 9], {7, 9}), (7, {7}):
        write_json(own / GENERATION, {"eos_token_id": given})
        assert eos_ids(load_backbone(folder, own / CONFIG)) == want


# -- from GGUF ---------------------------------------------------------------------------------------------------


def test_special_tokens_are_those_of_the_gguf(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    tokens = ["<unk>", "<start>", "<end>", "<pad>", "a", "b", "c", "ab", "abc"]
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [1] * 5)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    products = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {f"blk.0.{name}": (8, 8) for name in products} | {"token_embd": (len(tokens), 8)}
    shapes |= {name: (8,) for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.ones(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    earlier = tmp_path / "consistentee" / "tiny-012345678901"  # of a release that took the first token for the last
    earlier.mkdir(parents=True)
    (earlier / WEIGHTS).touch()

    folder = converted(tmp_path / "tiny.gguf", "0123456789012345")
    model, tokenizer = load_backbone(folder), load_tokenizer(folder)
    special = {"unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>", "pad_token": "<pad>"}
    assert tokenizer.special_tokens_map == special and tokenizer.eos_token_id == 2
    assert eos_ids(model) == {2} and (model.config.bos_token_id, model.config.pad_token_id) == (1, 3)


# -- their hash --------------------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    """Another value in the file's last tensor."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_the_hash_of_one_file_is_its_own(tmp_path):
    folder = save(tmp_path / "one", "bert", sharded=False)
    want = sha256((folder / WEIGHTS).read_bytes())
    assert BackboneReference(str(folder)).found() == (folder, want)
    # As in transformers, an index beside the one file means nothing.
    (folder / INDEX).write_text("{")
    assert BackboneReference(str(folder), want).found() == (folder, want)
    load_backbone(folder)


def test_the_hash_of_shards_covers_all_of_them(sharded):
    reference = BackboneReference(str(sharded))
    _, want = reference.found()
    files = [sharded / INDEX, *shards_of(sharded)]
    assert want == sha256("".join(f"{sha256(f.read_bytes())}  {f.name}\n" for f in files).encode())
    (sharded / "model-stray.safetensors").write_bytes(b"")
    assert reference.found() == (sharded, want), "a file that the index does not name is none of the weights"
    for path in files:
        before = path.read_bytes()
        damage(path) if path.name != INDEX else path.write_bytes(before + b"\n")
        with pytest.raises(ValueError, match=f"{INDEX} and its shards .*{want}"):
            BackboneReference(str(sharded), want).resolve()
        path.write_bytes(before)
    assert BackboneReference(str(sharded), want).resolve() == sharded


# -- what is wrong -----------------------------------------------------------------------------------------------


def both_refuse(folder: Path, error: type[Exception], match: str) -> None:
    """Where the backbone is found, and where it is loaded."""
    for read in (load_backbone, lambda folder: BackboneReference(str(folder)).resolve()):
        with pytest.raises(error, match=match):
            read(folder)


def test_missing_shards(sharded):
    first, *_, last = shards = shards_of(sharded)
    last.unlink()
    both_refuse(sharded, FileNotFoundError, f"{INDEX} names {len(shards)} shards, of which 1 .*: {last.name}; download")
    first.unlink()
    both_refuse(sharded, FileNotFoundError, f"of which 2 are not in its folder: {first.name}, {last.name}; download")


@pytest.mark.parametrize(
    "name",
    [
        "../other/model.safetensors", "..", "sub/model-1.safetensors", "./model-1.safetensors", "..\\model.safetensors",
        "/etc/model.safetensors", "pytorch_model-00001-of-00002.bin", "", None, 3, ["model.safetensors"],
    ],
)  # fmt: skip
def test_shards_that_are_none(sharded, name):
    """Neither files elsewhere nor pickles are read, whatever stands there."""
    other = sharded.parent / "other"
    other.mkdir()
    shutil.copy(shards_of(sharded)[0], other / "model.safetensors")
    edit_index(sharded, lambda names: names.update({sorted(names)[0]: name}))
    both_refuse(sharded, ValueError, f"{INDEX}: weight_map says that .* holds tensor .*; allowed are .safetensors")


@pytest.mark.parametrize(
    "text, match",
    [
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[]", "must hold a JSON object, got list"),
        ("{}", "weight_map must map .* got None: download"),
        ('{"metadata": {}, "weight_map": {}}', "weight_map must map .* got {}: download"),
        ('{"weight_map": ["model-00001-of-00002.safetensors"]}', "weight_map must map .* got .'model-00001"),
    ],
)
def test_indices_that_are_none(sharded, text, match):
    (sharded / INDEX).write_text(text)
    both_refuse(sharded, ValueError, f"{INDEX}.*{match}")


def test_index_and_shards_that_differ(sharded):
    first, second = shards_of(sharded)[:2]
    stray = sorted(load_file(second))[0]
    good = (sharded / INDEX).read_text()
    edit_index(sharded, lambda names: names.update({stray: first.name}))
    with pytest.raises(ValueError, match=f"{first.name} lacks the tensor {stray}, which {INDEX} says"):
        load_backbone(sharded)
    (sharded / INDEX).write_text(good)
    edit_index(sharded, lambda names: names.pop(stray))
    with pytest.raises(ValueError, match=f"{INDEX} lacks the tensor {stray}"):
        load_backbone(sharded)


def test_tensors_of_shards_are_checked(sharded):
    path = shards_of(sharded)[1]
    good, name = load_file(path), sorted(load_file(path))[0]
    for wrong, match in (
        (good[name].clone().fill_(float("nan")), f"{INDEX}: tensor {name} holds NaN"),
        (torch.zeros(1, 2, 3), rf"{INDEX}: tensor {name} has shape \[1, 2, 3\], the model needs "),
    ):
        save_file(good | {name: wrong}, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=match):
            load_backbone(sharded)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=f"{path.name} is not a readable safetensors file"):
        load_backbone(sharded)


def test_no_weights_at_all(sharded):
    for path in shards_of(sharded):
        path.rename(path.with_suffix(".bin"))
    (sharded / INDEX).rename(sharded / "pytorch_model.bin.index.json")
    both_refuse(sharded, ValueError, f"holds no {WEIGHTS}, but model-00001-of-.*pickles can run code")
    for path in sharded.glob("*.bin"):
        path.unlink()
    both_refuse(sharded, FileNotFoundError, f"holds no {WEIGHTS}, nor {INDEX} with its shards")


# -- from the hub ------------------------------------------------------------------------------------------------

NAME, COMMIT = "somebody/some-model", "0123456789" * 4


class Hub:
    """One model repository; a snapshot holds what was asked for, as that of huggingface_hub does."""

    def __init__(self, repository: Path, cache: Path):
        self.repository, self.snapshot, self.asked = repository, cache / COMMIT, []

    def snapshot_download(self, name, revision=None, allow_patterns=None, local_files_only=False):
        assert name == NAME and revision in (None, COMMIT)
        if not local_files_only:
            self.asked.append(revision)
            for path in self.repository.iterdir():
                if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                    self.snapshot.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, self.snapshot)
        if not self.snapshot.is_dir():
            raise FileNotFoundError("no snapshot")
        return str(self.snapshot)

    def names(self) -> set[str]:
        return {path.name for path in self.snapshot.iterdir()}


@pytest.fixture
def hub(sharded, tmp_path, monkeypatch):
    hub = Hub(sharded, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    return hub


def test_shards_are_downloaded(hub, sharded):
    (sharded / "model-stray.safetensors").write_bytes(b"not the index's")
    want = BackboneReference(str(sharded)).found()[1]
    reference = BackboneReference(NAME, want)
    assert reference.model_type() in ("bert", "llama") and hub.names() == {CONFIG}
    folder = reference.resolve()
    assert [path.name for path in weight_files(folder)] == [INDEX, *(path.name for path in shards_of(sharded))]
    assert {CONFIG, "tokenizer.json"} <= hub.names() and "model-stray.safetensors" not in hub.names()
    load_backbone(folder)
    assert hub.asked == [None, None, COMMIT], "shards of another commit than their index's"
    downloads = len(hub.asked)
    assert reference.resolve() == folder and len(hub.asked) == downloads, "downloaded though it is in the cache"
    (folder / shards_of(sharded)[2].name).unlink()
    assert reference.resolve() == folder, "a download that broke off is not taken up"


def test_one_file_is_preferred_on_the_hub(hub, sharded):
    """Repositories that hold both would be downloaded twice."""
    save_file({}, sharded / WEIGHTS)
    assert BackboneReference(NAME).resolve() == hub.snapshot
    assert WEIGHTS in hub.names() and not shards_of(hub.snapshot) and len(hub.asked) == 1


def test_an_index_of_the_hub_that_leaves_its_folder(hub, sharded):
    edit_index(sharded, lambda names: names.update({sorted(names)[0]: "../x.safetensors"}))
    for _ in range(2):  # downloaded, and from the cache
        with pytest.raises(ValueError, match="allowed are .safetensors files in the index's own folder"):
            BackboneReference(NAME).resolve()
    assert len(hub.asked) == 1


def test_shards_that_the_hub_lacks(hub, sharded):
    last = shards_of(sharded)[-1]
    last.unlink()
    with pytest.raises(FileNotFoundError, match=f"of which 1 are not in its folder: {last.name}"):
        BackboneReference(NAME).resolve()


def test_shards_in_the_cache_of_the_hub(sharded, tmp_path, monkeypatch):
    """huggingface_hub's own layout: files are links out of the folder, and the network is off."""
    cache = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    snapshot, blobs = cache / "snapshots" / COMMIT, cache / "blobs"
    for folder in (snapshot, blobs, cache / "refs"):
        folder.mkdir(parents=True)
    (cache / "refs" / "main").write_text(COMMIT)
    for path in sharded.iterdir():
        blob = blobs / sha256(path.read_bytes())
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.parent))
    want = BackboneReference(str(sharded)).found()[1]
    assert BackboneReference(NAME).found() == (snapshot, want)
    load_backbone(snapshot)
    shard = snapshot / shards_of(sharded)[0].name
    shard.unlink()
    with pytest.raises(OSError, match="could not be had .hub cache: incomplete; hub: "):
        BackboneReference(NAME).resolve()
