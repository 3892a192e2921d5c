"""Checkpoint folders: read with everything checked, written whole or not at all.

A folder in Hugging Face layout:

    config.json             the backbone's config with an ``early_exit`` section
    exits.safetensors       poolers, classifiers and policies
    model.safetensors       the backbone; or instead of it
    adapter_model.safetensors, adapter_config.json   a LoRA adapter (peft layout) for the backbone that
                            ``early_exit.backbone`` names by hub id and sha256
    tokenizer.json, ...     the tokenizer
    README.md               model card
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.backbones import WEIGHTS, BackboneReference, file_sha256
from engine.config import EarlyExitConfig
from engine.models.encoder import MultiExitEncoder

CONFIG, EXITS = "config.json", "exits.safetensors"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


# -- backbones ---------------------------------------------------------------------------------------------------


def load_backbone(folder: Path, config=None) -> nn.Module:
    """The encoder of a Hugging Face folder in fp32, without pooler of its own where the folder has none.

    Raises ValueError for missing, unexpected, misshapen or non-finite tensors, each named.
    """
    from transformers import AutoConfig, AutoModel

    hf_config = AutoConfig.from_pretrained(folder) if config is None else config
    tensors = read_tensors(folder / WEIGHTS)
    with torch.device("meta"):
        model = AutoModel.from_config(hf_config)
    prefix = model.base_model_prefix + "."
    tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    expected = model.state_dict()
    # Heads of other tasks (masked LM, classification) and index buffers that older releases saved are not the encoder's.
    foreign = ("cls.", "lm_head.", "classifier.", "embeddings.position_ids")
    tensors = {name: value for name, value in tensors.items() if not name.startswith(foreign)}
    if not any(name.startswith("pooler.") for name in tensors) and hasattr(model, "pooler"):
        model.pooler = None
        expected = model.state_dict()
    model.to_empty(device="cpu")
    _restore_buffers(model, hf_config)
    fill_module(model, tensors, str(folder / WEIGHTS), expected)
    return model.eval()


def _restore_buffers(model: nn.Module, hf_config) -> None:
    """Non-persistent buffers (position and token type ids) have no tensors in a file: compute them again."""
    embeddings = model.embeddings
    size = hf_config.max_position_embeddings
    if "position_ids" in embeddings._buffers:
        embeddings.position_ids = torch.arange(size).expand((1, -1))
    if "token_type_ids" in embeddings._buffers:
        embeddings.token_type_ids = torch.zeros((1, size), dtype=torch.long)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. ValueError where it is malformed, OSError where it is missing."""
    if not path.is_file():
        raise OSError(f"{path} does not exist")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


@torch.no_grad()
def fill_module(module: nn.Module, tensors: dict[str, Tensor], where: str, expected: dict | None = None) -> None:
    """Copy ``tensors`` into ``module``; nothing is written unless all of them fit."""
    expected = module.state_dict() if expected is None else expected
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing:
        raise ValueError(f"{where} lacks the tensor{'s' * (len(missing) > 1)} {_some(missing)}")
    if extra:
        raise ValueError(f"{where} has tensors that the model does not: {_some(extra)}")
    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{where}: tensor {name} has shape {list(value.shape)}, the model needs {list(expected[name].shape)}"
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{where}: tensor {name} holds NaN or infinite values")
    own = module.state_dict()
    for name, value in tensors.items():
        own[name].copy_(value)


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# -- reading -----------------------------------------------------------------------------------------------------


def resolve_checkpoint(checkpoint: str | os.PathLike) -> Path:
    """A checkpoint folder, or a hub id's snapshot."""
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise TypeError(f"checkpoint must be a folder or a hub id, got {type(checkpoint).__name__}")
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        what = "a pickle" if path.suffix in _PICKLES else "a file"
        raise ValueError(
            f"{path} is {what}; a checkpoint is a folder with {CONFIG} and safetensors. Pickles are never read: convert "
            "with safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
        )
    name = str(checkpoint)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name} does not exist: give a checkpoint folder, or a hub id such as user/model")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name))
    except Exception as error:  # many kinds: not found, gated, offline, transport
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(f"{name} is neither a folder here nor a model that the hub gives out: {reason}") from error


def read_config(folder: Path) -> tuple[Any, EarlyExitConfig, BackboneReference | None]:
    """(Hugging Face config, exits, backbone reference or None) of a checkpoint folder."""
    from transformers import AutoConfig

    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a checkpoint: it holds no {CONFIG}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict) or "early_exit" not in data:
        raise ValueError(
            f"{path} has no early_exit section: this is a model without exits; train them with 'consistentee train'"
        )
    section = data.pop("early_exit")
    if not isinstance(section, dict):
        raise ValueError(f"{path}: early_exit must be a mapping, got {type(section).__name__}")
    section = dict(section)
    backbone = section.pop("backbone", None)
    reference = None
    if backbone is not None:
        if not isinstance(backbone, dict) or not {"source", "sha256"} <= set(backbone) <= {
            "source",
            "sha256",
            "revision",
        }:
            raise ValueError(f"{path}: early_exit.backbone must have source and sha256 (and revision), got {backbone!r}")
        reference = BackboneReference(**backbone)
    config = EarlyExitConfig.from_dict(section, where=f"{path}: early_exit")
    if "model_type" not in data:
        raise ValueError(f"{path} lacks the key model_type")
    model_type = data.pop("model_type")
    return AutoConfig.for_model(model_type, **data), config, reference


