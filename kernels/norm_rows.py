"""Add & Norm of rows in 16 bit by the compiled extension: ``csrc/cuda/norm_rows.cu``, through ctypes as products are.

``add_layer_norm_rows_`` and ``add_layer_norm_compact_`` call it where it serves, and their own Triton kernel elsewhere.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from engine.kernels import extension
from engine.kernels.products import Partials

__all__ = ["norm_rows", "norm_rows_problem"]

_WIDEST = 768  # kWidest


class _Call(ctypes.Structure):
    """NormRowsCall of csrc/include/norm_rows.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("out", "x", "residual", "weight", "bias", "live", "dest", "sums", "stream")),
        *((name, c_int64) for name in ("capacity", "hidden", "out_stride", "x_stride", "residual_stride")),
        ("eps", c_float),
        *((name, c_int32) for name in ("four", "two", "settled", "bfloat16")),
    ]


@lru_cache
def _native() -> dict | str:
    return extension.c_functions("norm_rows", {"": (ctypes.c_char_p, [ctypes.POINTER(_Call)])})


def norm_rows_problem(
    out: Tensor, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, partials: Partials | None = None
) -> str | None:
    """Why the kernel cannot serve these operands, or None. A lane reads 16 bytes at a time."""
    native = _native()
    if isinstance(native, str):
        return native
    if not out.is_cuda or not extension.cuda_kernels():
        return "the tensors are not on a CUDA device that the extension serves"
    if out.dtype not in (torch.float16, torch.bfloat16) or not weight.dtype == bias.dtype == out.dtype:
        return "it takes float16 and bfloat16, weight and bias alike"
    if out.shape[1] % 8 or out.shape[1] > _WIDEST:
        return f"rows must have up to {_WIDEST} numbers, a multiple of 8"
    if any(t.data_ptr() % 16 or t.stride(0) % 8 for t in (out, x, residual)) or any(
        t.data_ptr() % 16 for t in (weight, bias)
    ):
        return "rows must start at multiples of 16 bytes"
    if partials is not None and partials.sums.data_ptr() % 16:
        return "partial sums must start at a multiple of 16 bytes"
    return None


def norm_rows(
    out: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    live: Tensor,
    capacity: int,
    dest: Tensor | None,
    settled: bool,
    partials: Partials | None,
) -> None:
    """LayerNorm(x[:n] + residual[:n]), n = live[0], with checked operands, on the current stream."""
    call = _Call(
        out=out.data_ptr(),
        x=x.data_ptr(),
        residual=residual.data_ptr(),
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        live=live.data_ptr(),
        dest=None if dest is None else dest.data_ptr(),
        sums=None if partials is None else partials.sums.data_ptr(),
        stream=torch.cuda.current_stream(out.device).cuda_stream,
        capacity=capacity,
        hidden=out.shape[1],
        out_stride=out.stride(0),
        x_stride=x.stride(0),
        residual_stride=residual.stride(0),
        eps=eps,
        four=0 if partials is None else partials.four,
        two=0 if partials is None else partials.two,
        settled=settled,
        bfloat16=out.dtype == torch.bfloat16,
    )
    extension.call_on(out.device, f"norms of {list(out.shape)}", _native()[""], ctypes.byref(call))
