"""What the Triton kernels share: triton where it is installed, device functions, launch shapes, argument checks.

All of them work on the *rows* layout (``packing.py``) in buffers of a fixed capacity, and none of them lets the host
know how much of a buffer is live: ``counts`` (2,) int32 on the device is [n_rows, n_tokens]. Grids cover the capacity;
a program beyond the live count loads that count and returns. Kernels start while the one in front of them in the stream
still ends, so that one may not be what writes counts, cu_seqlens, row ids, limits or weights. Nothing allocates, so
every op can be captured in a graph.

The kernels serve CUDA tensors, and CPU tensors where ``TRITON_INTERPRET=1`` was set before this module was imported.
Everywhere else, and where triton is absent, the torch twin beside each op is the implementation. A twin reads its
counts on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    import triton.language.extra.cuda  # noqa: F401  tl.extra.cuda, which ``begin`` names
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = tl = TensorDescriptor = None

__all__ = ["FLOATS", "INTERPRETED", "ROWS", "TOKENS", "UNALIGNED", "jit", "runs_kernel", "tl", "triton"]

# Entries of ``counts``.
ROWS, TOKENS = 0, 1

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)


def jit(kernel: Callable | None = None, **options):
    """``triton.jit``; without triton the function as it is, which nobody then calls."""
    if kernel is None:
        return lambda kernel: jit(kernel, **options)
    return kernel if triton is None else triton.jit(kernel, **options)


# Pointers that are read one entry at a time. Triton compiles a kernel again where such an argument is aligned otherwise
# than the last one; these may be slices of one buffer (a layer's counts) at any place without that.
UNALIGNED = ("counts_ptr", "cu_seqlens_ptr")


def runs_kernel(tensor: Tensor) -> bool:
    """Whether the kernel, rather than the twin, serves this tensor."""
    return triton is not None and (tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu"))


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@lru_cache
def early_launches(index: int) -> bool:
    """Whether kernels on that device may start while the one in front of them ends (programmatic dependent launch):
    each then waits for that one's results itself."""
    return torch.cuda.get_device_capability(index)[0] >= 9


def early(tensor: Tensor) -> dict[str, bool]:
    """Launch options of a Triton kernel that calls ``begin(EARLY)``."""
    if tensor.is_cuda and early_launches(tensor.get_device()):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


class TileLimits(NamedTuple):
    """What tiles are chosen by.

    hopper        whether 64 rows of a tile are multiplied from shared memory: capability 9
    shared_bytes  the most shared memory that a program may have
    """

    hopper: bool
    shared_bytes: int


HOPPER, AMPERE = TileLimits(True, 227 * 1024), TileLimits(False, 163 * 1024)  # H100, A100
# Of shared memory, what is left for other things than tiles.
_BESIDE_TILES = 8 * 1024


@lru_cache
def _tile_limits(index: int) -> TileLimits:
    properties = torch.cuda.get_device_properties(index)
    most = properties.shared_memory_per_block_optin
    # Nobody has measured tiles for more memory than an A100's on anything but a Hopper.
    return TileLimits(True, most) if properties.major == 9 else TileLimits(False, min(most, AMPERE.shared_bytes))


def tile_limits(tensor: Tensor) -> TileLimits:
    """Of the device the tensor is on."""
    return _tile_limits(tensor.get_device()) if tensor.is_cuda else AMPERE


