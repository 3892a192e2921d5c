"""Attention of a decode step on paged keys and values."""

import pytest
import torch
from torch.nn import functional as F

from engine.kernels import gpu_decode_attention
from engine.kernels.gpu_decode_attention import (
    decode_attention_,
    decode_attention__ref,
    decode_attention_workspace,
)
from tests.kernels import gpu_cases
from tests.kernels.cases import assert_no_worse

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
POISON = 7.0


class Case:
    def __init__(self, contexts, live, heads, kv_heads, d, block_size, dtype, device, room=None):
        rows = len(contexts)
        blocks = -(-max(contexts) // block_size) + 1
        self.order = torch.randperm(rows).to(torch.int32)
        self.positions = torch.tensor(contexts, dtype=torch.int32) - 1
        self.table = torch.randperm(rows * blocks).view(rows, blocks).to(torch.int32)
        slots = rows * blocks * block_size
        # Nothing may be read by what lies beyond a context, or beyond the live rows.
        for r, context in enumerate(contexts):
            self.table[r, -(-context // block_size) :] = 1 << 30
        dead = self.order[live:].long()
        self.table[dead], self.positions[dead], self.order[live:] = 1 << 30, 1 << 30, 1 << 30
        # Only what some live row may see is a number.
        self.keys, self.values = (torch.full((slots, kv_heads, d), float("nan")) for _ in range(2))
        for r in self.order[:live].tolist():
            seen = self.slots(r, block_size)
            self.keys[seen], self.values[seen] = (torch.randn(len(seen), kv_heads, d) for _ in range(2))
        self.query = torch.full((rows, heads, d), float("nan"))
        self.query[self.order[:live].long()] = torch.randn(live, heads, d)
        self.keys, self.values, self.query = (x.to(dtype).to(device) for x in (self.keys, self.values, self.query))
        self.block_size, self.live, self.device, self.scale = block_size, live, device, d**-0.5
        self.out = torch.full_like(self.query, POISON)
        self.workspace = decode_attention_workspace(rows, heads, kv_heads, d, device)

    def slots(self, r, size):
        places = torch.arange(int(self.positions[r]) + 1)
        return self.table[r].long()[places // size] * size + places % size

    def run(self, way):
        way(decode_attention_, decode_attention__ref)(
            self.out, self.query, self.keys, self.values, self.order.to(self.device), self.table.to(self.device),
            self.positions.to(self.device), torch.tensor([self.live, 5], dtype=torch.int32, device=self.device),
            self.scale, self.block_size, self.workspace,
        )  # fmt: skip
        return self.out

    def plain(self, r, wide):
        slots = self.slots(r, self.block_size).to(self.device)
        q, k, v = (x.to(wide) for x in (self.query[r], self.keys[slots], self.values[slots]))
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[1], 1) for x in (k, v))
        weights = (torch.einsum("hd,chd->hc", q, k) * self.scale).softmax(1)
        return torch.einsum("hc,chd->hd", weights, v)


@pytest.mark.parametrize("dtype", [HALF, SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("heads, kv_heads, d", [(4, 4, 16), (9, 3, 24), (4, 1, 64), (2, 2, 128)])
@pytest.mark.parametrize(
    "contexts, live, block_size",
    [
        ([1], 1, 16),
        ([15], 1, 4),
        ([16], 1, 16),
        ([17], 1, 16),
        ([100], 1, 16),
        ([17, 1, 15, 16, 70], 3, 4),
        ([5, 6], 0, 8),
        ([33] * 20, 20, 7),
    ],
)
def test_against_the_formula(way, dtype, heads, kv_heads, d, contexts, live, block_size):
    way.skip_wrong(dtype)
    case = Case(contexts, live, heads, kv_heads, d, block_size, dtype, way.device)
    out = case.run(way)
    alive = case.order[:live].tolist()
    for r in alive:
        assert_no_worse(out[r], case.plain(r, dtype), case.plain(r, torch.float64), factor=3, floor=3e-6)
    for r in set(range(len(contexts))) - set(alive):
        assert bool((out[r] == POISON).all())


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_several_tiles_to_a_part(way, kv_heads, splits):
    """Contexts beyond one tile of each part, and fewer parts than the workspace would choose."""
    case = Case([300, 65, 9], 2, 4, kv_heads, 16, 16, SINGLE, way.device)
    case.workspace = torch.full((3, splits, 4, 18), float("nan"), device=way.device)
    out = case.run(way)
    for r in case.order[:2].tolist():
        assert_no_worse(out[r], case.plain(r, SINGLE), case.plain(r, torch.float64), factor=3, floor=3e-6)


@pytest.mark.parametrize("queries, context", [(1, 20), (3, 3), (5, 40), (33, 70)])
def test_several_queries_of_a_sequence(way, queries, context):
    """The last tokens of two sequences, all at once: causal attention."""
    case = Case([context] * (2 * queries), 2 * queries, 4, 2, 16, 8, SINGLE, way.device)
    first = torch.arange(2 * queries) // queries * queries
    case.table = case.table[first]
    slots = [case.slots(r, 8).to(way.device) for r in (0, queries)]
    case.positions = context - queries + torch.arange(queries, dtype=torch.int32).repeat(2)
    out = case.run(way).unflatten(0, (2, queries))
    seen = torch.ones(queries, context, dtype=torch.bool, device=way.device).tril(context - queries)

    def causal(wide):
        q = case.query.to(wide).unflatten(0, (2, queries)).transpose(1, 2)
        k, v = (torch.stack([x[s] for s in slots]).to(wide).transpose(1, 2) for x in (case.keys, case.values))
        return F.scaled_dot_product_attention(q, k, v, seen, scale=case.scale, enable_gqa=True).transpose(1, 2)

    assert_no_worse(out, causal(SINGLE), causal(torch.float64), factor=3, floor=3e-6)


def test_scores_far_apart(way):
    """One position takes all the weight: nothing overflows, and parts without any do not count."""
    case = Case([150], 1, 2, 2, 16, 16, SINGLE, way.device)
    case.query[0] *= 300
    out = case.run(way)
    torch.testing.assert_close(out[0].double(), case.plain(0, torch.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(keys=torch.zeros(8, 3, 16)), "4 query heads cannot share 3 key heads evenly"),
        (dict(keys=torch.zeros(8, 2, 8)), "query must be .R, A, d. and keys .slots, KV, d."),
        (dict(values=torch.zeros(9, 2, 16)), r"values must have shape \[8, 2, 16\]"),
        (dict(order=torch.zeros(3)), "order must be int32"),
        (dict(workspace=torch.zeros(3, 2, 4, 16)), "see decode_attention_workspace"),
        (dict(workspace=torch.zeros(3, 4, 18)), "see decode_attention_workspace"),
        (dict(block_table=torch.zeros(3, 2, dtype=torch.int64)), r"block_table must be int32 of shape \[3 or more"),
        (dict(block_table=torch.zeros(2, 2, dtype=torch.int32)), r"block_table must be int32 of shape \[3 or more"),
        (dict(block_table=torch.zeros(2, 3, dtype=torch.int32).T), "block_table must be contiguous"),
        (dict(block_size=0), "block_size must be at least 1, got 0"),
        (dict(out=torch.zeros(3, 16, 4).transpose(1, 2)), "out must be contiguous"),
    ],
)
def test_wrong_arguments(change, words):
    def ints(*shape):
        return torch.zeros(shape, dtype=torch.int32)

    good = dict(
        out=torch.zeros(3, 4, 16), query=torch.zeros(3, 4, 16), keys=torch.zeros(8, 2, 16),
        values=torch.zeros(8, 2, 16), order=ints(3), block_table=ints(3, 2), positions=ints(3), counts=ints(2),
        scale=1.0, block_size=4, workspace=decode_attention_workspace(3, 4, 2, 16, torch.device("cpu")),
    )  # fmt: skip
    with pytest.raises(ValueError, match=words):
        decode_attention_(**{**good, **change})


@gpu_cases.compiles
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("shape", [(32, 32, 128), (32, 8, 128), (32, 4, 64), (9, 3, 64)],
                         ids=["7b", "groups of 4", "groups of 8", "smollm2"])  # fmt: skip
@pytest.mark.parametrize("name", ["_part_kernel", "_whole_kernel"])
def test_compiles(monkeypatch, name, shape, rows, arch):
    class Other:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    monkeypatch.setattr(gpu_cases, "MODULES", (gpu_decode_attention,))
    other = {"_part_kernel": "_whole_kernel", "_whole_kernel": "_part_kernel"}[name]
    monkeypatch.setattr(gpu_decode_attention, other, Other())
    case = Case([200] * rows, rows, *shape, 16, HALF, "cpu")
    if name == "_whole_kernel":
        case.workspace = torch.zeros(rows, 8, shape[0], shape[2] + 2)
    launch = gpu_cases.record(monkeypatch, name, lambda: case.run(lambda op, twin: op))
    usage = gpu_cases.compile_launch(launch, arch)
    assert usage.stack_bytes == 0 and usage.shared_bytes <= gpu_cases.SHARED_BYTES[arch]
