"""Load the compiled extension once, and say what each of its ops returns.

The extension (``engine/_C.abi3.so``) is one file for the CPU and CUDA, for every Python and for torch >= 2.10. Where it
was not built, the public functions of this package are the plain torch twins that stand beside them.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
import weakref
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

__all__ = ["available", "bind", "c_functions", "call_on", "cpu_kernels", "cuda_kernels", "drop_with", "hopper_problem",
           "library", "prepare"]  # fmt: skip

_NAMESPACE = "consistentee"
_library: torch.library.Library | None = None
_dll: ctypes.CDLL | None = None
_cuda_kernels = False
_twins_for_cuda = False  # the compiled CUDA half cannot serve
_bound: list[tuple[str, Callable]] = []  # ops and their twins
LEAST_CAPABILITY = (8, 0)  # of the devices that the CUDA half is built for (setup.py)


def available() -> bool:
    """Whether the compiled ops are loaded."""
    return _dll is not None


def library() -> ctypes.CDLL | None:
    """The extension's plain C functions, or None where it is absent."""
    return _dll


def c_functions(name: str, prototypes: dict[str, tuple]) -> dict[str, Callable] | str:
    """Plain C functions ``consistentee_<name><key>``, each with its (result, arguments) of ctypes; or why there are
    none (the CUDA half's)."""
    if _dll is None:
        return "the extension is not built"
    if not all(hasattr(_dll, f"consistentee_{name}{key}") for key in prototypes):
        return "the extension was built without CUDA (nvcc was absent)"
    functions = {}
    for key, (result, arguments) in prototypes.items():
        functions[key] = getattr(_dll, f"consistentee_{name}{key}")
        functions[key].restype, functions[key].argtypes = result, arguments
    return functions


def call_on(device: torch.device | int, what: str, function: Callable, *arguments) -> None:
    """Call one of ``c_functions`` that says null or what went wrong, with that CUDA device as the current one.
    RuntimeError with the reason, and ``what`` was to be done."""
    with torch.cuda.device(device):
        error = function(*arguments)
    if error is not None:
        raise RuntimeError(f"CUDA: {what}: {error.decode()}")


def drop_with(owner: object, plan: str, handle: int) -> None:
    """Give back what the op ``plan`` made, when its owner goes."""
    weakref.finalize(owner, getattr(_dll, f"consistentee_drop_{plan}"), ctypes.c_int64(handle))


def cuda_kernels() -> bool:
    """Whether CUDA tensors reach compiled kernels, rather than the torch twins."""
    return _cuda_kernels


def hopper_problem(functions: dict | str, index: int) -> str | None:
    """Why ``c_functions`` that launch kernels on Hopper's own instructions cannot serve that device, or None."""
    if isinstance(functions, str):
        return functions
    return _hopper_problem(index) if cuda_kernels() else "the extension has no usable CUDA half"


@lru_cache
def _hopper_problem(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    return None if (major, minor) == (9, 0) else f"it needs compute capability 9.0, this device has {major}.{minor}"


def cpu_kernels(name: str | None = None) -> str:
    """Name of the instruction set the CPU ops use; ``name`` chooses another that this machine has (for tests)."""
    if _dll is None:
        return "torch"
    return _dll.consistentee_cpu_kernels(name.encode() if name else None).decode()


def bind(name: str, twin: Callable) -> Callable:
    """The compiled op ``name``, or ``twin`` where the extension is absent.

    Where the extension has no usable CUDA half, or the op none, the twin is registered for CUDA tensors, so that
    callers need not ask.
    """
    if _dll is None:
        return twin
    _bound.append((name, twin))
    if _twins_for_cuda or not torch._C._dispatch_has_kernel_for_dispatch_key(f"{_NAMESPACE}::{name}", "CUDA"):
        _library.impl(name, twin, "CUDA", allow_override=True)
    return getattr(torch.ops.consistentee, name).default


def prepare(device: torch.device) -> None:
    """To be asked before tensors of ``device`` are worked on: where the compiled CUDA half was not built for it, the
    twins serve all CUDA tensors from now on, with one warning. (Not when the package is imported: asking for a device
    initialises CUDA.)"""
    global _cuda_kernels, _twins_for_cuda
    if device.type != "cuda" or not _cuda_kernels:
        return
    capability = torch.cuda.get_device_capability(device)
    if capability >= LEAST_CAPABILITY:
        return
    _cuda_kernels, _twins_for_cuda = False, True
    for name, twin in _bound:
        _library.impl(name, twin, "CUDA", allow_override=True)
    least, found = (".".join(map(str, x)) for x in (LEAST_CAPABILITY, capability))
    warnings.warn(
        f"the extension is built for compute capability {least} and up, {device} has {found}: CUDA tensors use the "
        "torch twins",
        stacklevel=2,
    )


def _path() -> Path:
    # kernels/ is reached through a link inside engine/, and may have been resolved by an importer: ask the package.
    return Path(sys.modules[__name__.partition(".")[0]].__path__[0]) / "_C.abi3.so"


def _load() -> None:
    global _dll, _library, _cuda_kernels, _twins_for_cuda
    path = _path()
    if not path.exists():
        warnings.warn("extension not built: using the torch twins; pip install -e . builds it", stacklevel=2)
        return
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        warnings.warn(
            f"extension not loaded ({error}): using the torch twins; pip install -e . rebuilds it", stacklevel=2
        )
        return
    dll = ctypes.CDLL(str(path))
    dll.consistentee_cpu_kernels.restype = ctypes.c_char_p
    dll.consistentee_cpu_kernels.argtypes = [ctypes.c_char_p]
    _dll = dll
    _library = torch.library.Library(_NAMESPACE, "IMPL")
    _register_fakes()
    if torch.version.cuda is None:
        return
    reason = _cuda_problem(dll)
    _cuda_kernels, _twins_for_cuda = reason is None, reason is not None
    if reason is not None:
        warnings.warn(f"{reason}: CUDA tensors use the torch twins", stacklevel=2)


def _cuda_problem(dll: ctypes.CDLL) -> str | None:
    """Why the CUDA half cannot serve, or None. A driver version of 0 means no driver, hence no CUDA tensors either."""
    if not hasattr(dll, "consistentee_cuda_versions"):
        return "the extension was built without CUDA (nvcc was absent)"
    driver, runtime = ctypes.c_int(0), ctypes.c_int(0)
    dll.consistentee_cuda_versions(ctypes.byref(driver), ctypes.byref(runtime))
    if 0 < driver.value < runtime.value // 1000 * 1000:
        return (
            f"the extension was built with CUDA {runtime.value // 1000} but the driver serves up to "
            f"{driver.value // 1000}.{driver.value % 1000 // 10} (rebuild it with an older nvcc, or update the driver)"
        )
    return None


# --- fakes: shapes and dtypes for tracing ------------------------------------------------------------------------


def _register_fakes() -> None:
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"{_NAMESPACE}::{name}")(fake)


