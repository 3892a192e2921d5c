"""Who leaves, who goes on, and what the next layer owes those: the extension's op and its twin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels import extension
from engine.kernels.step_rows import DECIDE, LEAVE, STAY, step_rows_, step_rows__ref
from tests.kernels.cases import needs_extension

INT = torch.int32
LAYERS, BLOCK = 6, 4
UNTOUCHED = -7  # what the outputs hold before
FUNCTIONS = [step_rows_, step_rows__ref]
WRITTEN = ("exit_layers", "exit_probs", "out_order", "out_counts", "watermarks", "owed_slots", "owed_positions",
           "settled")  # fmt: skip
KINDS = [(0, STAY, 1), (2, STAY, 3), (3, DECIDE, 4), (5, DECIDE, 0), (6, LEAVE, 0)]


def ints(*values):
    return torch.tensor(values, dtype=INT)


def case(rows, live=None, splits=3, longest=30, spare=0, room=None, seed=0):
    """Arguments of step_rows_ but for layer, kind and next_layer, by name. Sums of partial are exact in any order."""
    g = torch.Generator().manual_seed(seed)
    live = rows if live is None else live

    def draw(low, high, *size):
        return torch.randint(low, high, size, generator=g).to(INT)

    many = rows + spare
    positions = draw(0, longest, many)
    blocks = max(longest // BLOCK + 1, 1)
    order = torch.randperm(rows, generator=g).to(INT)
    order[live:] = 12345  # never a row
    return dict(
        partial=draw(-16, 17, rows, splits).float() / 8,
        b2=torch.tensor([0.25]),
        order=order,
        counts=ints(live, 99),
        threshold_logit=draw(-8, 9, many).float() / 8 + 1 / 16,
        script=draw(0, LAYERS + 1, many) * draw(0, 2, many),
        min_depth=draw(1, LAYERS, many),
        max_depth=draw(2, LAYERS + 1, many),
        exit_layers=torch.full((many,), UNTOUCHED, dtype=INT),
        exit_probs=torch.full((many,), float(UNTOUCHED)),
        out_order=torch.full((many,), UNTOUCHED, dtype=INT),
        out_counts=torch.full((2,), UNTOUCHED, dtype=INT),
        positions=positions,
        block_table=torch.randperm(many * blocks, generator=g).view(many, blocks).to(INT),
        block_size=BLOCK,
        watermarks=(torch.rand(many, LAYERS, generator=g) * (positions[:, None] + 2)).to(INT),
        owed_slots=torch.full((rows * longest if room is None else room,), UNTOUCHED, dtype=INT),
        owed_positions=torch.full((rows * longest if room is None else room,), UNTOUCHED, dtype=INT),
        settled=torch.tensor([1 << 40]),
    )


def expected(args, layer, kind, next_layer):
    """The definition, row by row in plain Python: the outputs."""
    out = {name: args[name].tolist() for name in WRITTEN}
    stay, owed = [], []
    for r in args["order"][: args["counts"][0]].tolist():
        leave, prob = kind == LEAVE, 1.0
        if kind == DECIDE:
            z = float(args["partial"][r].double().sum() + args["b2"].double())
            script = int(args["script"][r])
            leave = script <= layer if script > 0 else z > float(args["threshold_logit"][r])
            prob = float(torch.tensor(z).sigmoid())
            if args["max_depth"][r] <= layer:
                leave, prob = True, 1.0
            leave = leave and int(args["min_depth"][r]) <= layer
        if leave:
            out["exit_layers"][r], out["exit_probs"][r] = layer, prob
            continue
        stay.append(r)
        if next_layer:
            for p in range(out["watermarks"][r][next_layer - 1], int(args["positions"][r])):
                owed.append((int(args["block_table"][r, p // BLOCK]) * BLOCK + p % BLOCK, p))
            out["watermarks"][r][next_layer - 1] = int(args["positions"][r]) + 1
    owed = owed[: len(args["owed_slots"])]
    out["out_order"][: len(stay)] = stay
    out["owed_slots"][: len(owed)] = [slot for slot, _ in owed]
    out["owed_positions"][: len(owed)] = [p for _, p in owed]
    out["out_counts"], out["settled"] = [len(stay), len(owed)], [(1 << 40) + len(owed)]
    return out


def run(function, args, layer, kind, next_layer, device):
    """Outputs, on the host. Nothing else may have changed."""
    moved = {k: v.clone().to(device) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    function(**moved, layer=layer, kind=kind, next_layer=next_layer)
    for name, tensor in args.items():
        if isinstance(tensor, torch.Tensor) and name not in WRITTEN:
            assert torch.equal(tensor.nan_to_num(), moved[name].cpu().nan_to_num()), name
    return {name: moved[name].cpu() for name in WRITTEN}


def check(args, layer, kind, next_layer, device="cpu"):
    """Both implementations against the definition. Returns what it says."""
    want = expected(args, layer, kind, next_layer)
    for function in FUNCTIONS:
        got = run(function, args, layer, kind, next_layer, device)
        for name in WRITTEN:
            if name == "exit_probs":
                torch.testing.assert_close(got[name], torch.tensor(want[name]), rtol=1e-5, atol=1e-7)
            else:
                assert got[name].tolist() == want[name], (function.__name__, name)
    return want


@pytest.mark.parametrize("rows, live, spare", [(1, 1, 0), (1, 0, 2), (5, 5, 0), (5, 3, 1), (33, 33, 0), (300, 300, 0),
                                               (300, 271, 20)])  # fmt: skip
@pytest.mark.parametrize("layer, kind, next_layer", KINDS)
def test_against_plain_python(rows, live, spare, layer, kind, next_layer, device):
    for seed in range(3):
        check(case(rows, live, spare=spare, seed=seed), layer, kind, next_layer, device)


@pytest.mark.parametrize("rows", [31, 32, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025, 2100])
def test_sizes_of_the_rounds(rows, device):
    """Around the widths of warp, sums and block."""
    check(case(rows, longest=9), 3, DECIDE, 4, device)
    check(case(rows, rows - 1, longest=9, seed=1), 0, STAY, 1, device)


@pytest.mark.parametrize("splits", [0, 1, 7, 8, 9, 16, 64, 129])
def test_sizes_of_the_sums(splits, device):
    check(case(40, splits=splits), 3, DECIDE, 4, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_of_the_bias(dtype, device):
    for bias in (0.375, -2.0, 2.0**-14):
        args = case(20)
        args["b2"] = torch.tensor([bias], dtype=dtype)
        check(args, 3, DECIDE, 4, device)


@st.composite
def moments(draw):
    rows = draw(st.integers(0, 40))
    args = case(
        rows,
        draw(st.integers(0, rows)),
        splits=draw(st.integers(1, 20)),
        longest=draw(st.integers(1, 40)),
        spare=draw(st.integers(0, 3)),
        room=draw(st.none() | st.integers(0, 200)),
        seed=draw(st.integers(0, 1 << 30)),
    )
    return (
        args,
        draw(st.integers(1, LAYERS)),
        draw(st.sampled_from([STAY, DECIDE, LEAVE])),
        draw(st.integers(0, LAYERS)),
    )


@settings(max_examples=120, deadline=None)
@given(moments())
def test_any_moment(moment):
    check(*moment)


# --- decisions -----------------------------------------------------------------------------------------------------


def decided(device, layer=3, **limits):
    """Four rows with z -1, 0, 1 and NaN; by default nobody's limits are in the way. Who leaves, and the probabilities
    of those."""
    args = case(4, splits=2)
    args["order"] = ints(0, 1, 2, 3)
    args["partial"] = torch.tensor([[-2.0, 0.75], [0.25, -0.5], [1.0, -0.25], [0.0, float("nan")]])
    args |= dict(script=ints(0, 0, 0, 0), min_depth=ints(1, 1, 1, 1), max_depth=ints(*[LAYERS] * 4))
    args |= dict(threshold_logit=torch.zeros(4)) | limits
    results = []
    for function in FUNCTIONS:
        out = run(function, args, layer, DECIDE, 0, device)
        gone = [r for r in range(4) if out["exit_layers"][r] == layer]
        assert out["out_order"][: 4 - len(gone)].tolist() == [r for r in range(4) if r not in gone]
        assert out["out_counts"].tolist() == [4 - len(gone), 0]
        results.append({r: round(float(out["exit_probs"][r]), 4) for r in gone})
    assert str(results[0]) == str(results[1])  # NaN equals itself here
    return results[0]


def test_thresholds(device):
    assert decided(device) == {2: 0.7311}, "z equal to the threshold stays, and so does NaN"
    assert decided(device, threshold_logit=torch.full((4,), -2.0)) == {0: 0.2689, 1: 0.5, 2: 0.7311}
    assert decided(device, threshold_logit=torch.full((4,), float("inf"))) == {}
    assert decided(device, threshold_logit=torch.full((4,), -float("inf"))) == {0: 0.2689, 1: 0.5, 2: 0.7311}


def test_scripts(device):
    assert str(decided(device, script=ints(3, 2, 4, 1))) == "{0: 0.2689, 1: 0.5, 3: nan}"
    assert decided(device, script=ints(0, 0, 4, 0)) == {}


def test_limits(device):
    assert decided(device, max_depth=ints(3, 4, 6, 2)) == {0: 1.0, 2: 0.7311, 3: 1.0}
    assert decided(device, max_depth=ints(3, 3, 3, 3), script=ints(5, 5, 1, 0)) == dict.fromkeys(range(4), 1.0)
    assert decided(device, min_depth=ints(4, 1, 4, 1)) == {}
    assert decided(device, min_depth=ints(4, 1, 4, 1), max_depth=ints(3, 3, 3, 6)) == {1: 1.0}
    assert decided(device, min_depth=ints(4, 4, 1, 1), script=ints(1, 1, 1, 0)) == {2: 0.7311}


def test_all_leave_and_none_leaves(device):
    args = case(33)
    args["min_depth"][:], args["script"][:] = 1, 1
    assert check(args, 3, DECIDE, 4, device)["out_counts"] == [0, 0]
    assert check(case(33), 6, LEAVE, 0, device)["out_counts"] == [0, 0]
    assert check(case(33), 6, LEAVE, 2, device)["out_counts"] == [0, 0]
    args["min_depth"][:] = 4
    assert check(args, 3, DECIDE, 4, device)["out_counts"][0] == 33
    args["max_depth"][:] = 1
    assert check(args, 3, STAY, 4, device)["out_counts"][0] == 33, "where no exit is, max_depth removes nobody"


# --- what is owed --------------------------------------------------------------------------------------------------


def test_a_row_that_owes_thousands(device):
    args = case(5, longest=5001)
    args["positions"], args["watermarks"][:] = ints(5000, 0, 3, 4999, 1), 0
    args["watermarks"][3, 1] = 4998
    assert check(args, 1, STAY, 2, device)["out_counts"] == [5, 5000 + 0 + 3 + 1 + 1]
    args["positions"] = ints(*[4097] * 5)
    check(args, 1, STAY, 2, device)


def test_many_rows_that_owe_hundreds(device):
    args = case(300, longest=300)
    args["watermarks"][:] = 0
    assert check(args, 0, STAY, 1, device)["out_counts"][1] > 20000


def test_nothing_is_owed_behind_the_watermark(device):
    args = case(7)
    args["watermarks"][:] = args["positions"][:, None] + torch.arange(LAYERS, dtype=INT) % 3
    assert check(args, 1, STAY, 2, device)["out_counts"] == [7, 0]


@pytest.mark.parametrize("room", [0, 1, 5, 300, 700])
@pytest.mark.parametrize("rows", [3, 60, 400])
def test_lists_too_short_are_never_overrun(rows, room, device):
    """The lists are in the middle of larger ones; what stands around them must be left alone."""
    args = case(rows, room=0)
    args["watermarks"][:] = 0
    total = int(args["positions"].sum())
    for function in FUNCTIONS:
        around = {name: torch.full((room + 200,), UNTOUCHED, dtype=INT, device=device) for name in WRITTEN[-3:-1]}
        moved = {k: v.clone().to(device) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
        moved |= {name: memory[100 : 100 + room] for name, memory in around.items()}
        function(**moved, layer=0, kind=STAY, next_layer=1)
        listed = min(room, total)
        assert moved["out_counts"].tolist() == [rows, listed] and int(moved["settled"]) == (1 << 40) + listed
        for memory in around.values():
            assert bool((memory[100 : 100 + listed] != UNTOUCHED).all())
            memory[100 : 100 + listed] = UNTOUCHED
            assert bool((memory == UNTOUCHED).all())
        assert torch.equal(moved["watermarks"][:, 0], moved["positions"] + 1)


def test_settled_is_optional(device):
    for function in FUNCTIONS:
        args = case(4) | {"settled": None}
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
        function(**moved, layer=0, kind=STAY, next_layer=1)
        assert moved["out_counts"].tolist()[0] == 4


@pytest.mark.parametrize("rows", [1, 5, 33, 300])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_chain_of_layers(function, rows, device):
    """Two steps through all layers with two sets of lists, swapped: as step() does it, in plain Python."""
    args = case(rows, seed=rows)
    moved = {k: v.clone().to(device) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    marks, settled = args["watermarks"].tolist(), 0
    for step in range(2):
        moved["order"] = torch.arange(rows, dtype=INT, device=device)
        moved["counts"] = torch.tensor([rows, 0], dtype=INT, device=device)
        alive, left = list(range(rows)), {}
        for layer in range(LAYERS + 1):
            kind = LEAVE if layer == LAYERS else DECIDE if layer % 2 else STAY
            function(**moved, layer=layer, kind=kind, next_layer=0 if layer == LAYERS else layer + 1)
            told = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in moved.items()}
            for r in list(alive):
                z = float(told["partial"][r].sum() + told["b2"])
                script = int(told["script"][r])
                leave = kind == LEAVE
                if kind == DECIDE:
                    leave = script <= layer if script else z > float(told["threshold_logit"][r])
                    leave = (leave or int(told["max_depth"][r]) <= layer) and int(told["min_depth"][r]) <= layer
                if leave:
                    alive.remove(r)
                    left[r] = layer
            owed = []
            if layer < LAYERS:
                for r in alive:
                    owed += range(marks[r][layer], int(told["positions"][r]))
                    marks[r][layer] = int(told["positions"][r]) + 1
            settled += len(owed)
            assert told["out_order"][: len(alive)].tolist() == alive
            assert told["out_counts"].tolist() == [len(alive), len(owed)]
            assert told["owed_positions"][: len(owed)].tolist() == owed
            moved["order"], moved["out_order"] = moved["out_order"], moved["order"]
            moved["counts"], moved["out_counts"] = moved["out_counts"], moved["counts"]
        assert told["exit_layers"].tolist() == [left[r] for r in range(rows)]
        assert told["watermarks"].tolist() == marks and int(told["settled"]) == (1 << 40) + settled
        moved["positions"] += 1
        moved["block_table"] = torch.cat([moved["block_table"]] * 2, 1) if step == 0 else moved["block_table"]
        moved["partial"] = moved["partial"].flip(0)


@pytest.mark.gpu
def test_cuda_equals_cpu(cuda_device):
    """Also sums that round: both add in one order."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(60):
        rows = int(torch.randint(1, 1100, (1,), generator=generator))
        args = case(rows, splits=1 + seed, seed=seed, longest=1 + seed, room=None if seed % 3 else 50)
        args["partial"] = torch.randn(args["partial"].shape, generator=generator)
        layer, kind, next_layer = KINDS[seed % len(KINDS)]
        host, device = (run(step_rows_, args, layer, kind, next_layer, d) for d in ("cpu", "cuda"))
        torch.testing.assert_close(host.pop("exit_probs"), device.pop("exit_probs"), rtol=1e-5, atol=1e-7)
        for name, one in host.items():
            assert torch.equal(one, device[name]), name


