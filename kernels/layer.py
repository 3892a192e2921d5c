"""Whole layers as one op: what follows a layer's query-key-value product, and layers until somebody leaves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels.attention import ALL_TOKENS, lead_attention_ref
from engine.kernels.exits import add_layer_norm_ref, exit_policy_ref
from engine.kernels.extension import bind
from engine.kernels.linear import packed_linear_ref

__all__ = ["LAYER_TENSORS", "finish_layer", "run_layers"]

# Tensors of one layer in ``run_layers``.
LAYER_TENSORS = 12


def finish_layer_ref(
    qkv: Tensor,
    cu_seqlens: Tensor,
    rows: Tensor | None,
    residual: Tensor,
    num_heads: int,
    scale: float,
    part: int,
    position_bias: Tensor | None,
    attention_weight: Tensor,
    attention_bias: Tensor,
    attention_norm_weight: Tensor,
    attention_norm_bias: Tensor,
    attention_eps: float,
    intermediate_weight: Tensor,
    intermediate_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    output_norm_weight: Tensor,
    output_norm_bias: Tensor,
    output_eps: float,
) -> Tensor:
    hidden = qkv.shape[1] // 3
    if qkv.shape[1] != 3 * hidden:
        raise ValueError(
            f"qkv must hold query, key and value side by side, got a width of {qkv.shape[1]}, which 3 does not divide"
        )
    query, key, value = qkv.split(hidden, 1)
    count = residual.shape[0]
    x = lead_attention_ref(query, key, value, cu_seqlens, rows, num_heads, scale, part, position_bias, count)
    x = packed_linear_ref(x, attention_weight, attention_bias, hidden, False)
    x = add_layer_norm_ref(x, residual, attention_norm_weight, attention_norm_bias, attention_eps)
    y = packed_linear_ref(x, intermediate_weight, intermediate_bias, len(intermediate_bias), True)
    y = packed_linear_ref(y, output_weight, output_bias, hidden, False)
    return add_layer_norm_ref(y, x, output_norm_weight, output_norm_bias, output_eps)


def run_layers_ref(
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    threshold_logit: Tensor,
    num_heads: int,
    scale: float,
    position_bias: Tensor | None,
    layers: Sequence[Tensor],
    eps: Sequence[float],
    exit_tensors: Sequence[int],
    exits: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = len(layers) // LAYER_TENSORS
    if not count or (len(layers), len(eps), len(exit_tensors)) != (count * LAYER_TENSORS, 2 * count, count):
        raise ValueError(
            f"layers must hold {LAYER_TENSORS} tensors, eps 2 numbers and exit_tensors 1 for each layer, got "
            f"{len(layers)}, {len(eps)} and {len(exit_tensors)}"
        )
    if not set(exit_tensors) <= {0, 4, 6}:
        raise ValueError(f"exit_tensors must be 0 (no exit), 4 (policy) or 6 (pooler and policy), got {exit_tensors}")
    if sum(exit_tensors) != len(exits):
        raise ValueError(f"exits must hold the sum of exit_tensors ({sum(exit_tensors)}) tensors, got {len(exits)}")
    rows, hidden = cu_seqlens.shape[0] - 1, hidden_states.shape[1]
    state, z = hidden_states.new_empty((rows, hidden)), hidden_states.new_full((rows,), torch.nan)
    at = 0
    for layer, read in enumerate(exit_tensors):
        qkv_weight, qkv_bias, *rest = layers[layer * LAYER_TENSORS : (layer + 1) * LAYER_TENSORS]
        qkv = packed_linear_ref(hidden_states, qkv_weight, qkv_bias, 3 * hidden, False)
        rest = (*rest[:4], eps[2 * layer], *rest[4:], eps[2 * layer + 1])
        hidden_states = finish_layer_ref(
            qkv, cu_seqlens, None, hidden_states, num_heads, scale, ALL_TOKENS, position_bias, *rest
        )
        z = z.new_full((rows,), torch.nan)
        if read:
            pooler, policy = exits[at : at + read - 4] or (None, None), exits[at + read - 4 : at + read]
            at += read
            state, z = exit_policy_ref(hidden_states[:rows], *pooler, *policy)
            if bool((z > threshold_logit).any()):
                break
    return hidden_states, state, z, torch.tensor([layer + 1], dtype=torch.int32, device=z.device)


_run_layers = bind("run_layers", run_layers_ref)
_finish_layer = bind("finish_layer", finish_layer_ref)


def finish_layer(
    qkv: Tensor,
    cu_seqlens: Tensor,
    rows: Tensor | None,
    residual: Tensor,
    num_heads: int,
    scale: float,
    part: int,
    position_bias: Tensor | None,
    attention_weight: Tensor,
    attention_bias: Tensor,
    attention_norm_weight: Tensor,
    attention_norm_bias: Tensor,
    attention_eps: float,
    intermediate_weight: Tensor,
    intermediate_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    output_norm_weight: Tensor,
    output_norm_bias: Tensor,
    output_eps: float,
) -> Tensor:
    """The rest of a post-norm layer for the queries of ``part``, fp32: as many rows as residual.

    ``x = Norm(attention @ attention_weight + residual)``, then ``Norm(gelu(x @ intermediate) @ output + x)``.

    qkv                 (total_tokens or more, 3 H) in lead layout: query, key and value side by side
    cu_seqlens ... position_bias   as in ``lead_attention``
    residual            (n_queries or more, H): what the layer was given for these tokens, rows past the queries spare;
                        the last dimension contiguous
    *_weight, *_bias    of products, as in ``packed_linear``; of norms, (H,)
    As one op, because at batch 1 four products take 0.4 ms and a call from Python up to 0.02 ms, and because a product
    can then fetch the next one's weight.
    """
    return _finish_layer(
        qkv,
        cu_seqlens,
        rows,
        residual,
        num_heads,
        scale,
        part,
        position_bias,
        attention_weight,
        attention_bias,
        attention_norm_weight,
        attention_norm_bias,
        attention_eps,
        intermediate_weight,
        intermediate_bias,
        output_weight,
        output_bias,
        output_norm_weight,
        output_norm_bias,
        output_eps,
    )


def run_layers(
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    threshold_logit: Tensor,
    num_heads: int,
    scale: float,
    position_bias: Tensor | None,
    layers: Sequence[Tensor],
    eps: Sequence[float],
    exit_tensors: Sequence[int],
    exits: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Run layers one after the other, for all tokens, until a row's policy logit is above its threshold; fp32.

    hidden_states    (total_tokens or more, H) contiguous, in lead layout
    cu_seqlens, num_heads, scale, position_bias   as in ``lead_attention``
    threshold_logit  (batch,) fp32: a row leaves when z > threshold_logit
    layers           of every layer: the qkv product's weight (``pack_panels``) and bias, then the tensors of
                     ``finish_layer`` from attention_weight on
    eps              of every layer: attention_eps, output_eps
    exit_tensors     of every layer, how many of ``exits`` are its exit's: 0 where it has none or the exit is not read,
                     4 (w1, b1, w2, b2 of ``exit_policy``), or 6 (pooler_weight, pooler_bias before them)
    Returns the hidden states behind the last layer that ran, that layer's exit state (batch, H) and logits z (batch,)
    as ``exit_policy`` gives them (undefined, and NaN, where it has no exit), and the number of layers that ran.
    One op for all of them, because every pass streams more weights through the caches than they hold: between two
    calls from Python the interpreter itself has to come back from memory, 30 to 50 us a layer at batch 1.
    """
    hidden_states, state, z, ran = _run_layers(
        hidden_states, cu_seqlens, threshold_logit, num_heads, scale, position_bias, layers, eps, exit_tensors, exits
    )
    return hidden_states, state, z, int(ran)
