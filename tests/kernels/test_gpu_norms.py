import pytest
import torch
from torch.nn import functional as F

from engine.kernels import gpu_norms
from engine.kernels.gpu_norms import (
    ROWS,
    TOKENS,
    add_layer_norm_compact_,
    add_layer_norm_compact__ref,
    add_layer_norm_rows_,
    add_layer_norm_rows__ref,
    embed_layer_norm_rows_,
    embed_layer_norm_rows__ref,
)
from engine.kernels.products import Partials
from tests.kernels.cases import assert_no_worse, doubled, partials_of

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
POISON, EPS = 7.0, 1e-5


@pytest.fixture(autouse=True)
def triton_alone(monkeypatch):
    """What the extension would serve on a device, too (its own tests: test_norm_rows.py)."""
    monkeypatch.setattr(gpu_norms, "norm_rows_problem", lambda *operands: "here Triton's kernel is asked")


@pytest.fixture(params=[1, 4], ids=["one row", "four rows"])
def rows_a_program(request, monkeypatch):
    """Both shapes of a program, whatever the capacity would choose."""
    block = gpu_norms._block
    monkeypatch.setattr(gpu_norms, "_block", lambda *sizes: block(*sizes) | {"BLOCK_ROWS": request.param})


def plain(x, residual, weight, bias):
    total = x + residual
    return F.layer_norm(total, weight.shape, weight.to(x.dtype), bias.to(x.dtype), EPS)


def case(rows, hidden, dtype, device, norm_dtype=None):
    x, residual = (torch.randn(rows, hidden).to(dtype).to(device) for _ in range(2))
    weight, bias = (torch.randn(hidden).to(norm_dtype or dtype).to(device) for _ in range(2))
    return x, residual, weight, bias


def counts_of(rows, tokens, device):
    return torch.tensor([rows, tokens], dtype=torch.int32, device=device)


def check(out, x, residual, weight, bias):
    exact = plain(*doubled(x, residual, weight, bias))
    assert_no_worse(out, plain(x, residual, weight, bias), exact, floor=2e-6)


