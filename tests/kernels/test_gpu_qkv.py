import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.kernels import gpu_qkv
from engine.kernels.gpu_common import AMPERE, HOPPER, TileLimits
from engine.kernels.gpu_qkv import QkvConfig, qkv_configs, qkv_rows_, qkv_rows__ref
from engine.kernels.gpu_qkv_entries import entries_configs, qkv_entries
from tests.kernels import gpu_cases
from tests.kernels.cases import assert_no_worse, doubled

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
POISON = 7.0
EPS = 1e-5
NAN = float("nan")


@dataclass
class Case:
    """Arguments of the op, live rows and owed entries scattered; NaN wherever nobody may read."""

    query: Tensor
    keys: Tensor
    values: Tensor
    hidden: Tensor
    states: Tensor
    weight: Tensor
    norm: tuple[Tensor, float]
    cos: Tensor
    sin: Tensor
    order: Tensor
    slots: Tensor
    positions: Tensor
    owed_slots: Tensor
    owed_positions: Tensor
    counts: Tensor

    def arguments(self) -> list:
        return [getattr(self, name) for name in self.__dataclass_fields__]


def case(capacity, live, owed, shape, dtype, device, table_dtype=None, gain_dtype=None, room=70, gain=1.0):
    width, num_heads, kv_heads, d = shape
    spots = torch.randperm(room)[: live + owed].int()
    order = torch.randperm(capacity).int()
    rows = order[:live].long()
    far = 1 << 30  # out of range: who reads this, or follows it, is noticed
    slots, positions = torch.full((capacity,), far).int(), torch.full((capacity,), far).int()
    slots[rows], positions[rows] = spots[:live], torch.randint(0, 90, (live,)).int()
    order[live:] = far
    owed_slots, owed_positions = torch.full((owed + 3,), far).int(), torch.full((owed + 3,), far).int()
    owed_slots[:owed], owed_positions[:owed] = spots[live:], torch.randint(0, 90, (owed,)).int()
    hidden, states = torch.full((capacity, width), NAN), torch.full((room, width), NAN)
    hidden[rows] = torch.randn(live, width) * 3
    states[spots[live:].long()] = torch.randn(owed, width) * 0.1
    # The halves of LLaMA's tables are alike; these are not, so that each has to be read where it stands.
    angles = torch.outer(torch.arange(90.0), 10000.0 ** -(torch.arange(d) / d))
    weight = torch.randn((num_heads + 2 * kv_heads) * d, width) * width**-0.5
    made = Case(
        torch.full((capacity, num_heads, d), POISON).to(dtype),
        torch.full((room, kv_heads, d), POISON).to(dtype),
        torch.full((room, kv_heads, d), POISON).to(dtype),
        hidden.to(dtype),
        states.to(dtype),
        weight.to(dtype),
        ((torch.randn(width) * gain).to(gain_dtype or dtype), EPS),
        angles.cos().to(table_dtype or dtype),
        angles.sin().to(table_dtype or dtype),
        order,
        slots,
        positions,
        owed_slots,
        owed_positions,
        torch.tensor([live, owed], dtype=torch.int32),
    )
    for name in made.__dataclass_fields__:
        value = getattr(made, name)
        moved = (value[0].to(device), EPS) if name == "norm" else value.to(device)
        setattr(made, name, moved)
    return made


