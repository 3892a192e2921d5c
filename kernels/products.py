"""Products of a captured pass on Hopper: ``csrc/cuda/product_sm90a.cu``, reached through ctypes as graphs are.

``linear_rows_`` calls it where it serves, and its own Triton kernel everywhere else.

With few rows the kernel shares a sum among programs. What reads the result next can add the partial sums up itself,
which spares the programs their wait for each other: ``Partials`` says where they stand (csrc/include/product.h).
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels import extension

__all__ = [
    "PATHS",
    "Partials",
    "hopper_product",
    "partials_memory",
    "product_partials",
    "product_problem",
    "product_workspace",
    "whole_rows",
]

# Tiles of the kernel: rows x outputs; the last is the first's size, and warpgroups take tiles in turn. Without partial
# sums, that of 64 rows alone is shared among programs.
PATHS = ((128, 192), (128, 96), (64, 48), (128, 48), (128, 192))

_HALVES = (torch.float16, torch.bfloat16)


class _Call(ctypes.Structure):
    """ProductCall of csrc/include/product.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "weight", "bias", "out", "count", "workspace", "partials", "stream")),
        *((name, c_int64) for name in ("rows", "capacity", "inputs", "outputs")),
        *((name, c_int64) for name in ("x_stride", "weight_stride", "out_stride")),
        *((name, c_int32) for name in ("bfloat16", "bias_fp32", "gelu", "path")),
    ]


@lru_cache
def _native() -> dict | str:
    """The functions of product.h by their short names, or why there are none."""
    limits = [c_int64, c_int64, ctypes.POINTER(c_int32), ctypes.POINTER(c_int32)]
    prototypes = {
        "": (ctypes.c_char_p, [ctypes.POINTER(_Call)]),
        "_workspace": (c_int64, []),
        "_partials": (c_int64, []),
        "_limits": (ctypes.c_char_p, limits),
    }
    return extension.c_functions("product", prototypes)


def product_problem(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> str | None:
    """Why the kernel cannot serve these operands, or None. The copy engine wants 16 bytes of everything."""
    if not out.is_cuda:
        return "the tensors are not on a CUDA device"
    if out.dtype not in _HALVES:
        return "it multiplies float16 and bfloat16"
    if act == "tanh":
        return "it has no tanh"
    if weight.shape[0] % 8 or weight.shape[1] % 8:
        return "both widths must be multiples of 8"
    if any(t.data_ptr() % 16 or t.stride(0) % 8 for t in (out, x, weight)):
        return "rows must start at multiples of 16 bytes"
    return extension.hopper_problem(_native(), out.get_device())


def product_workspace(device: torch.device | str) -> Tensor | None:
    """Memory that one product at a time uses to share a tile's sums among programs; None where there is no kernel."""
    native = _native()
    if isinstance(native, str) or torch.device(device).type != "cuda":
        return None
    return torch.zeros(native["_workspace"](), dtype=torch.uint8, device=device)


class Partials(NamedTuple):
    """Where a product leaves its rows as partial sums while few rows are live, for their reader to add up.

    sums  fp32, one dimension: with S sums a row, that of row r, share s and column c stands at (r S + s) N + c
    four  live rows up to which S is 4
    two   live rows up to which it is 2, not below four; beyond, rows are where they always are
    """

    sums: Tensor
    four: int
    two: int

    def shares(self, live: int) -> int:
        """Partial sums of a row with so many live rows; 0: it is whole."""
        return 4 if live <= self.four else 2 if live <= self.two else 0

    def check(self, like: Tensor, like_name: str) -> None:
        sums = self.sums
        if sums.dtype != torch.float32 or sums.dim() != 1 or not sums.is_contiguous() or sums.device != like.device:
            raise ValueError(
                f"sums of partials must be contiguous float32 of one dimension on {like.device}, the device of "
                f"{like_name}, got {sums.dtype} {list(sums.shape)} on {sums.device}"
            )


def partials_memory(like: Tensor) -> Tensor | None:
    """Sums for any ``Partials``: one product at a time leaves its own there until its reader has ended. None where no
    kernel multiplies operands of the dtype and on the device of ``like``."""
    if like.dtype not in _HALVES or not like.is_cuda:
        return None
    if extension.hopper_problem(_native(), like.get_device()) is not None:
        return None
    return torch.zeros(_native()["_partials"](), device=like.device)


@lru_cache
def _limits(index: int, outputs: int, inputs: int) -> tuple[int, int]:
    four, two = c_int32(), c_int32()
    what = f"limits of a product of {outputs} by {inputs}"
    extension.call_on(index, what, _native()["_limits"], inputs, outputs, ctypes.byref(four), ctypes.byref(two))
    return four.value, two.value


def product_partials(memory: Tensor, outputs: int, inputs: int) -> Partials:
    """How products with weights [outputs, inputs] leave their rows in that memory."""
    return Partials(memory, *_limits(memory.get_device(), outputs, inputs))


def whole_rows(x: Tensor, partials: Partials | None, live: int, rows: slice | Tensor) -> Tensor:
    """``x[rows]`` of the live ones, as a product left them: partial sums added up, in fp32, where there are some."""
    shares = 0 if partials is None else partials.shares(live)
    if shares == 0:
        return x[rows]
    width = x.shape[1]
    return partials.sums[: live * shares * width].view(live, shares, width)[rows].sum(1)


def hopper_product(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    count: Tensor,
    gelu: bool,
    workspace: Tensor | None,
    path: int | None = None,
    partials: Partials | None = None,
) -> None:
    """``linear_rows_`` with n = count[0], checked operands, on the current stream. path: a tile of PATHS; None: chosen
    on the device, by the live count. Sums are shared among programs where there are partials to leave them in, else
    where a workspace is given."""
    call = _Call(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        count=count.data_ptr(),
        workspace=None if workspace is None else workspace.data_ptr(),
        partials=None if partials is None else partials.sums.data_ptr(),
        stream=torch.cuda.current_stream(out.device).cuda_stream,
        rows=x.shape[0],
        capacity=out.shape[0],
        inputs=weight.shape[1],
        outputs=weight.shape[0],
        x_stride=x.stride(0),
        weight_stride=weight.stride(0),
        out_stride=out.stride(0),
        bfloat16=out.dtype == torch.bfloat16,
        bias_fp32=bias is not None and bias.dtype == torch.float32,
        gelu=gelu,
        path=-1 if path is None else path,
    )
    what = f"a product of [{out.shape[0]}, {weight.shape[1]}] by {list(weight.shape)}"
    extension.call_on(out.device, what, _native()[""], ctypes.byref(call))
