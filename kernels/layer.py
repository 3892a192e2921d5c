"""What follows a layer's query-key-value product, as one op."""

from __future__ import annotations

from torch import Tensor

from engine.kernels.attention import lead_attention_ref
from engine.kernels.exits import add_layer_norm_ref
from engine.kernels.extension import bind
from engine.kernels.linear import packed_linear_ref

__all__ = ["finish_layer"]


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
