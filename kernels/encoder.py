"""A whole pass of an encoder with exits as one op, on the CPU in fp32: from token ids to what every row leaves with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels import extension

__all__ = ["EncoderPlan", "EncoderTensors", "LAYER_TENSORS", "run_encoder"]

# Tensors of one layer in ``EncoderTensors.layers``.
LAYER_TENSORS = 12


class EncoderTensors(NamedTuple):
    """All weights of an encoder with exits; L layers, E exits, hidden size H, all contiguous, fp32.

    word, token_type, position   (_, H); token_type None where the family has none
    norm_weight, norm_bias, norm_eps   of the embeddings
    first_position               of a row's first token
    num_heads, scale, position_bias   as in ``lead_attention``
    layers         of every layer, in a row: the qkv product's weight (``pack_panels``) and bias, then the tensors of
                   ``finish_layer`` from attention_weight on
    eps            of every layer: attention_eps, output_eps
    exit_layers    1 ... L, rising; the last one is L
    exits          of every exit: pooler_weight (H, H) and pooler_bias where ``pooled``; w1, b1, w2, b2 of
                   ``exit_policy``, but for the last; the classifier's weight (``pack_panels``) and bias
    classes        outputs of every classifier
    """

    word: Tensor
    token_type: Tensor | None
    position: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    norm_eps: float
    first_position: int
    num_heads: int
    scale: float
    position_bias: Tensor | None
    layers: Sequence[Tensor]
    eps: Sequence[float]
    exit_layers: Sequence[int]
    exits: Sequence[Tensor]
    pooled: bool
    classes: int


_run_encoder = torch.ops.consistentee.run_encoder.default if extension.available() else None


class EncoderPlan:
    """Weights of one encoder as ``run_encoder`` takes them, checked once and held by the extension.

    ValueError names a tensor of another shape, dtype or layout. Needs the extension.
    """

    def __init__(self, tensors: EncoderTensors):
        self.handle: int = torch.ops.consistentee.encoder_plan.default(*tensors)
        self.classes = tensors.classes
        extension.drop_with(self, "encoder_plan", self.handle)


def run_encoder(
    plan: EncoderPlan,
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    lengths: Sequence[int],
    threshold_logit: Tensor | None,
    script: Tensor | None,
    min_depth: Tensor | None,
    max_depth: Tensor | None,
    leave_rates: Tensor,
    deepest: int,
    second_pass_tokens: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every row through the layers until it leaves: logits fp32 [B, C], exit_layers int32 [B], exit_probs fp32 [B].

    input_ids, token_type_ids   int64 [T], rows end to end; no types stand for zeros
    lengths          of the B rows
    threshold_logit  fp32 [B]: a row leaves at an exit when its policy logit is above. Else
    script           int32 [B]: it leaves at this layer; the policy is computed all the same
    min_depth, max_depth  int32 [B] or None: no row leaves before, every row has left by
    leave_rates      fp32 [deepest], of each layer: the share of rows reaching it that is expected to leave there;
                     negative where its exit is not read. Plans the order of work, never the result
    deepest          everybody leaves here, with probability 1
    second_pass_tokens  First tokens are served first where three quarters of the other tokens of the rows that are
                     expected to leave are more than this

    One op, because every pass streams more weights through the caches than they hold: whatever runs between its parts,
    the interpreter above all, has to come back from memory each time. One row of 14 tokens through MiniLM's first layer
    takes 0.3 ms on two cores; done from Python call by call, what stood around it took 0.3 ms more.
    """
    return _run_encoder(
        input_ids,
        token_type_ids,
        lengths,
        plan.handle,
        plan.classes,
        threshold_logit,
        script,
        min_depth,
        max_depth,
        leave_rates,
        deepest,
        second_pass_tokens,
    )
