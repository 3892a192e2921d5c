"""Weights in the form the packed executor multiplies with, derived from the module's and watched for changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property, lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from engine.kernels.attention import lead_attention
from engine.kernels.encoder import EncoderPlan, EncoderTensors
from engine.kernels.exits import add_layer_norm
from engine.kernels.extension import prepare
from engine.kernels.layer import finish_layer
from engine.kernels.linear import PackedLinear, own_kernel
from engine.models.encoder import MultiExitEncoder

M = TypeVar("M", bound=nn.Module)
W = TypeVar("W")


class Heads(NamedTuple):
    """What the attention of all layers has in common. position_bias: see ``lead_attention``; of who asks for
    ``derive(..., PlainLinear)`` a matrix, see ``varlen_attention_``."""

    num_heads: int
    scale: float
    position_bias: Tensor | None


class PlainLinear(NamedTuple):
    """A product as it stands: weight [N, K] as in nn.Linear, bias [N]."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer. qkv: the three projections as one product [3 H, H]; norms as (weight, bias, eps).

    Products are PackedLinear, or PlainLinear for who multiplies with kernels of its own and asks for ``derive(...,
    PlainLinear)``: then ``finish`` and the plan have nothing to call.
    """

    qkv: PackedLinear
    attention_output: PackedLinear
    attention_norm: tuple[Tensor, Tensor, float]
    intermediate: PackedLinear
    output: PackedLinear
    output_norm: tuple[Tensor, Tensor, float]

    @cached_property
    def _operands(self) -> tuple | None:
        """What ``finish_layer`` takes of this layer; None where our kernel serves none of its products."""
        products = (self.attention_output, self.intermediate, self.output)
        if any(product.panels is None or product.bias is None for product in products):
            return None
        first, second, third = ((product.panels, product.bias) for product in products)
        return *first, *self.attention_norm, *second, *third, *self.output_norm

    @property
    def plan_tensors(self) -> tuple[list[Tensor], list[float]] | None:
        """Tensors and eps of this layer as ``EncoderTensors`` takes them; None where our kernel serves no product."""
        if self._operands is None or self.qkv.panels is None or self.qkv.bias is None:
            return None
        tensors = [x for x in self._operands if isinstance(x, Tensor)]
        return [self.qkv.panels, self.qkv.bias, *tensors], [self.attention_norm[2], self.output_norm[2]]

    def finish(
        self, qkv: Tensor, cu_seqlens: Tensor, rows: Tensor | None, residual: Tensor, heads: Heads, part: int
    ) -> Tensor:
        """The layer behind its qkv product, for the queries of ``part``: attention, output projection, Add & Norm, MLP,
        Add & Norm. As many rows as ``residual`` has: those past the queries are spare."""
        if self._operands is not None:
            return finish_layer(qkv, cu_seqlens, rows, residual, *heads[:2], part, heads.position_bias, *self._operands)
        query, key, value = qkv.chunk(3, 1)
        x = lead_attention(
            query, key, value, cu_seqlens, rows, *heads[:2], part, heads.position_bias, residual.shape[0]
        )
        x = add_layer_norm(self.attention_output(x), residual, *self.attention_norm)
        return add_layer_norm(self.output(self.intermediate(x, gelu=True)), x, *self.output_norm)


@dataclass(frozen=True, eq=False)
class ExitWeights:
    """One exit. policy: (w1, b1, w2, b2), None at the last layer; pooler: (weight, bias), None without a pooler."""

    pooler: tuple[Tensor, Tensor] | None
    classifier: PackedLinear
    policy: tuple[Tensor, Tensor, Tensor, Tensor] | None

    def state(self, first: Tensor) -> Tensor:
        """What the exit reads of first tokens [n, H], for where no policy (``exit_policy`` fuses the two) is asked."""
        return first if self.pooler is None else torch.tanh(torch.nn.functional.linear(first, *self.pooler))


@dataclass(frozen=True, eq=False)
class EncoderWeights:
    word: Tensor
    token_type: Tensor | None
    position: Tensor
    embedding_norm: tuple[Tensor, Tensor, float]
    heads: Heads
    layers: tuple[LayerWeights, ...]
    exits: dict[int, ExitWeights]
    own_kernel: bool
    first_position: int

    @cached_property
    def plan(self) -> EncoderPlan | None:
        """Everything as ``run_encoder`` takes it; None where it cannot: no kernel of ours here, or not all in fp32."""
        if not self.own_kernel:
            return None
        layers: list[Tensor] = []
        eps: list[float] = []
        for layer in self.layers:
            found = layer.plan_tensors
            if found is None:
                return None
            layers += found[0]
            eps += found[1]
        exits: list[Tensor] = []
        for exit_weights in self.exits.values():
            exits += [*(exit_weights.pooler or ()), *(exit_weights.policy or ())]
            exits += [exit_weights.classifier.panels, exit_weights.classifier.bias]
        last = self.exits[len(self.layers)]
        tensors = EncoderTensors(
            self.word,
            self.token_type,
            self.position,
            *self.embedding_norm,
            self.first_position,
            *self.heads,
            layers,
            eps,
            list(self.exits),
            exits,
            last.pooler is not None,
            len(last.classifier.bias),
        )
        every = [*layers, *exits, *(t for t in tensors if isinstance(t, Tensor))]
        if any(t.dtype != torch.float32 or not t.is_contiguous() for t in every):
            return None
        return EncoderPlan(tensors)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` computes what its class does: not a subclass's, an instance's or a hook's version."""
    own = type(module).forward is not kind.forward or "forward" in vars(module)
    return isinstance(module, kind) and not own and not any(getattr(module, name) for name in _HOOKS)


