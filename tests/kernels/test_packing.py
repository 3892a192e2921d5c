import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels import packing
from engine.kernels.packing import (
    compact_lead,
    compact_rows,
    gather_rows,
    pack_lead,
    prefix_sum,
    scatter_rows_,
    unpack_lead,
)
from tests.kernels.cases import cu_seqlens_of, lead_rows, needs_extension

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8)


def numbered(rows: int, *shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    """Rows that differ from each other, so that a misplaced one is seen."""
    width = int(torch.tensor(shape).prod()) if shape else 1
    x = torch.arange(rows * width, device=device).reshape(rows, *shape)
    return (x % 2 == 0) if dtype == torch.bool else (x % 251).to(dtype)


def rows_of(lengths, i):
    start = sum(lengths[:i])
    return list(range(start, start + lengths[i]))


# Each layout: the op, its twin, and where the tokens of a sequence stand.
LAYOUTS = {
    "rows": (compact_rows, packing.compact_rows_ref, rows_of),
    "lead": (compact_lead, packing.compact_lead_ref, lead_rows),
}


def check_compact(layout, lengths, keep, x):
    op, twin, where = LAYOUTS[layout]
    device = x.device
    cu_seqlens = cu_seqlens_of(lengths, device)
    mask = torch.tensor(keep, dtype=torch.bool, device=device)
    kept = [i for i, stays in enumerate(keep) if stays]
    new_lengths = [lengths[i] for i in kept]
    total = sum(new_lengths)
    for function in (op, twin):
        out, out_cu_seqlens, active_rows, n_active = function(x, cu_seqlens, mask)
        assert out.shape == x.shape and out.dtype == x.dtype
        assert int(n_active) == len(kept) and n_active.shape == (1,)
        assert active_rows[: len(kept)].tolist() == kept and active_rows.shape == (len(keep),)
        expected = cu_seqlens_of(new_lengths).tolist()
        assert out_cu_seqlens.tolist() == expected + [total] * (len(keep) - len(kept))
        for new, old in enumerate(kept):  # content and order, sequence by sequence
            assert torch.equal(out[where(new_lengths, new)], x[where(lengths, old)])
    return kept, new_lengths


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (384,), (3, 7)], ids=str)
def test_compact_dtypes_and_widths(layout, dtype, shape, device):
    lengths = [3, 1, 5, 2, 7]
    x = numbered(sum(lengths), *shape, dtype=dtype, device=device)
    check_compact(layout, lengths, [True, False, True, True, False], x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keep", [[1, 1, 1], [0, 0, 0], [0, 0, 1], [1, 0, 0]], ids=str)
def test_compact_all_none_ends(layout, keep, device):
    check_compact(layout, [4, 1, 3], [bool(k) for k in keep], numbered(8, 6, device=device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compact_one_row_and_no_row(layout, device):
    check_compact(layout, [1], [True], numbered(1, 6, device=device))
    check_compact(layout, [1], [False], numbered(1, 6, device=device))
    check_compact(layout, [], [], numbered(0, 6, device=device))


def test_compact_rows_of_length_zero(device):
    check_compact("rows", [0, 3, 0, 0, 2, 0], [True, True, False, True, True, True], numbered(5, 6, device=device))
    check_compact("rows", [0, 0], [True, False], numbered(0, 6, device=device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compact_column_slice(layout, device):
    x = numbered(8, 12, device=device)[:, 4:8]
    check_compact(layout, [4, 1, 3], [True, False, True], x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compact_large(layout, device):
    lengths = torch.randint(1, 40, (3000,)).tolist()
    keep = (torch.rand(3000) < 0.6).tolist()
    op, twin, _ = LAYOUTS[layout]
    x = torch.randn(sum(lengths), 32, device=device)
    arguments = (x, cu_seqlens_of(lengths, device), torch.tensor(keep, device=device))
    ours, theirs = op(*arguments), twin(*arguments)
    total = int(ours[1][-1])
    assert torch.equal(ours[0][:total], theirs[0][:total])
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(a, b)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_compact_is_undone_by_scatter(data):
    layout = data.draw(st.sampled_from(sorted(LAYOUTS)))
    shortest = 0 if layout == "rows" else 1
    lengths = data.draw(st.lists(st.integers(shortest, 6), max_size=12))
    keep = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    x = numbered(sum(lengths), 3)
    kept, new_lengths = check_compact(layout, lengths, keep, x)
    op, _, where = LAYOUTS[layout]
    compacted = op(x, cu_seqlens_of(lengths), torch.tensor(keep, dtype=torch.bool))[0]
    # Back to where they came from: survivors' rows return, the others keep what they had.
    source = [row for new in range(len(kept)) for row in where(new_lengths, new)]
    target = [row for old in kept for row in where(lengths, old)]
    restored = torch.full_like(x, -1)
    scatter_rows_(restored, compacted[source], torch.tensor(target, dtype=torch.int32))
    left = sorted(set(range(len(x))) - set(target))
    assert torch.equal(restored[target], x[target]) and bool((restored[left] == -1).all())


@pytest.mark.parametrize("lengths", [[], [0], [5], [3, 0, 2], list(range(2500))], ids=lambda v: str(len(v)))
def test_prefix_sum(lengths, device):
    given = torch.tensor(lengths, dtype=torch.int32, device=device)
    for function in (prefix_sum, packing.prefix_sum_ref):
        assert torch.equal(function(given), cu_seqlens_of(lengths, device))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (384,), (2, 3)], ids=str)
def test_gather_and_scatter(dtype, index_dtype, shape, device):
    x = numbered(20, *shape, dtype=dtype, device=device)
    index = torch.tensor([3, 19, 0, 3], dtype=index_dtype, device=device)
    for function in (gather_rows, packing.gather_rows_ref):
        assert torch.equal(function(x, index), x[index.long()])
    assert gather_rows(x, index[:0]).shape == (0, *shape)
    target = torch.tensor([5, 0, 11], dtype=index_dtype, device=device)
    src = numbered(30, *shape, dtype=dtype, device=device)[20:23]
    expected = x.clone()
    expected[target.long()] = src
    for function in (scatter_rows_, packing.scatter_rows__ref):
        out = x.clone()
        function(out, src, target)
        assert torch.equal(out, expected)


def test_gather_and_scatter_column_slices(device):
    wide = numbered(6, 12, device=device)
    index = torch.tensor([5, 1], device=device)
    assert torch.equal(gather_rows(wide[:, 3:7], index), wide[index, 3:7])
    expected = wide.clone()
    expected[index, 3:7] = 0
    scatter_rows_(wide[:, 3:7], torch.zeros(2, 4, device=device), index)
    assert torch.equal(wide, expected)


def test_gather_large(device):
    x = torch.randn(5000, 100, device=device)
    index = torch.randint(0, 5000, (7000,), device=device)
    assert torch.equal(gather_rows(x, index), x[index])


@pytest.mark.parametrize("shape", [(), (1,), (6,), (384,), (2, 3)], ids=str)
@pytest.mark.parametrize("lengths", [[1], [4], [3, 1, 5, 2], [2] * 40], ids=str)
def test_pack_and_unpack(lengths, shape, device):
    batch, width = len(lengths), max(lengths) + 2
    padded = numbered(batch * width, *shape, device=device).reshape(batch, width, *shape)
    sizes = torch.tensor(lengths, dtype=torch.int32, device=device)
    cu_seqlens = cu_seqlens_of(lengths, device)
    for pack, unpack in ((pack_lead, unpack_lead), (packing.pack_lead_ref, packing.unpack_lead_ref)):
        packed = pack(padded, sizes)
        assert packed.shape == (sum(lengths), *shape)
        assert torch.equal(packed, pack(padded, sizes, sum(lengths)))
        for i, length in enumerate(lengths):
            assert torch.equal(packed[lead_rows(lengths, i)], padded[i, :length])
        back = unpack(packed, cu_seqlens, width)
        for i, length in enumerate(lengths):
            assert torch.equal(back[i, :length], padded[i, :length])
            assert not back[i, length:].any()
        assert torch.equal(pack(back, sizes), packed)


def test_pack_empty_batch(device):
    nothing = torch.zeros(0, dtype=torch.int32, device=device)
    for pack, unpack in ((pack_lead, unpack_lead), (packing.pack_lead_ref, packing.unpack_lead_ref)):
        packed = pack(torch.zeros(0, 4, 6, device=device), nothing)
        assert packed.shape == (0, 6)
        assert unpack(packed, cu_seqlens_of([], device), 4).shape == (0, 4, 6)


# --- messages ------------------------------------------------------------------------------------------------------

INT = torch.int32
X = torch.zeros(5, 4)
CU = cu_seqlens_of([3, 2])
KEEP = torch.tensor([True, False])

MESSAGES = [
    (prefix_sum, (torch.tensor([1, -2], dtype=INT),), ValueError, r"lengths must not be negative, got -2"),
    (prefix_sum, (torch.tensor([1, 2]),), ValueError, r"lengths must be int32, got"),
    (compact_rows, (X, CU, KEEP[:1]), ValueError, r"keep must have shape \[2\], got \[1\]"),
    (compact_rows, (X, CU, KEEP.int()), ValueError, r"keep must be bool, got int32"),
    (compact_rows, (X[:4], CU, KEEP), ValueError, r"cu_seqlens must end within the number of rows \(4\), got 5"),
    (compact_rows, (X, CU.long(), KEEP), ValueError, r"cu_seqlens must be int32, got int64"),
    (compact_rows, (X.t(), CU, KEEP), ValueError, r"hidden_states must be contiguous within each row"),
    (compact_lead, (X[:3], cu_seqlens_of([3, 0]), KEEP), ValueError, r"at least 1 tokens, got 0 for sequence 1"),
    (gather_rows, (X, torch.tensor([0, 5])), IndexError, r"index must lie in \[0, 5\), the rows of x, got 5"),
    (gather_rows, (X, torch.tensor([-1], dtype=INT)), IndexError, r"got -1 at position 0"),
    (gather_rows, (X, torch.tensor([0.0])), ValueError, r"index must be int32 or int64, got float32"),
    (scatter_rows_, (X, X[:2], torch.tensor([0, 9])), IndexError, r"the rows of out, got 9 at position 1"),
    (scatter_rows_, (X, X[:2], torch.tensor([0])), ValueError, r"src must have one row for each of the 1 entries"),
    (scatter_rows_, (X, X[:1].double(), torch.tensor([0])), ValueError, r"src must have the dtype of out \(float32\)"),
    (pack_lead, (X[None], torch.tensor([6], dtype=INT)), ValueError, r"lengths must not exceed the width of padded"),
    (pack_lead, (X[None], torch.tensor([0], dtype=INT)), ValueError, r"lengths must be at least 1"),
    (pack_lead, (X[None], torch.tensor([4], dtype=INT), 3), ValueError, r"total_tokens must be the sum of lengths \(4"),
    (unpack_lead, (X, CU, 2), ValueError, r"max_seqlen must be at least the longest length, got 2 for a length of 3"),
]


@needs_extension
@pytest.mark.parametrize("function, arguments, error, message", MESSAGES)
def test_messages(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)
