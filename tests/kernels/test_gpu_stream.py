"""Products of a decode step for the live rows."""

import pytest
import torch
from torch.nn import functional as F

from engine.kernels import gpu_stream
from engine.kernels.gpu_stream import (
    StreamConfig,
    rms_norm_math,
    stream_configs,
    stream_rows_,
    stream_rows__ref,
    stream_workspace,
)
from tests.kernels import gpu_cases
from tests.kernels.cases import assert_no_worse, doubled

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
POISON = 7.0


def plain(x, weight, norm, residual, act):
    if norm is not None:
        x = norm[0] * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm[1]))
    y = F.linear(x, weight)
    if act == "swiglu":
        gate, up = y.chunk(2, 1)
        y = F.silu(gate) * up
    return y if residual is None else residual + y


def live_rows(capacity, live, device):
    """order with ``live`` rows in front, which stand anywhere."""
    order = torch.randperm(capacity).to(device, torch.int32)
    return order, torch.tensor([live, 99], dtype=torch.int32, device=device), order[:live].long()


@pytest.mark.parametrize("dtype", [HALF, SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize(
    "form, capacity, live, features, width",
    [
        (form, *size)
        for size in ((1, 1, 20, 40), (1, 0, 8, 16), (5, 3, 33, 72), (37, 20, 48, 136))
        for form in ("plain", "norm", "residual", "in place", "swiglu", "norm swiglu", "fp32 out")
        if size[0] == 1 or "norm" not in form
    ],
)
def test_products(way, dtype, form, capacity, live, features, width):
    way.skip_wrong(dtype)
    act = "swiglu" if "swiglu" in form else "none"
    order, counts, rows = live_rows(capacity, live, way.device)
    x = torch.randn(capacity, width)
    weight = (torch.randn(features * (2 if act == "swiglu" else 1), width) * width**-0.5).to(dtype).to(way.device)
    dead = torch.ones(capacity, dtype=torch.bool)
    dead[rows.cpu()] = False
    x[dead] = float("nan")  # nobody may look
    x = x.to(dtype).to(way.device)
    norm = ((1 + 0.2 * torch.randn(width)).to(dtype).to(way.device), 1e-5) if "norm" in form else None
    residual = torch.randn(capacity, features).to(dtype).to(way.device) if form in ("residual", "in place") else None
    out = torch.full((capacity, features), POISON, dtype=SINGLE if form == "fp32 out" else dtype, device=way.device)
    if form == "in place":
        given, out = residual.clone(), residual
    else:
        given = residual
    before = out.clone()
    way(stream_rows_, stream_rows__ref)(out, x, weight, order, counts, norm, residual, act)
    part = None if given is None else given[rows]
    wide = doubled(x[rows], weight, None if norm is None else norm[0], part)
    exact = plain(wide[0], wide[1], None if norm is None else (wide[2], norm[1]), wide[3], act)
    short = plain(x[rows], weight, None if norm is None else (norm[0], norm[1]), part, act)
    assert_no_worse(out[rows], short.to(out.dtype), exact, factor=3)
    assert torch.equal(out[dead.to(way.device)], before[dead.to(way.device)])


@pytest.mark.parametrize("size, gain", [(2000.0, 40.0), (0.02, 0.02)])
def test_numbers_at_the_ends_of_fp16(way, size, gain):
    """x times gain lies beyond fp16's largest number, or so low that hardly a bit is left of it."""
    order, counts, rows = live_rows(1, 1, way.device)
    x = (torch.randn(1, 64) * size).to(HALF).to(way.device)
    weight = (torch.randn(24, 64) * 0.1).to(HALF).to(way.device)
    norm = ((torch.randn(64).abs() * gain + gain).to(HALF).to(way.device), 1e-6)
    out = torch.zeros(1, 24, device=way.device, dtype=HALF)
    way(stream_rows_, stream_rows__ref)(out, x, weight, order, counts, norm)
    exact = plain(x.double(), weight.double(), (norm[0].double(), norm[1]), None, "none")
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=float(exact.abs().max()) * 2e-3)


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("capacity, act", [(1, "none"), (1, "swiglu"), (20, "none"), (40, "swiglu")])
def test_all_tiles_compute_the_same(way, dtype, capacity, act):
    order, counts, rows = live_rows(capacity, capacity, way.device)
    x = torch.randn(capacity, 80).to(dtype).to(way.device)
    weight = (torch.randn(48, 80) * 0.1).to(dtype).to(way.device)
    features = 24 if act == "swiglu" else 48
    want = plain(x, weight, None, None, act)
    for config in stream_configs(capacity, dtype, 80, act):
        out = torch.zeros(capacity, features, dtype=dtype, device=way.device)
        way(stream_rows_, stream_rows__ref)(out, x, weight, order, counts, act=act, config=config)
        torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)


