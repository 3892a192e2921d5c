"""Files read with everything checked: an error names the file, and the key or tensor in it that is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NO_PICKLES = (
    "pickles can run code when they are read, and are not: convert with safetensors.torch.save_file(torch.load(path, "
    "weights_only=True), '{}')"
)


@contextmanager
def naming(what: object) -> Iterator[None]:
    """Errors of the body become a ValueError that begins with ``what``, the file at fault; OSErrors name theirs."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # transformers, peft and tokenizers raise all kinds, the bare Exception included
        kind = "" if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{error}") from error


def require_file(folder: Path, name: str) -> Path:
    """The file's path. FileNotFoundError where it is missing, ValueError where pickles stand in its stead."""
    if (folder / name).is_file():
        return folder / name
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if pickles and name.endswith(".safetensors"):
        raise ValueError(f"{folder} holds no {name}, but {', '.join(pickles)}: " + NO_PICKLES.format(name))
    raise FileNotFoundError(f"{folder} holds no {name}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. FileNotFoundError where there is no file, ValueError where it holds something else."""
    require_file(path.parent, path.name)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested without end
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. ValueError where it is malformed, else as ``require_file``."""
    require_file(path.parent, path.name)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def check_tensors(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: object) -> None:
    """ValueError that names the tensor unless ``tensors`` has the names and shapes of ``expected``, and finite values.

    where  the file the tensors came from, for the error. ``expected`` may be on the meta device.
    """
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing:
        raise ValueError(f"{where} lacks the tensor{'s' * (len(missing) > 1)} {_some(missing)}")
    if extra:
        raise ValueError(f"{where} has tensors that the model does not: {_some(extra)}")
    for name, value in tensors.items():
        wanted = expected[name]
        if value.shape != wanted.shape:
            raise ValueError(
                f"{where}: tensor {name} has shape {list(value.shape)}, the model needs {list(wanted.shape)}"
            )
        if value.is_floating_point() != wanted.is_floating_point():
            raise ValueError(f"{where}: tensor {name} has dtype {value.dtype}, the model needs {wanted.dtype}")
        check_finite(name, value, wanted.dtype, where)


def check_finite(name: str, value: Tensor, dtype: torch.dtype, where: object) -> None:
    """ValueError unless every value is finite, and stays so in ``dtype``."""
    if _is_finite(value.to(dtype)):
        return
    if _is_finite(value.double()):
        raise ValueError(
            f"{where}: tensor {name} holds values beyond the range of {dtype} (at most {torch.finfo(dtype).max:g}): "
            "choose a dtype of wider range"
        )
    raise ValueError(f"{where}: tensor {name} holds NaN or infinite values")


def _is_finite(value: Tensor) -> bool:
    # NaN and infinities show in aminmax, which stores no mask: 1.5 ms for 10 M fp32 values, isfinite 44 ms (1 thread).
    return value.numel() == 0 or all(math.isfinite(x) for x in value.detach().aminmax())


@torch.no_grad()
def fill_tensors(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: object) -> None:
    """Write ``tensors`` into those of ``expected``; nothing is written unless all pass ``check_tensors``."""
    check_tensors(expected, tensors, where)
    for name, value in tensors.items():
        expected[name].copy_(value)


def fill_module(module: nn.Module, tensors: Mapping[str, Tensor], where: object) -> None:
    """``fill_tensors`` for all parameters and persistent buffers of a module."""
    fill_tensors(module.state_dict(), tensors, where)


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
