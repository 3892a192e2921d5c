"""A training run that may be killed at any moment: phases, each stored whole before the next one begins.

Every phase starts from the stored result of the one before and from its own seed, so a run that is killed and started
again does what an uninterrupted one would have done (bit for bit on a CPU).
"""

from __future__ import annotations

import json
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.devices import find_device
from engine.loading import check_replaceable, write_file, write_folder
from engine.reading import fill_tensors, read_tensors
from engine.train import card
from engine.train.start import read_record

log = logging.getLogger("engine.train")
_RECORD, _WEIGHTS = "record.json", "weights.safetensors"


class ResumableRun(ABC):
    """What all runs share: a folder beside the output with the record and the weights of phases.

    Set by who inherits, before ``_open``: model, backbone (a reference), data ({split: sha256 or None}).
    """

    model: nn.Module
    backbone: Any
    data: dict[str, str | None]

    def __init__(self, config: Any):
        self.config = config
        self.folder = Path(config.output + ".run")
        check_replaceable(Path(config.output))
        self.device = find_device(config.device, "cuda" if torch.cuda.is_available() else "cpu")
        self.record: dict[str, Any] = {}
        self._at = ""  # the phase that has been reached
        self._running = ""
        self._holds: str | None = ""  # the phase whose weights the model has; "": fresh ones, None: unknown ones

    @abstractmethod
    def _fresh_model(self) -> nn.Module:
        """The model that the run starts from."""

    @abstractmethod
    def _describe(self) -> dict[str, Any]:
        """What else a new record begins with."""

    @abstractmethod
    def _measured(self, name: str) -> dict[str, Any]:
        """Figures of the calibration part under the model as it is, for the phase that has just run; logs a line."""

    def _open(self) -> dict[str, Any]:
        """The record to go on with; stored at once, so that a place where it cannot be is found before training."""
        start = {
            "config": self.config.to_dict(),
            "backbone": {"source": self.backbone.source, "sha256": self.backbone.sha256},
            "data": self.data,
        }
        record = read_record(self.folder / _RECORD, start)
        if record is None:
            record = {**start, **self._describe(), "versions": card.versions(self.device), "phases": {}}
        else:
            log.info("resuming %s behind %s", self.folder, next(reversed(record["phases"]), "the start"))
        self.record = record
        self._store_record()
        return record

    def _store_record(self) -> None:
        write_file(self.folder / _RECORD, json.dumps(self.record, indent=1))

    def _store(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors in a folder of the run's own, whole or not at all."""
        from safetensors.torch import save_file

        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        write_folder(self.folder / name, lambda folder: save_file(plain, folder / _WEIGHTS))

    def _stored(self, name: str) -> dict[str, Tensor] | None:
        """What ``_store`` has kept, None where it has not."""
        path = self.folder / name / _WEIGHTS
        return read_tensors(path) if path.exists() else None

    def _phase(self, name: str, body: Callable[..., dict[str, Any]], keep: str = "", **kwargs: Any) -> None:
        """Run one phase behind the current one, unless it is stored; store its weights, then its figures.

        Weights of earlier phases are dropped, except those of ``keep``.
        """
        before, self._at = self._at, name
        if name in self.record["phases"]:
            return
        if self._holds != before:
            self._restore(before)
        self._holds = None  # half-trained weights until the phase is stored: run() may be called again after ctrl-C
        log.info("phase %s", name)
        self._running = name
        found = body(**kwargs)
        found["calibration"] = self._measured(name)
        self._store(name, trained_state(self.model))
        self.record["phases"][name] = found
        self._store_record()
        self._holds = name
        for earlier in set(self.record["phases"]) - {name, keep}:
            shutil.rmtree(self.folder / earlier, ignore_errors=True)

    def _restore(self, phase: str) -> None:
        """Give the model the weights that ``phase`` left; "": those that the run starts from."""
        if phase:
            path = self.folder / phase / _WEIGHTS
            tensors = read_tensors(path)
        else:
            path = Path(self.config.backbone)
            tensors = trained_state(self._fresh_model())
        self._holds = None
        fill_tensors(trained_state(self.model), tensors, path)
        self._holds = phase


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: all tensors, or with an adapter all but the frozen backbone's. Shares storage."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad or name.startswith("exits.")}
    return {name: value for name, value in model.state_dict().items() if name in trained}


def discard(output: str) -> None:
    """Remove the state of a run, not its checkpoint."""
    shutil.rmtree(Path(output + ".run"), ignore_errors=True)
