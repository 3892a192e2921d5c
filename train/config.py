"""Every choice of a training run, in one frozen record that is checked before work starts and saved with the run."""

from __future__ import annotations

import json
import math
import os
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

from engine.config import POOLERS
from engine.train.objectives import INDICATORS, REWARD_KINDS, WEIGHTINGS
from engine.train.policy_gradient import BASELINES, BEHAVIOURS

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class OptimiserOptions:
    """AdamW (eps 1e-8, no weight decay), linear decay to 0 without warm-up, gradient norm clipped at 1."""

    epochs: int
    batch_size: int
    learning_rate: float
    group: ClassVar[str] = "optimiser"  # the group's name in errors

    def __post_init__(self) -> None:
        check_integer(f"{self.group}.epochs", self.epochs, 0)
        check_integer(f"{self.group}.batch_size", self.batch_size, 1)
        check_positive(f"{self.group}.learning_rate", self.learning_rate)


@dataclass(frozen=True)
class InitOptions(OptimiserOptions):
    """Step 1, Eq. 1-2.

    weighting         w_l = l ("layer", the paper's) or 1 ("equal")
    last_exit_epochs  the first of the epochs train the last exit alone (ours)
    exits_rate        classifiers and poolers learn at this multiple of learning_rate (ours). They start from nothing,
                      the backbone does not: at 1 the exits of MiniLM's first two layers reach 6 and 70 % on
                      StackOverflow, at 10 (with early_gradient 0.5 and a teacher) 83 and 90 %
    early_gradient    what the exits before the last send into the backbone is scaled by this, 0 to 1 (ours): below 1
                      the last exit loses less accuracy to the others
    """

    epochs: int = 5
    batch_size: int = 16
    learning_rate: float = 2e-5
    weighting: str = "layer"
    last_exit_epochs: int = 0
    exits_rate: float = 1.0
    early_gradient: float = 1.0
    group: ClassVar[str] = "init"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("init.weighting", self.weighting, WEIGHTINGS)
        check_integer("init.last_exit_epochs", self.last_exit_epochs, 0)
        check_positive("init.exits_rate", self.exits_rate)
        check_number("init.early_gradient", self.early_gradient, 1.0)


@dataclass(frozen=True)
class TeacherOptions(OptimiserOptions):
    """Distillation into every exit, ahead of and throughout steps 1 and 4 (ours; off by default).

    The same backbone is fine-tuned ``folds`` times at full depth, each time without one part of train, and predicts
    the part it has not seen: soft labels that know which rows are doubtful, where a teacher that has seen a row only
    repeats its label. Every CE_l of Eq. 2 and Eq. 6 becomes (1 - weight) CE_l + weight T^2 KL(teacher || exit l), both
    softened by the temperature T (Hinton et al. 2015, section 2).

    folds  0: no teacher; 2 or more cost folds - 1 times ``epochs`` over train
    """

    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 2e-5
    folds: int = 0
    weight: float = 0.5
    temperature: float = 2.0
    group: ClassVar[str] = "teacher"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("teacher.folds", self.folds, 0)
        if self.folds == 1:
            raise ValueError("teacher.folds must be 0 (none) or at least 2: a fold is predicted by the others, got 1")
        check_number("teacher.weight", self.weight, 1.0)
        check_positive("teacher.temperature", self.temperature)


