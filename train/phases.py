"""The steps of ConsistentEE's training, each a function of model, data and options (paper, Algorithm 1; Eq. 1-7)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from engine.models.encoder import MultiExitEncoder
from engine.train import objectives, policy_gradient
from engine.train.batching import TokenizedExamples, shuffled_batches
from engine.train.config import InitOptions, OptimiserOptions, PolicyOptions, TaskOptions, TeacherOptions
from engine.train.hardness import ForgettingEvents, memorized_layer

log = logging.getLogger("engine.train")
_MODEL_FIELDS = ("input_ids", "attention_mask", "token_type_ids")
_MEASURE_BATCH = 256


@dataclass(frozen=True, eq=False)
class ExitCache:
    """What one full-depth pass in eval mode leaves for policy training. N instances, E exits.

    states   [E, N, H] fp16, what the policies read
    ce       [N, E] fp32
    correct  [N, E] bool
    """

    states: Tensor
    ce: Tensor
    correct: Tensor


def model_inputs(model: MultiExitEncoder, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a collated batch that the model reads, on its device."""
    return {name: batch[name].to(model.device, non_blocking=True) for name in _MODEL_FIELDS if name in batch}


@torch.inference_mode()
def measure(model: MultiExitEncoder, data: TokenizedExamples, description: str = "measure") -> ExitCache:
    """Every exit's state, loss and hit on every instance, dropout off, in the data's order. ValueError for NaN."""
    training = model.training
    model.eval()
    config, n = model.config, len(data)
    states = torch.empty(config.num_exits, n, model.encoder_backbone.config.hidden_size, dtype=torch.float16)
    states = states.to(model.device)
    ce = torch.empty(n, config.num_exits, device=model.device)
    correct = torch.empty(n, config.num_exits, dtype=torch.bool, device=model.device)
    for batch in progress_bar(data.batches(_MEASURE_BATCH, shuffle=False), n, _MEASURE_BATCH, description):
        out = model(**model_inputs(model, batch))
        rows, labels = batch["indices"].to(model.device), batch["labels"].to(model.device)
        states[:, rows] = out.states.half()
        ce[rows] = objectives.cross_entropy_per_exit(out.logits, labels)
        correct[rows] = out.logits.argmax(-1) == labels[:, None]
    model.train(training)
    if not bool(torch.isfinite(states).all()):
        raise ValueError(
            "the exits' states are NaN or exceed what fp16 can hold: use a sound backbone, with pooler shared or "
            "per_layer, which keeps states in [-1, 1]"
        )
    return ExitCache(states, ce, correct)


@dataclass(frozen=True, eq=False)
class Teacher:
    """Soft labels of the train split: log_probs [N, C] fp32, and how they enter the loss of every exit."""

    log_probs: Tensor
    weight: float
    temperature: float


def out_of_fold(
    model: MultiExitEncoder,
    data: TokenizedExamples,
    options: TeacherOptions,
    seed: int,
    restart: Callable[[], None],
) -> Tensor:
    """Log-probabilities [N, C] of every row from a full-depth model that was fine-tuned without it.

    The rows are cut at random into ``options.folds`` parts; ``restart`` gives ``model`` its initial weights again,
    which every part's training starts from. Leaves the model trained for the last part. ValueError for fewer rows than
    parts.
    """
    config, n = model.config, len(data)
    if n < options.folds:
        raise ValueError(f"teacher.folds is {options.folds}, but there are only {n} training rows: choose fewer folds")
    part_of = torch.randperm(n, generator=torch.Generator().manual_seed(seed)) % options.folds
    alone = InitOptions(options.epochs, options.batch_size, options.learning_rate, last_exit_epochs=options.epochs)
    log_probs = torch.empty(n, config.num_labels)
    for part in range(options.folds):
        restart()
        train_init(model, data.select((part_of != part).nonzero()[:, 0]), alone, seed + part)
        held_out = (part_of == part).nonzero()[:, 0]
        found = torch.empty(len(held_out), config.num_labels, device=model.device)
        with torch.inference_mode():
            for batch in data.select(held_out).batches(_MEASURE_BATCH, shuffle=False):
                logits = model(**model_inputs(model, batch)).logits[:, -1]
                found[batch["indices"].to(model.device)] = logits.float().log_softmax(-1)
        log_probs[held_out] = found.cpu()
    return log_probs


