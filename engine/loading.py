"""Checkpoint folders: read with everything checked, written whole or not at all.

A folder in Hugging Face layout:

    config.json             the backbone's config with an ``early_exit`` section
    exits.safetensors       poolers, classifiers and policies; of a decoder, policies and what heads have of their own
    model.safetensors       the backbone, or an index and its shards; or instead of it
    adapter_model.safetensors, adapter_config.json   a LoRA adapter (peft layout) for the backbone that
                            ``early_exit.backbone`` names by hub id and sha256
    tokenizer.json, ...     the tokenizer
    README.md               model card
    training.json           options and figures of the run that trained it
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.backbones import (
    CONFIG,
    DECODER,
    GENERATION,
    WEIGHTS,
    BackboneReference,
    hub_snapshot,
    load_backbone,
    read_backbone_config,
    weight_files,
)
from engine.config import DecoderExitConfig, EarlyExitConfig
from engine.models.decoder import MultiExitDecoder
from engine.models.encoder import MultiExitEncoder
from engine.models.families import family_of
from engine.reading import (
    NO_PICKLES,
    PICKLES,
    check_finite,
    fill_module,
    fill_tensors,
    naming,
    read_json,
    read_tensors,
    require_file,
)

EXITS = "exits.safetensors"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "README.md"]


# -- reading -----------------------------------------------------------------------------------------------------


def resolve_checkpoint(checkpoint: str | os.PathLike) -> Path:
    """A checkpoint folder, or a hub id's snapshot.

    TypeError for what is no name, ValueError for a file, FileNotFoundError for what neither disk nor hub has.
    """
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise TypeError(f"checkpoint must be a folder or a hub id, got {type(checkpoint).__name__}")
    path = Path(os.path.expanduser(checkpoint))
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(
            f"{path} is a {'pickle' if path.suffix in PICKLES else 'file'}; a checkpoint is a folder with {CONFIG} and "
            f"safetensors files ({NO_PICKLES.format(WEIGHTS)})"
        )
    name = str(checkpoint)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name} does not exist: give a checkpoint folder, or a hub id such as user/model")
    try:
        return hub_snapshot(name, allow_patterns=_PATTERNS)
    except OSError as error:
        raise FileNotFoundError(
            f"{name} is neither a folder here nor a model that the hub gives out: {error}"
        ) from error


def read_config(folder: Path) -> tuple[Any, EarlyExitConfig | DecoderExitConfig, BackboneReference | None]:
    """(Hugging Face config, exits, backbone reference or None) of a checkpoint folder.

    FileNotFoundError where it has no config.json, ValueError that names file and key where that is wrong.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a checkpoint: it holds no {CONFIG}")
    data = read_json(path)
    if "early_exit" not in data:
        raise ValueError(
            f"{path} has no early_exit section: this is a model without exits; train them with 'consistentee train'"
        )
    hf_config = read_backbone_config(path)
    with naming(path):
        section = data["early_exit"]
        if not isinstance(section, dict):
            raise TypeError(f"early_exit must be a mapping, got {type(section).__name__}")
        backbone = section.pop("backbone", None)
        reference = None if backbone is None else BackboneReference.from_dict(backbone)
        decoder = hf_config.model_type == DECODER
        exits = (DecoderExitConfig if decoder else EarlyExitConfig).from_dict(section)
    return hf_config, exits, reference


def load_model(
    checkpoint: str | os.PathLike, merge: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[MultiExitEncoder | MultiExitDecoder, Any]:
    """(model in eval mode on the CPU, tokenizer or None). Draws no random numbers.

    merge  fold a LoRA adapter into the backbone's weights
    dtype  of the model; adapters are merged in fp32 before
    Raises as ``resolve_checkpoint`` and ``read_config``; FileNotFoundError for missing files; ValueError that names the
    file for pickles, malformed files, and tensors that are missing, unexpected, misshapen or not finite in ``dtype``.
    """
    folder = resolve_checkpoint(checkpoint)
    _, config, reference = read_config(folder)
    for name in (EXITS,) if reference is None else (EXITS, ADAPTER, ADAPTER_CONFIG):
        require_file(folder, name)
    if reference is None:
        weight_files(folder)
    tokenizer = load_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):  # modules draw their initial weights, which are then overwritten
        if reference is None:
            backbone = load_backbone(folder)
        else:
            backbone = _load_adapter(load_backbone(reference.resolve(), folder / CONFIG), folder, merge)
        with naming(folder / CONFIG):
            model = (MultiExitEncoder if isinstance(config, EarlyExitConfig) else MultiExitDecoder)(backbone, config)
    fill_module(model.exits, read_tensors(folder / EXITS), folder / EXITS)
    for name, value in model.state_dict().items():
        check_finite(name, value, dtype, folder)
    return model.to(dtype).eval(), tokenizer


