"""What a checkpoint says about its exits: the ``early_exit`` section of ``config.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

POOLERS = ("shared", "per_layer", "none")
CRITERIA = ("policy", "scripted")
HEADS = ("shared", "lora", "own")
HEAD_SIDES = ("hidden", "logits")
FORMAT_VERSION = 1


@dataclass(frozen=True)
class EarlyExitConfig:
    """Exits of one multi-exit model. Immutable, checked once when it is made.

    num_layers          transformer layers of the backbone, numbered 1 ... num_layers
    exit_layers         layers that carry an exit, ascending; the last one is num_layers
    labels              class names; a label id is the position in this tuple
    pooler              what the exit reads of the first token's hidden state h: tanh(W h + b) with one W for all
                        layers ("shared"), one per exit ("per_layer"), or h itself ("none")
    policy_hidden_size  width of the policy's hidden layer (paper: two-layer MLP; 32 in the authors' code)
    classifier_dropout  dropout before each internal classifier, in training only
    criterion           when a row leaves, unless a run says otherwise
    threshold           a row leaves when its exit probability is above this, unless a run says otherwise
    max_length          longest row in tokens, special tokens included
    leave_rates         {threshold: expected share of the rows reaching each exit but the last that leave there}, as
                        measured on the calibration part. Plans the order of work, never a decision; may be empty
    """

    num_layers: int
    exit_layers: tuple[int, ...]
    labels: tuple[str, ...]
    pooler: str = "none"
    policy_hidden_size: int = 32
    classifier_dropout: float = 0.1
    criterion: str = "policy"
    threshold: float = 0.5
    max_length: int = 512
    leave_rates: tuple[tuple[float, tuple[float, ...]], ...] = ()
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name in ("exit_layers", "labels", "leave_rates"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                raise TypeError(f"{name} must be a list, got {type(value).__name__}: {value!r}")
            object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "leave_rates", _checked_rates(self.leave_rates, len(self.exit_layers) - 1))
        _check_version(self.format_version)
        _positive_int("num_layers", self.num_layers)
        _positive_int("policy_hidden_size", self.policy_hidden_size)
        _positive_int("max_length", self.max_length)
        _check_exit_layers(self.exit_layers, self.num_layers)
        if not all(isinstance(name, str) for name in self.labels):
            raise TypeError(f"labels must be strings, got {list(self.labels)!r}")
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels must be two or more different names, got {list(self.labels)!r}")
        if self.pooler not in POOLERS:
            raise ValueError(f"pooler must be one of {', '.join(POOLERS)}, got {self.pooler!r}")
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {self.criterion!r}")
        _in_range("threshold", self.threshold, 0.0, 1.0)
        _in_range("classifier_dropout", self.classifier_dropout, 0.0, 1.0)

    @property
    def num_exits(self) -> int:
        return len(self.exit_layers)

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    def expected_leave_rates(self, threshold: float) -> dict[int, float]:
        """{layer: expected share of the rows reaching it that leave there} for every exit but the last.

        Interpolated between the measured thresholds; without measurements every exit is taken to be equally likely.
        """
        exits = self.exit_layers[:-1]
        if threshold >= 1:
            return dict.fromkeys(exits, 0.0)
        if not self.leave_rates:
            return {layer: 1 / (self.num_exits - k) for k, layer in enumerate(exits)}
        above = next((i for i, (t, _) in enumerate(self.leave_rates) if t >= threshold), len(self.leave_rates) - 1)
        (low, before), (high, after) = self.leave_rates[max(above - 1, 0)], self.leave_rates[above]
        share = min(max((threshold - low) / (high - low), 0.0), 1.0) if high > low else 1.0
        return {layer: (1 - share) * a + share * b for layer, a, b in zip(exits, before, after, strict=True)}

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["exit_layers"] = list(self.exit_layers)
        data["labels"] = list(self.labels)
        data["leave_rates"] = [[threshold, list(rates)] for threshold, rates in self.leave_rates]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "early_exit") -> EarlyExitConfig:
        """Build from parsed JSON. Unknown and missing keys are a ValueError that names them."""
        _check_keys(cls, data, where, lists=("exit_layers", "labels"))
        return cls(**data)


@dataclass(frozen=True)
class DecoderExitConfig:
    """Exits of one multi-exit decoder. Immutable, checked once when it is made.

    num_layers, exit_layers, policy_hidden_size, criterion, threshold   as in EarlyExitConfig
    head        next-token logits of an exit: the model's own head ("shared"), with a change of low rank for each exit
                ("lora"), or a head for each exit ("own", the authors' code: as large as the vocabulary each time)
    head_side   where the change of rank ``head_rank`` acts: on the final-normed state ("hidden", small at large
                vocabularies) or on the logits ("logits", what LoRA on the authors' heads comes to)
    early_exit_classifier   hold CALM's: one linear layer for all exits, beside the policies
    max_length  longest sequence in tokens, prompt and continuation
    """

    num_layers: int
    exit_layers: tuple[int, ...]
    head: str = "lora"
    head_rank: int = 16
    head_side: str = "hidden"
    policy_hidden_size: int = 32
    early_exit_classifier: bool = False
    criterion: str = "policy"
    threshold: float = 0.5
    max_length: int = 2048
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if not isinstance(self.exit_layers, (list, tuple)):
            raise TypeError(f"exit_layers must be a list, got {type(self.exit_layers).__name__}: {self.exit_layers!r}")
        object.__setattr__(self, "exit_layers", tuple(self.exit_layers))
        _check_version(self.format_version)
        for name in ("num_layers", "head_rank", "policy_hidden_size", "max_length"):
            _positive_int(name, getattr(self, name))
        _check_exit_layers(self.exit_layers, self.num_layers)
        for name, allowed in (("head", HEADS), ("head_side", HEAD_SIDES), ("criterion", CRITERIA)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not isinstance(self.early_exit_classifier, bool):
            raise TypeError(f"early_exit_classifier must be true or false, got {self.early_exit_classifier!r}")
        _in_range("threshold", self.threshold, 0.0, 1.0)

    @property
    def num_exits(self) -> int:
        return len(self.exit_layers)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "exit_layers": list(self.exit_layers)}

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "early_exit") -> DecoderExitConfig:
        """Build from parsed JSON. Unknown and missing keys are a ValueError that names them."""
        _check_keys(cls, data, where, lists=("exit_layers",))
        return cls(**data)


def _check_keys(cls: type, data: Any, where: str, lists: tuple[str, ...]) -> None:
    if not isinstance(data, dict):
        raise TypeError(f"{where} must be a mapping, got {type(data).__name__}")
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}; known keys are {sorted(known)}")
    missing = sorted({"num_layers", *lists} - set(data))
    if missing:
        raise ValueError(f"{where} lacks the keys {missing}")
    for key in lists:
        if not isinstance(data[key], (list, tuple)):
            raise TypeError(f"{where}.{key} must be a list, got {type(data[key]).__name__}")


def _check_version(version: Any) -> None:
    if version != FORMAT_VERSION:
        raise ValueError(
            f"early_exit.format_version is {version!r}, this engine reads {FORMAT_VERSION}: "
            "load the checkpoint with the release that wrote it, or export it again"
        )


def _check_exit_layers(exit_layers: tuple, num_layers: int) -> None:
    if not exit_layers or any(isinstance(x, bool) or not isinstance(x, int) for x in exit_layers):
        raise ValueError(f"exit_layers must be a list of layer numbers, got {list(exit_layers)!r}")
    if list(exit_layers) != sorted(set(exit_layers)) or exit_layers[0] < 1:
        raise ValueError(f"exit_layers must be ascending, without repeats, from 1 on, got {list(exit_layers)}")
    if exit_layers[-1] != num_layers:
        raise ValueError(
            f"the last exit must stand at the last layer ({num_layers}), got exit_layers {list(exit_layers)}"
        )


def _checked_rates(leave_rates: tuple, entries: int) -> tuple[tuple[float, tuple[float, ...]], ...]:
    checked = []
    for pair in leave_rates:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[1], (list, tuple)):
            raise TypeError(f"leave_rates must hold [threshold, [rate of every exit but the last]] pairs, got {pair!r}")
        threshold, rates = pair
        _in_range("leave_rates: threshold", threshold, 0.0, 1.0)
        if len(rates) != entries:
            raise ValueError(
                f"leave_rates at threshold {threshold:g} must have {entries} entries, one for each exit but the last, "
                f"got {len(rates)}"
            )
        for rate in rates:
            _in_range("leave_rates", rate, 0.0, 1.0)
        checked.append((threshold, tuple(rates)))
    return tuple(sorted(checked))


def _positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _in_range(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value!r}")