def _ints(like: torch.Tensor, *shape) -> torch.Tensor:
    return like.new_empty(shape, dtype=torch.int32)


def _prefix_sum(lengths):
    return _ints(lengths, lengths.shape[0] + 1)


def _compact(hidden_states, cu_seqlens, keep):
    batch = keep.shape[0]
    return (
        hidden_states.new_empty(hidden_states.shape),
        _ints(keep, batch + 1),
        _ints(keep, batch),
        _ints(keep, 1),
    )


def _gather_rows(x, index):
    return x.new_empty((index.shape[0], *x.shape[1:]))


def _scatter_rows_(out, src, index):
    return None


def _step_rows_(*arguments, **named) -> None:
    return None


def _survivors_(keep, cu_seqlens, counts, state, out_cu_seqlens, token_dest, out_counts, out_state):
    return None


def _unknown_size() -> torch.SymInt:
    return torch.library.get_ctx().new_dynamic_size()


def _pack_lead(padded, lengths, total_tokens=None):
    total = _unknown_size() if total_tokens is None else total_tokens
    return padded.new_empty((total, *padded.shape[2:]))


def _unpack_lead(packed, cu_seqlens, max_seqlen):
    return packed.new_empty((cu_seqlens.shape[0] - 1, max_seqlen, *packed.shape[1:]))


def _lead_attention(query, key, value, cu_seqlens, rows, num_heads, scale, part, position_bias, num_queries=None):
    total, hidden = query.shape
    batch = cu_seqlens.shape[0] - 1
    if num_queries is not None:
        count = num_queries
    elif part == 0:
        count = batch if rows is None else rows.shape[0]
    elif rows is None:
        count = total if part == 2 else total - batch
    else:
        count = _unknown_size()
    return query.new_empty((count, hidden))


def _exit_policy(first, pooler_weight, pooler_bias, w1, b1, w2, b2):
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    return first.new_empty(first.shape), first.new_empty((first.shape[0],), dtype=wide)


def _embed_layer_norm(input_ids, token_type_ids, positions, word, token_type, position, weight, bias, eps):
    return word.new_empty((input_ids.shape[0], word.shape[1]))


def _add_layer_norm(x, residual, weight, bias, eps):
    return x.new_empty(x.shape)


def _packed_linear(x, weight, bias, outputs, gelu):
    return x.new_empty((x.shape[0], outputs))


def _finish_layer(qkv, cu_seqlens, rows, residual, *rest):
    return residual.new_empty(residual.shape)


def _plan(*tensors):
    return _unknown_size()


def _run_encoder(input_ids, token_type_ids, lengths, plan, classes, *rest):
    rows = len(lengths)
    logits, probs = (input_ids.new_empty(shape, dtype=torch.float32) for shape in ((rows, classes), (rows,)))
    return logits, _ints(input_ids, rows), probs


def _decode_step(token_ids, positions, block_table, watermarks, keys, values, states, *rest):
    rows = token_ids.shape[0]
    normed, probs = states.new_empty((rows, states.shape[1])), states.new_empty((rows,))
    return normed, _ints(states, rows), probs, token_ids.new_empty((1,))


_FAKES: dict[str, Callable] = {
    "prefix_sum": _prefix_sum,
    "compact_rows": _compact,
    "compact_lead": _compact,
    "gather_rows": _gather_rows,
    "scatter_rows_": _scatter_rows_,
    "survivors_": _survivors_,
    "step_rows_": _step_rows_,
    "pack_lead": _pack_lead,
    "unpack_lead": _unpack_lead,
    "lead_attention": _lead_attention,
    "exit_policy": _exit_policy,
    "embed_layer_norm": _embed_layer_norm,
    "add_layer_norm": _add_layer_norm,
    "packed_linear": _packed_linear,
    "finish_layer": _finish_layer,
    "encoder_plan": _plan,
    "run_encoder": _run_encoder,
    "decoder_plan": _plan,
    "decode_step": _decode_step,
}

_load()
