import functools

import pytest
import torch
from torch.nn import functional as F

from engine.kernels import gpu_stream
from engine.kernels.gpu_common import AMPERE, HOPPER, INTERPRETED, TileLimits, triton
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
EPS = 1e-5
NAN = float("nan")
FAR = 1 << 30  # no row: whoever reads it, or follows it, is noticed

# norm, residual, act, out in fp32: the products of a layer, and what else can be asked for.
FORMS = {
    "plain": (False, None, "none", False),
    "head": (False, None, "none", True),
    "output": (False, "in place", "none", False),
    "residual": (False, "apart", "none", False),
    "norm": (True, None, "none", False),
    "norm residual": (True, "in place", "none", False),
    "gate up": (True, None, "swiglu", False),
    "swiglu": (False, None, "swiglu", False),
    "all": (True, "apart", "swiglu", True),
}
# A norm is for one row. Above, these would be plain, output and swiglu again.
OF_ONE_ROW = {"norm", "norm residual", "gate up"}


def formula(x, weight, norm, residual, act):
    """Hugging Face's LLaMA, written without the op's own helpers."""
    if norm is not None:
        gain, eps = norm
        wide = x if x.dtype == torch.float64 else x.float()
        x = gain.to(x.dtype) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    y = x @ weight.t()
    if act == "swiglu":
        features = len(weight) // 2
        y = F.silu(y[:, :features]) * y[:, features:]
    return y if residual is None else residual + y


