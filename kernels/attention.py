"""Attention within packed sequences whose first tokens lead (the lead layout of ``packing.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.extension import bind
from engine.kernels.packing import unpack_lead_ref

__all__ = ["ALL_TOKENS", "FIRST_TOKENS", "OTHER_TOKENS", "lead_attention"]

# Whose queries are served: the sequences' first tokens, their other tokens, or both.
FIRST_TOKENS, OTHER_TOKENS, ALL_TOKENS = 0, 1, 2


def lead_attention_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    rows: Tensor | None,
    num_heads: int,
    scale: float,
    part: int,
    position_bias: Tensor | None = None,
    num_queries: int | None = None,
) -> Tensor:
    total, hidden = query.shape
    batch = cu_seqlens.shape[0] - 1
    if num_heads < 1 or hidden % num_heads:
        raise ValueError(f"num_heads must divide the width of query, got {num_heads} for a width of {hidden}")
    if part not in (FIRST_TOKENS, OTHER_TOKENS, ALL_TOKENS):
        raise ValueError(f"part must be 0 (first tokens), 1 (other tokens) or 2 (all), got {part}")
    if total == 0 or (rows is not None and rows.numel() == 0):
        return query.new_empty((0, hidden))
    lengths = cu_seqlens.diff()
    longest = int(lengths.max())
    wide = torch.promote_types(query.dtype, torch.float32)
    served = torch.arange(batch, device=query.device) if rows is None else rows.long()

    def heads(x: Tensor) -> Tensor:
        padded = unpack_lead_ref(x, cu_seqlens, longest)[served]
        return padded.unflatten(2, (num_heads, -1)).transpose(1, 2).to(wide)

    scores = heads(query) @ heads(key).transpose(2, 3) * scale
    if position_bias is not None:
        span = (position_bias.shape[1] + 1) // 2
        if span < longest:
            raise ValueError(f"position_bias must reach the longest length {longest}, got M = {span}")
        position = torch.arange(longest, device=query.device)
        scores = scores + position_bias.to(wide)[:, position - position[:, None] + span - 1]
    present = torch.arange(longest, device=query.device) < lengths[served, None]
    weights = scores.masked_fill(~present[:, None, None], float("-inf")).softmax(-1)
    attended = (weights @ heads(value)).transpose(1, 2).flatten(2).to(query.dtype)
    first, others = attended[:, 0], attended[:, 1:][present[:, 1:]]
    out = torch.cat({FIRST_TOKENS: [first], OTHER_TOKENS: [others], ALL_TOKENS: [first, others]}[part])
    if num_queries is None:
        return out
    if num_queries < out.shape[0]:
        raise ValueError(f"num_queries must be at least {out.shape[0]} for these rows, got {num_queries}")
    return torch.cat([out, out.new_zeros(num_queries - out.shape[0], hidden)])


_lead_attention = bind("lead_attention", lead_attention_ref)


def lead_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    rows: Tensor | None,
    num_heads: int,
    scale: float,
    part: int,
    position_bias: Tensor | None = None,
    num_queries: int | None = None,
) -> Tensor:
    """softmax(scale * Q K^T + bias) V within each sequence, every token seeing its whole sequence.

    query, key, value  (total_tokens or more, num_heads * head_dim) in lead layout, rows past the tokens
                       ignored; fp32, fp64, fp16 or bf16; the last dimension contiguous, any row stride (column slices
                       of one fused buffer)
    cu_seqlens         (batch + 1,) int32
    rows               (n,) int32, the sequences to serve in this order, or None for all
    part               FIRST_TOKENS, OTHER_TOKENS or ALL_TOKENS: whose queries
    position_bias      (num_heads, 2 * M - 1), fp32 or the dtype of query, M >= the longest length, or None. Entry
                       (j - i) + M - 1 is added to the scaled score of query position i and key position j (MPNet)
    num_queries        rows of the result, at least as many as there are queries: those past them are zeros, spare
                       capacity. With ``rows`` and any but first tokens, CUDA otherwise waits for the device to learn it
    Returns (n_queries, num_heads * head_dim): the first tokens of ``rows``, or their other tokens sequence by
    sequence, or both in lead layout. Products accumulate in fp32 (fp64 for fp64).
    """
    return _lead_attention(query, key, value, cu_seqlens, rows, num_heads, scale, part, position_bias, num_queries)