def _exit_losses(logits: Tensor, labels: Tensor, rows: Tensor, teacher: Teacher | None) -> Tensor:
    """[N, E]: CE of every exit, mixed with the teacher's opinion where there is one."""
    ce = objectives.cross_entropy_per_exit(logits, labels)
    if teacher is None:
        return ce
    opinion = teacher.log_probs[rows].to(logits.device, non_blocking=True)
    distillation = objectives.distillation_loss(logits, opinion, teacher.temperature)
    return (1 - teacher.weight) * ce + teacher.weight * distillation


def train_init(
    model: MultiExitEncoder, data: TokenizedExamples, options: InitOptions, seed: int, teacher: Teacher | None = None
) -> tuple[list[float], ForgettingEvents]:
    """Step 1: all exits together (Eq. 1-2). Returns the loss of every epoch, and forgetting events at the last exit."""
    forgetting = ForgettingEvents(len(data))

    def loss_of(batch: dict[str, Tensor], labels: Tensor, epoch: int) -> Tensor:
        out = model(**model_inputs(model, batch), early_gradient=options.early_gradient)
        forgetting.update(batch["indices"], out.logits[:, -1].argmax(-1) == labels)
        losses = _exit_losses(out.logits, labels, batch["indices"], teacher)
        if epoch < options.last_exit_epochs:
            return losses[:, -1].mean()
        return objectives.weighted_exit_loss(losses, model.config.exit_layers, options.weighting)

    return _train_task(model, data, options, seed, loss_of, "init"), forgetting


def train_task(
    model: MultiExitEncoder,
    data: TokenizedExamples,
    options: TaskOptions,
    seed: int,
    threshold: float = 0.5,
    teacher: Teacher | None = None,
) -> list[float]:
    """Step 4: the classifier at the exit that the frozen policy takes (Eq. 6). Returns the loss of every epoch."""

    def loss_of(batch: dict[str, Tensor], labels: Tensor, epoch: int) -> Tensor:
        out = model(**model_inputs(model, batch))
        losses = _exit_losses(out.logits, labels, batch["indices"], teacher)
        return objectives.task_loss(
            losses, model.config.exit_layers, out.policy_logits, options.indicator, threshold=threshold
        )

    return _train_task(model, data, options, seed, loss_of, "task")