@dataclass(frozen=True)
class PolicyOptions(OptimiserOptions):
    """Step 3, Eq. 5, on cached states and losses.

    method          closed_form (exact expected reward; ours, default) or reinforce (the paper's)
    reward          hardness (Eq. 4) or vanilla (Eq. 3)
    alpha           price of a layer; None: the middle of objectives.alpha_grid
    ml_refresh      memorized layer computed every round (paper) or once, after step 1 (authors' code)
    initialisation  zero (exit probability 0.5 everywhere) or uniform_hazard (every exit equally likely)
    warm_start_epochs  epochs of binary cross-entropy on the sign of the exact gradient before the objective
    entropy_bonus   closed_form only
    behaviour, num_samples, baseline, ratio_clip, epsilon_*  reinforce only
    """

    epochs: int = 10
    batch_size: int = 256
    learning_rate: float = 1e-3
    method: str = "closed_form"
    reward: str = "hardness"
    alpha: float | None = None
    ml_refresh: str = "round"
    initialisation: str = "uniform_hazard"
    warm_start_epochs: int = 0
    entropy_bonus: float = 0.0
    behaviour: str = "bernoulli"
    num_samples: int = 8
    baseline: str = "leave_one_out"
    ratio_clip: float | None = 10.0
    epsilon_start: float = 0.05
    epsilon_end: float = 0.005
    epsilon_tau: float = 1000.0
    group: ClassVar[str] = "policy"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("policy.method", self.method, ("closed_form", "reinforce"))
        check_one_of("policy.reward", self.reward, REWARD_KINDS)
        check_one_of("policy.ml_refresh", self.ml_refresh, ("round", "once"))
        check_one_of("policy.initialisation", self.initialisation, ("zero", "uniform_hazard"))
        check_one_of("policy.behaviour", self.behaviour, BEHAVIOURS)
        check_one_of("policy.baseline", self.baseline, BASELINES)
        check_integer("policy.num_samples", self.num_samples, 2 if self.baseline == "leave_one_out" else 1)
        check_integer("policy.warm_start_epochs", self.warm_start_epochs, 0)
        if self.alpha is not None:
            check_number("policy.alpha", self.alpha)
        check_number("policy.entropy_bonus", self.entropy_bonus)
        if self.ratio_clip is not None:
            check_positive("policy.ratio_clip", self.ratio_clip)
        check_number("policy.epsilon_start", self.epsilon_start, 1.0)
        check_number("policy.epsilon_end", self.epsilon_end, 1.0)
        check_positive("policy.epsilon_tau", self.epsilon_tau)


@dataclass(frozen=True)
class TaskOptions(OptimiserOptions):
    """Step 4, Eq. 6. indicator: which exits have a loss (greedy, sample, expected); exits_rate: as in InitOptions."""

    epochs: int = 1
    batch_size: int = 16
    learning_rate: float = 2e-5
    indicator: str = "greedy"
    exits_rate: float = 1.0
    group: ClassVar[str] = "task"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("task.indicator", self.indicator, INDICATORS)
        check_positive("task.exits_rate", self.exits_rate)


@dataclass(frozen=True)
class SelectOptions:
    """After the rounds: policies for every alpha on one cache, the operating point chosen on the calibration part.

    alphas      multiples of policy.alpha; empty keeps the policy of the best round at threshold 0.5
    thresholds  exit thresholds tried for each alpha
    max_relative_loss  the deepest saving whose calibration accuracy is at least (1 - this) x the reference
    reference   "full_depth" (this model's last exit), or an accuracy on the same calibration part
    """

    alphas: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
    thresholds: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
    max_relative_loss: float = 0.0
    reference: str | float = "full_depth"

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas", as_tuple("select.alphas", self.alphas))
        object.__setattr__(self, "thresholds", as_tuple("select.thresholds", self.thresholds))
        check_number("select.max_relative_loss", self.max_relative_loss, 1.0)
        for value in self.alphas:
            check_number("select.alphas", value)
        for value in self.thresholds:
            check_number("select.thresholds", value, 1.0)
        if self.alphas and not self.thresholds:
            raise ValueError("select.thresholds must not be empty where alphas are swept")
        if self.reference != "full_depth" and not (_is_finite(self.reference) and 0 <= self.reference <= 1):
            raise ValueError(f"select.reference must be full_depth or an accuracy in [0, 1], got {self.reference!r}")


@dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters on the backbone's linear layers (peft); rank 0: full fine-tuning."""

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.05

    def __post_init__(self) -> None:
        check_integer("lora.rank", self.rank, 0)
        check_positive("lora.alpha", self.alpha)
        check_number("lora.dropout", self.dropout, 1.0)