def effective_linear(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias that ``module`` multiplies with now, an active LoRA adapter included.

    A fused product would not see an adapter, or a hook, that acts in the module's own forward: what cannot be written
    as one weight is a TypeError.
    """
    base, weight = module, None
    if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer"):
        base = module.base_layer
        if _plain(base, nn.Linear) and not (module.disable_adapters or module.merged):
            weight = base.weight
            for adapter in module.active_adapters:
                if adapter in module.lora_A:
                    if module.use_dora.get(adapter) or module.lora_bias.get(adapter):
                        raise TypeError(f"adapter {adapter!r} uses DoRA or a LoRA bias: merge it first ({_MERGE})")
                    weight = weight + module.get_delta_weight(adapter).to(weight.dtype)
    if not _plain(base, nn.Linear):
        raise TypeError(
            f"cannot pack a {type(module).__name__} with a forward of its own or with hooks: allowed are "
            f"torch.nn.Linear and peft LoRA layers around one; merge other adapters into the weights first ({_MERGE})"
        )
    weight = base.weight if weight is None else weight
    return weight, base.weight.new_zeros(base.weight.shape[0]) if base.bias is None else base.bias


_MERGE = "peft: merge_and_unload"


def _norm(norm: nn.Module) -> tuple[Tensor, Tensor, float]:
    if not _plain(norm, nn.LayerNorm):
        raise TypeError(f"cannot use a {type(norm).__name__} as LayerNorm: merge its adapter first ({_MERGE})")
    bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
    return norm.weight.detach(), bias.detach(), norm.eps


def _table(embedding: nn.Module) -> Tensor:
    if not _plain(embedding, nn.Embedding):
        raise TypeError(f"cannot use a {type(embedding).__name__} as embedding: merge its adapter first ({_MERGE})")
    return embedding.weight.detach()


def _pair(linear: nn.Module) -> tuple[Tensor, Tensor]:
    weight, bias = effective_linear(linear)
    return weight.detach(), bias.detach()


@torch.no_grad()
def derive(model: MultiExitEncoder, product: type[PackedLinear] | type[PlainLinear] = PackedLinear) -> EncoderWeights:
    """Pack all weights of ``model``. Layers' packed products are copies, and so is every qkv; everything else is the
    module's own storage."""

    def linear(module: nn.Module) -> PackedLinear | PlainLinear:
        return product(*_pair(module))

    backbone, family, config = model.encoder_backbone, model.family, model.config
    embeddings = backbone.embeddings
    layers = []
    for layer in family.layers(backbone):
        parts = family.parts(layer)
        projections = [effective_linear(m) for m in (parts.query, parts.key, parts.value)]
        layers.append(
            LayerWeights(
                qkv=product(torch.cat([w for w, _ in projections]), torch.cat([b for _, b in projections])),
                attention_output=linear(parts.attention_output),
                attention_norm=_norm(parts.attention_norm),
                intermediate=linear(parts.intermediate),
                output=linear(parts.output),
                output_norm=_norm(parts.output_norm),
            )
        )
    exits = {}
    for k, layer in enumerate(config.exit_layers):
        pooler = model.exits.pooler(k)
        policy = model.exits.policies[k] if k < config.num_exits - 1 else None
        exits[layer] = ExitWeights(
            pooler=None if pooler is None else _pair(pooler),
            classifier=linear(model.exits.classifiers[k]),
            policy=None if policy is None else (*_pair(policy.dense), *_pair(policy.out)),
        )
    bias = family.relative_bias(backbone, config.max_length)
    if bias is not None and product is PlainLinear:
        from engine.kernels.gpu_attention import position_matrix  # brings triton along

        bias = position_matrix(bias)
    hf = backbone.config
    return EncoderWeights(
        word=_table(embeddings.word_embeddings),
        token_type=_table(embeddings.token_type_embeddings) if family.token_types else None,
        position=_table(embeddings.position_embeddings),
        embedding_norm=_norm(embeddings.LayerNorm),
        heads=Heads(
            hf.num_attention_heads,
            (hf.hidden_size // hf.num_attention_heads) ** -0.5,
            None if bias is None else bias.detach(),
        ),
        layers=tuple(layers),
        exits=exits,
        own_kernel=own_kernel(model.device, model.dtype),
        first_position=family.first_position,
    )


class WatchedWeights(Generic[W]):
    """Derived weights of one model, derived again when the model's have changed.

    watching   whether anybody but the engine holds the model. Until then nothing can change and nothing is looked at
    in_place   where parameters hold other values at their old places, derived copies are written anew at theirs, and
               the weights stay the same object: for who has captured where they stand, and reads copies on the
               stream on which they are written

    Seen: everything that changes a value (optimiser steps, fused ones included, though torch counts no version for
    them; ``copy_``, ``load_state_dict``, writes through ``p.data``), new storage (``.to()``, ``p.data = ...``), new
    parameters (``load_state_dict(assign=True)``), replaced modules, adapters added, merged, disabled or switched.
    The look costs one read of the weights: 3 ms for 10 M parameters.
    """

    def __init__(self, model: M, watching: bool, derive: Callable[[M], W], in_place: bool = False):
        self.model = model
        self.watching = watching
        self._derive, self._in_place = derive, in_place
        self._lock = threading.Lock()
        self._held: tuple[W, tuple | None] | None = None  # weights, and the state they were derived from
        self._listing: tuple[list, list, list] = ([], [], [])

    def held(self) -> W:
        """The weights of the last look, or refresh."""
        held = self._held
        if held is not None:
            return held[0]
        with self._lock:  # somebody else may just have derived them
            return self._derived() if self._held is None else self._held[0]

    def current(self) -> W:
        """The weights of this moment: a look. What cannot be derived is an error at every look."""
        held = self._held
        if held is not None and (not self.watching or self._read_state() == held[1]):
            return held[0]
        return self.refresh()

    def drop(self) -> None:
        """Give back what is held; who asks next derives anew."""
        self._held = None

    def refresh(self) -> W:
        """Pack again, whatever the watch says."""
        with self._lock:
            return self._derived()

    def _derived(self) -> W:
        """``refresh``, under the lock."""
        device = self.model.device
        prepare(device)  # where it may have moved
        before, self._listing = self._listing, self._list()
        state = self._read_state()
        try:
            weights = self._derive(self.model)
        except BaseException:
            self._listing = before  # compared with the new one, the next look would find nothing changed
            raise
        parameters = self._parameters()
        if state is not None and parameters is not None:
            # Deriving may move parameters into a storage that they share, which is no change. Where a value has
            # changed meanwhile, the state from before is kept: the next look derives again.
            places = self._places(parameters)
            if places != state[0] and _contents(parameters) == state[1]:
                state = places, state[1]
        if self._in_place and self._held is not None:
            old, known = self._held
            if known is not None and state is not None and known[0] == state[0]:
                weights = _renewed(old, weights)
        if not self._in_place and device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # other threads read on other streams
        self._held = weights, state
        return weights

    def _list(self) -> tuple[list, list, list]:
        # Dictionaries of the modules themselves, so that a replaced parameter or child is seen through them.
        children, slots, adapters = [], [], []
        for module in self.model.modules():
            children.append((module, dict(module._modules), _behaviour(module)))
            slots += [(module._parameters, name) for name in module._parameters]
            if hasattr(module, "merged_adapters"):
                adapters.append(module)
        return children, slots, adapters

    def _read_state(self) -> tuple[tuple, tuple] | None:
        """Everything that the derived weights depend on: where parameters are, and what they hold. None where the
        modules are no longer those listed."""
        parameters = self._parameters()
        return None if parameters is None else (self._places(parameters), _contents(parameters))

    def _parameters(self) -> list[Tensor] | None:
        children, slots, _ = self._listing
        for module, modules, behaviour in children:
            if module._modules != modules or _behaviour(module) != behaviour:
                return None
        try:
            parameters = [owner[name] for owner, name in slots]
        except KeyError:
            return None
        return [p for p in parameters if p is not None]

    def _places(self, parameters: list[Tensor]) -> tuple:
        adapters = self._listing[2]
        return (
            [id(p) for p in parameters],
            [p.data_ptr() for p in parameters],
            [(tuple(m.active_adapters), tuple(m.merged_adapters), m.disable_adapters) for m in adapters],
            [tuple(m.scaling.items()) for m in adapters if hasattr(m, "scaling")],
        )


def _leaves(weights: Any) -> Iterator[Any]:
    """Tensors and whatever else derived weights are made of, in order."""
    if is_dataclass(weights):
        weights = [getattr(weights, field.name) for field in fields(weights)]
    elif isinstance(weights, dict):
        weights = [*weights, *weights.values()]
    if isinstance(weights, (list, tuple)):
        yield len(weights)
        for part in weights:
            yield from _leaves(part)
    else:
        yield weights


@torch.no_grad()
def _renewed(old: W, new: W) -> W:
    """``old`` with the values of ``new``, whose parameters stand where they stood: what has another place is a copy of
    its own in both. ``new`` itself where something else than values has changed."""
    leaves, copies = (list(_leaves(old)), list(_leaves(new))), []
    if len(leaves[0]) != len(leaves[1]):
        return new
    for before, now in zip(*leaves, strict=True):
        if not isinstance(before, Tensor) or not isinstance(now, Tensor):
            if before is not now and before != now:
                return new
        elif (before.shape, before.dtype, before.device) != (now.shape, now.dtype, now.device):
            return new
        elif before.data_ptr() != now.data_ptr():
            copies.append((before, now))
    for before, now in copies:
        before.copy_(now)
    return old


def _behaviour(module: nn.Module) -> tuple:
    """What else than tensors a module's result depends on: a forward of its own, hooks, a norm's eps."""
    return "forward" in vars(module), *(len(getattr(module, name)) for name in _HOOKS), getattr(module, "eps", None)


@torch.no_grad()
def _contents(parameters: list[Tensor]) -> tuple[list[int], list[int]]:
    """Two prints of every parameter, embeddings too (an adapter may be anywhere): xor of its bits, which any small
    change of one element alters, and a product with fixed random numbers, which signs, orders and constants alter."""
    bits, products = [], []
    for parameter in parameters:
        flat = parameter.detach().flatten()
        bits.append(torch.hash_tensor(flat))
        # In half precision two elements might change places unseen.
        wide = torch.promote_types(flat.dtype, torch.float32)
        numbers = _random_numbers(wide, flat.device)
        products += [torch.dot(piece.to(wide), numbers[: len(piece)]).double() for piece in flat.split(len(numbers))]
    # As bits: a NaN is then equal to itself.
    return torch.stack(bits).view(torch.int64).tolist(), torch.stack(products).view(torch.int64).tolist()


@lru_cache
def _random_numbers(dtype: torch.dtype, device: torch.device) -> Tensor:
    """2^20 numbers, always the same: longer tensors are taken piece by piece."""
    return torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(device, dtype)
