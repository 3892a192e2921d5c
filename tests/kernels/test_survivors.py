from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.survivors import survivors_, survivors__ref
from tests.kernels.cases import cu_seqlens_of, needs_extension

INT = torch.int32
STATE_DTYPES = (torch.int32, torch.float32, torch.int64, torch.float64)
UNTOUCHED = -7  # what the outputs hold before


def case(lengths, keep, cap_rows, cap_tokens, device="cpu", keep_dtype=torch.bool):
    """Arguments of survivors_; what lies past the live rows is garbage on purpose."""
    rows, spare = len(lengths), cap_rows - len(lengths)
    cu_seqlens = torch.cat([cu_seqlens_of(lengths), torch.randint(-99, 99, (spare,), dtype=INT)])
    flags = torch.cat([torch.tensor(keep, dtype=torch.bool), torch.ones(spare, dtype=torch.bool)])
    state = [torch.randn(cap_rows).mul(1000).to(dtype) for dtype in STATE_DTYPES]
    return SimpleNamespace(
        keep=flags.to(keep_dtype).to(device),
        cu_seqlens=cu_seqlens.to(device),
        counts=torch.tensor([rows, sum(lengths)], dtype=INT, device=device),
        state=[s.to(device) for s in state],
        out_cu_seqlens=torch.full((cap_rows + 1,), UNTOUCHED, dtype=INT, device=device),
        token_dest=torch.full((cap_tokens,), UNTOUCHED, dtype=INT, device=device),
        out_counts=torch.full((2,), UNTOUCHED, dtype=INT, device=device),
        out_state=[torch.full((cap_rows,), UNTOUCHED, dtype=dtype, device=device) for dtype in STATE_DTYPES],
    )


def expected(lengths, keep, cap_rows, cap_tokens, state):
    """The definition, row by row in plain Python."""
    cu_seqlens, dest, kept = [0], [], []
    for i, (length, stays) in enumerate(zip(lengths, keep, strict=True)):
        if stays:
            kept.append(i)
            dest += range(cu_seqlens[-1], cu_seqlens[-1] + length)
            cu_seqlens.append(cu_seqlens[-1] + length)
        else:
            dest += [-1] * length
    total = cu_seqlens[-1]
    return (
        cu_seqlens + [total] * (cap_rows - len(kept)),
        dest + [-1] * (cap_tokens - len(dest)),
        [len(kept), total],
        [[s[i].item() for i in kept] + [UNTOUCHED] * (cap_rows - len(kept)) for s in state],
    )


def check(lengths, keep, cap_rows=None, cap_tokens=None, device="cpu", keep_dtype=torch.bool):
    cap_rows = len(lengths) if cap_rows is None else cap_rows
    cap_tokens = sum(lengths) if cap_tokens is None else cap_tokens
    for function in (survivors_, survivors__ref):
        args = case(lengths, keep, cap_rows, cap_tokens, device, keep_dtype)
        before = [t.clone() for t in (args.keep, args.cu_seqlens, args.counts, *args.state)]
        function(*vars(args).values())
        cu_seqlens, dest, counts, state = expected(lengths, keep, cap_rows, cap_tokens, args.state)
        assert args.out_cu_seqlens.tolist() == cu_seqlens
        assert args.token_dest.tolist() == dest
        assert args.out_counts.tolist() == counts
        assert [s.tolist() for s in args.out_state] == state
        for old, new in zip(before, (args.keep, args.cu_seqlens, args.counts, *args.state), strict=True):
            assert torch.equal(old, new)


