import math

import pytest
import torch

from engine.kernels.attention import ALL_TOKENS, FIRST_TOKENS, OTHER_TOKENS, lead_attention, lead_attention_ref
from tests.kernels.cases import FLOATS, assert_no_worse, cu_seqlens_of, doubled, lead_rows, needs_extension

PARTS = (FIRST_TOKENS, OTHER_TOKENS, ALL_TOKENS)


def naive(query, key, value, lengths, rows, num_heads, scale, part, bias=None):
    """The definition, one query, head and key at a time in fp64."""
    query, key, value, bias = (x.cpu() if x is not None else None for x in doubled(query, key, value, bias))
    d = query.shape[1] // num_heads
    first, others = [], []
    for i in rows:
        where = lead_rows(lengths, i)
        for position, row in enumerate(where):
            out = []
            for h in range(num_heads):
                head = slice(h * d, (h + 1) * d)
                scores = [float(query[row, head] @ key[k, head]) * scale for k in where]
                if bias is not None:
                    middle = (bias.shape[1] - 1) // 2
                    scores = [s + float(bias[h, j - position + middle]) for j, s in enumerate(scores)]
                top = max(scores)
                weights = [math.exp(s - top) for s in scores]
                out.append(sum(w * value[k, head] for w, k in zip(weights, where, strict=True)) / sum(weights))
            (others if position else first).append(torch.cat(out))
    chosen = {FIRST_TOKENS: first, OTHER_TOKENS: others, ALL_TOKENS: first + others}[part]
    return torch.stack(chosen) if chosen else query.new_empty(0, query.shape[1])


def fused(total, hidden, dtype=torch.float32, device="cpu"):
    """query, key, value as the columns of one buffer, the way a fused projection leaves them."""
    return torch.randn(total, 3 * hidden).to(dtype).to(device).split(hidden, 1)


def both(query, key, value, lengths, *rest, **more):
    cu_seqlens = cu_seqlens_of(lengths, query.device)
    return [f(query, key, value, cu_seqlens, *rest, **more) for f in (lead_attention, lead_attention_ref)]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_twin_and_op_against_loops(part, with_rows, with_bias, device):
    lengths, num_heads, d = [3, 1, 6, 2], 2, 5
    query, key, value = fused(sum(lengths), num_heads * d, device=device)
    rows = torch.tensor([2, 0], dtype=torch.int32, device=device) if with_rows else None
    bias = torch.randn(num_heads, 15, device=device) if with_bias else None
    expected = naive(query, key, value, lengths, [2, 0] if with_rows else range(4), num_heads, 0.4, part, bias)
    for out in both(query, key, value, lengths, rows, num_heads, 0.4, part, bias):
        torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("num_heads, d", [(2, 32), (3, 12), (1, 5), (2, 64), (1, 1), (1, 200)])
@pytest.mark.parametrize("part", PARTS)
def test_dtypes_and_heads(dtype, num_heads, d, part, device):
    # Lengths around the vector widths (4, 8, 16, 32), the block of keys (64), and one that takes several blocks.
    lengths = [1, 2, 3, 4, 5, 17, 12, 33, 64, 65, 150, 31, 32]
    query, key, value = fused(sum(lengths), num_heads * d, dtype, device)
    ours, twin = both(query, key, value, lengths, None, num_heads, d**-0.5, part)
    exact = lead_attention_ref(
        *doubled(query, key, value), cu_seqlens_of(lengths, device), None, num_heads, d**-0.5, part
    )
    assert_no_worse(ours, twin, exact, floor=2e-6)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_instruction_sets(instruction_set, part, with_bias):
    lengths, num_heads, d = [1, 7, 18, 90, 4, 33], 3, 20
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        query, key, value = fused(sum(lengths), num_heads * d, dtype)
        bias = torch.randn(num_heads, 2 * 90 - 1) if with_bias else None
        ours, twin = both(query, key, value, lengths, None, num_heads, d**-0.5, part, bias)
        exact = lead_attention_ref(
            *doubled(query, key, value), cu_seqlens_of(lengths), None, num_heads, d**-0.5, part, *doubled(bias)
        )
        assert_no_worse(ours, twin, exact, floor=2e-6)


@pytest.mark.parametrize("part", PARTS)
def test_rows_in_any_order(part, device):
    lengths, num_heads, d = [3, 1, 60, 2, 9], 2, 16
    query, key, value = fused(sum(lengths), num_heads * d, device=device)
    rows = torch.tensor([4, 1, 2], dtype=torch.int32, device=device)
    ours, twin = both(query, key, value, lengths, rows, num_heads, 0.25, part)
    torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-6)
    count = {FIRST_TOKENS: 3, OTHER_TOKENS: 67, ALL_TOKENS: 70}[part]
    again, _ = both(query, key, value, lengths, rows, num_heads, 0.25, part, num_queries=count)
    assert torch.equal(ours, again)
    for out in both(query, key, value, lengths, rows[:0], num_heads, 0.25, part):
        assert out.shape == (0, num_heads * d)


