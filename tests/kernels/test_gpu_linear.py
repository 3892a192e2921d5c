import pytest
import torch
from torch.nn import functional as F

from engine.kernels.gpu_linear import ACTIVATIONS, ROWS, TOKENS, configs_for, linear_rows_, linear_rows__ref
from engine.kernels.gpu_norms import add_layer_norm_rows_, add_layer_norm_rows__ref
from engine.kernels.products import (
    PATHS,
    Partials,
    hopper_product,
    partials_memory,
    product_partials,
    product_problem,
    product_workspace,
    whole_rows,
)
from tests.kernels.cases import assert_no_worse, doubled

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
POISON = 7.0


def plain(x, weight, bias, act):
    y = x @ weight.t() if bias is None else x @ weight.t() + bias.to(x.dtype)
    return {"none": lambda y: y, "gelu": F.gelu, "tanh": torch.tanh}[act](y)


def case(rows, features, width, dtype, device, bias_dtype=None):
    x = torch.randn(rows, width).to(dtype).to(device)
    weight = (torch.randn(features, width) * width**-0.5).to(dtype).to(device)
    return x, weight, torch.randn(features).to(bias_dtype or dtype).to(device)


def poisoned(rows, features, dtype, device):
    return torch.full((rows, features), POISON, dtype=dtype, device=device)


def counts_of(rows, tokens, device):
    return torch.tensor([rows, tokens], dtype=torch.int32, device=device)


def check(out, n, x, weight, bias, act):
    """The first n rows against fp64, the others untouched."""
    exact = plain(*doubled(x, weight, bias), act)
    assert_no_worse(out[:n], plain(x, weight, bias, act), exact)
    assert bool((out[n:] == POISON).all())