@pytest.mark.parametrize("dtype", [HALF, SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("hidden", [1, 40, 300])
@pytest.mark.parametrize("capacity, live", [(1, 1), (11, 7), (5, 0)])
def test_residual(way, rows_a_program, dtype, hidden, capacity, live):
    way.skip_wrong(dtype)
    x, residual, weight, bias = case(capacity, hidden, dtype, way.device)
    x[live:] = float("nan")
    out = torch.full_like(residual, POISON)
    way(add_layer_norm_rows_, add_layer_norm_rows__ref)(
        out, x, residual, weight, bias, EPS, counts_of(0, live, way.device), TOKENS
    )
    check(out[:live], x[:live], residual[:live], weight, bias)
    assert bool((out[live:] == POISON).all())


@pytest.mark.parametrize("both", [False, True], ids=["residual gathered", "both gathered"])
def test_first_tokens(way, rows_a_program, both):
    _, residual, weight, bias = case(20, 48, HALF, way.device, SINGLE)
    index = torch.tensor([0, 9, 10, 19, 20], dtype=torch.int32, device=way.device)
    x = torch.randn(20 if both else 4, 48).to(HALF).to(way.device)
    out = torch.full((4, 48), POISON, dtype=HALF, device=way.device)
    way(add_layer_norm_rows_, add_layer_norm_rows__ref)(
        out, x, residual, weight, bias, EPS, counts_of(3, 19, way.device), ROWS, index, index if both else None
    )
    rows = index[:3].long()
    check(out[:3], x[rows] if both else x[:3], residual[rows], weight, bias)
    assert bool((out[3:] == POISON).all())


def test_in_place_and_in_column_slices(way, rows_a_program):
    x, residual, weight, bias = case(9, 32, SINGLE, way.device)
    wide = torch.full((9, 80), POISON, device=way.device)
    out = wide[:, 8:40]
    out.copy_(x)
    way(add_layer_norm_rows_, add_layer_norm_rows__ref)(
        out, out, residual, weight, bias, EPS, counts_of(9, 9, way.device), TOKENS
    )
    check(out, x, residual, weight, bias)
    assert bool((wide[:, :8] == POISON).all() and (wide[:, 40:] == POISON).all())


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("stay", ["some", "none", "all"])
@pytest.mark.parametrize("settled", [False, True])
def test_survivors_move_to_their_places(way, rows_a_program, dtype, stay, settled):
    x, residual, weight, bias = case(13, 40, dtype, way.device)
    live = 11
    keep = {"some": [0, 3, 4, 5, 10], "none": [], "all": list(range(live))}[stay]
    dest = torch.full((13,), -1, dtype=torch.int32)
    dest[keep] = torch.arange(len(keep), dtype=torch.int32)
    dest[live:] = 1  # past the live count, whatever stands there
    gone = [t for t in range(13) if t not in keep]
    x[gone] = float("nan")
    out = torch.full((13, 40), POISON, dtype=dtype, device=way.device)
    way(add_layer_norm_compact_, add_layer_norm_compact__ref)(
        out, x, residual, weight, bias, EPS, counts_of(4, live, way.device), dest.to(way.device), settled=settled
    )
    check(out[: len(keep)], x[keep], residual[keep], weight, bias)
    assert bool((out[len(keep) :] == POISON).all())


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("shares", [0, 2, 4])
@pytest.mark.parametrize("form", ["rows", "gathered", "compact"])
def test_partial_sums_are_added_up(way, rows_a_program, dtype, shares, form):
    """Every form reads a product's partial sums instead of its rows, where there are some, and gets the same."""
    way.skip_wrong(dtype)
    x, residual, weight, bias = case(13, 40, dtype, way.device)
    partials, shared = partials_of(x, shares), x if shares == 0 else torch.full_like(x, float("nan"))
    live, index = 11, torch.tensor([3, 0, 10, 7], dtype=torch.int32, device=way.device)
    dest = torch.full((13,), -1, dtype=torch.int32, device=way.device)
    dest[[1, 4, 10]] = torch.arange(3, dtype=torch.int32, device=way.device)
    outs = []
    for given, sums in ((x, None), (shared, partials)):
        out = torch.full((4 if form == "gathered" else 13, 40), POISON, dtype=dtype, device=way.device)
        norm = (out, given, residual, weight, bias, EPS)
        if form == "compact":
            counts = counts_of(4, live, way.device)
            way(add_layer_norm_compact_, add_layer_norm_compact__ref)(*norm, counts, dest, sums)
        else:
            which, places = (ROWS, (index, index)) if form == "gathered" else (TOKENS, (None, None))
            counts = counts_of(4, live, way.device)
            way(add_layer_norm_rows_, add_layer_norm_rows__ref)(*norm, counts, which, *places, sums)
        outs.append(out)
    assert not bool(outs[0].isnan().any()) and bool((outs[0] != POISON).any())
    torch.testing.assert_close(*outs, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [HALF, SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("types", ["given", "all 0", "no table"])
@pytest.mark.parametrize("live", [0, 6, 9])
def test_embeddings(way, rows_a_program, dtype, types, live):
    way.skip_wrong(dtype)
    hidden, capacity = 48, 9
    word, token_type, position = (torch.randn(n, hidden).to(dtype).to(way.device) for n in (30, 2, 12))
    weight, bias = (torch.randn(hidden).to(dtype).to(way.device) for _ in range(2))
    ids = torch.randint(0, 30, (capacity,), device=way.device)
    kinds = torch.randint(0, 2, (capacity,), device=way.device, dtype=torch.int32)
    places = torch.randint(0, 12, (capacity,), device=way.device, dtype=torch.int32)
    ids[live:] = 1 << 40  # past the live count, whatever stands there
    out = torch.full((capacity, hidden), POISON, dtype=dtype, device=way.device)
    table = None if types == "no table" else token_type
    way(embed_layer_norm_rows_, embed_layer_norm_rows__ref)(
        out, ids, kinds if types == "given" else None, places, word, table, position, weight, bias, EPS,
        counts_of(2, live, way.device),
    )  # fmt: skip

    def total(word, token_type, position):
        found = word[ids[:live]]
        if types != "no table":
            found = found + token_type[kinds[:live].long() if types == "given" else 0]
        return found + position[places[:live].long()]

    exact = plain(total(*doubled(word, token_type, position)), 0, *doubled(weight, bias))
    assert_no_worse(out[:live], plain(total(word, token_type, position), 0, weight, bias), exact, floor=2e-6)
    assert bool((out[live:] == POISON).all())


def test_ids_out_of_range(way):
    """The device reads row 0 rather than foreign memory; the twin says so."""
    table, one = torch.randn(5, 16, device=way.device), torch.ones(16, device=way.device)
    ids = torch.tensor([5, -7, 2], device=way.device)
    out = torch.empty(3, 16, device=way.device)
    arguments = (ids, None, torch.zeros_like(ids), table, None, table, one, one, EPS, counts_of(1, 3, way.device))
    if way.name == "twin":
        with pytest.raises(IndexError):
            embed_layer_norm_rows__ref(out, *arguments)
    else:
        embed_layer_norm_rows_(out, *arguments)
        torch.testing.assert_close(out, plain(table[[0, 0, 2]], table[[0, 0, 0]], one, one), rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_the_others(way):
    x, residual, weight, bias = case(8, 96, SINGLE, way.device)
    outs = []
    for live in (8, 2):
        out = torch.zeros_like(x)
        way(add_layer_norm_rows_, add_layer_norm_rows__ref)(
            out, x, residual, weight, bias, EPS, counts_of(0, live, way.device), TOKENS
        )
        outs.append(out[:2])
    assert torch.equal(*outs)


X, OUT, V = torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(8)
N, IDS = counts_of(2, 4, "cpu"), torch.zeros(4, dtype=torch.int32)
ROWS_MESSAGES = [
    ((OUT.double(), X, X, V, V, EPS, N, 1), "out must be float16, bfloat16 or float32, got float64"),
    ((OUT, X[:3], X, V, V, EPS, N, 1), r"x must have shape \[4 or more, 8\], got \[3, 8\]"),
    ((OUT, X, X.half(), V, V, EPS, N, 1), r"residual must have the dtype of out .float32., got float16"),
    ((OUT, X, X, V[:7], V, EPS, N, 1), r"weight must have shape \[8\], got \[7\]"),
    ((OUT, X, X, V, V.half(), EPS, N, 1), "bias must be float32, got float16"),
    ((OUT, X, X, V, V, EPS, N.float(), 1), r"counts must be int32 of shape \[2\]"),
    ((OUT, X, X, V, V, EPS, N, 3), "which must be 0 .rows. or 1 .tokens."),
    ((OUT, X, X, V, V, EPS, N, 1, IDS[:3]), r"residual_index must have shape \[4 or more\], got \[3\]"),
    ((X, X, OUT, V, V, EPS, N, 1, None, IDS), "out must not overlap x in memory"),
]


@pytest.mark.parametrize("arguments, message", ROWS_MESSAGES)
def test_messages(arguments, message):
    with pytest.raises(ValueError, match=message):
        add_layer_norm_rows_(*arguments)


def test_messages_about_partials():
    with pytest.raises(ValueError, match=r"sums of partials must be contiguous float32 of one dimension on cpu"):
        add_layer_norm_rows_(OUT, X, X, V, V, EPS, N, 1, partials=Partials(X, 1, 1))


def test_more_messages():
    with pytest.raises(ValueError, match="out must not overlap residual in memory"):
        add_layer_norm_compact_(OUT, X, OUT, V, V, EPS, N, IDS)
    with pytest.raises(ValueError, match="token_dest must be int32, got int64"):
        add_layer_norm_compact_(OUT, X, X, V, V, EPS, N, IDS.long())
    with pytest.raises(ValueError, match="token_type must be given where token_type_ids is, got None"):
        embed_layer_norm_rows_(OUT, IDS, IDS, IDS, X, None, X, V, V, EPS, N)
    with pytest.raises(ValueError, match="input_ids must be int32 or int64, got float32"):
        embed_layer_norm_rows_(OUT, V, None, IDS, X, None, X, V, V, EPS, N)
    with pytest.raises(ValueError, match=r"word must be contiguous, got strides \(16, 1\)"):
        embed_layer_norm_rows_(OUT, IDS, None, IDS, torch.zeros(4, 16)[:, :8], None, X, V, V, EPS, N)


@pytest.mark.interpreter
def test_the_compiled_kernel_has_rows_that_are_many_and_no_index(monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_norms, "_COMPILED_FROM", 5)
    monkeypatch.setattr(gpu_norms, "norm_rows_problem", lambda *operands: None)
    monkeypatch.setattr(gpu_norms, "norm_rows", lambda *given: asked.append(given))
    rows = torch.arange(6, dtype=torch.int32)
    for capacity, index in ((6, None), (5, None), (4, None), (6, rows)):
        x, residual, weight, bias = case(6, 16, HALF, "cpu")
        counts = counts_of(1, capacity, "cpu")
        out = torch.full((capacity, 16), POISON, dtype=HALF)
        add_layer_norm_rows_(out, x, residual, weight, bias, EPS, counts, TOKENS, index)
        if capacity < 5 or index is not None:
            check(out, x[:capacity], residual[:capacity], weight, bias)
            continue
        [(*operands, eps, live, rows_of_out, dest, settled, partials)] = asked
        assert all(a is b for a, b in zip(operands, (out, x, residual, weight, bias), strict=True)) and eps == EPS
        assert (live.tolist(), rows_of_out, dest, settled, partials) == ([capacity], capacity, None, False, None)
        asked.clear()
    x, residual, weight, bias = case(6, 16, HALF, "cpu")
    add_layer_norm_compact_(torch.empty_like(x), x, residual, weight, bias, EPS, counts_of(1, 6, "cpu"), rows)
    assert len(asked) == 1 and asked[0][-3] is rows
