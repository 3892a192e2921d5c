"""What the launchers of the Triton kernels launch at realistic shapes, and how to compile it without a device."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from engine.kernels import exit_rows, gpu_attention, gpu_common, gpu_exit, gpu_linear, gpu_norms
from engine.kernels.gpu_common import AMPERE, HOPPER, INTERPRETED, TileLimits, triton
from engine.kernels.products import Partials
from engine.kernels.survivors import Removal

MODULES = (gpu_linear, gpu_attention, gpu_norms, gpu_exit)
NUM_HEADS = 12  # of BERT-base (H 768, head_dim 64) and MiniLM (H 384, head_dim 32)
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
LIMITS = {80: AMPERE, 90: HOPPER}
SMALL = TileLimits(False, 99 * 1024)  # capability 8.6, 8.9, 12.0
VERSION = "3.6.0"

# Marks of tests that compile.
needs_compiler = [
    pytest.mark.skipif(triton is None, reason="triton is not installed"),
    pytest.mark.skipif(
        triton is not None and triton.__version__ != VERSION, reason=f"register counts are those of triton {VERSION}"
    ),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
    pytest.mark.slow,
]


def compiles(test: Callable) -> Callable:
    """``needs_compiler`` for one test."""
    for mark in needs_compiler:
        test = mark(test)
    return test


# --- launches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One launch as a launcher made it, launch options among the keyword arguments."""

    name: str
    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder:
    def __init__(self, kernel: Any, launches: list[tuple]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def on_device_like(monkeypatch, arch: int, *modules: Any, limits: TileLimits | None = None) -> None:
    """The launchers of modules choose as on a device of this architecture."""
    for module in (gpu_common, *modules):
        monkeypatch.setattr(module, "early", lambda x: {"EARLY": arch >= 90})
    for module in modules:
        monkeypatch.setattr(module, "tile_limits", lambda x: limits or LIMITS[arch])


def record(monkeypatch, name: str, call: Callable[[], None]) -> Launch:
    """The one launch that ``call`` would make, its CPU tensors standing for the device's."""
    (launch,) = record_all(monkeypatch, name, call)
    return launch


def record_all(monkeypatch, name: str, call: Callable[[], None]) -> list[Launch]:
    launches: list[tuple] = []
    with monkeypatch.context() as patch:
        for module in MODULES:
            patch.setattr(module, "runs_kernel", lambda tensor: True)
            for attribute, kernel in vars(module).items():
                if attribute.endswith("_kernel") and hasattr(kernel, "arg_names"):
                    patch.setattr(module, attribute, _Recorder(kernel, launches))
        call()
    return [Launch(name, *launch) for launch in launches]


def calls(hidden: int, dtype: torch.dtype, tokens: int = 4096, rows: int = 64) -> Iterator[tuple[str, Callable]]:
    """One call of every op and of each of its forms, in the shapes of an encoder of this width."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    int32, floats = torch.int32, torch.float32
    counts, cu_seqlens = empty(2, dtype=int32), empty(rows + 1, dtype=int32)
    x, weight, bias = empty(tokens, hidden), empty(hidden), empty(hidden)
    wide, qkv = empty(tokens, 4 * hidden), empty(tokens, 3 * hidden)

    def linear(out_features: int, capacity: int, act: str, which: int = 1):
        out, weight, offset = empty(capacity, out_features), empty(out_features, hidden), empty(out_features)
        return lambda: gpu_linear.linear_rows_(out, x[:capacity], weight, offset, counts, which, act)

    yield "linear qkv", linear(3 * hidden, tokens, "none")
    yield "linear gelu", linear(4 * hidden, tokens, "gelu")
    yield "linear pooler", linear(hidden, rows, "tanh", 0)
    yield "linear small", linear(hidden, 16, "none")
    down = (empty(tokens, hidden), wide, empty(hidden, 4 * hidden), bias, counts, 1)
    yield "linear down", lambda: gpu_linear.linear_rows_(*down)

    scale = 0.125
    matrix = empty(NUM_HEADS, 512, 512, dtype=floats)
    for max_seqlen in (128, 32):
        attend = (empty(tokens, hidden), qkv, cu_seqlens, counts, NUM_HEADS, scale, max_seqlen)
        yield f"attention {max_seqlen}", lambda a=attend: gpu_attention.varlen_attention_(*a)
        yield f"attention {max_seqlen} bias", lambda a=attend: gpu_attention.varlen_attention_(*a, matrix)
        first = (empty(rows, hidden), *attend[1:])
        yield f"first tokens {max_seqlen}", lambda a=first: gpu_attention.varlen_attention_(*a, None, True)
    few = (empty(tokens, hidden), qkv, cu_seqlens[:17], counts, NUM_HEADS, scale, 128)
    yield "attention 128 few", lambda: gpu_attention.varlen_attention_(*few)
    removal = Removal(empty(16, dtype=torch.int8), *(empty(n, dtype=int32) for n in (16, 17, tokens, 2, 16)))
    yield "attention 128 removal", lambda: gpu_attention.varlen_attention_(*few, removal=removal)
    yield "first tokens bias", lambda a=first: gpu_attention.varlen_attention_(*a, matrix, True)

    norm = (weight, bias, 1e-12)
    other, out = empty(tokens, hidden), empty(tokens, hidden)
    ids = empty(tokens, dtype=torch.int64)
    tables = (empty(30522, hidden), empty(2, hidden), empty(512, hidden))
    embed = (ids, ids, ids, *tables, *norm, counts)
    yield "embed", lambda: gpu_norms.embed_layer_norm_rows_(out, *embed)
    yield "norm", lambda: gpu_norms.add_layer_norm_rows_(out, x, other, *norm, counts, 1)
    yield "norm first", lambda: gpu_norms.add_layer_norm_rows_(
        empty(rows, hidden), x, other, *norm, counts, 0, cu_seqlens, cu_seqlens
    )
    dest = empty(tokens, dtype=int32)
    yield "norm compact", lambda: gpu_norms.add_layer_norm_compact_(out, x, other, *norm, counts, dest)
    partials = Partials(empty(tokens * hidden, dtype=floats), 512, 2048)
    yield "norm compact partials", lambda: gpu_norms.add_layer_norm_compact_(
        out, x, other, *norm, counts, dest, partials, settled=True
    )
    some = (out[:64], x[:64], other[:64])
    yield "norm few partials", lambda: gpu_norms.add_layer_norm_rows_(*some, *norm, counts, 1, partials=partials)

    classes = 150
    policy = (empty(32, hidden), empty(32), empty(1, 32), empty(1))
    classifier = (empty(classes, hidden), empty(classes))
    per_row = empty(rows, dtype=int32)
    limits = exit_rows.ExitLimits(per_row, per_row, per_row, empty(rows, dtype=floats), per_row)
    exits = exit_rows.ExitDestinations(
        empty(rows, classes, dtype=floats), per_row, empty(rows, dtype=floats), empty(rows, dtype=torch.int8)
    )
    for criterion in ("policy", "confidence", "last"):
        rest = (counts, 3, criterion, policy, classifier)
        yield f"exit norm {criterion}", lambda r=rest: gpu_exit.exit_norm_rows_(
            exits, limits, x, other, norm, *r, cu_seqlens
        )
        yield f"exit add norm {criterion}", lambda r=rest: gpu_exit.exit_add_norm_rows_(
            exits, limits, out, x, other, norm, *r, cu_seqlens
        )
        yield f"exit norm partials {criterion}", lambda r=rest: gpu_exit.exit_norm_rows_(
            exits, limits, x, other, norm, *r, cu_seqlens, partials
        )
        yield f"exit add norm partials {criterion}", lambda r=rest: gpu_exit.exit_add_norm_rows_(
            exits, limits, out, x, other, norm, *r, cu_seqlens, partials=partials
        )
        yield f"exit add norm few partials {criterion}", lambda r=rest: gpu_exit.exit_add_norm_rows_(
            exits, limits, out[:800], x[:800], other, norm, *r, cu_seqlens, partials=partials
        )
        yield f"exit add norm, state, {criterion}", lambda r=rest: gpu_exit.exit_add_norm_rows_(
            exits, limits, out, x, other, norm, *r, None, x[:rows]
        )
    for criterion in ("policy", "scripted"):
        rest = (counts, 3, criterion, policy, classifier)
        yield f"exit state {criterion}", lambda r=rest: gpu_exit.exit_rows_(exits, limits, x[:rows], *r)


def launches(monkeypatch, hidden: int, dtype: torch.dtype) -> list[Launch]:
    return [record(monkeypatch, name, call) for name, call in calls(hidden, dtype)]


# --- compilation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """What ptxas gave one kernel. stack_bytes: where spilled registers go, 0 without spills."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    ptx: str


class _Driver:
    """A device of this architecture, as far as compiling asks."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 1000 + self.arch  # Triton's caches are per device: none that exists

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launch(launch: Launch, arch: int) -> Usage:
    """Everything that a launch does up to the launch: arguments bound and specialised, kernel compiled."""
    drivers = triton.runtime.driver
    usual = drivers._active
    drivers.set_active(_Driver(arch))
    try:
        # As ``gpu_common.early`` has it on such a device.
        early = {"EARLY": True, "launch_pdl": True} if arch >= 90 else {"EARLY": False}
        compiled = launch.kernel.warmup(*launch.args, grid=(1,), **{**launch.kwargs, **early})
    finally:
        drivers.set_active(usual)
    registers, stack = _resources(compiled.asm["cubin"])
    return Usage(registers, stack, compiled.metadata.shared, compiled.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def main() -> None:
    """Print what every form takes in every dtype on both architectures. Minutes."""
    import pytest

    for hidden in (768, 384):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for launch in launches(pytest.MonkeyPatch(), hidden, dtype):
                for arch in SHARED_BYTES:
                    usage = compile_launch(launch, arch)
                    print(
                        f"H {hidden}  {str(dtype).removeprefix('torch.'):8}  {launch.name:36}  sm_{arch}  "
                        f"{usage.registers:3} registers  {usage.stack_bytes} B spilled  "
                        f"{usage.shared_bytes / 1024:6.1f} KB shared",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