@pytest.mark.gpu
def test_what_contradicts_itself_stays_in_bounds_on_cuda(cuda_device):
    """Counts past the rows, ids of no row, marks and positions from nowhere."""
    for live in (-1, 3, 1 << 30):
        args = case(3, room=50)
        args["counts"] = ints(live, 0)
        args["order"] = ints(1, 99, -5)
        args["positions"] = ints(5, 1 << 30, 5)
        args["watermarks"][:] = -(1 << 30)
        out = run(step_rows_, args, 0, STAY, 1, "cuda")
        torch.cuda.synchronize()
        assert out["out_counts"].tolist() == ([0, 0] if live < 0 else [1, args["block_table"].shape[1] * BLOCK])


@pytest.mark.gpu
def test_captured_in_a_graph(cuda_device):
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in case(33).items()}
    given = {k: v.clone() for k, v in moved.items() if isinstance(v, torch.Tensor)}
    arguments = dict(layer=3, kind=DECIDE, next_layer=4)
    step_rows_(**moved, **arguments)
    want = {name: moved[name].clone() for name in WRITTEN}
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step_rows_(**moved, **arguments)
    for _ in range(2):
        for name in WRITTEN:
            moved[name].copy_(given[name])
        graph.replay()
        torch.cuda.synchronize()
        for name in WRITTEN:
            assert torch.equal(moved[name], want[name]), name