@dataclass(frozen=True)
class TrainConfig:
    """One ConsistentEE run.

    backbone           hub id or folder of a BERT, RoBERTa or MPNet encoder
    data               folder or hub:owner/name with train, dev and maybe test (engine.train.data.load_folder)
    output             checkpoint folder to write; the run's state stands beside it, in <output>.run
    pooler             none, shared or per_layer (EarlyExitConfig). "none" is the paper's literal reading, and the
                       default because it is better and cheaper: with a shared pooler the first two MiniLM exits stay
                       near chance on StackOverflow, and each exit check multiplies by one more H x H matrix
    exit_layers        None: every layer
    calibration_share  part of train that training never sees: rounds, alpha and threshold are chosen on it
    drop_leaked        drop train rows whose text also stands in dev or test
    max_rounds         of {memorized layer, policy, task}; fewer when the calibration objective
                       mean(-CE - alpha * depth) improves by less than ``tolerance`` (relative)
    """

    backbone: str
    data: str
    output: str
    pooler: str = "none"
    exit_layers: tuple[int, ...] | None = None
    policy_hidden_size: int = 32
    classifier_dropout: float = 0.1
    max_length: int = 128
    calibration_share: float = 0.1
    drop_leaked: bool = True
    seed: int = 42
    device: str = "auto"
    max_rounds: int = 5
    tolerance: float = 1e-3
    lora: LoraOptions = field(default_factory=LoraOptions)
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    init: InitOptions = field(default_factory=InitOptions)
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    task: TaskOptions = field(default_factory=TaskOptions)
    select: SelectOptions = field(default_factory=SelectOptions)

    def __post_init__(self) -> None:
        check_run(self)
        if self.exit_layers is not None:  # which layers there are, the backbone knows
            object.__setattr__(self, "exit_layers", as_tuple("exit_layers", self.exit_layers))
        check_one_of("pooler", self.pooler, POOLERS)
        check_integer("policy_hidden_size", self.policy_hidden_size, 1)
        check_number("classifier_dropout", self.classifier_dropout, 1.0)
        check_flag("drop_leaked", self.drop_leaked)
        check_integer("max_rounds", self.max_rounds, 0)
        check_number("tolerance", self.tolerance)

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TrainConfig:
        return build_options(cls, data, "train")


def check_run(config: Any) -> None:
    """What every run's options have: its names (made text in place), sizes, seed, device and groups of options."""
    for name in ("backbone", "data", "output"):
        value = getattr(config, name)
        if not isinstance(value, (str, os.PathLike)) or not str(value):
            raise ValueError(f"{name} must be a name or a path, got {value!r}")
        object.__setattr__(config, name, str(value))
    if Path(config.output).name in ("", ".."):
        raise ValueError(f"output must name a folder of its own, which is replaced whole, got {config.output!r}")
    object.__setattr__(config, "output", str(Path(config.output)))  # "out/" and "out" are one run
    check_integer("max_length", config.max_length, 3)
    check_positive("calibration_share", config.calibration_share)
    if config.calibration_share >= 1:
        raise ValueError(f"calibration_share must lie in (0, 1), got {config.calibration_share!r}")
    check_integer("seed", config.seed, 0)
    if not isinstance(config.device, str):
        raise TypeError(f"device must be auto or the name of a torch device, got {config.device!r}")
    for group in fields(config):
        kind, value = group.default_factory, getattr(config, group.name)
        if is_dataclass(kind) and not isinstance(value, kind):
            raise TypeError(f"{group.name} must be {kind.__name__}, got {value!r}")


def load_recipe(name: str | Path) -> dict[str, Any]:
    """Options of a recipe: a name in engine/train/recipes, or a JSON file."""
    path = RECIPES / f"{name}.json"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.json")))
        raise FileNotFoundError(f"recipe {name!r} is neither a file nor one of: {known}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a recipe must be a JSON object, got {type(data).__name__}")
    return data


def override(options: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Apply ``key=value`` or ``group.key=value``; values are JSON, or strings where they are not."""
    merged = json.loads(json.dumps(options))
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key:
            raise ValueError(f"expected key=value, got {assignment!r}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        target = merged
        *groups, last = key.split(".")
        for group in groups:
            target = target.setdefault(group, {})
            if not isinstance(target, dict):
                raise ValueError(f"{assignment!r}: {group} is not a group of options")
        target[last] = value
    return merged


def build_options(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise TypeError(f"{where} must be a group of options, got {type(data).__name__}: {data!r}")
    known = {f.name: f for f in fields(cls)}
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ValueError(f"{where} has unknown options {unknown}; known are {sorted(known)}")
    required = {name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if required - set(data):
        raise ValueError(f"{where} lacks the options {sorted(required - set(data))}")
    values = dict(data)
    for name, value in data.items():
        default = known[name].default_factory
        if is_dataclass(default):
            values[name] = build_options(default, value, name)
    return cls(**values)


def check_one_of(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")


def check_integer(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")


def check_number(name: str, value: Any, high: float = math.inf) -> None:
    """0 <= value <= high, and finite."""
    if not _is_finite(value) or not 0 <= value <= high:
        allowed = "0 or more" if high == math.inf else f"in [0, {high:g}]"
        raise ValueError(f"{name} must be a number {allowed}, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    if not _is_finite(value) or value <= 0:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def as_tuple(name: str, value: Any) -> tuple:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list, got {value!r}")
    return tuple(value)
