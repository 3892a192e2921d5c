"""Add & Norm by the compiled extension on a device, against plain torch: every width of a lane, few and many rows."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import gpu_norms
from engine.kernels.gpu_norms import TOKENS, add_layer_norm_compact_, add_layer_norm_rows_
from engine.kernels.norm_rows import norm_rows_problem
from engine.kernels.products import Partials
from tests.kernels.cases import partials_of
from tests.kernels.test_gpu_norms import BRAIN, EPS, HALF, POISON, case, check, counts_of

CAPACITIES = [1, 9, 265, 600, 1057, 3072]  # 1, 1, 2, 4, 8 and 8 rows a program of 132 multiprocessors


@pytest.fixture(autouse=True)
def native_alone(gpu, monkeypatch):
    """Nothing goes to Triton's kernel unseen."""
    x, residual, weight, bias = case(2, 8, HALF, "cuda")
    problem = norm_rows_problem(x, x, residual, weight, bias)
    if problem is not None:
        pytest.skip(problem)
    monkeypatch.setattr(gpu_norms, "_add_norm_kernel", None)
    monkeypatch.setattr(gpu_norms, "_COMPILED_FROM", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("hidden", [8, 256, 384, 392, 600, 768])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_rows(dtype, hidden, capacity):
    x, residual, weight, bias = case(capacity, hidden, dtype, "cuda")
    for live in {0, 1, capacity // 2, capacity}:
        out = torch.full_like(x, POISON)
        add_layer_norm_rows_(out, x, residual, weight, bias, EPS, counts_of(0, live, "cuda"), TOKENS)
        check(out[:live], x[:live], residual[:live], weight, bias)
        assert bool((out[live:] == POISON).all())


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["x", "residual"])
@pytest.mark.parametrize("capacity", [9, 3072])
def test_in_place(which, capacity):
    x, residual, weight, bias = case(capacity, 768, HALF, "cuda")
    given = {"x": x.clone(), "residual": residual.clone()}
    add_layer_norm_rows_(given[which], *given.values(), weight, bias, EPS, counts_of(0, capacity, "cuda"), TOKENS)
    check(given[which], x, residual, weight, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [9, 3072])
def test_column_slices(capacity):
    x, residual, weight, bias = case(capacity, 384, HALF, "cuda")
    wide = [torch.full((capacity, 384 + 24), POISON, dtype=HALF, device="cuda") for _ in range(3)]
    out, *rest = (matrix[:, 8 : 8 + 384] for matrix in wide)
    for piece, values in zip(rest, (x, residual), strict=True):
        piece.copy_(values)
    add_layer_norm_rows_(out, *rest, weight, bias, EPS, counts_of(0, capacity, "cuda"), TOKENS)
    check(out, x, residual, weight, bias)
    assert bool((wide[0][:, :8] == POISON).all()) and bool((wide[0][:, 392:] == POISON).all())


@pytest.mark.gpu
@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("shares", [0, 2, 4])
@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("hidden", [256, 384, 768])
def test_some_move_to_their_places(hidden, capacity, shares, settled):
    x, residual, weight, bias = case(capacity, hidden, HALF, "cuda")
    live = capacity - capacity // 5
    stay = (torch.rand(live, device="cuda") < 0.6).nonzero().squeeze(1)
    dest = torch.full((capacity,), -1, dtype=torch.int32, device="cuda")
    dest[stay] = torch.arange(len(stay), dtype=torch.int32, device="cuda")
    partials = partials_of(x, shares)
    given = x if shares == 0 else torch.full_like(x, float("nan"))
    out = torch.full_like(x, POISON)
    counts = counts_of(0, live, "cuda")
    add_layer_norm_compact_(out, given, residual, weight, bias, EPS, counts, dest, partials, settled)
    check(out[: len(stay)], x[stay], residual[stay], weight, bias)
    assert bool((out[len(stay) :] == POISON).all())


@pytest.mark.gpu
def test_live_rows_tell_how_many_sums_there_are():
    x, residual, weight, bias = case(40, 768, HALF, "cuda")
    for live, shares in ((10, 4), (11, 2), (20, 2), (21, 0)):
        sums = partials_of(x, shares or 4).sums if shares else torch.full((4 * x.numel(),), float("nan"), device="cuda")
        out = torch.full_like(x, POISON)
        given = x if shares == 0 else torch.full_like(x, float("nan"))
        add_layer_norm_rows_(out, given, residual, weight, bias, EPS, counts_of(0, live, "cuda"), TOKENS,
                             partials=Partials(sums, 10, 20))  # fmt: skip
        check(out[:live], x[:live], residual[:live], weight, bias)


@pytest.mark.gpu
def test_a_nan_stays_in_its_row():
    x, residual, weight, bias = case(50, 384, HALF, "cuda")
    x[7, 3] = float("nan")
    out = torch.empty_like(x)
    add_layer_norm_rows_(out, x, residual, weight, bias, EPS, counts_of(0, 50, "cuda"), TOKENS)
    assert out.isnan().any(1).nonzero().flatten().tolist() == [7] and bool(out[7].isnan().all())


@pytest.mark.gpu
def test_what_it_cannot_serve():
    x, residual, weight, bias = case(9, 392, HALF, "cuda")
    assert norm_rows_problem(x, x, residual, weight, bias) is None
    odd = Partials(torch.zeros(4 * 9 * 392 + 1, device="cuda")[1:], 9, 9)
    single = weight.float()
    for expected, arguments in {
        "float16 and bfloat16": (x.float(), x, residual, weight, bias),
        "weight and bias alike": (x, x, residual, single, bias),
        "a multiple of 8": (x[:, :380], x[:, :380], residual[:, :380], weight[:380], bias[:380]),
        "up to 768 numbers": case(9, 776, HALF, "cuda")[:1] * 3 + case(9, 776, HALF, "cuda")[2:],
        "multiples of 16 bytes": (x[:, 4:388], x, residual, weight, bias),
        "partial sums must start": (x, x, residual, weight, bias, odd),
        "not on a CUDA device": (x.cpu(), x, residual, weight, bias),
    }.items():
        assert expected in norm_rows_problem(*arguments)