# --- messages ------------------------------------------------------------------------------------------------------

MESSAGES = [
    ({"kind": 3}, r"kind must be 0 \(everybody goes on\), 1 \(an exit decides\) or 2 \(everybody leaves\), got 3"),
    ({"partial": None}, r"partial and b2 are missing: an exit decides here"),
    ({"b2": None}, r"partial and b2 are missing: an exit decides here"),
    ({"partial": torch.zeros(2, 3).double()}, r"partial must be float32, got float64"),
    ({"partial": torch.zeros(1, 3)}, r"partial must have a row for each of the 2 of order, got shape \[1, 3\]"),
    ({"partial": torch.zeros(2, 6)[:, ::2]}, r"partial must be contiguous, got strides \[6, 2\]"),
    ({"b2": torch.zeros(2)}, r"b2 must have shape \[1\], got \[2\]"),
    ({"b2": ints(0)}, r"b2 must be float32, float64, float16 or bfloat16, got int32"),
    ({"order": torch.zeros(2, 1, dtype=INT)}, r"order must have 1 dimensions, got shape \[2, 1\]"),
    ({"order": torch.tensor([0, 1])}, r"order must be int32, got int64"),
    ({"order": ints(0, 2)}, r"order must hold row ids in \[0, 2\) for the 2 live rows, got 2 at 1"),
    ({"order": ints(-1, 0)}, r"order must hold row ids in \[0, 2\) for the 2 live rows, got -1 at 0"),
    ({"counts": ints(2)}, r"counts must have shape \[2\], got \[1\]"),
    ({"counts": ints(3, 0)}, r"counts\[0\], the live rows, must lie in \[0, 2\], got 3"),
    ({"counts": ints(-1, 0)}, r"counts\[0\], the live rows, must lie in \[0, 2\], got -1"),
    ({"layer": 0}, r"layer must lie in \[1, 6\], got 0"),
    ({"layer": 7}, r"layer must lie in \[1, 6\], got 7"),
    ({"layer": -1, "kind": STAY}, r"layer must lie in \[0, 6\], got -1"),
    ({"next_layer": 7}, r"next_layer must lie in \[0, 6\], got 7"),
    ({"next_layer": -1}, r"next_layer must lie in \[0, 6\], got -1"),
    ({"threshold_logit": torch.zeros(2).half()}, r"threshold_logit must be float32, got float16"),
    ({"script": ints(0)}, r"script must have a row for each of the 2 of order, got shape \[1\]"),
    ({"min_depth": torch.zeros(2)}, r"min_depth must be int32, got float32"),
    ({"max_depth": ints(1, 2, 3, 4)[::2]}, r"max_depth must be contiguous, got strides \[2\]"),
    ({"exit_layers": torch.zeros(2)}, r"exit_layers must be int32, got float32"),
    ({"exit_probs": ints(0, 0)}, r"exit_probs must be float32, got int32"),
    ({"out_order": ints(0)}, r"out_order must have a row for each of the 2 of order, got shape \[1\]"),
    ({"out_counts": ints(0)}, r"out_counts must have shape \[2\], got \[1\]"),
    ({"positions": ints(-1, 0)}, r"positions must not be negative, got -1 for row 0"),
    ({"positions": ints(0, 99)}, r"block_table must have blocks for .*, got 8 blocks of 4 for row 1 at position 99"),
    ({"block_table": ints(0, 1)}, r"block_table must have 2 dimensions, got shape \[2\]"),
    ({"block_table": torch.zeros(2, 0, dtype=INT)}, r"block_table must have a block for each row, got shape \[2, 0\]"),
    ({"block_size": 0}, r"block_size must lie in \[1, 2147483647\], got 0"),
    ({"watermarks": torch.zeros(2, 6)}, r"watermarks must be int32, got float32"),
    (
        {"watermarks": torch.full((2, 6), -1, dtype=INT)},
        r"watermarks must not be negative, got -1 for row 0 in layer 4",
    ),
    ({"owed_slots": torch.zeros(2)}, r"owed_slots must be int32, got float32"),
    ({"owed_positions": ints(0)}, r"owed_positions must have shape \[60\], got \[1\]"),
    ({"settled": ints(0)}, r"settled must be int64, got int32"),
    ({"settled": torch.zeros(2, dtype=torch.int64)}, r"settled must have shape \[1\], got \[2\]"),
]


