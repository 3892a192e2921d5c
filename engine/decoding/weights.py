"""Weights in the form ``decode_step`` multiplies with, derived from the module's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.executors.weights import effective_linear
from engine.kernels.decoder import DecoderPlan, DecoderTensors
from engine.kernels.linear import PANEL, own_kernel, pack_panels
from engine.models.decoder import MultiExitDecoder


def _products(*modules: nn.Module) -> Tensor | None:
    """Linear modules side by side as one packed product; None where one has a bias, or more than a weight."""
    try:
        pairs = [effective_linear(module) for module in modules]
    except TypeError:  # not one weight: the modules serve as they are
        return None
    if any(bool(bias.any()) for _, bias in pairs):
        return None
    return pack_panels(torch.cat([weight.detach() for weight, _ in pairs]))


@torch.no_grad()
def decoder_plan(model: MultiExitDecoder) -> DecoderPlan | None:
    """Everything but the head, packed for the CPU; None where ``decode_step`` does not serve: no kernel of ours here,
    not all in fp32, biases, another activation, an adapter that is no LoRA. Active LoRA adapters are folded in.

    The layers' products are copies, 4 bytes a parameter; everything else is the module's own storage.
    """
    hf, backbone = model.language_model.config, model.backbone
    first = backbone.layers[0].self_attn
    if not own_kernel(model.device, model.dtype) or hf.hidden_act != "silu":
        return None
    if hf.num_attention_heads * first.head_dim % PANEL or first.head_dim % 2:
        return None
    layers: list[Tensor] = []
    eps: list[float] = []
    for layer in backbone.layers:
        attention, mlp = layer.self_attn, layer.mlp
        products = (
            _products(attention.q_proj, attention.k_proj, attention.v_proj),
            _products(attention.o_proj),
            _products(mlp.gate_proj, mlp.up_proj),
            _products(mlp.down_proj),
        )
        if any(product is None for product in products):
            return None
        before, behind = layer.input_layernorm, layer.post_attention_layernorm
        layers += [before.weight.detach(), *products[:2], behind.weight.detach(), *products[2:]]
        eps += [before.variance_epsilon, behind.variance_epsilon]
    policies = [t.detach() for p in model.exits.policies for m in (p.dense, p.out) for t in (m.weight, m.bias)]
    cos, sin = model.rope(torch.arange(model.config.max_length))
    norm = backbone.norm
    tensors = DecoderTensors(
        backbone.embed_tokens.weight.detach(),
        cos.contiguous(),
        sin.contiguous(),
        norm.weight.detach(),
        norm.variance_epsilon,
        hf.num_attention_heads,
        hf.num_key_value_heads,
        first.scaling,
        layers,
        eps,
        list(model.config.exit_layers),
        policies,
    )
    every = [*layers, *policies, tensors.embedding, tensors.final_weight]
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in every):
        return None
    return DecoderPlan(tensors)