@pytest.mark.parametrize("dtype", [HALF, SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("capacity, live, features, width", [(1, 1, 16, 32), (37, 21, 33, 40), (70, 70, 130, 136)])
def test_products(way, dtype, act, capacity, live, features, width):
    way.skip_wrong(dtype)
    x, weight, bias = case(capacity, features, width, dtype, way.device)
    x[live:] = float("nan")  # nobody may look
    out = poisoned(capacity, features, dtype, way.device)
    way(linear_rows_, linear_rows__ref)(out, x, weight, bias, counts_of(0, live, way.device), TOKENS, act)
    check(out, live, x[:live], weight, bias, act)


@pytest.mark.parametrize("live", [0, 3, 5])
def test_as_many_as_there_are_rows(way, live):
    """The count of rows and not that of tokens. No live row at all writes nothing."""
    x, weight, bias = case(5, 24, 48, HALF, way.device, bias_dtype=SINGLE)
    out = poisoned(5, 24, HALF, way.device)
    way(linear_rows_, linear_rows__ref)(out, x, weight, bias, counts_of(live, 30, way.device), ROWS, "tanh")
    check(out, live, x[:live], weight, bias, "tanh")


def test_without_bias_and_in_column_slices(way):
    x, weight, _ = case(9, 20, 24, SINGLE, way.device)
    wide_x, wide_out = torch.randn(9, 64, device=way.device), poisoned(9, 64, SINGLE, way.device)
    wide_x[:, 8:32] = x
    way(linear_rows_, linear_rows__ref)(
        wide_out[:, 10:30], wide_x[:, 8:32], weight, None, counts_of(9, 9, way.device), TOKENS
    )
    check(wide_out[:, 10:30], 9, x, weight, None, "none")
    assert bool((wide_out[:, :10] == POISON).all() and (wide_out[:, 30:] == POISON).all())


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
def test_all_tiles_compute_the_same(way, dtype):
    x, weight, bias = case(200, 70, 72, dtype, way.device)
    for config in configs_for(200, 70, 72, dtype):
        out = poisoned(200, 70, dtype, way.device)
        way(linear_rows_, linear_rows__ref)(
            out, x, weight, bias, counts_of(1, 195, way.device), TOKENS, "gelu", config=config
        )
        check(out, 195, x[:195], weight, bias, "gelu")


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
def test_a_row_does_not_depend_on_the_others(way, dtype):
    if way.name == "twin":
        pytest.skip("a torch product may choose its order by the number of rows")
    x, weight, bias = case(40, 48, 64, dtype, way.device)
    outs = []
    for live in (40, 3):
        out = poisoned(40, 48, dtype, way.device)
        linear_rows_(out, x, weight, bias, counts_of(0, live, way.device), TOKENS, "gelu")
        outs.append(out[:3])
    assert torch.equal(*outs)


def test_nan_stays_in_its_row(way):
    x, weight, bias = case(4, 16, 32, SINGLE, way.device)
    x[1, 5] = float("nan")
    for act in ACTIVATIONS:
        out = poisoned(4, 16, SINGLE, way.device)
        way(linear_rows_, linear_rows__ref)(out, x, weight, bias, counts_of(4, 4, way.device), TOKENS, act)
        assert out.isnan().all(1).tolist() == [False, True, False, False] and int(out.isnan().sum()) == 16


# --- the Hopper kernel, which linear_rows_ prefers where it serves ---------------------------------------------------


@pytest.fixture
def hopper(gpu):
    x, weight, bias = case(8, 8, 8, HALF, "cuda")
    if (reason := product_problem(torch.empty_like(x), x, weight, bias, "none")) is not None:
        pytest.skip(f"no Hopper kernel: {reason}")


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [True, False], ids=["workspace", "no workspace"])
@pytest.mark.parametrize("path", [None, *range(len(PATHS))])
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize(
    "capacity, live, features, width",
    [(1, 1, 768, 768), (70, 37, 384, 384), (128, 128, 768, 3072), (257, 200, 120, 72), (64, 64, 8, 16),
     (2100, 2000, 2304, 768), (130, 129, 200, 1000), (4200, 4099, 2304, 768), (6000, 5900, 1536, 64),
     (9000, 8500, 3072, 136)],
)  # fmt: skip
def test_hopper_products(hopper, capacity, live, features, width, dtype, path, shared):
    workspace = product_workspace("cuda") if shared else None
    for act in ("none", "gelu"):
        for bias_dtype in (dtype, SINGLE):
            x, weight, bias = case(capacity, features, width, dtype, "cuda", bias_dtype)
            x[live:] = float("nan")  # nobody may look
            for given in (bias, None):
                out = poisoned(capacity, features, dtype, "cuda")
                count = counts_of(live, 0, "cuda")
                hopper_product(out, x, weight, given, count, act == "gelu", workspace, path)
                check(out, live, x[:live], weight, given if given is not None else torch.zeros_like(bias), act)
    if shared:
        assert not bool(workspace[:640].any()), "the counters of shared tiles must be zero again"


@pytest.mark.gpu
@pytest.mark.parametrize("path", [None, *range(len(PATHS))])
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize(
    "capacity, live, features, width, shares",
    [(1, 1, 768, 768, 4), (128, 128, 768, 3072, 4), (257, 200, 120, 72, None), (700, 512, 768, 3072, 4),
     (1024, 1000, 768, 3072, 2), (2048, 1500, 768, 3072, 2), (4200, 4099, 768, 768, 0), (130, 129, 200, 1000, None)],
)  # fmt: skip
def test_products_that_leave_partial_sums(hopper, capacity, live, features, width, shares, dtype, path):
    """Few rows share a sum, whoever reads it adds it up; many rows, or one step of K, stand in ``out`` as always."""
    x, weight, bias = case(capacity, features, width, dtype, "cuda")
    x[live:] = float("nan")  # nobody may look
    partials = product_partials(partials_memory(x), features, width)
    found = partials.shares(live)
    if path is None and shares is not None:
        assert found == shares
    for given in (bias, None):
        partials.sums[:] = float("nan")
        out = poisoned(capacity, features, dtype, "cuda")
        hopper_product(out, x, weight, given, counts_of(live, 0, "cuda"), False, None, path, partials)
        if path is not None:  # another tile has other limits: what is written says how many
            written = int((~partials.sums.isnan()).sum())
            found, rest = divmod(written, live * features)
            assert found in (0, 2, 4) and rest == 0
        assert bool((out == POISON).all()) == (found > 0)
        assert bool(partials.sums[live * found * features :].isnan().all()), "written past the live rows"
        whole = out.clone()
        whole[:live] = whole_rows(out, Partials(partials.sums, *{4: (live, live), 2: (0, live), 0: (0, 0)}[found]),
                                  live, slice(live))  # fmt: skip
        check(whole, live, x[:live], weight, given if given is not None else torch.zeros_like(bias), "none")


@pytest.mark.gpu
@pytest.mark.parametrize("roomy", [False, True], ids=["as many rows as live", "many rows"])
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("width", [768, 3072], ids=["out", "down"])
@pytest.mark.parametrize("at", ["one", "four", "past four", "two", "past two"])
def test_who_reads_partial_sums_knows_how_many_there_are(hopper, at, width, dtype, roomy):
    """The product and the norm behind it, on both sides of both limits: each goes by the live count alone."""
    features, eps = 768, 1e-12
    partials = product_partials(partials_memory(torch.empty(0, dtype=dtype, device="cuda")), features, width)
    four, two = partials.four, partials.two
    assert 1 < four < two
    live = {"one": 1, "four": four, "past four": four + 1, "two": two, "past two": two + 1}[at]
    capacity = max(4200, two + 1) if roomy else live  # four rows a program of the norm, or one
    x, weight, bias = case(capacity, features, width, dtype, "cuda")
    x[live:] = float("nan")  # nobody may look
    residual, norm = torch.randn(capacity, features).to("cuda", dtype), torch.randn(2, features).to("cuda", dtype)
    partials.sums.fill_(float("nan"))
    product, out = (poisoned(capacity, features, dtype, "cuda") for _ in range(2))
    counts = counts_of(0, live, "cuda")
    linear_rows_(product, x, weight, bias, counts, TOKENS, partials=partials)
    assert bool((product == POISON).all()) == (at != "past two")
    assert int((~partials.sums.isnan()).sum()) == live * features * partials.shares(live)
    add_layer_norm_rows_(out, product, residual, *norm, eps, counts, TOKENS, partials=partials)
    assert bool((out[live:] == POISON).all())

    twins = []
    for wide in (False, True):  # in the dtype itself, and in fp64
        x_, weight_, bias_, residual_, *norm_ = (
            t.double() if wide else t for t in (x[:live], weight, bias, residual[:live], *norm)
        )
        y, z = torch.empty_like(residual_), torch.empty_like(residual_)
        linear_rows__ref(y, x_, weight_, bias_, counts, TOKENS)
        add_layer_norm_rows__ref(z, y, residual_, *norm_, eps, counts, TOKENS)
        twins.append(z)
    assert_no_worse(out[:live], *twins, floor=2e-6)


def test_partials(way):
    """The twin keeps to the layout, its reader adds up. Who cannot leave partial sums says so."""
    x, weight, bias = case(7, 16, 32, SINGLE, way.device)
    arguments = (x, weight, bias, counts_of(0, 5, way.device), TOKENS)
    out = poisoned(7, 16, SINGLE, way.device)
    for four, two, shares in ((8, 8, 4), (4, 5, 2), (3, 4, 0)):
        partials = Partials(torch.full((7 * 4 * 16,), POISON, device=way.device), four, two)
        assert partials.shares(5) == shares
        linear_rows__ref(out, *arguments, partials=partials)
        whole = torch.cat([whole_rows(out, partials, 5, slice(5)), poisoned(2, 16, SINGLE, way.device)])
        check(whole, 5, x[:5], weight, bias, "none")
        index = torch.tensor([4, 0], device=way.device)
        assert torch.equal(whole_rows(out, partials, 5, index), whole[index])
        assert bool((partials.sums[5 * shares * 16 :] == POISON).all())
        out.fill_(POISON)
    with pytest.raises(ValueError, match="partials have no activation: act must be none beside them, got 'gelu'"):
        linear_rows_(out, *arguments, "gelu", partials=partials)
    if way.name != "twin":
        with pytest.raises(ValueError, match="the Hopper kernel alone leaves partials, and does not serve here: "):
            linear_rows_(out, *arguments, partials=partials)
    assert partials_memory(x) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_gelu_of_the_hopper_kernel_at_every_size_of_number(hopper, dtype):
    """Through products with the identity, so that sums are the inputs themselves: nothing but GELU and its rounding."""
    large = torch.logspace(-7, 4, 256)
    numbers = torch.cat([torch.linspace(-12, 12, 3 * 4096 - 512), large, -large])
    x = numbers.reshape(-1, 64).to("cuda", dtype)
    out = poisoned(*x.shape, dtype, "cuda")
    hopper_product(out, x, torch.eye(64, device="cuda", dtype=dtype), None, counts_of(len(x), 0, "cuda"), True, None)
    exact = F.gelu(x.double())
    # Half a spacing is rounding; 1.2e-5 is what the approximation may add; below, fp16's spacing is 6e-8.
    spacing = torch.finfo(dtype).eps * 2.0 ** exact.abs().clamp_min(2.0**-14).log2().floor()
    assert bool(((out.double() - exact).abs() <= 0.51 * spacing + torch.clamp(0.5 * spacing, max=1.2e-5)).all())


@pytest.mark.gpu
def test_hopper_products_in_column_slices_of_larger_buffers(hopper):
    x, weight, bias = case(90, 96, 128, HALF, "cuda")
    wide_x, wide_out = torch.randn(90, 320, device="cuda").half(), poisoned(90, 256, HALF, "cuda")
    wide_x[:, 64:192] = x
    out = wide_out[:, 32:128]
    assert product_problem(out, wide_x[:, 64:192], weight, bias, "none") is None
    linear_rows_(out, wide_x[:, 64:192], weight, bias, counts_of(0, 80, "cuda"), TOKENS)
    check(out, 80, x[:80], weight, bias, "none")
    assert bool((wide_out[:, :32] == POISON).all() and (wide_out[:, 128:] == POISON).all())


@pytest.mark.gpu
def test_what_the_driver_refuses_is_said_in_its_words(hopper):
    _, weight, bias = case(8, 16, 24, HALF, "cuda")
    shifted = torch.empty(9, 25, dtype=HALF, device="cuda")[:8, 1:]
    with pytest.raises(RuntimeError, match="^CUDA: a product of .* refused the operand's .*: invalid argument$"):
        hopper_product(poisoned(8, 16, HALF, "cuda"), shifted, weight, bias, counts_of(8, 0, "cuda"), False, None)


@pytest.mark.gpu
def test_what_the_hopper_kernel_leaves_to_triton(hopper):
    x, weight, bias = case(8, 16, 24, HALF, "cuda")
    out = torch.empty(8, 16, dtype=HALF, device="cuda")
    assert product_problem(out, x, weight, bias, "none") is None
    assert "no tanh" in product_problem(out, x, weight, bias, "tanh")
    assert "float16 and bfloat16" in product_problem(out.float(), x.float(), weight.float(), bias, "none")
    assert "multiples of 8" in product_problem(out[:, :12], x, weight[:12], bias, "none")
    shifted = torch.empty(9, 25, dtype=HALF, device="cuda")[:8, 1:]
    assert "16 bytes" in product_problem(out, shifted, weight, bias, "none")


def test_the_hopper_kernel_is_for_cuda_tensors():
    x, weight, bias = case(8, 16, 24, HALF, "cpu")
    assert product_problem(x, x, weight, bias, "none") == "the tensors are not on a CUDA device"
    assert product_workspace("cpu") is None


@pytest.mark.gpu
def test_a_graph_reads_the_count_at_every_replay(gpu):
    x, weight, bias = case(300, 384, 768, HALF, "cuda")
    counts, out = counts_of(0, 300, "cuda"), poisoned(300, 384, HALF, "cuda")
    linear_rows_(out, x, weight, bias, counts, TOKENS, "gelu")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        linear_rows_(out, x, weight, bias, counts, TOKENS, "gelu")
    for live in (300, 17, 0):
        out.fill_(POISON)
        counts[1] = live
        graph.replay()
        check(out, live, x[:live], weight, bias, "gelu")


def test_the_table_of_tiles():
    """Enough programs for the device wherever the product has them, at every capacity; the default is a candidate."""
    for dtype in (HALF, BRAIN, SINGLE):
        for rows in (0, 1, 16, 128, 1024, 4096, 16384):
            for features, width in ((2304, 768), (768, 768), (768, 3072), (1152, 384), (384, 384)):
                for act in ACTIVATIONS:
                    configs = configs_for(rows, features, width, dtype, act)
                    assert len(set(configs)) == len(configs)
                    programs = [-(-rows // c.block_m) * -(-features // c.block_n) for c in configs]
                    smallest = min(c.block_m * c.block_n for c in configs_for(16, features, width, dtype)[:1])
                    assert programs[0] >= 132 or configs[0].block_m * configs[0].block_n == smallest
    assert configs_for(128, 768, 768, HALF)[0].block_m <= 32
    assert configs_for(16384, 2304, 768, HALF)[0][:3] == (128, 256, 64)
    assert configs_for(16384, 3072, 768, HALF, "gelu")[0][:3] == (128, 128, 64)
    with pytest.raises(ValueError, match="dtype must be float16, bfloat16 or float32, got torch.float64"):
        configs_for(1, 1, 1, torch.float64)
    with pytest.raises(ValueError, match="needs sizes of at least 1 .0 rows are allowed., got 4, 0, 8"):
        configs_for(4, 0, 8, HALF)


OUT, X, W, B, N = torch.zeros(4, 6), torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(6), counts_of(2, 4, "cpu")
MESSAGES = [
    ((OUT.double(), X, W, B, N, 1), "out must be float16, bfloat16 or float32, got float64"),
    ((OUT, X, W[:5], B, N, 1), r"weight must have shape \[6, K\], got \[5, 8\]"),
    ((OUT, X[:3], W, B, N, 1), r"x must have shape \[4 or more, 8\], got \[3, 8\]"),
    ((OUT, X.half(), W, B, N, 1), r"x must have the dtype of out .float32., got float16"),
    ((OUT, X, torch.zeros(8, 6).t(), B, N, 1), r"weight must be contiguous along its rows"),
    ((OUT, X, W, B[:5], N, 1), r"bias must have shape \[6\], got \[5\]"),
    ((OUT, X, W, B.half(), N, 1), "bias must be float32, got float16"),
    ((OUT, X, W, B, N.long(), 1), r"counts must be int32 of shape \[2\], the live rows and tokens, got int64 \[2\]"),
    ((OUT, X, W, B, N, 2), r"which must be 0 .rows. or 1 .tokens., .* got 2"),
    ((OUT, X, W, B, N, 1, "relu"), "act must be one of none, gelu, tanh, got 'relu'"),
    ((X[:, :6], X, W, B, N, 1), "out must not overlap x in memory"),
]


@pytest.mark.parametrize("arguments, message", MESSAGES)
def test_messages(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_rows_(*arguments)