def good():
    return case(2) | dict(order=ints(0, 1), layer=3, kind=DECIDE, next_layer=4)


@needs_extension
@pytest.mark.parametrize("change, message", MESSAGES)
def test_messages(change, message):
    before = good()
    given = {**before, **change}
    with pytest.raises(ValueError, match=message):
        step_rows_(**given)
    for name in set(WRITTEN) - set(change):
        assert torch.equal(given[name], good()[name]), f"{name} was written although an argument is wrong"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_shared_memory_is_refused(function):
    arena = torch.zeros(200, dtype=INT)
    shared = [
        {"order": arena[:2], "out_order": arena[:2], "counts": ints(0, 0)},
        {"counts": arena[:2], "out_counts": arena[1:3]},
        {"owed_slots": arena[:60], "owed_positions": arena[59:119]},
        {"exit_layers": arena[:2], "out_order": arena[1:3]},
    ]
    for change in shared:
        with pytest.raises(ValueError, match="must not share memory with"):
            function(**{**good(), **change})
    function(**{**good(), "owed_slots": arena[:60], "owed_positions": arena[60:120], "out_order": arena[120:122]})


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("change", [{"kind": 3}, {"kind": -1}, {"partial": None}, {"next_layer": 7}])
def test_the_twin_refuses_what_it_cannot_do(function, change):
    with pytest.raises(ValueError, match="must be 0|are missing|must lie in"):
        function(**{**good(), **change})


# --- how it sits in torch ------------------------------------------------------------------------------------------


@needs_extension
def test_traces_as_a_mutation(device):
    """torch.compile sees what is written, with and without the optional output."""
    compiled = torch.compile(lambda a: step_rows_(**a), fullgraph=True, backend="aot_eager")
    for change in ({}, {"settled": None}):
        one, two = ({k: v.clone().to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
                    for given in (good() | change, good() | change))  # fmt: skip
        step_rows_(**one)
        compiled(two)
        for name in WRITTEN:
            assert one[name] is None or torch.equal(one[name], two[name]), name


@needs_extension
def test_a_kernel_for_either_device():
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has("consistentee::step_rows_", "CPU") and has("consistentee::step_rows_", "CUDA")
    assert extension.available()
