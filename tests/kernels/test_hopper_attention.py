"""Attention on Hopper's own instructions against plain torch: whatever length, whoever stands behind a sequence."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import extension
from engine.kernels.gpu_attention import position_matrix, varlen_attention_, varlen_attention__ref
from engine.kernels.hopper_attention import attention_problem
from engine.kernels.survivors import Removal
from tests.kernels.cases import assert_no_worse, cu_seqlens_of

HALVES = [pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, id="bf16")]


@pytest.fixture
def hopper(gpu):
    x = torch.zeros(1, 64, dtype=torch.float16, device="cuda")
    problem = attention_problem(x, x, 1, 1.0, 128)
    if problem is not None:
        pytest.skip(problem)


def attend(qkv, lengths, heads, longest, removal=None, live=None, out=None, bias=None):
    """[live tokens, H], all else of it untouched; and what plain torch makes of it in the same dtype and in fp64."""
    live = len(lengths) if live is None else live
    tokens = sum(lengths[:live])
    counts = torch.tensor([live, tokens], dtype=torch.int32, device="cuda")
    cu_seqlens = cu_seqlens_of(lengths, "cuda")
    hidden = qkv.shape[1] // 3
    out = torch.full((len(qkv), hidden), 7.0, dtype=qkv.dtype, device="cuda") if out is None else out
    given = qkv.clone()
    assert attention_problem(out, qkv, heads, 0.125, longest, bias) is None
    varlen_attention_(out, qkv, cu_seqlens, counts, heads, 0.125, longest, bias, removal=removal)
    assert torch.equal(qkv.nan_to_num(), given.nan_to_num()) and bool((out[tokens:] == 7.0).all())
    expected = []
    for dtype in (qkv.dtype, torch.float64):
        wide = torch.zeros(len(qkv), hidden, dtype=dtype, device="cuda")
        varlen_attention__ref(wide, qkv.to(dtype), cu_seqlens, counts, heads, 0.125, max(longest, *lengths), bias)
        expected.append(wide[:tokens])
    return out[:tokens], *expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("longest", [16, 64, 65, 128])
@pytest.mark.parametrize("head, biased", [(64, False), (64, True), (32, False)])
def test_every_length(hopper, dtype, longest, head, biased):
    """A NaN behind the last one; another sequence's numbers behind all others."""
    bias = None
    if biased:
        bias = position_matrix(torch.randn(2, 2 * 140 - 1, device="cuda")).to(dtype)
    lengths = list(range(1, longest + 1))
    for order in (lengths, lengths[::-1]):
        qkv = torch.randn(sum(order) + 3, 3 * 2 * head, device="cuda").to(dtype)
        qkv[sum(order) :] = float("nan")
        assert_no_worse(*attend(qkv, order, 2, longest, bias=bias), floor=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_random_batches(hopper, dtype):
    generator = torch.Generator().manual_seed(0)
    for number in range(60):
        rows = int(torch.randint(1, 80, (1,), generator=generator))
        longest = int(torch.randint(1, 129, (1,), generator=generator))
        lengths = torch.randint(1, longest + 1, (rows,), generator=generator).tolist()
        live, heads = int(torch.randint(0, rows + 1, (1,), generator=generator)), (1, 3, 12)[number % 3]
        head = (64, 64, 32)[number // 3 % 3]
        qkv = torch.randn(sum(lengths) + number % 2 * 40, 3 * heads * head, device="cuda").to(dtype)
        qkv[sum(lengths[:live]) :] = float("nan")
        found, *expected = attend(qkv, lengths, heads, longest, live=live)
        if live:
            assert_no_worse(found, *expected, floor=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_a_nan_stays_in_its_sequence(hopper, where):
    lengths, part = [5, 33, 17, 100, 64], ("query", "key", "value").index(where)
    qkv = torch.randn(sum(lengths), 3 * 64, device="cuda", dtype=torch.float16)
    clean, *_ = attend(qkv, lengths, 1, 128)
    for row, start in enumerate([0, 5, 38, 55, 155]):
        bad = qkv.clone()
        bad[start, 64 * part : 64 * part + 64] = float("nan")
        found, *_ = attend(bad, lengths, 1, 128)
        inside = torch.zeros(len(qkv), dtype=torch.bool, device="cuda")
        inside[start : start + lengths[row]] = True
        assert torch.equal(found[~inside], clean[~inside])
        assert bool(found[start].isnan().all())


@pytest.mark.gpu
@pytest.mark.parametrize("head", [64, 32])
def test_a_sequence_gives_the_same_whoever_else_is_there(hopper, head):
    lengths = [5, 64, 0, 33, 16]
    qkv = torch.randn(sum(lengths), 3 * 2 * head, device="cuda", dtype=torch.float16)
    found, *expected = attend(qkv, lengths, 2, 64)
    assert_no_worse(found, *expected, floor=2e-6)
    assert torch.equal(attend(qkv, lengths, 2, 128)[0], found)
    assert torch.equal(attend(qkv[69:], lengths[3:], 2, 64)[0], found[69:])


@pytest.mark.gpu
@pytest.mark.parametrize("head, biased", [(64, False), (64, True), (32, False)])
def test_a_sequence_gives_the_same_in_a_crowd(hopper, head, biased):
    """However many programs share a multiprocessor."""
    bias = position_matrix(torch.randn(2, 255, device="cuda")).half() if biased else None
    lengths = [128, 65, 96, 1, 100]
    qkv = torch.randn(sum(lengths), 3 * 2 * head, device="cuda", dtype=torch.float16)
    found, *_ = attend(qkv, lengths, 2, 128, bias=bias)
    for times in (3, 10, 40, 130):
        many, *_ = attend(qkv.repeat(times, 1), lengths * times, 2, 128, bias=bias)
        assert torch.equal(many, found.repeat(times, 1))


@pytest.mark.gpu
def test_a_length_beyond_what_was_said_writes_nowhere_else(hopper):
    lengths = [128, 100, 3]
    qkv = torch.randn(sum(lengths), 3 * 64, device="cuda", dtype=torch.float16)
    found, *_ = attend(qkv, lengths, 1, 64)
    torch.cuda.synchronize()
    assert bool((found[64:128] == 7.0).all()) and bool((found[192:228] == 7.0).all())


@pytest.mark.gpu
def test_no_tokens(hopper):
    none = torch.zeros(0, 64, device="cuda", dtype=torch.float16)
    zeros = torch.zeros(3, dtype=torch.int32, device="cuda")
    varlen_attention_(none, none.repeat(1, 3), zeros, zeros[:2], 1, 0.125, 64)


@pytest.mark.gpu
def test_large_scores(hopper):
    qkv = 30 * torch.randn(128 + 20, 3 * 64, device="cuda", dtype=torch.float16)
    found, same, exact = attend(qkv, [128, 20], 1, 128)
    assert bool(found.isfinite().all())
    assert_no_worse(found, same, exact, floor=2e-6)


@pytest.mark.gpu
def test_rows_with_room_between(hopper):
    wide = torch.randn(70, 3 * 128 + 64, device="cuda", dtype=torch.float16)
    results = torch.full((70, 200), 7.0, device="cuda", dtype=torch.float16)
    qkv, out = wide[:, 64:], results[:, 72:]
    assert attention_problem(out, qkv, 2, 0.125, 70) is None
    assert_no_worse(*attend(qkv, [3, 60, 7], 2, 70, out=out), floor=2e-6)
    assert bool((results[:, :72] == 7.0).all())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, 32, 33, 200, 256])
@pytest.mark.parametrize("longest, heads, head, biased", [(40, 1, 64, False), (128, 3, 32, False), (128, 2, 64, True)])
def test_a_removal_beside_it(hopper, rows, longest, heads, head, biased):
    bias = position_matrix(torch.randn(heads, 255, device="cuda")).half() if biased else None
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator).tolist()
    for live, share in ((rows, 0.5), (rows, 0.0), (rows, 1.0), (rows // 2, 0.5), (0, 0.5)):
        keep = (torch.rand(rows, generator=generator) < share).to(torch.int8).cuda()
        ids = torch.randperm(rows, generator=generator).int().cuda()
        tokens = sum(lengths)

        def ints(size):
            return torch.full((size,), -9, dtype=torch.int32, device="cuda")

        removal, twin = (Removal(keep, ids, ints(rows + 1), ints(tokens), ints(2), ints(rows)) for _ in range(2))
        qkv = torch.randn(tokens, 3 * heads * head, device="cuda", dtype=torch.float16)
        found, *expected = attend(qkv, lengths, heads, longest, removal, live, bias=bias)
        counts = torch.tensor([live, sum(lengths[:live])], dtype=torch.int32, device="cuda")
        twin.run(cu_seqlens_of(lengths, "cuda"), counts)
        stay, kept = twin.out_counts.tolist()
        assert removal.out_counts.tolist() == [stay, kept]
        assert torch.equal(removal.out_cu_seqlens[: stay + 1], twin.out_cu_seqlens[: stay + 1])
        assert torch.equal(removal.out_row_ids[:stay], twin.out_row_ids[:stay])
        assert torch.equal(removal.token_dest[: counts[1]], twin.token_dest[: counts[1]])
        if live:
            assert_no_worse(found, *expected, floor=2e-6)


def test_what_it_cannot_serve(monkeypatch):
    class Fake:
        """What is asked of a tensor on a device."""

        def __init__(self, **changed):
            self.is_cuda, self.dtype, self.shape, self.address, self.step = True, torch.float16, (9, 128), 0, 128
            vars(self).update(changed)

        def data_ptr(self):
            return self.address

        def stride(self, dimension):
            return self.step

        def get_device(self):
            return 0

    monkeypatch.setattr(extension, "hopper_problem", lambda functions, index: None)
    good = Fake()
    assert attention_problem(good, Fake(step=384), 2, 0.125, 128) is None
    for expected, arguments in {
        "not on a CUDA device": (Fake(is_cuda=False), good, 2, 0.125, 128),
        "float16 and bfloat16": (Fake(dtype=torch.float32), good, 2, 0.125, 128),
        "64 or 32": (good, good, 3, 0.125, 128),
        "the bias their dtype": (good, good, 2, 0.125, 128, Fake(dtype=torch.float32)),
        "a position bias heads must": (good, good, 4, 0.125, 128, good),
        "at most 128 tokens": (good, good, 2, 0.125, 129),
        "no tokens": (Fake(shape=(0, 128)), Fake(shape=(0, 384)), 2, 0.125, 128),
        "rows of the position bias": (Fake(shape=(9, 128)), good, 2, 0.125, 128, Fake(address=8)),
        "above 0": (good, good, 2, -0.125, 128),
        "multiples of 16 bytes": (good, Fake(address=8), 2, 0.125, 128),
        "rows must start": (Fake(step=132), good, 2, 0.125, 128),
    }.items():
        assert expected in attention_problem(*arguments)