def load_model(checkpoint: str | os.PathLike, merge: bool = True) -> tuple[MultiExitEncoder, Any]:
    """(model in eval mode and fp32, tokenizer or None). merge: fold a LoRA adapter into the backbone's weights."""
    folder = resolve_checkpoint(checkpoint)
    hf_config, config, reference = read_config(folder)
    if not (folder / EXITS).is_file():
        raise FileNotFoundError(f"{folder} holds no {EXITS}")
    _refuse_pickles(folder)
    if reference is None:
        backbone = load_backbone(folder, hf_config)
    else:
        backbone = load_backbone(reference.resolve())
        if (folder / ADAPTER_CONFIG).is_file():
            backbone = _load_adapter(backbone, folder, merge)
    model = MultiExitEncoder(backbone, config)
    fill_module(model.exits, read_tensors(folder / EXITS), str(folder / EXITS))
    return model.eval(), load_tokenizer(folder)


def _refuse_pickles(folder: Path) -> None:
    if (folder / WEIGHTS).is_file() or (folder / ADAPTER).is_file():
        return
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise ValueError(
            f"{folder} holds its weights as a pickle ({', '.join(pickles)}), which can run code when it is read. Convert "
            "it: safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
        )


def _load_adapter(backbone: nn.Module, folder: Path, merge: bool) -> nn.Module:
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict

    tensors = read_tensors(folder / ADAPTER)
    try:
        lora = LoraConfig.from_pretrained(folder)
    except (ValueError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG} cannot be read: {error}") from error
    lora.inference_mode = merge
    backbone.pooler = None  # the exits hold their own; an adapter never covers it
    model = PeftModel(backbone, lora)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    where = str(folder / ADAPTER)
    fill_tensors(expected, tensors, where)
    return model.merge_and_unload() if merge else model


@torch.no_grad()
def fill_tensors(expected: dict[str, Tensor], tensors: dict[str, Tensor], where: str) -> None:
    """``fill_module`` for a plain mapping of tensors that are written in place."""
    holder = nn.Module()
    holder.state_dict = lambda: expected  # type: ignore[method-assign]
    fill_module(holder, tensors, where)


def load_tokenizer(folder: Path):
    """The folder's fast tokenizer, None where it has none."""
    if not (folder / "tokenizer.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# -- writing -----------------------------------------------------------------------------------------------------


def save_checkpoint(
    model: MultiExitEncoder,
    folder: str | os.PathLike,
    tokenizer=None,
    backbone: BackboneReference | None = None,
    card: str | None = None,
) -> Path:
    """Write ``model`` as a checkpoint folder, replacing one that stands there.

    backbone  what the adapter of a peft-wrapped model was trained on: the folder then holds the adapter and this
              reference. A model without adapter is written whole.
    Everything is written beside the folder and renamed: it holds the old checkpoint or the new one, nothing between.
    """
    wrapped = hasattr(model.backbone, "peft_config")
    if wrapped and (backbone is None or backbone.sha256 is None):
        raise ValueError("the backbone carries an adapter: name the weights it was trained on (backbone=, with sha256)")
    if not wrapped and backbone is not None:
        raise ValueError("a backbone reference is for models with an adapter; this one's backbone is written whole")

    def write(target: Path) -> None:
        config = model.encoder_backbone.config.to_dict()
        config.pop("_name_or_path", None)  # where the backbone lay on the machine that trained: nobody else's business
        config["early_exit"] = model.config.to_dict()
        if backbone is not None:
            reference = {"source": backbone.source, "sha256": backbone.sha256}
            if backbone.revision is not None:
                reference["revision"] = backbone.revision
            config["early_exit"]["backbone"] = reference
        (target / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(_plain(model.exits.state_dict()), target / EXITS)
        if wrapped:
            _save_adapter(model.backbone, target, backbone)
        else:
            save_file(_plain(model.backbone.state_dict()), target / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        if card is not None:
            (target / "README.md").write_text(card, encoding="utf-8")

    return write_folder(Path(folder), write)


def _save_adapter(backbone: nn.Module, target: Path, reference: BackboneReference | None) -> None:
    from peft import get_peft_model_state_dict

    save_file(_plain(get_peft_model_state_dict(backbone, save_embedding_layers=False)), target / ADAPTER)
    config = backbone.peft_config["default"].to_dict()
    config["base_model_name_or_path"] = reference.source
    config["inference_mode"] = True
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    (target / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def write_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """Fill a new folder through ``write`` and put it in place of ``folder`` in one rename."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    beside.chmod(0o755)
    try:
        write(beside)
        for path in beside.iterdir():
            path.chmod(0o644)  # safetensors writes files for the owner alone
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.replace(folder, old)  # an empty folder may be replaced by a folder
            os.replace(beside, folder)
            shutil.rmtree(old)
        else:
            os.replace(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return folder


def write_file(path: str | os.PathLike, data: str | bytes) -> None:
    """Write a file beside its place and rename it there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def attach_exits(backbone: BackboneReference, config: dict[str, Any]) -> tuple[MultiExitEncoder, Any, BackboneReference]:
    """A fresh multi-exit model on a pretrained backbone.

    config  EarlyExitConfig fields; num_layers, exit_layers (all layers) and max_length default to the backbone's
    Returns the model, its tokenizer (or None), and the reference with the sha256 of the weights found.
    """
    folder = backbone.resolve()
    module = load_backbone(folder)
    layers = module.config.num_hidden_layers
    fields = {"num_layers": layers, "exit_layers": tuple(range(1, layers + 1)), **config}
    if fields.get("max_length") is None:
        from engine.models.families import family_of

        fields["max_length"] = family_of(module.config).longest(module.config)
    model = MultiExitEncoder(module, EarlyExitConfig.from_dict(fields, where="exits"))
    reference = BackboneReference(backbone.source, file_sha256(folder / WEIGHTS), backbone.revision)
    return model, load_tokenizer(folder), reference
