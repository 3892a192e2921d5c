"""The steps of ConsistentEE's training for decoders, each a function of model, data and options.

Every position with a next token is an instance of ``objectives``: N tokens, E exits. The losses of all exits cost E
head products a token, so logits exist for a few hundred tokens at a time, in the backward pass too.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.models.decoder import MultiExitDecoder
from engine.train import objectives, policy_gradient
from engine.train.decoder_config import HeadOptions, StepOptions, TokenPolicyOptions, TokenTaskOptions
from engine.train.hardness import memorized_layer
from engine.train.instructions import TokenizedInstructions
from engine.train.phases import make_optimiser, progress_bar

log = logging.getLogger("engine.train")
# Tokens whose logits of one exit exist at a time: 512 x 49 152 fp32 are 100 MB, and a GPU has more.
_CHUNK, _CHUNK_ON_GPU = 512, 4096


def _chunk(n: Tensor) -> int:
    return _CHUNK_ON_GPU if n.is_cuda else _CHUNK


def token_losses(model: MultiExitDecoder, exit_index: int, n: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """CE (T,) in nats and hits (T,) bool of one exit for final-normed states n (T, H) and targets (T,).

    Differentiable in n and the head; logits are made again in the backward pass, chunk by chunk.
    """

    def of_chunk(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.exit_logits(exit_index, states).float()
        return nn.functional.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1) == wanted

    size = _chunk(n)
    chunks = zip(n.split(size), targets.split(size), strict=True)
    if torch.is_grad_enabled():
        parts = [checkpoint(of_chunk, states, wanted, use_reentrant=False) for states, wanted in chunks]
    else:
        parts = [of_chunk(states, wanted) for states, wanted in chunks]
    return torch.cat([ce for ce, _ in parts]), torch.cat([hit for _, hit in parts])


def exit_states(model: MultiExitDecoder, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Final-normed states (E, T, H) of every exit at full depth, and targets (T,), of the positions that have one."""
    batch = {name: value.to(model.device) for name, value in batch.items()}
    outputs = model.layer_outputs(batch["input_ids"], batch["attention_mask"])
    asked = batch["targets"] >= 0
    states = [model.final_norm(outputs[layer - 1][asked]) for layer in model.config.exit_layers]
    return torch.stack(states), batch["targets"][asked]