@pytest.mark.parametrize("keep_dtype", [torch.bool, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("keep", [[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 1]], ids=str)
@pytest.mark.parametrize("cap_rows, cap_tokens", [(4, 11), (4, 16), (7, 11), (9, 40)])
def test_small(keep, cap_rows, cap_tokens, keep_dtype, device):
    check([4, 1, 3, 3], [bool(k) for k in keep], cap_rows, cap_tokens, device, keep_dtype)


def test_nobody_leaves_is_the_identity(device):
    lengths = [5, 2, 9]
    args = case(lengths, [True] * 3, 3, 16, device)
    survivors_(*vars(args).values())
    assert torch.equal(args.out_cu_seqlens, args.cu_seqlens) and torch.equal(args.out_counts, args.counts)
    assert torch.equal(args.token_dest, torch.arange(16, dtype=INT, device=device))
    assert all(torch.equal(old, new) for old, new in zip(args.state, args.out_state, strict=True))


@pytest.mark.parametrize("cap_rows, cap_tokens", [(0, 0), (0, 5), (3, 0), (5, 1000)])
def test_no_live_row(cap_rows, cap_tokens, device):
    check([], [], cap_rows, cap_tokens, device)


def test_empty_sequences(device):
    check([0, 3, 0, 0, 2, 0], [True, False, True, False, True, True], 8, 9, device)
    check([0, 0], [True, True], 2, 4, device)


@pytest.mark.parametrize("rows", [31, 32, 33, 255, 256, 257, 511, 512, 513, 1025, 3000])
def test_sizes_of_the_scan(rows, device):
    """Around the widths of warp, block and round, at the capacity and below it."""
    lengths = torch.randint(0, 9, (rows,)).tolist()
    keep = (torch.rand(rows) < 0.6).tolist()
    check(lengths, keep, rows, sum(lengths), device)
    check(lengths, keep, rows + 100, sum(lengths) + 700, device)


@pytest.mark.parametrize("length", [1, 128, 511, 512, 513, 2000])
def test_sizes_of_the_token_blocks(length, device):
    check([length] * 6, [True, False, True, True, False, True], 8, 6 * length + 1, device)


def test_state_is_optional(device):
    args = case([2, 1], [False, True], 2, 3, device)
    survivors_(args.keep, args.cu_seqlens, args.counts, [], args.out_cu_seqlens, args.token_dest, args.out_counts, [])
    assert args.token_dest.tolist() == [-1, -1, 0] and args.out_counts.tolist() == [1, 1]


@st.composite
def passes(draw):
    rows = draw(st.integers(0, 40))
    lengths = draw(st.lists(st.integers(0, 30), min_size=rows, max_size=rows))
    keep = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    return lengths, keep, rows + draw(st.integers(0, 5)), sum(lengths) + draw(st.integers(0, 50))


@settings(max_examples=80, deadline=None)
@given(passes())
def test_any_pass(one):
    check(*one)


def test_a_chain_of_passes(device):
    """Two sets of buffers, swapped at every layer: row ids at the end are those that no layer removed."""
    rows, layers = 50, 6
    lengths = torch.randint(1, 20, (rows,)).tolist()
    leaves_at = torch.randint(0, layers + 3, (rows,))
    args = case(lengths, [True] * rows, rows, sum(lengths), device)
    ids = torch.arange(rows, dtype=INT, device=device)
    now = [args.cu_seqlens, args.counts, ids]
    then = [args.out_cu_seqlens, args.out_counts, torch.full_like(ids, UNTOUCHED)]
    for layer in range(layers):
        keep = (leaves_at.to(device)[now[2].clamp(min=0)] != layer).to(torch.int8)
        survivors_(keep, now[0], now[1], [now[2]], then[0], args.token_dest, then[1], [then[2]])
        now, then = then, now
    left = [i for i in range(rows) if leaves_at[i] >= layers]
    assert now[2][: len(left)].tolist() == left
    assert now[1].tolist() == [len(left), sum(lengths[i] for i in left)]
    assert now[0].tolist() == cu_seqlens_of([lengths[i] for i in left]).tolist() + [int(now[1][1])] * (rows - len(left))


@pytest.mark.gpu
def test_cuda_equals_cpu(cuda_device):
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        rows = int(torch.randint(0, 700, (1,), generator=generator))
        lengths = torch.randint(0, 40, (rows,), generator=generator).tolist()
        share = float(torch.rand(1, generator=generator)) * 1.4 - 0.2  # all leave and nobody leaves occur
        keep = (torch.rand(rows, generator=generator) < share).tolist()
        host = case(lengths, keep, rows + 3, sum(lengths) + 5)
        moved = {k: [x.cuda() for x in v] if isinstance(v, list) else v.cuda() for k, v in vars(host).items()}
        survivors_(*vars(host).values())
        survivors_(*moved.values())
        for name in ("out_cu_seqlens", "token_dest", "out_counts"):
            assert torch.equal(getattr(host, name), moved[name].cpu()), name
        for one, two in zip(host.out_state, moved["out_state"], strict=True):
            assert torch.equal(one, two.cpu())


# --- messages ------------------------------------------------------------------------------------------------------


def ints(*values):
    return torch.tensor(values, dtype=INT)


STATE = torch.zeros(2)
MESSAGES = [
    ({"keep": torch.ones(2)}, r"keep must be bool, int8 or uint8, got float32"),
    ({"keep": torch.ones(2, 1, dtype=torch.bool)}, r"keep must have 1 dimensions, got shape \[2, 1\]"),
    ({"cu_seqlens": ints(0, 3)}, r"cu_seqlens must have shape \[3\], got \[2\]"),
    ({"cu_seqlens": torch.tensor([0, 3, 5])}, r"cu_seqlens must be int32, got int64"),
    ({"cu_seqlens": ints(1, 3, 5)}, r"cu_seqlens must start with 0, got 1"),
    ({"cu_seqlens": ints(0, 3, 2)}, r"cu_seqlens must not fall, got 3 and 2 for live row 1"),
    ({"counts": ints(2)}, r"counts must have shape \[2\], got \[1\]"),
    ({"counts": ints(3, 5)}, r"counts\[0\], the live rows, must lie in \[0, 2\], got 3"),
    ({"counts": ints(-1, 5)}, r"counts\[0\], the live rows, must lie in \[0, 2\], got -1"),
    ({"counts": ints(2, 9)}, r"counts\[1\], the live tokens, must lie in \[0, 8\], got 9"),
    ({"counts": ints(2, 4)}, r"counts\[1\], .* where cu_seqlens puts the end of the live rows \(5\), got 4"),
    ({"out_cu_seqlens": ints(0, 0)}, r"out_cu_seqlens must have shape \[3\], got \[2\]"),
    ({"out_counts": torch.zeros(4, dtype=INT)[::2]}, r"out_counts must be contiguous, got strides \[2\]"),
    ({"token_dest": torch.zeros(8)}, r"token_dest must be int32, got float32"),
    ({"state": []}, r"out_state must have one tensor for each of the 0 of state, got 1"),
    ({"state": [torch.zeros(3)]}, r"state\[0\] must have shape \[2\], got \[3\]"),
    ({"out_state": [torch.zeros(2).double()]}, r"out_state\[0\] must have the dtype of state\[0\] \(float32\)"),
    ({"state": [STATE.half()], "out_state": [STATE.half()]}, r"state\[0\] must have items of 4 or 8 bytes, got fl"),
    ({"state": [STATE] * 33, "out_state": [STATE] * 33}, r"state must have at most 32 tensors, got 33"),
    ({"state": [STATE], "out_state": [STATE]}, r"out_state\[0\] must not share memory with state\[0\]"),
]


def good():
    return dict(
        keep=torch.tensor([True, False]),
        cu_seqlens=ints(0, 3, 5),
        counts=ints(2, 5),
        state=[torch.zeros(2)],
        out_cu_seqlens=ints(0, 0, 0),
        token_dest=torch.zeros(8, dtype=INT),
        out_counts=ints(0, 0),
        out_state=[torch.zeros(2)],
    )


@needs_extension
@pytest.mark.parametrize("change, message", MESSAGES)
def test_messages(change, message):
    with pytest.raises(ValueError, match=message):
        survivors_(**{**good(), **change})


@pytest.mark.parametrize("function", [survivors_, survivors__ref])
def test_shared_memory_is_refused(function):
    arena = torch.zeros(16, dtype=INT)
    shared = [
        {"cu_seqlens": arena[:3], "out_cu_seqlens": arena[2:5], "counts": ints(0, 0)},
        {"counts": arena[:2], "out_counts": arena[:2]},
        {"token_dest": arena[:8], "out_counts": arena[7:9]},
        {"state": [arena[:2]], "out_state": [arena[1:3]], "counts": ints(0, 0)},
    ]
    for change in shared:
        with pytest.raises(ValueError, match="must not share memory with"):
            function(**{**good(), **change})
    function(**{**good(), "out_cu_seqlens": arena[:3], "token_dest": arena[3:11], "out_counts": arena[11:13]})
