"""Devices and instruction sets the op tests run on."""

import pytest
import torch

from engine.kernels import extension


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if not extension.cuda_kernels():
            pytest.skip("the extension has no usable CUDA half")
    return request.param


@pytest.fixture
def cuda_device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
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
