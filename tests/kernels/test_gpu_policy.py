"""Final norm and policy of a decode step's rows, and what an exit's head adds."""

import pytest
import torch
from torch.nn import functional as F

from engine.kernels import gpu_policy
from engine.kernels.gpu_policy import (
    delta_rows_,
    delta_rows__ref,
    policy_rows_,
    policy_rows__ref,
    policy_splits,
)
from tests.kernels import gpu_cases
from tests.kernels.cases import assert_no_worse

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
POISON = 7.0


def rows_of(capacity, live, device):
    order = torch.randperm(capacity).to(device, torch.int32)
    return order, torch.tensor([live, 3], dtype=torch.int32, device=device), order[:live].long()


@pytest.mark.parametrize("dtype", [HALF, SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize(
    "capacity, live, width, neurons",
    [(1, 1, 40, 6), (5, 3, 64, 32), (20, 20, 24, 5), (4, 0, 16, 2), (40, 33, 300, 37), (48, 5, 512, 16),
     (17, 0, 32, 16)],
)  # fmt: skip
@pytest.mark.parametrize("form", ["policy", "no policy", "no states"])
def test_policy(way, dtype, capacity, live, width, neurons, form):
    way.skip_wrong(dtype)
    order, counts, rows = rows_of(capacity, live, way.device)

    def new(*shape, scale=1.0):
        return (torch.randn(*shape) * scale).to(dtype).to(way.device)

    hidden = torch.full((capacity, width), float("nan"), dtype=dtype, device=way.device)
    hidden[rows] = new(live, width)
    norm = (1 + new(width, scale=0.2), 1e-5)
    policy = None if form == "no policy" else (new(neurons, width, scale=width**-0.5), new(neurons), new(1, neurons))
    splits = policy_splits(capacity, width, neurons)
    partial = torch.full((capacity, splits), POISON, device=way.device)
    normed = torch.full((capacity, width), POISON, dtype=dtype, device=way.device)
    states = None if form == "no states" else torch.full((50, width), POISON, dtype=dtype, device=way.device)
    slots = torch.randperm(50)[:capacity].to(way.device, torch.int32)
    way(policy_rows_, policy_rows__ref)(partial, normed, states, hidden, norm, policy, order, slots, counts)
    wide = hidden[rows].double()
    n = norm[0].double() * (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + norm[1]))
    short = hidden[rows]
    short_n = norm[0] * (short * torch.rsqrt(short.square().mean(1, keepdim=True) + norm[1]))
    assert_no_worse(normed[rows], short_n, n, factor=3)
    dead = torch.ones(capacity, dtype=torch.bool, device=way.device)
    dead[rows] = False
    assert bool((normed[dead] == POISON).all() and (partial[dead] == POISON).all())
    if states is not None:
        assert torch.equal(states[slots[rows].long()], hidden[rows])
        assert int((states == POISON).all(1).sum()) == 50 - live
    if policy is None:
        assert bool((partial == POISON).all())
    else:
        w1, b1, w2 = (p.double() for p in policy)
        z = F.linear(F.gelu(F.linear(normed[rows].double(), w1, b1)), w2)[:, 0]
        torch.testing.assert_close(partial[rows].sum(1).double(), z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [HALF, SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("capacity, live, width, rank", [(1, 1, 40, 3), (5, 3, 72, 16), (3, 0, 16, 4)])
def test_delta(way, dtype, capacity, live, width, rank):
    way.skip_wrong(dtype)
    order, counts, rows = rows_of(capacity, live, way.device)
    normed = torch.full((capacity, width), float("nan"), dtype=dtype, device=way.device)
    normed[rows] = torch.randn(live, width).to(dtype).to(way.device)
    a = (torch.randn(4, rank, width) * width**-0.5).to(dtype).to(way.device)
    b = (torch.randn(4, width, rank) * rank**-0.5).to(dtype).to(way.device)
    index = torch.randint(0, 4, (capacity,)).to(way.device, torch.int32)
    out = torch.full_like(normed, POISON)
    way(delta_rows_, delta_rows__ref)(out, normed, a, b, index, order, counts)
    for r in range(capacity):
        if r not in rows.tolist():
            assert bool((out[r] == POISON).all())
            continue
        e = int(index[r])
        exact = normed[r].double() + b[e].double() @ (a[e].double() @ normed[r].double())
        assert_no_worse(out[r], normed[r] + b[e] @ (a[e] @ normed[r]), exact, factor=3)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(normed=torch.zeros(3, 7)), r"normed must have shape \[3 or more, 8\]"),
        (dict(states=torch.zeros(9, 8).half()), "states must have the dtype of hidden"),
        (dict(policy=(torch.zeros(4, 8), torch.zeros(5), torch.zeros(1, 4))), r"b1 must have shape \[4\]"),
        (dict(partial=torch.zeros(2, 2)), r"partial must be fp32 of shape \[3 or more, splits\]"),
        (dict(slots=torch.zeros(3)), "slots must be int32"),
    ],
)
def test_wrong_arguments(change, words):
    row = torch.zeros(3, dtype=torch.int32)
    good = dict(
        partial=torch.zeros(3, 2), normed=torch.zeros(3, 8), states=torch.zeros(9, 8), hidden=torch.zeros(3, 8),
        norm=(torch.ones(8), 1e-5), policy=(torch.zeros(4, 8), torch.zeros(4), torch.zeros(1, 4)), order=row,
        slots=row, counts=torch.zeros(2, dtype=torch.int32),
    )  # fmt: skip
    with pytest.raises(ValueError, match=words):
        policy_rows_(**{**good, **change})
    with pytest.raises(ValueError, match="sizes must be at least 1"):
        policy_splits(0, 8, 8)
    x = torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"b must have shape \[2, 8, 4\]"):
        delta_rows_(torch.zeros(3, 8), x, torch.zeros(2, 4, 8), torch.zeros(2, 4, 8), row, row, good["counts"])


@gpu_cases.compiles
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("width, neurons", [(4096, 32), (5120, 512), (576, 32)])
def test_compiles(monkeypatch, width, neurons, rows, arch):
    def new(*shape, dtype=HALF):
        return torch.empty(shape, dtype=dtype)

    def ints(*shape):
        return new(*shape, dtype=torch.int32)

    splits = policy_splits(rows, width, neurons)
    monkeypatch.setattr(gpu_cases, "MODULES", (gpu_policy,))
    calls = {
        "policy": lambda: policy_rows_(
            new(rows, splits, dtype=SINGLE), new(rows, width), new(64, width), new(rows, width), (new(width), 1e-5),
            (new(neurons, width), new(neurons), new(1, neurons)), ints(rows), ints(rows), ints(2)),
        "delta": lambda: delta_rows_(new(rows, width), new(rows, width), new(10, 128, width), new(10, width, 128),
                                     ints(rows), ints(rows), ints(2)),
    }  # fmt: skip
    for name, call in calls.items():
        usage = gpu_cases.compile_launch(gpu_cases.record(monkeypatch, name, call), arch)
        assert usage.stack_bytes == 0 and usage.shared_bytes <= gpu_cases.SHARED_BYTES[arch], name