def _train_task(
    model: MultiExitEncoder,
    data: TokenizedExamples,
    options: InitOptions | TaskOptions,
    seed: int,
    loss_of: Callable[[dict[str, Tensor], Tensor, int], Tensor],
    name: str,
) -> list[float]:
    torch.manual_seed(seed)  # dropout, and the draws of indicator "sample"
    order = torch.Generator().manual_seed(seed)
    parameters = model.task_parameters()
    for parameter in model.policy_parameters():
        parameter.requires_grad_(False)
    steps = -(-len(data) // options.batch_size) * options.epochs
    fast = {id(p) for p in model.reading_parameters()} if options.exits_rate != 1 else set()
    groups = [
        {"params": [p for p in parameters if id(p) not in fast]},
        {"params": [p for p in parameters if id(p) in fast], "lr": options.learning_rate * options.exits_rate},
    ]
    optimiser, schedule = make_optimiser(groups if fast else parameters, options, steps)
    model.train()
    losses = []
    try:
        for epoch in range(options.epochs):
            total = torch.zeros((), device=model.device)
            batches = data.batches(options.batch_size, shuffle=True, generator=order)
            for batch in progress_bar(batches, len(data), options.batch_size, f"{name} {epoch + 1}/{options.epochs}"):
                labels = batch["labels"].to(model.device)
                loss = loss_of(batch, labels, epoch)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimiser.step()
                schedule.step()
                total += loss.detach() * len(labels)
            losses.append(float(total) / len(data))
            if not math.isfinite(losses[-1]):
                raise ValueError(f"{name}: epoch {epoch + 1} has a NaN or infinite loss: lower {name}.learning_rate")
            log.info("%s epoch %d/%d: loss %.4f", name, epoch + 1, options.epochs, losses[-1])
        _check_finite(parameters, name)
    finally:
        for parameter in model.policy_parameters():
            parameter.requires_grad_(True)
        model.eval()
    return losses


def train_policy(
    model: MultiExitEncoder, cache: ExitCache, memorized: Tensor, options: PolicyOptions, alpha: float, seed: int
) -> list[float]:
    """Step 3: the policies, everything else frozen (Eq. 3-5), on cached states and losses.

    memorized  [N] int64 memorized layers. Starts from the policies the model holds.
    Returns the mean expected reward of every epoch (the objective J, higher is better), warm start excluded.
    """
    torch.manual_seed(seed)
    policies = model.exits.policies
    if not len(policies):
        return []
    device = cache.ce.device
    reward = objectives.rewards(
        cache.ce, model.config.exit_layers, alpha, model.config.num_layers, memorized.to(device), options.reward
    )
    order = torch.Generator().manual_seed(seed)
    sampler = torch.Generator(device=device).manual_seed(seed)
    epsilon = policy_gradient.EpsilonSchedule(options.epsilon_start, options.epsilon_end, options.epsilon_tau)
    n = len(reward)
    epochs = options.warm_start_epochs + options.epochs
    parameters = model.policy_parameters()
    optimiser, schedule = make_optimiser(parameters, options, -(-n // options.batch_size) * epochs)
    values, step = [], 0
    model.train()
    for epoch in progress_bar(range(epochs), epochs, 1, f"policy alpha={alpha:.3g}"):
        total = torch.zeros((), device=device)
        for part in shuffled_batches(n, options.batch_size, order):
            rows = part.to(device)
            z = policy_logits(model, cache.states[:, rows])
            r = reward[rows]
            if epoch < options.warm_start_epochs:
                targets = policy_gradient.bce_warm_start_targets(z, r)
                loss = nn.functional.binary_cross_entropy_with_logits(z, targets)
            elif options.method == "closed_form":
                loss = policy_gradient.closed_form_loss(z, r, options.entropy_bonus)
            else:
                # t of the schedule counts layer calls, as the authors do: one per policy and optimiser step.
                share = 0.0 if options.behaviour == "bernoulli" else epsilon(step * len(policies))
                exits = policy_gradient.sample_exits(z, options.num_samples, options.behaviour, share, sampler)
                loss = policy_gradient.reinforce_loss(z, r, exits, options.baseline, options.ratio_clip)
            total += policy_gradient.expected_reward(z.detach(), r).sum()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            step += 1
        if epoch >= options.warm_start_epochs:
            values.append(float(total) / n)
    model.eval()
    _check_finite(parameters, "policy")
    if values:
        log.info("policy alpha %.4g: expected reward %.4f -> %.4f", alpha, values[0], values[-1])
    return values


def policy_logits(model: MultiExitEncoder, states: Tensor) -> Tensor:
    """z [N, E-1] of cached states [E, N, H]."""
    policies = model.exits.policies
    if not len(policies):
        return states.new_zeros(states.shape[1], 0, dtype=torch.float32)
    dtype = policies[0].dense.weight.dtype
    return torch.stack([policy(states[k].to(dtype)) for k, policy in enumerate(policies)], dim=1)


def memorized_layers(cache: ExitCache, exit_layers: tuple[int, ...]) -> Tensor:
    """Step 2 (Eq. 7): [N] int64 on the cache's device."""
    return memorized_layer(cache.correct, exit_layers)


def make_optimiser(parameters: list[nn.Parameter] | list[dict], options: OptimiserOptions, steps: int):
    """AdamW and its schedule, as ``OptimiserOptions`` says."""
    optimiser = torch.optim.AdamW(parameters, lr=options.learning_rate, eps=1e-8, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: max(0.0, 1 - step / max(steps, 1)))
    return optimiser, schedule


def _check_finite(parameters: list[nn.Parameter], name: str) -> None:
    """The last step of an epoch can break weights without a trace in the epoch's loss."""
    if not all(bool(torch.isfinite(p).all()) for p in parameters):
        raise ValueError(f"{name}: training ended with NaN or infinite weights: lower {name}.learning_rate")


def progress_bar(batches: Iterable, rows: int, batch_size: int, description: str) -> Iterable:
    return tqdm(batches, total=-(-rows // batch_size), desc=description, leave=False, delay=1, disable=None)