class Case:
    """Arguments of the op: live rows scattered, NaN in every row that nobody may look at."""

    def __init__(self, capacity, live, features, width, dtype, device, form="plain", gain=1.0, size=1.0, wide=False):
        has_norm, residual, self.act, single = FORMS[form]
        order = torch.randperm(capacity).int()
        rows = order[:live].long()
        order[live:] = FAR
        x = torch.full((capacity, width), NAN)
        x[rows] = torch.randn(live, width) * size
        weight = torch.randn(features * (2 if self.act == "swiglu" else 1), width) * width**-0.5
        self.x, self.weight = x.to(device, dtype), weight.to(device, dtype)
        self.order, self.rows = order.to(device), rows.to(device)
        self.counts = torch.tensor([live, FAR], dtype=torch.int32, device=device)  # the second is for others
        gains = (torch.randn(width) * gain).to(device, SINGLE if wide else dtype)
        self.norm = (gains, EPS) if has_norm and capacity == 1 else None
        self.out = torch.full((capacity, features), POISON, dtype=SINGLE if single else dtype, device=device)
        self.residual = self.given = None
        if residual is not None:
            other = torch.full((capacity, features), NAN)
            other[rows] = torch.randn(live, features)
            self.given = other.to(device, dtype)
            self.residual = self.given.clone()
            if residual == "in place":
                self.out = self.residual

    def run(self, op, config=None, workspace=None):
        op(self.out, self.x, self.weight, self.order, self.counts, self.norm, self.residual, self.act, config=config,
           workspace=workspace)  # fmt: skip

    def check(self):
        """The live rows against fp64, every other untouched."""
        x = self.x[self.rows]
        residual = None if self.given is None else self.given[self.rows]
        twin = formula(x, self.weight, self.norm, residual, self.act).to(self.out.dtype)
        x64, weight64, residual64 = doubled(x, self.weight, residual)
        norm64 = None if self.norm is None else (self.norm[0].double(), EPS)
        assert_no_worse(self.out[self.rows], twin, formula(x64, weight64, norm64, residual64, self.act))
        untouched = torch.ones(len(self.out), dtype=torch.bool, device=self.out.device)
        untouched[self.rows] = False
        rest = self.out[untouched]
        assert bool(rest.isnan().all() if self.out is self.residual else (rest == POISON).all())


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [HALF, SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize(
    "form, capacity, live, features, width",
    [
        (form, *size)
        for size in ((1, 1, 16, 32), (5, 3, 21, 37), (37, 21, 40, 72))
        for form in FORMS
        if size[0] == 1 or form not in OF_ONE_ROW
    ],
)
def test_products(way, dtype, form, capacity, live, features, width):
    way.skip_wrong(dtype)
    case = Case(capacity, live, features, width, dtype, way.device, form)
    case.run(way(stream_rows_, stream_rows__ref))
    case.check()


@pytest.mark.parametrize("dtype", [HALF, SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("form", ["output", "gate up", "all"])
@pytest.mark.parametrize("features, width", [(1, 1), (3, 37), (33, 130), (7, 2049), (5, 4096)])
def test_one_row_of_any_width(way, dtype, form, features, width):
    """Rows that start at no multiple of 16 bytes, blocks filled in part, several steps of K."""
    way.skip_wrong(dtype)
    case = Case(1, 1, features, width, dtype, way.device, form)
    case.run(way(stream_rows_, stream_rows__ref))
    case.check()


@pytest.mark.parametrize("dtype", [HALF, SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("form", ["output", "swiglu"])
@pytest.mark.parametrize("features, width", [(1, 1), (3, 37), (65, 259)])
def test_rows_of_any_width(way, dtype, form, features, width):
    way.skip_wrong(dtype)
    case = Case(5, 5, features, width, dtype, way.device, form)
    case.run(way(stream_rows_, stream_rows__ref))
    case.check()


@pytest.mark.parametrize("form", ["output", "swiglu"])
@pytest.mark.parametrize("capacity", [1, 5, 37, 64, 100])
def test_live_counts(way, form, capacity):
    """None at all, one, all; more rows than the largest tile has."""
    for live in sorted({0, 1, capacity}):
        case = Case(capacity, live, 24, 48, HALF, way.device, form)
        case.run(way(stream_rows_, stream_rows__ref))
        case.check()


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("form", ["norm", "gate up"])
def test_gains_of_single_precision(way, dtype, form):
    case = Case(1, 1, 24, 48, dtype, way.device, form, wide=True)
    case.run(way(stream_rows_, stream_rows__ref))
    case.check()


@pytest.mark.parametrize("form", ["norm", "gate up", "norm residual"])
def test_large_numbers_in_half_precision(way, form):
    """x w and x^2 are above fp16's 65504 although the norm, and so the product, is not."""
    case = Case(1, 1, 24, 128, HALF, way.device, form)
    signs = torch.randn(1, 128, device=way.device).sign()
    case.x[case.rows] = (signs * 2000).half()
    case.norm[0].copy_(torch.randn(128).sign() * 40)
    case.run(way(stream_rows_, stream_rows__ref))
    assert bool(case.out[case.rows].isfinite().all())
    case.check()


@pytest.mark.parametrize("form", ["norm", "gate up"])
def test_small_numbers_in_half_precision(way, form):
    """Hidden states and gains of a model's first layers: their product, and w's with the gain, near fp16's smallest."""
    case = Case(1, 1, 24, 128, HALF, way.device, form, gain=0.01, size=0.01)
    case.run(way(stream_rows_, stream_rows__ref))
    case.check()


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize(
    "form, capacity",
    [("gate up", 1), *((form, capacity) for form in ("output", "swiglu") for capacity in (1, 3, 32, 70))],
)
def test_all_configs_compute_the_same(way, dtype, form, capacity):
    if way.name == "twin":
        pytest.skip("the twin has no configs")
    act = FORMS[form][2]
    configs = stream_configs(capacity, dtype, 72, act)
    narrow = StreamConfig(1, 2, 32, 1) if capacity == 1 else StreamConfig(16, 16, 32, 4, 2)  # several steps of K
    # A tile serves one row, too, but for its norm.
    tiles = stream_configs(2, dtype, 72, act) if capacity == 1 and not FORMS[form][0] else ()
    for config in (*configs, narrow, *tiles):
        case = Case(capacity, capacity, 37, 72, dtype, way.device, form)
        case.run(stream_rows_, config)
        case.check()


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("form", ["output", "head"])
@pytest.mark.parametrize("features, width", [(24, 72), (130, 400), (3, 37)])
@pytest.mark.parametrize("capacity, live", [(2, 1), (5, 0), (37, 20), (64, 64), (100, 90)])
def test_programs_that_share_a_tile(way, dtype, form, capacity, live, features, width):
    """Also with parts that have no columns of their own, and again with the same workspace."""
    if way.name == "twin":
        pytest.skip("the twin has no programs")
    workspace = stream_workspace(capacity, features + 50, way.device)
    for config in (None, StreamConfig(16, 64, 32, 4, 2, splits=2), StreamConfig(32, 64, 128, 4, 2, splits=2)):
        case = Case(capacity, live, features, width, dtype, way.device, form)
        case.run(stream_rows_, config, workspace)
        case.check()
        assert not bool(workspace.arrived.any())


def test_what_a_shared_tile_needs(way):
    if way.name == "twin":
        pytest.skip("the twin has no programs")
    with pytest.raises(ValueError, match="tiles take no norm: choose a config with block_m 1"):
        Case(1, 1, 70, 64, HALF, way.device, "norm").run(stream_rows_, StreamConfig(16, 64, 32, 4, 2))
    case, config = Case(5, 5, 70, 64, HALF, way.device, "output"), StreamConfig(16, 64, 32, 4, 2, splits=2)
    with pytest.raises(ValueError, match="with a workspace alone: choose splits 1"):
        case.run(stream_rows_, config)
    with pytest.raises(ValueError, match="workspace must be of stream_workspace for 5 rows and 70 columns"):
        case.run(stream_rows_, config, stream_workspace(4, 70, way.device))
    with pytest.raises(ValueError, match="too little room for .* choose fewer splits"):
        case.run(stream_rows_, config._replace(splits=4), stream_workspace(5, 70, way.device))


SHARED = StreamConfig(16, 64, 32, 4, 2, splits=2)


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("capacity, live", [(5, 5), (37, 20)])
def test_products_behind_each_other_share_a_workspace(way, dtype, capacity, live):
    """The second reads what the first has written, and has other columns."""
    if way.name == "twin":
        pytest.skip("the twin has no programs")
    workspace = stream_workspace(capacity, 130, way.device)
    a = Case(capacity, live, 130, 72, dtype, way.device, "output")
    b = Case(capacity, live, 70, 130, dtype, way.device, "output")
    b.x, b.order, b.rows, b.counts = a.out, a.order, a.rows, a.counts
    b.given.fill_(NAN)
    b.given[b.rows] = torch.randn(live, 70, device=way.device).to(dtype)
    b.residual.copy_(b.given)
    a.run(stream_rows_, SHARED, workspace)
    b.run(stream_rows_, SHARED, workspace)
    a.check()
    b.check()
    assert not bool(workspace.arrived.any())


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
def test_a_row_of_a_shared_tile_does_not_depend_on_the_others(way, dtype):
    """On their number, their values, and its place in the order; bit for bit."""
    if way.name == "twin":
        pytest.skip("a torch product may choose its order by the number of rows")
    case, workspace = Case(37, 37, 100, 136, dtype, way.device), stream_workspace(37, 100, way.device)
    row = int(case.order[0])
    found = []
    for order, factor in ((range(37), 1.0), ([0], 1.0), ([1, 2, 0], 1.0), (range(37), -30.0)):
        picked = case.order[list(order)]
        rest = torch.full((37 - len(picked),), FAR, dtype=torch.int32, device=way.device)
        counts = torch.tensor([len(picked), 0], dtype=torch.int32, device=way.device)
        x = case.x * factor
        x[row] = case.x[row]
        out = torch.full_like(case.out, POISON)
        stream_rows_(out, x, case.weight, torch.cat([picked, rest]), counts, config=SHARED, workspace=workspace)
        found.append(out[row].clone())
    assert all(torch.equal(found[0], other) for other in found[1:])


def counts_change(case, live):
    """Other live rows of a case in which all were."""
    case.out.fill_(POISON)
    case.rows = torch.randperm(len(case.out), device=case.out.device)[:live]
    case.order.fill_(FAR)
    case.order[:live] = case.rows
    case.counts[0] = live


def test_launches_of_changing_counts_share_a_workspace(way):
    """More tiles of rows, fewer, none, and again."""
    if way.name == "twin":
        pytest.skip("the twin has no programs")
    case, workspace = Case(37, 37, 130, 72, HALF, way.device, "head"), stream_workspace(37, 130, way.device)
    for live in (37, 1, 0, 17, 16, 37):
        counts_change(case, live)
        case.run(stream_rows_, SHARED, workspace)
        case.check()
        assert not bool(workspace.arrived.any())


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("form", ["output", "swiglu"])
def test_a_row_does_not_depend_on_the_others(way, dtype, form):
    """On their number, their values, and its place in the order."""
    if way.name == "twin":
        pytest.skip("a torch product may choose its order by the number of rows")
    found = []
    case = Case(37, 37, 24, 72, dtype, way.device, form)
    row = int(case.order[0])
    for order in (range(37), [0], [1, 2, 0]):
        picked = case.order[list(order)]
        rest = torch.full((37 - len(picked),), FAR, dtype=torch.int32, device=way.device)
        counts = torch.tensor([len(picked), 0], dtype=torch.int32, device=way.device)
        residual = None if case.given is None else case.given.clone()
        out = torch.full_like(case.out, POISON) if residual is None else residual
        stream_rows_(out, case.x, case.weight, torch.cat([picked, rest]), counts, case.norm, residual, case.act)
        found.append(out[row].clone())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("capacity", [1, 4])
@pytest.mark.parametrize("form", ["output", "gate up"])
def test_nan_stays_in_its_row(way, form, capacity):
    case = Case(capacity, capacity, 16, 32, SINGLE, way.device, form)
    sick = int(case.order[0])
    case.x[sick, 5] = NAN
    case.run(way(stream_rows_, stream_rows__ref))
    assert case.out.isnan().all(1).nonzero().flatten().tolist() == [sick] and int(case.out.isnan().sum()) == 16


@pytest.mark.parametrize("capacity, live", [(1, 1), (5, 3)])
def test_swiglu_far_from_zero(way, capacity, live):
    """silu of -10^4 is 0 and of 10^4 is 10^4, without inf / inf."""
    case = Case(capacity, live, 4, 8, SINGLE, way.device, "swiglu")
    case.x[case.rows] = 1.0
    case.weight[:4] = torch.tensor([-1e4, 1e4, -10.0, 0.0], device=way.device)[:, None] / 8
    case.weight[4:] = 0.125
    case.run(way(stream_rows_, stream_rows__ref))
    want = torch.tensor([0.0, 1e4, -10 / (1 + 22026.4657948), 0.0], device=way.device)
    assert torch.allclose(case.out[case.rows], want.expand(live, 4), rtol=1e-5, atol=1e-7)


def test_the_norm_is_that_of_llama():
    x, gain = torch.randn(3, 40).half(), torch.randn(40).half()
    assert torch.equal(rms_norm_math(x, gain, EPS), formula(x, torch.eye(40).half(), (gain, EPS), None, "none"))


def test_more_rows_than_the_step_has(way):
    """x may be longer than out, order too; the capacity is out's."""
    case = Case(5, 5, 16, 32, HALF, way.device)
    case.x = torch.cat([case.x, torch.full_like(case.x, NAN)])
    case.order = torch.cat([case.order, torch.full_like(case.order, FAR)])
    case.run(way(stream_rows_, stream_rows__ref))
    case.check()


def test_counts_may_stand_anywhere_in_a_buffer(way):
    for capacity in (1, 5):
        case = Case(capacity, capacity, 16, 32, HALF, way.device, "output")
        case.counts = torch.cat([torch.full_like(case.counts, FAR)[:1], case.counts, case.counts])[1:3]
        case.run(way(stream_rows_, stream_rows__ref))
        case.check()


@pytest.mark.parametrize("rows, features", [(0, 8), (3, 0)])
def test_nothing_to_do(way, rows, features):
    case = Case(rows, 0, features, 16, HALF, way.device)
    case.run(way(stream_rows_, stream_rows__ref))


# --- on a device -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [1, 8, 40])
@pytest.mark.parametrize("form", ["plain", "gate up"])
def test_a_graph_reads_the_count_and_the_order_at_every_replay(gpu, form, capacity):
    case = Case(capacity, capacity, 200, 264, HALF, "cuda", form)
    case.run(stream_rows_)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run(stream_rows_)
    for live in (capacity, 1, 0):
        counts_change(case, live)
        graph.replay()
        case.check()


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [8, 40])
def test_a_graph_of_shared_tiles_reads_the_count_at_every_replay(gpu, capacity):
    """Two products in a row on one workspace, as a layer has them."""
    workspace = stream_workspace(capacity, 520, "cuda")
    cases = [Case(capacity, capacity, features, 264, HALF, "cuda", "head") for features in (520, 200)]

    def run():
        for case in cases:
            case.run(stream_rows_, SHARED, workspace)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for live in (capacity, 1, 0, capacity - 3, capacity):
        for case in cases:
            counts_change(case, live)
        graph.replay()
        for case in cases:
            case.check()
        assert not bool(workspace.arrived.any())


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [1, 8])
def test_products_in_a_row_wait_for_each_other(gpu, capacity):
    """Launches start early: each reads what the one in front has written, and nothing older."""
    a, b = (Case(capacity, capacity, 4096, 4096, HALF, "cuda", size=0.5) for _ in range(2))
    x, y = a.x.clone(), torch.full_like(a.x, POISON)
    graph = torch.cuda.CUDAGraph()

    def chain(between):
        for weight in (a.weight, b.weight) * 8:
            for out, given in ((y, x), (x, y)):
                between()
                stream_rows_(out, given, weight, a.order, a.counts)

    chain(torch.cuda.synchronize)
    want = x.clone()
    with torch.cuda.graph(graph):
        chain(lambda: None)
    for _ in range(3):
        x.copy_(a.x)
        y.fill_(POISON)
        graph.replay()
        assert torch.equal(x, want)


LLAMA = {
    "output": (4096, 4096, "output"),
    "gate up": (11008, 4096, "gate up"),
    "gate up after a norm": (11008, 4096, "swiglu"),
    "down": (4096, 11008, "output"),
    "head": (32000, 4096, "head"),
}
SMOL = {
    "output": (576, 576, "output"),
    "gate up": (1536, 576, "gate up"),
    "gate up after a norm": (1536, 576, "swiglu"),
    "down": (576, 1536, "output"),
    "head": (49152, 576, "head"),
}
REAL = {**{f"7b {name}": product for name, product in LLAMA.items()}, **SMOL}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "capacity, live, product",
    [
        (*rows, product)
        for rows in ((1, 1), (8, 5), (32, 32), (64, 50), (130, 130))
        for product in REAL
        if rows[0] == 1 or REAL[product][2] not in OF_ONE_ROW
    ],
)
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_real_shapes(gpu, dtype, capacity, live, product):
    features, width, form = REAL[product]
    case = Case(capacity, live, features, width, dtype, "cuda", form)
    case.run(stream_rows_)
    case.check()


# --- configs and messages --------------------------------------------------------------------------------------------


def test_the_table_of_configs():
    for dtype in (HALF, BRAIN, SINGLE):
        for rows in (1, 2, 8, 16, 17, 32, 33, 64, 200):
            for width in (576, 1536, 4096, 11008):
                for act in gpu_stream.ACTIVATIONS:
                    configs = stream_configs(rows, dtype, width, act)
                    assert len(set(configs)) == len(configs)
                    assert all((c.block_m == 1) == (rows == 1) for c in configs)
                    # No tile is more than half empty at its capacity, unless it is the smallest.
                    assert all(c.block_m <= 16 or c.block_m < 2 * rows for c in configs)


@pytest.mark.parametrize(
    "rows, form, first",
    [
        # Few columns are shared by two programs where there is a workspace; many never, nor are gate and up.
        (8, dict(out_features=4096, workspace=True), StreamConfig(16, 64, 128, 4, 4, splits=2)),
        (32, dict(out_features=4096, workspace=True), StreamConfig(32, 64, 128, 4, 4, splits=2)),
        (64, dict(out_features=4096, workspace=True), StreamConfig(64, 64, 128, 4, 4, splits=2)),
        (8, dict(out_features=4096), StreamConfig(16, 64, 256, 4, 4)),
        (8, dict(out_features=32000, workspace=True), StreamConfig(16, 64, 256, 4, 4)),
        (8, dict(out_features=6336, workspace=True), StreamConfig(16, 64, 128, 4, 4, splits=2)),
        (8, dict(out_features=6337, workspace=True), StreamConfig(16, 64, 256, 4, 4)),
        (8, dict(out_features=4096, workspace=True, act="swiglu"), StreamConfig(16, 64, 128, 4, 4)),
        (1, dict(out_features=4096, workspace=True), StreamConfig(1, 4, 2048, 8)),
        # Less shared memory than an H100's: the widest tiles are left out, of what remains fewer stages.
        (8, dict(out_features=32000, limits=AMPERE), StreamConfig(16, 64, 128, 4, 6)),
        (64, dict(out_features=32000, limits=AMPERE), StreamConfig(64, 64, 64, 4, 8)),
        (64, dict(out_features=4096, workspace=True, limits=AMPERE), StreamConfig(64, 64, 128, 4, 4, splits=2)),
        (8, dict(act="swiglu", limits=AMPERE), StreamConfig(16, 64, 128, 4, 4)),
        (32, dict(act="swiglu", limits=AMPERE), StreamConfig(32, 64, 64, 4, 3)),
        (8, dict(out_features=32000, limits=gpu_cases.SMALL), StreamConfig(16, 64, 64, 4, 8)),
        (32, dict(out_features=32000, limits=gpu_cases.SMALL), StreamConfig(32, 64, 64, 4, 7)),
        (64, dict(out_features=4096, workspace=True, limits=gpu_cases.SMALL), StreamConfig(64, 64, 64, 4, 5)),
        (64, dict(out_features=32000, limits=TileLimits(True, 64 * 1024)), StreamConfig(64, 64, 64, 4, 3)),
        (1, dict(limits=TileLimits(False, 48 * 1024)), StreamConfig(1, 4, 2048, 8)),
    ],
)
def test_what_the_table_goes_by(rows, form, first):
    configs = stream_configs(rows, HALF, 4096, **form)
    assert configs[0] == first
    assert len(set(configs)) == len(configs)
    if form.get("limits", HOPPER) == HOPPER:
        assert configs == stream_configs(rows, HALF, 4096, **{**form, "limits": HOPPER})


OUT, X, W = torch.zeros(4, 6), torch.zeros(4, 8), torch.zeros(6, 8)
ORDER, N = torch.zeros(4, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
GAIN, REST = torch.zeros(8), torch.zeros(4, 6)
MESSAGES = [
    ((OUT, X.double(), W, ORDER, N), "x must be float16, bfloat16 or float32, got float64"),
    ((OUT[0], X, W, ORDER, N), r"out, x and weight must have 2 dimensions, got \[6\], \[4, 8\], \[6, 8\]"),
    ((OUT.half(), X, W, ORDER, N), "out must have the dtype of x or be float32, got torch.float16"),
    ((OUT, X[:3], W, ORDER, N), r"x must have shape \[4 or more, 8\], got \[3, 8\]"),
    ((OUT, torch.zeros(8, 4).t(), W, ORDER, N), "x must be contiguous along its rows, got strides"),
    ((OUT, torch.zeros(4, 16)[:, :8], W, ORDER, N), r"x must be contiguous, got strides \(16, 1\): call contiguous"),
    ((torch.zeros(4, 9)[:, :6], X, W, ORDER, N), r"out must be contiguous, got strides \(9, 1\): call contiguous"),
    ((OUT, X, W.half(), ORDER, N), r"weight must have the dtype of x .float32., got float16"),
    ((OUT, X, W[:5], ORDER, N), r"weight must have shape \[6, 8\], got \[5, 8\]"),
    ((OUT, X, W, ORDER, N, None, None, "swiglu"), r"weight must have shape \[12, 8\], got \[6, 8\]"),
    ((OUT, X, torch.zeros(8, 6).t(), ORDER, N), "weight must be contiguous, got strides"),
    ((OUT, X, W, ORDER.long(), N), "order must be int32, got int64"),
    ((OUT, X, W, ORDER[:3], N), r"order must have shape \[4 or more\], got \[3\]"),
    ((OUT, X, W, ORDER, N.long()), r"counts must be int32 of shape \[2\], the live rows and tokens, got int64 \[2\]"),
    ((OUT, X, W, ORDER, N, (GAIN[:7], EPS)), r"the norm's weight must have shape \[8\], got \[7\]"),
    ((OUT, X, W, ORDER, N, (GAIN.half(), EPS)), "the norm's weight must be float32, got float16"),
    ((OUT, X, W, ORDER, N, None, REST[:3]), r"residual must have shape \[4, 6\], got \[3, 6\]"),
    ((OUT, X, W, ORDER, N, None, REST.half()), r"residual must have the dtype of x .float32., got float16"),
    ((OUT, X, W, ORDER, N, None, torch.zeros(6, 4).t()), "residual must be contiguous, got strides"),
    ((OUT, X, W, ORDER, N, None, None, "gelu"), "act must be one of none, swiglu, got 'gelu'"),
    ((X.view(-1)[:24].view(4, 6), X, W, ORDER, N), "out must not overlap x in memory"),
]


@pytest.mark.parametrize("arguments, message", MESSAGES)
def test_messages(arguments, message):
    with pytest.raises(ValueError, match=message):
        stream_rows_(*arguments)


def taken(x, dtype, *shape):
    """The first numbers of x as something else."""
    numbers = torch.Size(shape).numel()
    return x.view(-1)[:numbers].view(dtype).view(shape)


ROOM = stream_workspace(4, 6, torch.device("cpu"))
PARTIAL, ARRIVED = ROOM
WORKSPACES = [
    (ROOM._replace(partial=PARTIAL.half()), "workspace.partial must be float32, got float16"),
    (ROOM._replace(partial=PARTIAL[0]), r"for 4 rows and 6 columns or more, got a partial of \[4, 6\]"),
    (ROOM._replace(partial=PARTIAL[:0]), r"for 4 rows and 6 columns or more, got a partial of \[0, 4, 6\]"),
    (ROOM._replace(partial=PARTIAL[:, :3]), r"for 4 rows and 6 columns or more, got a partial of \[2, 3, 6\]"),
    (ROOM._replace(partial=PARTIAL.transpose(1, 2)), "workspace.partial must be contiguous, got strides"),
    (ROOM._replace(partial=PARTIAL.to("meta")), r"workspace.partial must be on the device of x \(cpu\), got meta"),
    (ROOM._replace(arrived=ARRIVED.long()), "workspace.arrived must be int32, got int64"),
    (ROOM._replace(arrived=ARRIVED[None]), r"workspace.arrived must have shape \[0 or more\], got \[1, 1\]"),
    (ROOM._replace(arrived=ARRIVED.to("meta")), r"workspace.arrived must be on the device of x \(cpu\), got meta"),
    (ROOM._replace(arrived=torch.zeros(6, dtype=torch.int32)[::2]), "workspace.arrived must be contiguous"),
    (ROOM._replace(arrived=taken(PARTIAL, torch.int32, 1)), "workspace.arrived must not overlap workspace.partial"),
    (ROOM._replace(arrived=ORDER), "workspace.arrived must not overlap order in memory"),
    (ROOM._replace(arrived=N), "workspace.arrived must not overlap counts in memory"),
    (ROOM._replace(partial=W.view(2, 4, 6)), "workspace.partial must not overlap weight in memory"),
    (ROOM._replace(partial=OUT[None]), "workspace.partial must not overlap out in memory"),
    (ROOM._replace(partial=REST[None]), "workspace.partial must not overlap residual in memory"),
]


@pytest.mark.parametrize("workspace, message", WORKSPACES, ids=[m for _, m in WORKSPACES])
def test_messages_about_workspaces(workspace, message):
    with pytest.raises(ValueError, match=message):
        stream_rows_(OUT, X, W, ORDER, N, residual=REST, workspace=workspace)


def test_a_workspace_is_apart_from_the_norm():
    gain = torch.zeros(24)
    with pytest.raises(ValueError, match="workspace.partial must not overlap norm in memory"):
        stream_rows_(
            OUT[:1], X[:1], W, ORDER, N, (gain[:8], EPS), workspace=ROOM._replace(partial=gain.view(1, 4, 6))
        )


def test_messages_about_overlaps_and_empty_rows():
    memory = torch.zeros(5, 6)
    with pytest.raises(ValueError, match="residual must be out itself or apart from it"):
        stream_rows_(memory[1:], X, W, ORDER, N, residual=memory[:4])
    with pytest.raises(ValueError, match="x must have at least one column"):
        stream_rows_(OUT, X[:, :0].contiguous(), W[:, :0].contiguous(), ORDER, N)


# --- compiled without a device ---------------------------------------------------------------------------------------

needs_compiler = [
    pytest.mark.skipif(triton is None, reason="triton is not installed"),
    pytest.mark.skipif(
        triton is not None and triton.__version__ != "3.6.0", reason="register counts are those of triton 3.6.0"
    ),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
]


@functools.cache
def given(capacity, product, dtype):
    """Arguments in LLaMA-7B's shapes; memory that nobody touches."""
    features, width, form = LLAMA[product]
    norm, residual, act, single = FORMS[form]

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype)

    return (
        empty(capacity, features, dtype=SINGLE if single else dtype), empty(capacity, width),
        empty(features * (2 if act == "swiglu" else 1), width), empty(capacity, dtype=torch.int32),
        empty(2, dtype=torch.int32), (empty(width), EPS) if norm and capacity == 1 else None,
        empty(capacity, features) if residual else None, act,
    )  # fmt: skip


def compiled(monkeypatch, capacity, product, dtype, arch, config=None, limits=None):
    monkeypatch.setattr(gpu_cases, "MODULES", (gpu_stream,))
    gpu_cases.on_device_like(monkeypatch, arch, gpu_stream, limits=limits)
    arguments, shared = given(capacity, product, dtype), stream_workspace(capacity, 32000, torch.device("cpu"))
    launch = gpu_cases.record(monkeypatch, product, lambda: stream_rows_(*arguments, config=config, workspace=shared))
    usage = gpu_cases.compile_launch(launch, arch)
    assert usage.stack_bytes == 0, f"{config}: registers are spilled"
    assert usage.shared_bytes <= gpu_cases.SHARED_BYTES[arch]
    return usage


@pytest.mark.slow
class TestCompile:
    pytestmark = needs_compiler

    @pytest.mark.parametrize(
        "capacity, product",
        [(1, "gate up"), *((n, p) for n in (1, 8, 32, 64) for p in ("output", "gate up after a norm", "down"))],
    )
    def test_every_config(self, monkeypatch, capacity, product):
        """The defaults and other dtypes are compiled in test_gpu_stream.py."""
        features, width, form = LLAMA[product]
        for config in stream_configs(capacity, HALF, width, FORMS[form][2], features, workspace=True):
            compiled(monkeypatch, capacity, product, HALF, 90, config)

    @pytest.mark.parametrize("product", ["output", "gate up after a norm", "head"])
    @pytest.mark.parametrize("capacity", [8, 32, 64])
    def test_little_shared_memory(self, monkeypatch, capacity, product):
        small = gpu_cases.SMALL
        usage = compiled(monkeypatch, capacity, product, HALF, 80, limits=small)
        assert usage.shared_bytes <= small.shared_bytes

    @pytest.mark.parametrize("product", ["output", "gate up", "down", "head"])
    def test_one_row_streams(self, monkeypatch, product):
        """Weights in loads of 16 bytes that L2 is to drop first, some of them ahead of the kernel in front: of all
        programs that have room on a multiprocessor the 32 KB that 3.35 TB/s takes at some 1.2 us."""
        features, width, form = LLAMA[product]
        usage = compiled(monkeypatch, 1, product, HALF, 90)
        config = stream_configs(1, HALF, width, FORMS[form][2])[0]
        before, behind = usage.ptx.split("griddepcontrol.wait")
        first = before.count("evict_first.L2::cache_hint.v4.b32")
        assert first * 16 * 32 * config.num_warps >= config.block_n * config.block_k * 2
        assert "evict_first.L2::cache_hint.v4.b32" in behind
        registers = 32 * config.num_warps * (-(-usage.registers // 8) * 8)
        programs = min(64 // config.num_warps, 65536 // registers)
        assert programs * first * 16 * 32 * config.num_warps >= 32 * 1024