def all_losses(model: MultiExitDecoder, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """CE and hits (T, E) of all exits."""
    parts = [token_losses(model, k, n, targets) for k, n in enumerate(states)]
    return torch.stack([ce for ce, _ in parts], 1), torch.stack([hit for _, hit in parts], 1)


def policy_logits(model: MultiExitDecoder, states: Tensor) -> Tensor:
    """z (T, E - 1) of states (E, T, H)."""
    found = [model.policy_logits(k, n) for k, n in enumerate(states[:-1])]
    return torch.stack(found, 1) if found else states.new_zeros(states.shape[1], 0)


def train_last_exit(
    model: MultiExitDecoder, data: TokenizedInstructions, options: StepOptions, seed: int
) -> list[float]:
    """Mode 0: the backbone's parameters that require a gradient (a LoRA adapter's, say), CE at the last exit."""

    def loss_of(batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        batch = {name: value.to(model.device) for name, value in batch.items()}
        hidden = model.layer_outputs(batch["input_ids"], batch["attention_mask"])[-1]
        asked = batch["targets"] >= 0
        last = model.config.num_exits - 1
        ce, _ = token_losses(model, last, model.final_norm(hidden[asked]), batch["targets"][asked])
        return ce.mean(), len(ce)

    return _train(model, data, options, seed, _adapter_parameters(model), loss_of, "sft", dropout=True)


_RIDGE = 1e-4  # of the mean variance of a state's elements


@torch.no_grad()
def fit_heads(model: MultiExitDecoder, data: TokenizedInstructions, batch_size: int = 16) -> None:
    """Start "lora" heads of the hidden side where they are worth most: n_l + B A n_l is the map of rank R that comes
    nearest to the last exit's state, in the mean over all tokens (reduced-rank regression: Izenman 1975; as a linear
    map behind every layer: Belrose et al. 2023, "tuned lens"). One pass over the data, no gradients.

    SmolLM2-135M's head reads n_l of layer 15 at 18.5 nats a token; behind a fitted map of rank 128 at 4.8.
    """
    config = model.config
    if config.head != "lora" or config.head_side != "hidden":
        given = f"{config.head!r}, {config.head_side!r}"
        raise ValueError(f"heads are fitted for head 'lora' on side 'hidden', got {given}")
    model.eval()
    covariance = product = None
    for batch in progress_bar(data.batches(batch_size, False), len(data), batch_size, "fit"):
        states = exit_states(model, batch)[0].double()  # (E, T, H)
        if covariance is None:
            shape = len(states), states.shape[-1], states.shape[-1]
            covariance, product = states.new_zeros(shape), states.new_zeros(shape)
        covariance += states.mT @ states
        product += states.mT @ states[-1]
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    for delta, xx, xy in list(zip(model.exits.deltas, covariance, product, strict=True))[:-1]:
        xx = xx + _RIDGE * xx.diagonal().mean() * eye
        change = torch.linalg.solve(xx, xy) - eye  # n (1 + change) ~ the last exit's n
        # |X change|^2 = |L' change|^2 for X'X = L L': its largest right singular vectors are what is kept.
        vectors = torch.linalg.svd(torch.linalg.cholesky(xx).mT @ change)[2][: config.head_rank].mT
        a = change @ vectors
        scale = a.norm(dim=0).sqrt()  # both factors the same length: they are trained at one rate
        delta.a.weight.copy_((a / scale).mT)
        delta.b.weight.copy_(vectors * scale)


def train_heads(model: MultiExitDecoder, data: TokenizedInstructions, options: HeadOptions, seed: int) -> list[float]:
    """Mode 1: what the exits' heads have of their own, by sum_l l CE_l / sum_l l; everything else frozen, unless
    ``options.adapter`` says that what the backbone trains is trained with them."""
    parameters = model.head_parameters()
    if options.adapter:
        parameters = parameters + _adapter_parameters(model)

    def loss_of(batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        with torch.set_grad_enabled(options.adapter):
            states, targets = exit_states(model, batch)
        ce, _ = all_losses(model, states, targets)
        return objectives.weighted_exit_loss(ce, model.config.exit_layers), len(ce)

    return _train(model, data, options, seed, parameters, loss_of, "heads", dropout=options.adapter)


def _adapter_parameters(model: MultiExitDecoder) -> list[nn.Parameter]:
    own = {id(p) for p in model.exits.parameters()}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in own]


def train_policies(
    model: MultiExitDecoder,
    data: TokenizedInstructions,
    options: TokenPolicyOptions,
    alphas: Sequence[float],
    seed: int,
) -> list[nn.ModuleList]:
    """Mode 2 by the closed form, for several prices of a layer side by side: what costs time, the states and losses of
    all exits, is the same for all. The policies of each price, which all start as the model's; the model stays."""
    sets = [copy.deepcopy(model.exits.policies) for _ in alphas]
    _train_closed_form(model, data, options, dict(zip(alphas, sets, strict=True)), seed)
    return sets


def _train_closed_form(
    model: MultiExitDecoder,
    data: TokenizedInstructions,
    options: TokenPolicyOptions,
    sets: Mapping[float, nn.ModuleList],
    seed: int,
) -> list[float]:
    layers, num_layers = model.config.exit_layers, model.config.num_layers

    def loss_of(batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        with torch.no_grad():
            states, targets = exit_states(model, batch)
            ce, hits = all_losses(model, states, targets)
        ml = memorized_layer(hits, layers)
        losses = []
        for alpha, policies in sets.items():
            rewards = objectives.rewards(ce, layers, alpha, num_layers, ml, options.reward)
            z = torch.stack([policy(n) for policy, n in zip(policies, states, strict=False)], 1)
            losses.append(policy_gradient.closed_form_loss(z, rewards, options.entropy_bonus))
        return torch.stack(losses).sum(), len(ce)

    parameters = [p for policies in sets.values() for p in policies.parameters()]
    return _train(model, data, options, seed, parameters, loss_of, "policy alpha=" + _listed(sets))


def _listed(alphas: Iterable[float]) -> str:
    return ", ".join(f"{alpha:.3g}" for alpha in alphas)


def train_policy(
    model: MultiExitDecoder, data: TokenizedInstructions, options: TokenPolicyOptions, alpha: float, seed: int
) -> list[float]:
    """Mode 2: the policies, everything else frozen. Returns minus the mean reward of every epoch."""
    layers, num_layers = model.config.exit_layers, model.config.num_layers
    if len(layers) == 1:
        return []
    if options.context == "full":
        return _train_closed_form(model, data, options, {alpha: model.exits.policies}, seed)
    generator = torch.Generator(device=model.device).manual_seed(seed)

    def loss_of(batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        discount = torch.ones(())
        if options.reward == "hardness":
            with torch.no_grad():
                ml = memorized_layer(all_losses(model, *exit_states(model, batch))[1], layers)
            discount = 1 - ml.float() / num_layers
        log_probs, rewards = [], []
        for _ in range(options.num_samples):
            log_prob, depth, ce = sampled_exits(model, batch, generator)
            log_probs.append(log_prob / depth if options.per_layer else log_prob)
            rewards.append(-ce - alpha * discount.to(ce.device) * depth)
        reward = torch.stack(rewards)
        k = options.num_samples
        advantage = (reward - reward.mean(0)) * (k / (k - 1))
        return -(advantage * torch.stack(log_probs)).mean(), reward.shape[1]

    return _train(model, data, options, seed, model.policy_parameters(), loss_of, f"sampled alpha={alpha:.3g}")


def train_early_exit_classifier(
    model: MultiExitDecoder, data: TokenizedInstructions, options: StepOptions, seed: int
) -> list[float]:
    """CALM's baseline: its classifier, everything else frozen, by whether an exit's token is the last exit's:
    binary CE, both answers of an exit weighing the same, in the mean over the exits but the last."""

    def loss_of(batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        with torch.no_grad():
            states, _ = exit_states(model, batch)
            tokens = torch.stack([_best_tokens(model, k, n) for k, n in enumerate(states)], 1)
            same = (tokens[:, :-1] == tokens[:, -1:]).float()
            share = same.mean(0).clamp(1 / len(same), 1 - 1 / len(same)) if len(same) > 1 else 0.5
            weight = torch.where(same > 0, 0.5 / share, 0.5 / (1 - share))
        z = torch.stack([model.classifier_logits(n) for n in states[:-1]], 1)
        return nn.functional.binary_cross_entropy_with_logits(z, same, weight), len(same)

    parameters = list(model.exits.early_exit_classifier.parameters())
    return _train(model, data, options, seed, parameters, loss_of, "early-exit classifier")


def _best_tokens(model: MultiExitDecoder, exit_index: int, n: Tensor) -> Tensor:
    return torch.cat([model.exit_logits(exit_index, states).argmax(-1) for states in n.split(_chunk(n))])


def sampled_exits(
    model: MultiExitDecoder, batch: dict[str, Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """A pass in which every position draws its exit from its policies, with real state copying.

    Of the T positions with a target: log-probability of the trajectory (T,), differentiable in the policies; exit layer
    (T,); CE at the exit (T,), without gradient. Positions of a prompt draw, too: there is no prompt pass in training.
    """
    batch = {name: value.to(model.device) for name, value in batch.items()}
    shape, exits = batch["input_ids"].shape, model.config.exit_layers
    asked = batch["targets"] >= 0
    left = torch.full(shape, model.config.num_layers, device=model.device)
    inside = torch.ones(shape, dtype=torch.bool, device=model.device)
    log_prob = torch.zeros(shape, device=model.device)
    states: Tensor | None = None

    def behind(layer: int, hidden: Tensor) -> Tensor:
        """What a layer gives is looked at before the next one runs: who leaves keeps its state from now on."""
        nonlocal inside, log_prob, states
        if layer in exits:
            n = model.final_norm(hidden)
            states = n if states is None else torch.where(inside[..., None], n, states)
            index = exits.index(layer)
            if layer < model.config.num_layers:
                with torch.enable_grad():
                    z = model.policy_logits(index, n)
                    draws = torch.rand(shape, generator=generator, device=z.device)
                    leaves = draws < torch.sigmoid(z.detach())
                    said = torch.where(leaves, nn.functional.logsigmoid(z), nn.functional.logsigmoid(-z))
                    log_prob = log_prob + torch.where(inside, said, 0.0)
                left[inside & leaves] = layer
                inside = inside & ~leaves
        return left

    with torch.no_grad():
        model.layer_outputs(batch["input_ids"], batch["attention_mask"], exit_layers=behind)
        depth, n, targets = left[asked], states[asked], batch["targets"][asked]
        ce = torch.empty(len(targets), device=model.device)
        for index, layer in enumerate(exits):
            rows = depth == layer
            if bool(rows.any()):
                ce[rows] = token_losses(model, index, n[rows], targets[rows])[0]
    return log_prob[asked], depth, ce


def train_task(
    model: MultiExitDecoder,
    data: TokenizedInstructions,
    options: TokenTaskOptions,
    seed: int,
    threshold: float = 0.5,
) -> list[float]:
    """Mode 3: the heads at the exits that the frozen policies take (Eq. 6), at full context; with ``options.adapter``
    what the backbone trains, too."""
    parameters = model.head_parameters()
    if options.adapter:
        parameters = parameters + _adapter_parameters(model)

    def loss_of(batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        with torch.set_grad_enabled(options.adapter):
            states, targets = exit_states(model, batch)
        with torch.no_grad():  # a constant of Eq. 6: the adapter is not to gain by moving exits
            z = policy_logits(model, states)
        ce, _ = all_losses(model, states, targets)
        return objectives.task_loss(ce, model.config.exit_layers, z, options.indicator, threshold), len(ce)

    return _train(model, data, options, seed, parameters, loss_of, "task", dropout=options.adapter)


@dataclass(frozen=True)
class TokenFigures:
    """Of a pass with the greedy policy at full context. ce, accuracy: at the exits taken, and (``_full``) at the last;
    per exit: the losses at that exit of all tokens, and the share of tokens that leave there."""

    tokens: int
    ce: float
    ce_full: float
    accuracy: float
    accuracy_full: float
    mean_depth: float
    exit_ce: tuple[float, ...]
    exit_share: tuple[float, ...]


@torch.no_grad()
def measure(
    model: MultiExitDecoder, data: TokenizedInstructions, threshold: float = 0.5, batch_size: int = 16
) -> TokenFigures:
    """Teacher-forced figures, without copying: cheap; what decoding finds is measured by decoding."""
    layers = model.config.exit_layers
    total = torch.zeros(4, dtype=torch.float64)
    per_ce, share, depth, count = torch.zeros(len(layers)).double(), torch.zeros(len(layers)).double(), 0.0, 0
    for batch in data.batches(batch_size, shuffle=False):
        states, targets = exit_states(model, batch)
        ce, hits = all_losses(model, states, targets)
        index = objectives.greedy_exit_index(policy_logits(model, states), threshold)
        taken, hit = (x.gather(1, index[:, None])[:, 0].double().sum().cpu() for x in (ce, hits))
        total += torch.stack([taken, ce[:, -1].double().sum().cpu(), hit, hits[:, -1].double().sum().cpu()])
        per_ce += ce.double().sum(0).cpu()
        share += torch.bincount(index.cpu(), minlength=len(layers))
        depth += float(torch.tensor(layers)[index.cpu()].sum())
        count += len(ce)
    ce, ce_full, accuracy, accuracy_full = (total / count).tolist()
    return TokenFigures(
        count, ce, ce_full, accuracy, accuracy_full, depth / count,
        tuple((per_ce / count).tolist()), tuple((share / count).tolist()),
    )  # fmt: skip


def _train(
    model: MultiExitDecoder,
    data: TokenizedInstructions,
    options: StepOptions,
    seed: int,
    parameters: list[nn.Parameter],
    loss_of: Callable[[dict[str, Tensor]], tuple[Tensor, int]],
    name: str,
    dropout: bool = False,
) -> list[float]:
    """The loss of every epoch, a mean over tokens. Only ``parameters`` change. Where the backbone is frozen its
    adapter's dropout is off: exits then learn from the states that they will see."""
    if not parameters:
        raise ValueError(f"{name}: there is nothing to train (of a shared head an exit has nothing of its own)")
    torch.manual_seed(seed)  # dropout
    order = torch.Generator().manual_seed(seed)
    steps = -(-len(data) // options.batch_size) * options.epochs
    optimiser, schedule = make_optimiser(parameters, options, steps)
    losses = []
    with _only(model, parameters):
        model.train(dropout)
        for epoch in range(options.epochs):
            total, count = 0.0, 0
            batches = data.batches(options.batch_size, True, order)
            for batch in progress_bar(batches, len(data), options.batch_size, f"{name} {epoch + 1}/{options.epochs}"):
                loss, tokens = loss_of(batch)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimiser.step()
                schedule.step()
                total += float(loss.detach()) * tokens
                count += tokens
            losses.append(total / max(count, 1))
            if not math.isfinite(losses[-1]):
                raise ValueError(f"{name}: epoch {epoch + 1} has a NaN or infinite loss: lower the learning rate")
            log.info("%s epoch %d/%d: loss %.4f", name, epoch + 1, options.epochs, losses[-1])
    return losses


class _only:
    """Gradients for some parameters alone; eval mode and what required a gradient before, afterwards."""

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter]):
        self._model, self._chosen = model, {id(p) for p in parameters}
        self._before = [(p, p.requires_grad) for p in model.parameters()]

    def __enter__(self) -> None:
        for parameter, _ in self._before:
            parameter.requires_grad_(id(parameter) in self._chosen)

    def __exit__(self, *error: object) -> None:
        for parameter, required in self._before:
            parameter.requires_grad_(required)
        self._model.eval()
