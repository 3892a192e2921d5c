"""One decoding step of a decoder with exits as one op, on the CPU in fp32: from token ids to final-normed states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels import extension

__all__ = ["DecoderPlan", "DecoderTensors", "LAYER_TENSORS", "decode_step"]

# Tensors of one layer in ``DecoderTensors.layers``.
LAYER_TENSORS = 6


class DecoderTensors(NamedTuple):
    """Weights of a LLaMA decoder with exits but for its head; L layers, E exits, all contiguous, fp32, no biases.

    embedding              (V, H)
    cos, sin               (positions, head_dim): RoPE in LLaMA's layout, its scaling included
    final_weight, final_eps   of the RMSNorm that policies and heads read through
    num_heads, kv_heads    kv_heads divides num_heads; num_heads * head_dim is a multiple of 16
    scale                  of attention scores
    layers     of every layer: input norm's weight (H,); query, key and value as one product and the attention's output
               (``pack_panels``); the second norm's weight (H,); gate and up as one product, and down (``pack_panels``)
    eps        of every layer: of its two norms
    exit_layers  1 ... L, rising; the last one is L
    policies   of every exit but the last: w1, b1, w2, b2 of ``exit_policy``
    """

    embedding: Tensor
    cos: Tensor
    sin: Tensor
    final_weight: Tensor
    final_eps: float
    num_heads: int
    kv_heads: int
    scale: float
    layers: Sequence[Tensor]
    eps: Sequence[float]
    exit_layers: Sequence[int]
    policies: Sequence[Tensor]


_decode_step = torch.ops.consistentee.decode_step.default if extension.available() else None


class DecoderPlan:
    """Weights of one decoder as ``decode_step`` takes them, checked once and held by the extension.

    ValueError names a tensor of another shape, dtype or layout. Needs the extension.
    """

    def __init__(self, tensors: DecoderTensors):
        self.handle: int = torch.ops.consistentee.decoder_plan.default(*tensors)
        extension.drop_with(self, "decoder_plan", self.handle)


def decode_step(
    plan: DecoderPlan,
    token_ids: Tensor,
    positions: Tensor,
    block_table: Tensor,
    watermarks: Tensor,
    keys: Tensor,
    values: Tensor,
    states: Tensor,
    block_size: int,
    threshold_logit: Tensor,
    script: Tensor,
    min_depth: Tensor,
    max_depth: Tensor,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The newest token of n sequences through the layers until each leaves: final-normed states (n, H), exit_layers
    int32 (n,), exit_probs (n,), and how many keys and values of one position in one layer were owed and are settled.

    token_ids, positions   int64 (n,)
    block_table    int32 (n, blocks): position p of row i stands in slot block_table[i, p // block_size] * block_size +
                   p % block_size
    watermarks     int32 (n, L), written: keys and values of positions below stand in the layer's cache. A layer that a
                   row visits settles what it owes the row: positions from there on, from their exit states
    keys, values   (L, slots, kv_heads, head_dim), written; states (slots, H), written where a row leaves early
    threshold_logit  fp32 (n,): a row leaves at an exit when its policy logit is above
    script         int32 (n,): 0, or the layer at which it leaves instead
    min_depth, max_depth  int32 (n,): no row leaves before, every row has left by; max_depth is an exit's layer

    Limited by the bytes of the visited layers' weights, 4 a parameter, at few rows.
    """
    normed, exit_layers, probs, settled = _decode_step(
        token_ids,
        positions,
        block_table,
        watermarks,
        keys,
        values,
        states,
        block_size,
        plan.handle,
        threshold_logit,
        script,
        min_depth,
        max_depth,
    )
    return normed, exit_layers, probs, int(settled)
