"""Attention of short sequences on Hopper: ``csrc/cuda/attention_sm90a.cu``, reached through ctypes as products are.

``varlen_attention_`` calls it where it serves, and its own Triton kernel everywhere else.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from engine.kernels import extension
from engine.kernels.survivors import Removal

__all__ = ["attention_problem", "hopper_attention"]

_LONGEST = 128  # kAttentionLongest


class _Call(ctypes.Structure):
    """AttentionCall of csrc/include/attention.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("qkv", "out", "bias", "cu_seqlens", "counts", "keep", "row_ids")),
        *((name, c_void_p) for name in ("out_cu_seqlens", "token_dest", "out_counts", "out_row_ids", "stream")),
        *((name, c_int64) for name in ("rows", "tokens", "longest", "heads", "head_dim")),
        *((name, c_int64) for name in ("qkv_stride", "out_stride", "bias_side")),
        ("scale_log2", c_float),
        ("bfloat16", c_int32),
    ]


@lru_cache
def _native() -> dict | str:
    return extension.c_functions("attention", {"": (ctypes.c_char_p, [ctypes.POINTER(_Call)])})


def attention_problem(
    out: Tensor, qkv: Tensor, num_heads: int, scale: float, max_seqlen: int, position_bias: Tensor | None = None
) -> str | None:
    """Why the kernel cannot serve these operands, or None. The copy engine wants 16 bytes of everything."""
    if not out.is_cuda:
        return "the tensors are not on a CUDA device"
    if out.dtype not in (torch.float16, torch.bfloat16):
        return "it takes float16 and bfloat16"
    if out.shape[1] not in (64 * num_heads, 32 * num_heads):
        return "heads must have 64 or 32 numbers"
    if position_bias is not None and (out.shape[1] != 64 * num_heads or position_bias.dtype != out.dtype):
        return "with a position bias heads must have 64 numbers, and the bias their dtype"
    if position_bias is not None and (position_bias.data_ptr() % 16 or position_bias.shape[-1] % _LONGEST):
        return f"rows of the position bias must start at multiples of 16 bytes, and be multiples of {_LONGEST} long"
    if qkv.shape[0] == 0:
        return "there are no tokens"
    if max_seqlen > _LONGEST:
        return f"sequences must have at most {_LONGEST} tokens"
    if not scale > 0:
        return "scale must be above 0"
    if any(t.data_ptr() % 16 or t.stride(0) % 8 for t in (out, qkv)):
        return "rows must start at multiples of 16 bytes"
    return extension.hopper_problem(_native(), out.get_device())


def hopper_attention(
    out: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    counts: Tensor,
    num_heads: int,
    scale: float,
    max_seqlen: int,
    position_bias: Tensor | None,
    removal: Removal | None,
) -> None:
    """``varlen_attention_`` of all tokens, with checked operands, on the current stream."""
    found = {} if removal is None else {name: vector.data_ptr() for name, vector in removal._asdict().items()}
    call = _Call(
        qkv=qkv.data_ptr(),
        out=out.data_ptr(),
        bias=None if position_bias is None else position_bias.data_ptr(),
        cu_seqlens=cu_seqlens.data_ptr(),
        counts=counts.data_ptr(),
        stream=torch.cuda.current_stream(out.device).cuda_stream,
        rows=cu_seqlens.shape[0] - 1,
        tokens=qkv.shape[0],
        longest=max_seqlen,
        heads=num_heads,
        head_dim=out.shape[1] // num_heads,
        qkv_stride=qkv.stride(0),
        out_stride=out.stride(0),
        bias_side=0 if position_bias is None else position_bias.shape[-1],
        scale_log2=scale * math.log2(math.e),
        bfloat16=out.dtype == torch.bfloat16,
        **found,
    )
    extension.call_on(out.device, f"attention of {list(qkv.shape)}", _native()[""], ctypes.byref(call))