def _load_adapter(backbone: nn.Module, folder: Path, merge: bool) -> nn.Module:
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict

    tensors = read_tensors(folder / ADAPTER)
    options = read_json(folder / ADAPTER_CONFIG)
    if hasattr(backbone, "pooler"):
        backbone.pooler = None  # the exits hold their own; an adapter never covers it
    with naming(folder / ADAPTER_CONFIG):
        if options.get("peft_type") != "LORA":
            raise ValueError(f"peft_type must be 'LORA', got {options.get('peft_type')!r}")
        # A newer peft writes keys that this one does not have: harmless where they are off, another adapter where not.
        known = {field.name for field in fields(LoraConfig)}
        unknown = sorted(key for key, value in options.items() if key not in known and value)
        if unknown:
            raise ValueError(f"keys {unknown} are set, which this peft does not know: upgrade peft, or unset them")
        lora = LoraConfig(**{key: value for key, value in options.items() if key in known})
        lora.inference_mode = merge
        lora.init_lora_weights = False  # all are overwritten, and some ways to initialise them change the backbone
        model = PeftModel(backbone, lora)
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    fill_tensors(expected, tensors, folder / ADAPTER)
    return model.merge_and_unload() if merge else model


def load_tokenizer(folder: Path) -> Any:
    """The folder's fast tokenizer, None where it has none. ValueError that names the files where it is malformed."""
    if not (folder / _TOKENIZER[0]).is_file():
        return None
    from transformers import AutoTokenizer

    for name in _TOKENIZER:
        if (folder / name).is_file():
            read_json(folder / name)
    with naming(f"{folder}: the tokenizer cannot be read"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def attach_exits(
    backbone: BackboneReference, config: dict[str, Any]
) -> tuple[MultiExitEncoder | MultiExitDecoder, Any, BackboneReference]:
    """A fresh multi-exit model on a pretrained backbone.

    config  EarlyExitConfig or DecoderExitConfig fields; num_layers, exit_layers (all layers) and max_length default to
            the backbone's
    Returns the model, its tokenizer (or None), and the reference with the sha256 of the weights found.
    Raises as ``BackboneReference.resolve`` and ``load_backbone``; ValueError or TypeError for a wrong config.
    """
    folder, sha256 = backbone.found()
    module = load_backbone(folder)
    layers = module.config.num_hidden_layers
    chosen = {"num_layers": layers, "exit_layers": tuple(range(1, layers + 1)), **config}
    decoder = module.config.model_type == DECODER
    if chosen.get("max_length") is None:
        hf = module.config
        chosen["max_length"] = hf.max_position_embeddings if decoder else family_of(hf).longest(hf)
    if decoder:
        model = MultiExitDecoder(module, DecoderExitConfig.from_dict(chosen, where="exits"))
    else:
        model = MultiExitEncoder(module, EarlyExitConfig.from_dict(chosen, where="exits"))
    reference = BackboneReference(backbone.source, sha256, backbone.revision)
    return model, load_tokenizer(folder), reference


# -- writing -----------------------------------------------------------------------------------------------------


def save_checkpoint(
    model: MultiExitEncoder | MultiExitDecoder,
    folder: str | os.PathLike,
    tokenizer=None,
    backbone: BackboneReference | None = None,
    card: str | None = None,
    extra: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write ``model`` as a checkpoint folder, replacing the checkpoint that stands there.

    backbone  what the adapter of a peft-wrapped model was trained on: the folder then holds the adapter and this
              reference. A model without adapter is written whole.
    extra     further files, name -> text
    dtype     of exits and adapter in their files (None: as they are); a backbone that is written stays as it is
    Raises ValueError where the reference is missing or not wanted, the adapter is no single LoRA, a tensor is not
    finite, or ``folder`` is something else than a checkpoint; then, and whatever else fails, nothing has changed.
    """
    if not isinstance(model, (MultiExitEncoder, MultiExitDecoder)):
        raise TypeError(f"model must be a MultiExitEncoder or a MultiExitDecoder, got {type(model).__name__}")
    folder = Path(folder)
    check_replaceable(folder)
    decoder = isinstance(model, MultiExitDecoder)
    module = model.causal_lm if decoder else model.backbone
    base = model.language_model if decoder else model.encoder_backbone
    wrapped = hasattr(module, "peft_config")
    if wrapped and (backbone is None or backbone.sha256 is None):
        raise ValueError("the backbone carries an adapter: name the weights it was trained on (backbone=, with sha256)")
    if not wrapped and backbone is not None:
        raise ValueError("a backbone reference is for models with an adapter; this one's backbone is written whole")
    config = base.config.to_dict()
    config.pop("_name_or_path", None)  # where the backbone lay on the machine that trained: nobody else's business
    config["early_exit"] = model.config.to_dict()
    if wrapped:
        config["early_exit"]["backbone"] = backbone.to_dict()
        name, tensors, adapter_config = _adapter(module, backbone.source)
    else:
        name, tensors, adapter_config = WEIGHTS, module.state_dict(), None
        if decoder and base.config.tie_word_embeddings:
            del tensors["lm_head.weight"]  # the embeddings, once more
    files = {
        name: _plain(tensors, None if name == WEIGHTS else dtype), EXITS: _plain(model.exits.state_dict(), dtype)
    }  # fmt: skip

    def write(target: Path) -> None:
        write_json(target / CONFIG, config)
        if adapter_config is not None:
            write_json(target / ADAPTER_CONFIG, adapter_config)
        if decoder:
            write_json(target / GENERATION, {"eos_token_id": base.generation_config.eos_token_id})
        for name, tensors in files.items():
            save_file(tensors, target / name, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        if card is not None:
            (target / "README.md").write_text(card, encoding="utf-8")
        for name, text in (extra or {}).items():
            (target / name).write_text(text, encoding="utf-8")

    return write_folder(folder, write)


def check_replaceable(folder: Path) -> None:
    """ValueError where ``folder`` is not new, empty or a checkpoint: replacing it would delete somebody's files."""
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_empty and not (folder / EXITS).is_file():
        raise ValueError(f"{folder.absolute()} is there and is no checkpoint: remove it, or choose another folder")


def _adapter(backbone: nn.Module, source: str) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """(file name, tensors, peft config) of the one active adapter, whatever its name."""
    from peft import get_peft_model_state_dict

    active = backbone.active_adapters
    if len(active) != 1 or backbone.peft_config[active[0]].peft_type != "LORA":
        raise ValueError(f"a checkpoint holds one LoRA adapter, but the backbone's active ones are {active}")
    config = backbone.peft_config[active[0]].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    config |= {"base_model_name_or_path": source, "inference_mode": True}
    return ADAPTER, get_peft_model_state_dict(backbone, adapter_name=active[0], save_embedding_layers=False), config


def _plain(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    for name, value in tensors.items():
        check_finite(name, value, dtype or value.dtype, "the model cannot be saved")
    return {name: value.detach().to("cpu", dtype).contiguous() for name, value in tensors.items()}


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# -- whole or not at all -----------------------------------------------------------------------------------------


def write_folder(folder: str | os.PathLike, write: Callable[[Path], None]) -> Path:
    """Fill a new folder through ``write`` and put it in the place of ``folder``, whatever that holds.

    It is filled beside its place and renamed. An error, ctrl-C included, leaves the old folder and nothing else; only
    where a process is killed between the two last renames, the old folder remains under a hidden name beside its place.
    NotADirectoryError for a file.
    """
    folder = Path(folder).resolve()  # through links: it is their target that is replaced
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: remove it, or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True
    ) as beside:
        new, old = Path(beside, folder.name), Path(f"{beside}-old")
        new.mkdir()
        write(new)
        for path in (new, *new.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files for the owner alone
        try:
            if folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)
        except BaseException:
            if old.exists() and not folder.exists():
                os.replace(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    return folder


def write_file(path: str | os.PathLike, data: str | bytes) -> None:
    """Write a file beside its place and rename it there: an error leaves the old file and nothing else."""
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
