"""The script for sanitizers must at least run: on the CPU it walks over the same shapes."""

import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from engine.bench import sanitize, sanitize_triton
from engine.kernels import extension
from engine.kernels.gpu_common import triton
from tests.kernels.cases import needs_extension

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def said(capsys) -> dict[str, str]:
    lines = capsys.readouterr().out.splitlines()
    return {name: what for name, _, what in (line.partition(": ") for line in lines)}


@needs_extension
def test_runs_on_the_cpu(capsys):
    sanitize.main(["--device", "cpu"])
    assert list(said(capsys)) == list(sanitize.RUNS)


@pytest.mark.parametrize("name", sanitize_triton.RUNS)
def test_one_group(capsys, name):
    sanitize.main(["--device", "cpu", "--only", name])
    assert said(capsys) == {name: "ran"}


def test_triton_needs_no_extension(capsys, monkeypatch):
    monkeypatch.setattr(extension, "available", lambda: False)
    sanitize.main(["--device", "cpu"])
    for name, what in said(capsys).items():
        assert what == ("ran" if name in sanitize_triton.RUNS else "left out, the extension is not built")
    with pytest.raises(SystemExit, match="^nothing to sanitize: the extension is not built"):
        sanitize.main(["--device", "cpu", "--only", "packing"])


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
def test_no_product_of_a_library(inference):
    def results(x, q):
        attended = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        return F.linear(x, q[0, 0], x[0, 0, :5]), F.linear(x, q[0, 0]), F.linear(x[0], q[0, 0]), attended, q @ q.mT

    with torch.inference_mode(inference):
        x, q = torch.randn(2, 3, 8), torch.randn(2, 4, 5, 8)
        with sdpa_kernel(SDPBackend.MATH):
            with Called() as usual:
                expected = results(x, q)
            with Called() as called, sanitize.WithoutLibraries():
                found = results(x, q)
    torch.testing.assert_close(found, expected)
    products = {"mm", "bmm", "addmm", "baddbmm", "linear", "matmul", "scaled_dot_product_attention"}
    assert usual.names & products and not called.names & products


class Recorder:
    def __init__(self, name: str, launches: list[tuple]):
        self.name, self.launches = name, launches

    def __getitem__(self, grid: tuple[int, ...]):
        """What Triton compiles anew: other dtypes, other constants; but for the alignment of strides."""
        return lambda *args, **kwargs: self.launches.append(
            (self.name, *(getattr(x, "dtype", None) for x in args), *sorted(kwargs.items()))
        )


@pytest.mark.skipif(triton is None, reason="triton is not installed")
def test_every_triton_kernel_in_few_forms(monkeypatch):
    """A kernel that nobody watches would not be missed; forms, which all have to be compiled, would add up."""
    names, launches = set(), []
    for path in KERNELS.glob("gpu_*.py"):
        module = importlib.import_module(f"engine.kernels.{path.stem}")
        kernels = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
        kernels = {name: value for name, value in kernels.items() if hasattr(value, "arg_names")}  # not runs_kernel
        for name, kernel in kernels.items():
            owner = f"{kernel.fn.__module__}.{name}"  # one that another file launches is still the same
            monkeypatch.setattr(module, name, Recorder(owner, launches))
            names.add(owner)
        if kernels and hasattr(module, "runs_kernel"):
            monkeypatch.setattr(module, "runs_kernel", lambda tensor: True)
    for run in sanitize_triton.RUNS.values():
        run("cpu")
    assert {launch[0] for launch in launches} == names and len(names) >= 14
    assert 60 <= len(set(launches)) <= 90


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_says_what_is_missing():
    with pytest.raises(SystemExit, match="^nothing to sanitize: "):
        sanitize.main([])