def test_norm_as_hugging_face_rounds_it():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm, x = LlamaRMSNorm(32, eps=1e-5).half(), torch.randn(5, 32).half()
    torch.nn.init.normal_(norm.weight, mean=1.0)
    assert torch.equal(norm(x), rms_norm_math(x, norm.weight.detach(), 1e-5))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(act="gelu"), "act must be one of none, swiglu"),
        (dict(weight=torch.zeros(4, 7)), r"weight must have shape \[4, 8\], got \[4, 7\]"),
        (dict(weight=torch.zeros(4, 8).half()), "weight must have the dtype of x"),
        (dict(out=torch.zeros(3, 4).double()), "out must have the dtype of x or be float32"),
        (dict(order=torch.zeros(3)), "order must be int32"),
        (dict(counts=torch.zeros(3, dtype=torch.int32)), r"counts must be int32 of shape \[2\]"),
        (dict(norm=(torch.zeros(9), 1e-5)), "the norm's weight must have shape"),
        (dict(norm=(torch.zeros(8), 1e-5)), "norm is for one row, got room for 3"),
        (dict(residual=torch.zeros(3, 5)), r"residual must have shape \[3, 4\]"),
        (dict(x=torch.zeros(8, 3).t()), "x must be contiguous"),
        (dict(x=torch.zeros(3, 0), weight=torch.zeros(4, 0)), "x must have at least one column"),
        (
            dict(zip(("out", "residual"), torch.zeros(16).as_strided((2, 3, 4), (2, 4, 1)), strict=True)),
            "residual must be out itself or apart from it",
        ),
    ],
)
def test_wrong_arguments(change, words):
    good = dict(out=torch.zeros(3, 4), x=torch.zeros(3, 8), weight=torch.zeros(4, 8),
                order=torch.zeros(3, dtype=torch.int32), counts=torch.zeros(2, dtype=torch.int32))  # fmt: skip
    with pytest.raises(ValueError, match=words):
        stream_rows_(**{**good, **change})


def test_wrong_configs(way):
    with pytest.raises(ValueError, match="dtype must be float16"):
        stream_configs(1, torch.float64)
    with pytest.raises(ValueError, match="rows must be at least 1"):
        stream_configs(0, HALF)
    if way.name != "twin":
        order, counts, _ = live_rows(2, 1, way.device)
        x, weight = torch.zeros(2, 16, device=way.device), torch.zeros(16, 16, device=way.device)
        with pytest.raises(ValueError, match="block_m 1 is for one row, got room for 2"):
            stream_rows_(torch.zeros_like(x), x, weight, order, counts, config=StreamConfig(1, 4, 16, 4))


@gpu_cases.compiles
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
@pytest.mark.parametrize("capacity", [1, 8, 32, 64])
@pytest.mark.parametrize("form", ["output", "gate up", "down", "head"])
def test_compiles(monkeypatch, form, capacity, dtype, arch):
    """At LLaMA-7B's shapes, as the step calls them: no register is spilled, and the tiles fit."""

    def new(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype)

    order, counts = new(capacity, dtype=torch.int32), new(2, dtype=torch.int32)
    norm = (new(4096), 1e-5) if capacity == 1 else None
    shared = dict(workspace=stream_workspace(capacity, 4096, torch.device("cpu")))
    gpu_cases.on_device_like(monkeypatch, arch, gpu_stream)
    calls = {
        "output": lambda: stream_rows_(new(capacity, 4096), new(capacity, 4096), new(4096, 4096), order, counts,
                                       residual=new(capacity, 4096), **shared),
        "gate up": lambda: stream_rows_(new(capacity, 11008), new(capacity, 4096), new(22016, 4096), order, counts,
                                        norm=norm, act="swiglu"),
        "down": lambda: stream_rows_(new(capacity, 4096), new(capacity, 11008), new(4096, 11008), order, counts,
                                     residual=new(capacity, 4096), **shared),
        "head": lambda: stream_rows_(new(capacity, 32000, dtype=SINGLE), new(capacity, 4096), new(32000, 4096), order,
                                     counts),
    }  # fmt: skip
    monkeypatch.setattr(gpu_cases, "MODULES", (gpu_stream,))
    usage = gpu_cases.compile_launch(gpu_cases.record(monkeypatch, form, calls[form]), arch)
    assert usage.stack_bytes == 0, "registers are spilled"
    assert usage.shared_bytes <= gpu_cases.SHARED_BYTES[arch]