@needs_extension
def test_a_sequence_alone_and_in_a_batch(device):
    """Batch of N equals N batches of one, bit for bit."""
    lengths, num_heads, d = [3, 20, 70, 1], 4, 32
    query, key, value = fused(sum(lengths), num_heads * d, device=device)
    batch = lead_attention(query, key, value, cu_seqlens_of(lengths, device), None, num_heads, 0.2, ALL_TOKENS)
    for i, length in enumerate(lengths):
        own = lead_rows(lengths, i)
        alone = lead_attention(
            query[own], key[own], value[own], cu_seqlens_of([length], device), None, num_heads, 0.2, ALL_TOKENS
        )
        assert torch.equal(alone, batch[own])


@pytest.mark.parametrize("part", PARTS)
def test_large_scores_and_nan(part, device):
    lengths = [40, 2]
    query, key, value = (x.clone() for x in fused(42, 16, device=device))
    query *= 100  # scores in the hundreds: exp would overflow without the running maximum
    ours, twin = both(query, key, value, lengths, None, 1, 1.0, part)
    torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-4)
    key[lead_rows(lengths, 1)[1]] = float("nan")
    ours, twin = both(query, key, value, lengths, None, 1, 1.0, part)
    assert torch.equal(ours.isnan(), twin.isnan()) and ours.isnan().any()


def test_bias_in_the_dtype_of_the_data(device):
    for dtype in FLOATS:
        query, key, value = fused(9, 8, dtype, device)
        bias = torch.randn(2, 13).to(dtype).to(device)
        ours, twin = both(query, key, value, [5, 4], None, 2, 0.3, ALL_TOKENS, bias)
        exact = lead_attention_ref(
            *doubled(query, key, value), cu_seqlens_of([5, 4], device), None, 2, 0.3, ALL_TOKENS, bias.double()
        )
        assert_no_worse(ours, twin, exact, floor=2e-6)


def test_no_sequence(device):
    query, key, value = fused(0, 8, device=device)
    for out in both(query, key, value, [], None, 2, 1.0, ALL_TOKENS):
        assert out.shape == (0, 8)


Q = torch.zeros(5, 8)
CU = cu_seqlens_of([3, 2])
ROWS = torch.tensor([1], dtype=torch.int32)
MESSAGES = [
    ((Q, Q, Q, CU, None, 3, 1.0, 2, None), ValueError, "num_heads must divide the width of query, got 3"),
    ((Q, Q, Q, CU, None, 2, 1.0, 3, None), ValueError, "part must be 0 .first tokens., 1 .other tokens. or 2"),
    ((Q, Q[:4], Q, CU, None, 2, 1.0, 2, None), ValueError, r"key must have shape \[5, 8\], got \[4, 8\]"),
    ((Q, Q, Q.double(), CU, None, 2, 1.0, 2, None), ValueError, r"value must have the dtype of query \(float32\)"),
    ((Q, Q, Q, CU.long(), None, 2, 1.0, 2, None), ValueError, "cu_seqlens must be int32, got int64"),
    ((Q[:4], Q[:4], Q[:4], CU, None, 2, 1.0, 2, None), ValueError, r"end within the rows of query \(4\), got 0 and 5"),
    ((Q, Q, Q, cu_seqlens_of([5, 0]), None, 2, 1.0, 2, None), ValueError, "at least 1 token, got 0 for sequence 1"),
    ((Q, Q, Q, CU, ROWS + 1, 2, 1.0, 0, None), IndexError, r"rows must lie in \[0, 2\), .* got 2 at position 0"),
    ((Q, Q, Q, CU, None, 2, 1.0, 2, torch.zeros(2, 3)), ValueError, "position_bias must reach the longest length"),
    ((Q, Q, Q, CU, None, 2, 1.0, 2, torch.zeros(1, 9)), ValueError, r"position_bias must be \[num_heads, 2 \* M - 1\]"),
    ((Q, Q, Q, CU, ROWS, 2, 1.0, 1, None, 0), ValueError, "num_queries must be at least 1 for these rows, got 0"),
    ((Q.int(), Q, Q, CU, None, 2, 1.0, 2, None), ValueError, "query must be float32, float64, float16 or bfloat16"),
]


@needs_extension
@pytest.mark.parametrize("arguments, error, message", MESSAGES)
def test_messages(arguments, error, message):
    with pytest.raises(error, match=message):
        lead_attention(*arguments)
