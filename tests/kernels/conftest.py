"""Devices and instruction sets the op tests run on."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from engine.kernels import extension
from engine.kernels.gpu_common import INTERPRETED, triton


def pytest_collection_modifyitems(config, items):
    """Triton's interpreter is switched on before the kernels are imported, or not at all: one process cannot do both.
    ``TRITON_INTERPRET=1 pytest -m interpreter tests/kernels`` runs what is left out here."""
    if not INTERPRETED:
        left_out = [item for item in items if item.get_closest_marker("interpreter")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("interpreter")]


@dataclass(frozen=True)
class Way:
    """One implementation of a Triton op, and where its tensors stand."""

    name: str
    device: str

    def __call__(self, op: Callable, twin: Callable) -> Callable:
        return twin if self.name == "twin" else op

    def skip_wrong(self, dtype: torch.dtype) -> None:
        if self.name == "interpreter" and dtype == torch.bfloat16:
            pytest.skip("Triton's interpreter multiplies bf16 matrices wrongly and rounds to bf16 towards zero")


@pytest.fixture(
    params=[
        "twin",
        pytest.param("interpreter", marks=pytest.mark.interpreter),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def way(request) -> Way:
    """The torch twin, the kernel in Triton's interpreter, the kernel on a device."""
    if request.param == "cuda":
        request.getfixturevalue("gpu")
        if triton is None:
            pytest.skip("triton is not installed")
    return Way(request.param, "cuda" if request.param == "cuda" else "cpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    if request.param == "cuda":
        request.getfixturevalue("gpu")
        if not extension.cuda_kernels():
            pytest.skip("the extension has no usable CUDA half")
    return request.param


@pytest.fixture
def cuda_device(gpu) -> str:
    if not torch._C._dispatch_has_kernel_for_dispatch_key("consistentee::gather_rows", "CUDA"):
        pytest.skip("the dispatch table has no CUDA kernel for consistentee::gather_rows")
    return "cuda"


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instruction_set(request):
    """Every set of CPU kernels this machine can run, restored afterwards."""
    if not extension.available():
        pytest.skip("the extension is not built")
    usual = extension.cpu_kernels()
    if extension.cpu_kernels(request.param) != request.param:
        extension.cpu_kernels()
        pytest.skip(f"this CPU has no {request.param} kernels")
    yield request.param
    assert extension.cpu_kernels() == usual


@pytest.fixture(autouse=True)
def steady():
    """Same numbers every time; one thread, since waiting for a busy neighbour takes longer than these shapes do."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