def formula(x, weight, norm, cos, sin, heads, d):
    """Hugging Face's LLaMA: norm, products, rotate_half. [entries, all heads, d], values among the heads not turned."""
    gain, eps = norm
    wide = x if x.dtype == torch.float64 else x.float()
    normed = gain.to(x.dtype) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    plain = (normed @ weight.t()).view(len(x), len(weight) // d, d)
    turning = plain[:, :heads]
    rotated = torch.cat((-turning[..., d // 2 :], turning[..., : d // 2]), -1)
    turned = turning * cos[:, None].to(x.dtype) + rotated * sin[:, None].to(x.dtype)
    return torch.cat([turned, plain[:, heads:]], 1)


def check(c: Case) -> None:
    """Everything that is to be written against fp64, everything else untouched."""
    live, owed = c.counts.tolist()
    (_, num_heads, d), kv_heads = c.query.shape, c.keys.shape[1]
    rows, owed_slots = c.order[:live].long(), c.owed_slots[:owed].long()
    places = torch.cat([c.slots[rows].long(), owed_slots])
    at = torch.cat([c.positions[rows], c.owed_positions[:owed]]).long()
    x = torch.cat([c.hidden[rows], c.states[owed_slots]])
    x64, weight64, gain64, cos64, sin64 = doubled(x, c.weight, c.norm[0], c.cos[at], c.sin[at])
    exact = formula(x64, weight64, (gain64, EPS), cos64, sin64, num_heads + kv_heads, d)
    twin = formula(x, c.weight, c.norm, c.cos[at], c.sin[at], num_heads + kv_heads, d)
    written = c.query[rows], c.keys[places], c.values[places]
    heads = [num_heads, kv_heads, kv_heads]
    # As one, since of a single row's values alone plain torch may by luck round all the right way.
    parts = ((q[:live], k, v) for q, k, v in (written, twin.split(heads, 1), exact.split(heads, 1)))
    assert_no_worse(*(torch.cat([part.flatten() for part in found]) for found in parts))
    untouched = torch.ones(len(c.query), dtype=torch.bool, device=rows.device)
    untouched[rows] = False
    assert bool((c.query[untouched] == POISON).all())
    untouched = torch.ones(len(c.keys), dtype=torch.bool, device=rows.device)
    untouched[places] = False
    assert bool((c.keys[untouched] == POISON).all() and (c.values[untouched] == POISON).all())


# H, A, KV, d: SmolLM2 scaled down, one key head to a query head, heads that fill no block.
GQA, PLAIN, ODD = (72, 9, 3, 16), (64, 4, 4, 32), (40, 2, 1, 24)


@pytest.mark.parametrize("dtype", [HALF, SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("shape", [GQA, PLAIN, ODD], ids=["gqa", "plain", "odd"])
@pytest.mark.parametrize("capacity, live", [(1, 1), (5, 3), (20, 20), (20, 17)])
@pytest.mark.parametrize("owed", [0, 1, 3, 40])
def test_rows_and_owed_entries(way, dtype, shape, capacity, live, owed):
    way.skip_wrong(dtype)
    c = case(capacity, live, owed, shape, dtype, way.device)
    way(qkv_rows_, qkv_rows__ref)(*c.arguments())
    check(c)


def entries_for(c, room):
    return torch.full((room, c.hidden.shape[1]), NAN, dtype=c.hidden.dtype, device=c.hidden.device)


@pytest.mark.parametrize("dtype", [HALF, SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("shape", [GQA, PLAIN, (40, 2, 1, 128)], ids=["gqa", "plain", "128"])
@pytest.mark.parametrize(
    "capacity, live, owed, room",
    [(5, 3, 0, 1), (5, 0, 0, 16), (5, 0, 6, 16), (20, 17, 3, 20), (20, 20, 45, 16), (20, 20, 45, 70)],
)
def test_norms_of_their_own(way, dtype, shape, capacity, live, owed, room):
    """Room for one of the entries, for some, for all."""
    way.skip_wrong(dtype)
    c = case(capacity, live, owed, shape, dtype, way.device)
    way(qkv_rows_, qkv_rows__ref)(*c.arguments(), entries=entries_for(c, room))
    check(c)


def test_entries_and_the_order_of_sums(way):
    """Wherever an entry stands."""
    if way.name == "twin":
        pytest.skip("a torch product may choose its order by the number of rows")
    c = case(20, 20, 30, GQA, HALF, way.device)
    found = []
    for counts in ((20, 30), (3, 0)):
        c.counts[:] = torch.tensor(counts)
        qkv_rows_(*c.arguments(), entries=entries_for(c, 64))
        rows = c.order[:3].long()
        found.append([x.clone() for x in (c.query[rows], c.keys[c.slots[rows].long()])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_who_has_entries():
    assert [qkv_entries(rows, 32, 32, 128) for rows in (1, 2, 8, 32, 64)] == [0, 32, 64, 128, 256]
    assert qkv_entries(64, 9, 3, 64) == 0
    c = case(1, 1, 0, PLAIN, HALF, "cpu")
    with pytest.raises(ValueError, match="entries are for a capacity of 2 or more, got 1: leave them out"):
        qkv_rows_(*c.arguments(), entries=entries_for(c, 8))
    c = case(4, 1, 0, PLAIN, HALF, "cpu")
    odd = case(4, 1, 0, ODD, HALF, "cpu")
    with pytest.raises(ValueError, match="entries are for a head_dim of 16, 32, 64 or 128, got 24: leave them out"):
        qkv_rows_(*odd.arguments(), entries=entries_for(odd, 8))
    with pytest.raises(ValueError, match="entries must have room for at least 1, got 0: leave them out"):
        qkv_rows_(*c.arguments(), entries=entries_for(c, 0))
    with pytest.raises(ValueError, match=r"entries must have shape \[any, 64\], got \[8, 63\]"):
        qkv_rows_(*c.arguments(), entries=entries_for(c, 8)[:, 1:].contiguous())


@pytest.mark.parametrize("capacity, owed", [(1, 0), (1, 2), (5, 0), (5, 2)])
def test_nobody_is_live(way, capacity, owed):
    c = case(capacity, 0, owed, GQA, HALF, way.device)
    way(qkv_rows_, qkv_rows__ref)(*c.arguments())
    check(c)


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("capacity, owed", [(1, 0), (1, 1), (5, 4)])
def test_tables_and_gains_of_single_precision(way, dtype, capacity, owed):
    c = case(capacity, capacity, owed, GQA, dtype, way.device, SINGLE, SINGLE)
    way(qkv_rows_, qkv_rows__ref)(*c.arguments())
    check(c)


@pytest.mark.parametrize("capacity, owed", [(1, 0), (1, 5), (5, 1)])
@pytest.mark.parametrize("gain", [0.003, 30.0])
def test_numbers_at_the_ends_of_fp16(way, gain, capacity, owed):
    """Hidden states of LLaMA's first layer and its gains are far below one, some features of its last far above:
    their product leaves fp16's range at either end, the result must not show it."""
    c = case(capacity, capacity, owed, GQA, HALF, way.device, gain=gain)
    factor = 0.005 if gain < 1 else 3000.0
    c.hidden *= factor
    c.states *= factor
    c.hidden[:, 5] = 60000.0 if gain > 1 else 0.03
    way(qkv_rows_, qkv_rows__ref)(*c.arguments())
    check(c)


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("capacity, owed", [(1, 0), (1, 19), (20, 9)])
def test_all_tiles_compute_the_same(way, dtype, capacity, owed):
    if way.name == "twin":
        pytest.skip("the twin has no tiles")
    narrow = QkvConfig(16, 8, 32, 4, 2, 1, 32)  # several steps of the vector way
    for config in (*qkv_configs(capacity, 9, 3, 16, dtype), narrow):
        c = case(capacity, capacity, owed, GQA, dtype, way.device)
        qkv_rows_(*c.arguments(), config)
        check(c)


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
def test_a_row_does_not_depend_on_the_others(way, dtype):
    if way.name == "twin":
        pytest.skip("a torch product may choose its order by the number of rows")
    c = case(20, 20, 30, GQA, dtype, way.device)
    found = []
    for counts in ((20, 30), (3, 0)):
        c.counts[:] = torch.tensor(counts)
        qkv_rows_(*c.arguments())
        rows = c.order[:3].long()
        found.append([x.clone() for x in (c.query[rows], c.keys[c.slots[rows].long()])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("capacity, owed", [(1, 0), (4, 2)])
def test_nan_stays_in_its_row(way, capacity, owed):
    c = case(capacity, capacity, owed, PLAIN, SINGLE, way.device)
    sick = int(c.order[0])
    c.hidden[sick, 3] = NAN
    way(qkv_rows_, qkv_rows__ref)(*c.arguments())
    assert c.query.isnan().flatten(1).all(1).nonzero().flatten().tolist() == [sick]
    slot = int(c.slots[sick])
    for cache in (c.keys, c.values):
        assert cache[slot].isnan().all() and int(cache.isnan().sum()) == cache[slot].numel()


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [1, 8])
def test_a_graph_reads_the_counts_at_every_replay(gpu, capacity):
    c = case(capacity, capacity, 40, GQA, HALF, "cuda")
    qkv_rows_(*c.arguments())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        qkv_rows_(*c.arguments())
    for counts in ((capacity, 40), (1, 0), (capacity, 7), (0, 0)):
        for written in (c.query, c.keys, c.values):
            written.fill_(POISON)
        c.counts[:] = torch.tensor(counts)
        graph.replay()
        check(c)


# bf16 has the same kernels; 7B is large for a test, its shape is what counts.
@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 32, 32, 128), (576, 9, 3, 64)], ids=["7b", "smollm2"])
@pytest.mark.parametrize("capacity, live, owed", [(1, 1, 0), (1, 1, 9), (8, 5, 30), (32, 32, 0), (64, 50, 64)])
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
def test_real_shapes(gpu, dtype, shape, capacity, live, owed):
    c = case(capacity, live, owed, shape, dtype, "cuda", room=200)
    qkv_rows_(*c.arguments())
    check(c)
    most = qkv_entries(capacity, *shape[1:])
    for room in {most, most // 4} - {0}:
        for config in (None, *entries_configs(capacity, dtype)):
            for written in (c.query, c.keys, c.values):
                written.fill_(POISON)
            qkv_rows_(*c.arguments(), config, entries=entries_for(c, room))
            check(c)


def test_the_table_of_tiles():
    for dtype in (HALF, BRAIN, SINGLE):
        for rows in (0, 1, 8, 16, 32, 64, 200):
            for heads in ((32, 32, 128), (9, 3, 64)):
                configs = qkv_configs(rows, *heads, dtype)
                assert len(set(configs)) == len(configs)
    assert qkv_configs(8, 32, 32, 128, HALF)[0].rows == 32
    assert qkv_configs(64, 32, 32, 128, HALF)[0].rows == 64
    assert qkv_configs(8, 9, 3, 64, HALF)[0].pairs == 8


def test_tiles_go_by_the_device():
    """H100, A100, and less shared memory than the tiles that are chosen there take."""
    heads = (32, 32, 128)
    assert qkv_configs(64, *heads, HALF, HOPPER)[0] == qkv_configs(64, *heads, HALF)[0] == QkvConfig(64, 32, 128, 4, 4)
    assert qkv_configs(64, *heads, HALF, AMPERE)[0] == QkvConfig(64, 32, 64, 4, 6)
    assert [tuple(entries_configs(64, HALF, limits)[0]) for limits in (HOPPER, AMPERE, gpu_cases.SMALL)] == [
        (128, 128, 8, 3), (128, 64, 8, 4), (128, 64, 8, 2)
    ]  # fmt: skip
    assert entries_configs(64, HALF) == entries_configs(64, HALF, HOPPER)
    for rows in (2, 8, 64):
        for limits in (gpu_cases.SMALL, TileLimits(True, 99 * 1024), TileLimits(False, 64 * 1024)):
            for c in qkv_configs(rows, *heads, HALF, limits):
                assert 2 * (c.rows + 2 * c.pairs) * c.block_k * c.num_stages < limits.shared_bytes
            for c in entries_configs(rows, HALF, limits):
                assert 2 * (c.rows + 128) * c.block_k * c.num_stages < limits.shared_bytes


def replaced(**changes):
    torch.manual_seed(0)
    c = case(4, 2, 3, PLAIN, SINGLE, "cpu")
    for name, change in changes.items():
        setattr(c, name, change(getattr(c, name)))
    return c.arguments()


MESSAGES = [
    ({"hidden": Tensor.double}, "hidden must be float16, bfloat16 or float32, got float64"),
    ({"hidden": lambda x: x[0]}, r"hidden must have shape \[rows, H\], got \[64\]"),
    ({"query": lambda x: x[:3]}, r"query must have shape \[4, 4, 32\], got \[3, 4, 32\]"),
    ({"query": lambda x: x[..., :31]}, r"query must have shape \[4, heads, an even head_dim\], got \[4, 4, 31\]"),
    ({"query": lambda x: x.half()}, r"query must have the dtype of hidden .float32., got float16"),
    ({"query": lambda x: x.transpose(0, 1)}, "query must be contiguous, got strides"),
    ({"keys": lambda x: x[..., :16].contiguous()}, r"keys must have shape \[any, any, 32\], got \[70, 4, 16\]"),
    ({"keys": lambda x: torch.cat([x, x], 1)}, "query heads must be a multiple of the key heads, got 4 and 8"),
    ({"values": lambda x: x[:60]}, r"values must have shape \[70, 4, 32\], got \[60, 4, 32\]"),
    ({"states": lambda x: x[:60]}, r"states must have shape \[70, 64\], got \[60, 64\]"),
    ({"weight": lambda x: x[1:]}, r"weight must have shape \[384, 64\], got \[383, 64\]"),
    ({"norm": lambda x: (x[0][1:], EPS)}, r"norm must have shape \[64\], got \[63\]"),
    ({"cos": lambda x: x[:, 1:]}, r"cos must have shape \[positions, 32\], got \[90, 31\]"),
    ({"sin": Tensor.half}, "sin must be float32, got float16"),
    ({"sin": lambda x: x[1:]}, r"cos and sin must be alike, got torch.float32 \[90, 32\], torch.float32 \[89, 32\]"),
    ({"order": lambda x: x[1:]}, r"order must have shape \[4 or more\], got \[3\]"),
    ({"slots": Tensor.long}, "slots must be int32, got int64"),
    ({"positions": Tensor.float}, "positions must be int32, got float32"),
    ({"owed_slots": Tensor.long}, "owed_slots must be int32, got int64"),
    ({"owed_positions": lambda x: x[1:]}, r"owed_positions must have shape \[6 or more\], got \[5\]"),
    ({"counts": lambda x: x[:1]}, r"counts must be int32 of shape \[2\], the live rows and tokens, got int32 \[1\]"),
]


@pytest.mark.parametrize("changes, message", MESSAGES, ids=[f"{list(c)[0]} {i}" for i, (c, _) in enumerate(MESSAGES)])
def test_messages(changes, message):
    with pytest.raises(ValueError, match=message):
        qkv_rows_(*replaced(**changes))


def test_written_buffers_are_apart():
    arguments = replaced()
    arguments[2] = arguments[1]
    with pytest.raises(ValueError, match="keys must not overlap values in memory: give another buffer"):
        qkv_rows_(*arguments)


@pytest.mark.parametrize("name", ["query", "keys", "values", "hidden", "states", "weight", "norm", "cos", "sin"])
def test_entries_are_apart_from_everything(name):
    c = case(4, 2, 3, PLAIN, SINGLE, "cpu")
    other = c.norm[0] if name == "norm" else getattr(c, name)
    first, second = (name, "entries") if name in ("query", "keys", "values") else ("entries", name)
    with pytest.raises(ValueError, match=f"{first} must not overlap {second} in memory: give another buffer"):
        qkv_rows_(*c.arguments(), entries=other.view(-1)[-64:].view(1, 64))


def test_lists_are_apart_from_what_is_written():
    c = case(4, 2, 3, PLAIN, SINGLE, "cpu")
    c.order = c.query.view(-1)[:4].view(torch.int32)
    with pytest.raises(ValueError, match="query must not overlap order in memory: give another buffer"):
        qkv_rows_(*c.arguments())


def test_what_is_only_read_may_overlap():
    """The states of a cache may be the rows' own hidden states."""
    c = case(4, 4, 3, PLAIN, SINGLE, "cpu", room=8)
    memory = torch.randn(8, 64)
    c.hidden, c.states = memory[:4], memory
    for entries in (None, entries_for(c, 8)):
        for written in (c.query, c.keys, c.values):
            written.fill_(POISON)
        qkv_rows_(*c.arguments(), entries=entries)
        check(c)


def test_tiles_are_of_the_kind_that_is_asked():
    c = case(4, 2, 3, PLAIN, SINGLE, "cpu")
    with pytest.raises(ValueError, match=r"type QkvConfig without entries, got EntriesConfig\(rows=16"):
        qkv_rows_(*c.arguments(), entries_configs(4, SINGLE)[0])
    with pytest.raises(ValueError, match=r"type EntriesConfig with entries, got QkvConfig\(rows="):
        qkv_rows_(*c.arguments(), qkv_configs(4, 4, 4, 32, SINGLE)[0], entries_for(c, 8))


# --- compiled without a device ---------------------------------------------------------------------------------------

SHAPES = {"7b": (4096, 32, 32, 128), "smollm2": (576, 9, 3, 64)}


@functools.cache
def compiled_case(capacity, shape, dtype):
    return case(capacity, 1, 0, shape, dtype, "cpu", room=8)


def compiled(monkeypatch, capacity, shape, dtype, arch, config=None, limits=None):
    c = compiled_case(capacity, shape, dtype)
    gpu_cases.on_device_like(monkeypatch, arch, gpu_qkv, limits=limits)
    monkeypatch.setattr(gpu_cases, "MODULES", (gpu_qkv,))
    launch = gpu_cases.record(monkeypatch, "qkv", lambda: qkv_rows_(*c.arguments(), config))
    usage = gpu_cases.compile_launch(launch, arch)
    assert usage.stack_bytes == 0, f"{config}: registers are spilled"
    assert usage.shared_bytes <= gpu_cases.SHARED_BYTES[arch]
    return usage


class TestCompile:
    pytestmark = gpu_cases.needs_compiler

    @pytest.mark.parametrize("arch", [80, 90])
    @pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    @pytest.mark.parametrize("capacity", [1, 8, 64])
    def test_defaults(self, monkeypatch, capacity, shape, dtype, arch):
        usage = compiled(monkeypatch, capacity, shape, dtype, arch)
        if capacity == 1 and dtype != SINGLE:
            # Four programs of four warps a multiprocessor, for what these must have on their way; three on sm_80.
            assert usage.registers <= (128 if arch == 90 else 168)
            assert (4 if arch == 90 else 3) * usage.shared_bytes <= gpu_cases.SHARED_BYTES[arch]

    @pytest.mark.parametrize("capacity", [1, 2, 8, 64])
    def test_little_shared_memory(self, monkeypatch, capacity):
        small = gpu_cases.SMALL
        assert compiled(monkeypatch, capacity, SHAPES["7b"], HALF, 80, None, small).shared_bytes <= small.shared_bytes
        c = compiled_case(capacity, SHAPES["7b"], HALF)
        call = functools.partial(qkv_rows_, *c.arguments(), None, entries_for(c, 8))
        for launch in gpu_cases.record_all(monkeypatch, "qkv", call) if capacity > 1 else ():
            assert gpu_cases.compile_launch(launch, 80).shared_bytes <= small.shared_bytes

    @pytest.mark.parametrize("capacity", [1, 64])
    def test_every_tile(self, monkeypatch, capacity):
        for shape in SHAPES.values():
            for config in qkv_configs(capacity, *shape[1:], HALF):
                compiled(monkeypatch, capacity, shape, HALF, 90, config)

    @pytest.mark.parametrize("arch", [80, 90])
    @pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
    @pytest.mark.parametrize("capacity", [2, 8, 32, 64])
    def test_entries(self, monkeypatch, capacity, dtype, arch):
        c = compiled_case(capacity, SHAPES["7b"], dtype)
        gpu_cases.on_device_like(monkeypatch, arch, gpu_qkv)
        monkeypatch.setattr(gpu_cases, "MODULES", (gpu_qkv,))
        configs = entries_configs(capacity, dtype, gpu_cases.LIMITS[arch])
        for config in configs:
            call = functools.partial(qkv_rows_, *c.arguments(), config, entries_for(c, 2 * config.rows))
            for launch in gpu_cases.record_all(monkeypatch, "qkv", call):
                usage = gpu_cases.compile_launch(launch, arch)
                assert usage.stack_bytes == 0 or config != configs[0]
                assert usage.shared_bytes <= gpu_cases.SHARED_BYTES[arch]
            if arch == 90 and dtype != SINGLE:
                assert "wgmma" in usage.ptx and "cp.async.bulk.tensor" in usage.ptx

    def test_loads_ahead(self, monkeypatch):
        """One row: the weight is on its way to registers before the kernel in front has ended."""
        before = compiled(monkeypatch, 1, SHAPES["7b"], HALF, 90).ptx.split("griddepcontrol.wait")[0]
        # 32 KB of 2 pairs, 16 loads of 16 bytes a thread.
        assert before.count("evict_first.L2::cache_hint.v4.b32") == 16