def fitting_tiles(configs: tuple, stage_bytes: Callable, limits: TileLimits) -> tuple:
    """Of configs those for whose tiles there is room, in their order; where there are none, the smallest with fewer
    stages. stage_bytes(config): what one of its num_stages takes."""
    most = limits.shared_bytes - _BESIDE_TILES
    found = tuple(config for config in configs if stage_bytes(config) * config.num_stages <= most)
    if found:
        return found
    least = min(configs, key=stage_bytes)
    return (least._replace(num_stages=max(1, most // stage_bytes(least))),)


def copied_tiles(weight: Tensor, rows: int, columns: int):
    """The tiles (rows, columns) of a 2-d weight for Hopper's copy engine (TMA), or None where a device has none or the
    weight's rows do not begin at multiples of 16 bytes: tiles are then loaded by addresses."""
    fits = weight.data_ptr() % 16 == 0 and weight.shape[1] * weight.element_size() % 16 == 0
    if not fits or not (INTERPRETED or early(weight)["EARLY"]):
        return None
    return TensorDescriptor.from_tensor(weight, [rows, columns])


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


# --- device functions ------------------------------------------------------------------------------------------------


@jit
def begin(EARLY: tl.constexpr):
    """With EARLY, wait for the kernel in front, and let the one behind start as soon as there is room.

    What the kernel in front does not write may be loaded ahead of it: weights, which nothing in a pass writes, and
    which rows are live, which some kernel further in front has written (``loaded_ahead``). Every program gets here
    before it returns or stores anything: so the kernels further in front have ended when one behind starts."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@jit
def loaded_ahead(ptr, mask=None, other=None):
    """What a kernel of the pass wrote, but not the one in front. Past the first level of cache, where the last value
    may still stand: nobody clears it for a kernel that starts early."""
    return tl.load(ptr, mask=mask, other=other, cache_modifier=".cg")


@jit
def weight_tile(ptrs, tiles, row, k, inner, K: tl.constexpr, EXACT: tl.constexpr, TILES: tl.constexpr):
    """A tile of a weight from column k on, 0 beyond the last: with TILES by the copy engine from ``copied_tiles``, else
    from ptrs, its addresses at column 0. EXACT: no tile has columns beyond."""
    if TILES:
        return tiles.load([row, k])
    if EXACT:
        return tl.load(ptrs + k)
    return tl.load(ptrs + k, mask=inner[None, :] < K - k, other=0.0)


@jit
def shares_of(live, four, two):
    """``Partials.shares``: partial sums of a row that a product has left."""
    return tl.where(live <= four, 4, tl.where(live <= two, 2, 0))


@jit
def gelu(x):
    """The erf form, BERT's."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@jit
def tanh(x):
    """From exp(-2 |x|), which cannot overflow; absolute error within 1e-7. NaN stays NaN."""
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


# --- checks: what was given, what is allowed, what to do -------------------------------------------------------------


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_float(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} must be float16, bfloat16 or float32, got {_name(x.dtype)}: convert it first")


def check_rows(name: str, x: Tensor, like: Tensor, like_name: str, width: int, rows: int = 0) -> None:
    """x [rows or more, width] in the dtype and on the device of ``like``, its last dimension contiguous."""
    if x.dim() != 2 or x.shape[1] != width or x.shape[0] < rows:
        raise ValueError(f"{name} must have shape [{rows} or more, {width}], got {list(x.shape)}")
    check_like(name, x, like, like_name)
    if width > 1 and x.stride(1) != 1:
        raise ValueError(f"{name} must be contiguous along its rows, got strides {x.stride()}: call contiguous()")


def check_like(name: str, x: Tensor, like: Tensor, like_name: str) -> None:
    if x.dtype != like.dtype:
        raise ValueError(f"{name} must have the dtype of {like_name} ({_name(like.dtype)}), got {_name(x.dtype)}")
    check_device(name, x, like, like_name)


def check_device(name: str, x: Tensor, like: Tensor, like_name: str) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name} ({like.device}), got {x.device}")


def check_weight(name: str, x: Tensor, like: Tensor, like_name: str, *shape: int) -> None:
    """A contiguous weight of this shape, fp32 or the dtype of ``like``."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")
    if x.dtype not in (like.dtype, torch.float32):
        allowed = " or ".join(dict.fromkeys(("float32", _name(like.dtype))))
        raise ValueError(f"{name} must be {allowed}, got {_name(x.dtype)}")
    check_device(name, x, like, like_name)
    check_contiguous(**{name: x})


def check_contiguous(**tensors: Tensor | None) -> None:
    """By name; None is a tensor that was not given."""
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {x.stride()}: call contiguous()")


def check_vector(
    name: str, x: Tensor, like: Tensor, like_name: str, dtype: torch.dtype | tuple[torch.dtype, ...], size: int
) -> None:
    """x [size or more], contiguous."""
    allowed = dtype if isinstance(dtype, tuple) else (dtype,)
    if x.dtype not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(_name, allowed))}, got {_name(x.dtype)}")
    if x.dim() != 1 or x.shape[0] < size:
        raise ValueError(f"{name} must have shape [{size} or more], got {list(x.shape)}")
    check_device(name, x, like, like_name)
    if x.shape[0] > 1 and x.stride(0) != 1:
        raise ValueError(f"{name} must be contiguous, got stride {x.stride(0)}: call contiguous()")


def check_counts(name: str, counts: Tensor, like: Tensor, like_name: str) -> None:
    if counts.dtype != torch.int32 or tuple(counts.shape) != (2,):
        raise ValueError(
            f"{name} must be int32 of shape [2], the live rows and tokens, got {_name(counts.dtype)} "
            f"{list(counts.shape)}"
        )
    check_device(name, counts, like, like_name)
    if counts.stride(0) != 1:
        raise ValueError(f"{name} must be contiguous, got stride {counts.stride(0)}: call contiguous()")


def check_which(which: int) -> None:
    if which not in (ROWS, TOKENS):
        raise ValueError(f"which must be 0 (rows) or 1 (tokens), the entry of counts to obey, got {which!r}")


def _span(x: Tensor) -> tuple[int, int]:
    """Addresses from the first element to past the last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def check_apart(out: Tensor, name: str, x: Tensor, out_name: str = "out") -> None:
    """Programs write rows of out while others still read x: the two must not overlap."""
    if out.numel() and x.numel() and out.device == x.device:
        (start, end), (x_start, x_end) = _span(out), _span(x)
        if start < x_end and x_start < end:
            raise ValueError(
                f"{out_name} must not overlap {name} in memory, rows of it are still read: give another buffer"
            )
