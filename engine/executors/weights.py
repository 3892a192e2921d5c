"""Weights in the form the packed executor multiplies with, derived from the module's and watched for changes."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.kernels.linear import PackedLinear
from engine.models.encoder import MultiExitEncoder


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer. qkv: the three projections as one product [3 H, H]; norms as (weight, bias, eps)."""

    qkv: PackedLinear
    attention_output: PackedLinear
    attention_norm: tuple[Tensor, Tensor, float]
    intermediate: PackedLinear
    output: PackedLinear
    output_norm: tuple[Tensor, Tensor, float]


@dataclass(frozen=True, eq=False)
class ExitWeights:
    """One exit. policy: (w1, b1, w2, b2), None at the last layer; pooler: (weight, bias), None without a pooler."""

    pooler: tuple[Tensor, Tensor] | None
    classifier: tuple[Tensor, Tensor]
    policy: tuple[Tensor, Tensor, Tensor, Tensor] | None


@dataclass(frozen=True, eq=False)
class EncoderWeights:
    word: Tensor
    token_type: Tensor | None
    position: Tensor
    embedding_norm: tuple[Tensor, Tensor, float]
    position_bias: Tensor | None
    layers: tuple[LayerWeights, ...]
    exits: dict[int, ExitWeights]
    num_heads: int
    scale: float


def effective_linear(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that ``module`` multiplies with now, an active LoRA adapter included.

    A fused product would not see an adapter that is only applied in the module's own forward.
    """
    if isinstance(module, nn.Linear):
        return module.weight, module.bias
    base = getattr(module, "base_layer", None)
    if not isinstance(base, nn.Linear) or not hasattr(module, "get_delta_weight"):
        raise TypeError(
            f"cannot pack a {type(module).__name__}: allowed are torch.nn.Linear and peft LoRA layers around one; "
            "merge other adapters into the weights first (peft: merge_and_unload)"
        )
    if module.disable_adapters or module.merged:
        return base.weight, base.bias
    weight = base.weight
    for adapter in module.active_adapters:
        if adapter in module.lora_A:
            if module.use_dora.get(adapter) or module.lora_bias.get(adapter):
                raise TypeError(f"adapter {adapter!r} uses DoRA or a LoRA bias: merge it first (peft: merge_and_unload)")
            weight = weight + module.get_delta_weight(adapter)
    return weight, base.bias


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight.detach(), norm.bias.detach(), norm.eps


def _pair(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    return linear.weight.detach(), linear.bias.detach()


@torch.no_grad()
def derive(model: MultiExitEncoder) -> EncoderWeights:
    """Pack all weights of ``model``. Layers' products are copies, everything else is the module's own storage."""
    backbone, family, config = model.encoder_backbone, model.family, model.config
    embeddings = backbone.embeddings
    layers = []
    for layer in family.layers(backbone):
        parts = family.parts(layer)
        projections = [effective_linear(m) for m in (parts.query, parts.key, parts.value)]
        layers.append(
            LayerWeights(
                qkv=PackedLinear(torch.cat([w for w, _ in projections]), torch.cat([b for _, b in projections])),
                attention_output=PackedLinear(*effective_linear(parts.attention_output)),
                attention_norm=_norm(parts.attention_norm),
                intermediate=PackedLinear(*effective_linear(parts.intermediate)),
                output=PackedLinear(*effective_linear(parts.output)),
                output_norm=_norm(parts.output_norm),
            )
        )
    exits = {}
    for k, layer in enumerate(config.exit_layers):
        pooler = model.exits.pooler(k)
        policy = model.exits.policies[k] if k < config.num_exits - 1 else None
        exits[layer] = ExitWeights(
            pooler=None if pooler is None else _pair(pooler),
            classifier=_pair(model.exits.classifiers[k]),
            policy=None if policy is None else (*_pair(policy.dense), *_pair(policy.out)),
        )
    bias = family.relative_bias(backbone, config.max_length)
    hf = backbone.config
    return EncoderWeights(
        word=embeddings.word_embeddings.weight.detach(),
        token_type=embeddings.token_type_embeddings.weight.detach() if family.token_types else None,
        position=embeddings.position_embeddings.weight.detach(),
        embedding_norm=_norm(embeddings.LayerNorm),
        position_bias=None if bias is None else bias.detach(),
        layers=tuple(layers),
        exits=exits,
        num_heads=hf.num_attention_heads,
        scale=(hf.hidden_size // hf.num_attention_heads) ** -0.5,
    )


class WatchedWeights:
    """Derived weights of one model, packed again when the model's have changed.

    Seen: writes in place (optimiser steps, ``copy_``, ``load_state_dict``), new storage (``.to()``, ``p.data = ...``),
    new parameters (``load_state_dict(assign=True)``), replaced modules, adapters added, merged, disabled or switched.
    Not seen: a write *through* ``p.data`` (``p.data.add_(...)``), which torch itself does not count; call ``refresh``.
    """

    def __init__(self, model: MultiExitEncoder):
        self.model = model
        self._lock = threading.Lock()
        self._weights: EncoderWeights | None = None
        self._children: list = []
        self._slots: list = []
        self._adapters: list = []
        self._counted = True
        self._state: tuple | None = None

    def current(self) -> EncoderWeights:
        """The weights of this moment. About 20 us at 6 layers where nothing changed."""
        weights = self._weights
        if weights is not None and self._read_state() == self._state:
            return weights
        return self.refresh()

    def refresh(self) -> EncoderWeights:
        """Pack again, whatever the watch says."""
        with self._lock:
            self._list_slots()
            state = self._read_state()
            self._weights = derive(self.model)
            self._state = state
            return self._weights

    def _list_slots(self) -> None:
        # Dictionaries of the modules themselves, so that a replaced parameter or child is seen through them.
        children, slots, adapters = [], [], []
        for module in self.model.modules():
            children += [(module._modules, name, child) for name, child in module._modules.items()]
            slots += [(module._parameters, name) for name, p in module._parameters.items() if p is not None]
            if hasattr(module, "merged_adapters"):
                adapters.append(module)
        self._children, self._slots, self._adapters = children, slots, adapters
        # Parameters made in inference mode count no versions: torch refuses to write them in place.
        self._counted = not any(owner[name].is_inference() for owner, name in slots)

    def _read_state(self) -> tuple | None:
        try:
            for children, name, child in self._children:
                if children[name] is not child:
                    return None
            parameters = [owner[name] for owner, name in self._slots]
            return (
                list(map(id, parameters)),
                [p.data_ptr() for p in parameters],
                [p._version for p in parameters] if self._counted else None,
                [
                    (tuple(m.active_adapters), tuple(m.merged_adapters), m.disable_adapters, tuple(m.scaling.items()))
                    for m in self._adapters
                ],
            )
        except (KeyError, AttributeError, RuntimeError):  # a parameter is gone, or no longer of the kind it was
            return None
