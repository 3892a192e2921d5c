"""What stands between two layers: the residual LayerNorms, and the exit check on first tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from engine.kernels.extension import bind

__all__ = ["add_layer_norm", "embed_layer_norm", "exit_policy"]


# --- torch twins ---------------------------------------------------------------------------------------------------


def exit_policy_ref(
    first: Tensor,
    pooler_weight: Tensor | None,
    pooler_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
) -> tuple[Tensor, Tensor]:
    if (pooler_weight is None) != (pooler_bias is None):
        raise ValueError("pooler_weight and pooler_bias must be given together, got one alone")
    wide = torch.promote_types(first.dtype, torch.float32)
    state = first.clone() if pooler_weight is None else linear(first, pooler_weight, pooler_bias).tanh()
    hidden = gelu(linear(state.to(wide), w1.to(wide), b1.to(wide)))
    return state, linear(hidden, w2.to(wide), b2.to(wide)).squeeze(1)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps).to(dtype)


def embed_layer_norm_ref(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    positions: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    if token_type_ids is not None and token_type is None:
        raise ValueError("token_type must be given where token_type_ids is")
    wide = torch.promote_types(word.dtype, torch.float32)
    total = word[input_ids].to(wide) + position[positions].to(wide)
    if token_type is not None:
        total = total + (token_type[0] if token_type_ids is None else token_type[token_type_ids]).to(wide)
    return _layer_norm(total, weight, bias, eps, word.dtype)


def add_layer_norm_ref(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return _layer_norm(x.to(wide) + residual.to(wide), weight, bias, eps, x.dtype)


_exit_policy = bind("exit_policy", exit_policy_ref)
_embed_layer_norm = bind("embed_layer_norm", embed_layer_norm_ref)
_add_layer_norm = bind("add_layer_norm", add_layer_norm_ref)


# --- public functions ----------------------------------------------------------------------------------------------


def exit_policy(
    first: Tensor,
    pooler_weight: Tensor | None,
    pooler_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
) -> tuple[Tensor, Tensor]:
    """The exit check: ``state = tanh(pooler(first))``, ``logit = w2 . gelu(w1 @ state + b1) + b2``.

    first                       (n, H) contiguous, fp32, fp64, fp16 or bf16: the rows' first tokens
    pooler_weight, pooler_bias  (H, H) and (H,), dtype of first, a linear layer; None, None: state is a copy of first
    w1, b1, w2, b2              (P, H), (P,), (1, P), (1,): the policy, fp32 or the dtype of first; gelu in its erf form
    Returns state (n, H) in the dtype of first, and logit (n,) in fp32 (fp64 for fp64), computed from state as returned.
    A row's result does not depend on the other rows.
    """
    return _exit_policy(first, pooler_weight, pooler_bias, w1, b1, w2, b2)


def embed_layer_norm(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    positions: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """``LayerNorm(word[input_ids] + token_type[token_type_ids] + position[positions])`` for packed tokens, (T, H).

    input_ids, token_type_ids, positions  (T,) int32 or int64; token_type_ids None means type 0 throughout
    word, token_type, position            (vocabulary, H), (types, H) or None, (positions, H), all of one dtype
    The sum and the norm are taken in fp32 (fp64 for fp64). On the CPU an id out of range is an IndexError.
    """
    return _embed_layer_norm(input_ids, token_type_ids, positions, word, token_type, position, weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``LayerNorm(x + residual)``, (T, H) each, rows contiguous; the norm is taken in fp32 (fp64 for fp64)."""
    return _add_layer_norm(x, residual, weight, bias, eps)
