"""Every Triton kernel over awkward shapes, for ``sanitize`` to launch.

Each form of a kernel takes a second or two to compile, so there is one form for every branch that is decided at compile
time, in whatever dtype; what is decided on the device (counts, lengths, places, how many partial sums) varies within a
form and costs nothing. Products run the Triton kernel also where Hopper's would serve.

racecheck reports writes of one instruction against themselves in first tokens' attention, decode attention, the qkv
products and decoders' exits; the other groups, and the other tools, report nothing. In first tokens' attention these
instructions are those by which Triton 3.6 changes the layout of a row's scores, which several lanes hold alike: each of
them stores the same value to the same place. The other three have such changes of layout, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels.exit_rows import ExitDestinations, ExitLimits
from engine.kernels.gpu_attention import varlen_attention_
from engine.kernels.gpu_common import ROWS, TOKENS
from engine.kernels.gpu_decode_attention import decode_attention_
from engine.kernels.gpu_exit import exit_add_norm_rows_, exit_norm_rows_, exit_rows_
from engine.kernels.gpu_greedy import greedy_rows_
from engine.kernels.gpu_linear import LinearConfig, linear_rows_
from engine.kernels.gpu_measures import classifier_rows_, response_rows_, saturation_rows_
from engine.kernels.gpu_norms import add_layer_norm_compact_, add_layer_norm_rows_, embed_layer_norm_rows_
from engine.kernels.gpu_policy import delta_rows_, policy_rows_, policy_splits
from engine.kernels.gpu_qkv import QkvConfig, qkv_rows_
from engine.kernels.gpu_stream import StreamConfig, stream_rows_, stream_workspace
from engine.kernels.products import Partials
from engine.kernels.survivors import Removal

__all__ = ["RUNS"]

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
EPS = 1e-5
FAR = 1 << 28  # an id, place or length that nobody may follow: no buffer reaches so far

# Lengths of the live sequences: up to 5 and 18 tokens.
FEW = ([], [1], [4, 9], [3, 1, 5, 2, 7])
SPARE = 4  # rows and tokens that buffers have beyond


class Maker(NamedTuple):
    """Makes tensors on the host and copies them: what a kernel may read before the kernel in front of it has ended
    (counts, row ids, weights) is then never the work of that one."""

    device: str
    dtype: torch.dtype

    def full(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape).to(dtype or self.dtype).to(self.device)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def head(self, live: int, capacity: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Live rows in front of others that hold nothing."""
        out = self.empty(capacity, *shape, dtype=dtype)
        out[:live] = torch.randn(live, *shape).to(out.dtype)
        return out

    def at(self, rows: list[int], capacity: int, *shape: int) -> Tensor:
        """These rows of a buffer, and nothing in the others."""
        out = self.empty(capacity, *shape)
        for row in rows:
            out[row] = torch.randn(shape).to(out.dtype)
        return out

    def ints(self, values: list[int], capacity: int = 0) -> Tensor:
        """The values, and ``FAR`` up to the capacity."""
        spare = [FAR] * (capacity - len(values))
        return torch.tensor([*values, *spare], dtype=torch.int32, device=self.device)

    def ints_at(self, rows: list[int], values: list[int], capacity: int) -> Tensor:
        out = [FAR] * capacity
        for row, value in zip(rows, values, strict=True):
            out[row] = value
        return self.ints(out)


def _some(count: int, end: int) -> list[int]:
    """So many numbers below ``end``."""
    return torch.randint(0, end, (count,)).tolist()


def _picked(count: int, end: int) -> list[int]:
    """So many distinct numbers below ``end``."""
    return torch.randperm(end)[:count].tolist()


def _lives(capacity: int) -> list[int]:
    return sorted({0, 1, capacity // 2 + 1, capacity} if capacity > 1 else {0, 1})


def _starts(make: Maker, lengths: list[int], capacity: int) -> Tensor:
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return make.ints(starts, capacity + 1)


def _product(make: Maker, live: int, capacity: int, width: int, limits: tuple[int, int] | None):
    """What a product has left: its rows, or (within ``limits``) partial sums of them and no rows."""
    if limits is None:
        return make.head(live, capacity, width), None
    four, two = limits
    partials = Partials(make.empty(max(4 * four, 2 * two) * width, dtype=SINGLE), four, two)
    shares = partials.shares(live)
    partials.sums[: live * shares * width] = torch.randn(live * shares * width)
    return make.head(0 if shares else live, capacity, width), partials


# --- encoder ---------------------------------------------------------------------------------------------------------


def _weights(make: Maker, hidden: int, neurons: int, classes: int) -> tuple:
    """Policy and classifier."""
    policy = make.full(neurons, hidden), make.full(neurons), make.full(1, neurons), make.full(1)
    return policy, (make.full(classes, hidden), make.full(classes))


def _exit_rows(make: Maker, live: int, capacity: int, classes: int, plain: bool) -> tuple[ExitDestinations, ExitLimits]:
    """plain: only what every criterion needs, and where the batch has it; else all there is, at the rows' places."""
    batch = capacity + 3
    out = ExitDestinations(
        make.empty(batch, classes, dtype=SINGLE),
        make.empty(batch, dtype=torch.int32),
        make.empty(batch, dtype=SINGLE),
        make.empty(capacity, dtype=torch.int8),
        None if plain else make.empty(capacity, dtype=SINGLE),
    )
    row_ids = make.ints(_picked(live, batch), capacity)
    if plain:
        return out, ExitLimits(row_ids, None, None, make.full(batch, dtype=SINGLE), make.ints(_some(batch, 7)), True)
    low, high, script = (make.ints(_some(live, 7), capacity) for _ in range(3))
    return out, ExitLimits(row_ids, low, high, make.head(live, capacity, dtype=SINGLE), script)


def run_exits(device: str) -> None:
    """Given states: two tiles of neurons, and classes that programs share in one turn and in several."""
    sizes = (HALF, 260, 33, 37, 6), (HALF, 72, 5, 150, 100)
    for (dtype, hidden, neurons, classes, capacity), criterion in zip(sizes, ("policy", "scripted"), strict=True):
        make = Maker(device, dtype)
        policy, classifier = _weights(make, hidden, neurons, classes)
        for live in _lives(capacity):
            rows = _exit_rows(make, live, capacity, classes, criterion == "scripted")
            state = make.head(live, capacity + 1, hidden)
            exit_rows_(*rows, state, make.ints([live, FAR]), 3, criterion, policy, classifier)
    _run_exit_norms(device)
    _run_exit_add_norms(device)


def _run_exit_norms(device: str) -> None:
    """First tokens of the rows layout and compact ones, whole, or as sums in all cases or in some."""
    cases = (
        (SINGLE, 33, 5, 2, "policy", True, None),
        (HALF, 260, 33, 37, "confidence", False, None),
        (BRAIN, 384, 32, 20, "scripted", True, (100, 200)),
        (HALF, 72, 5, 1100, "last", False, (1, 3)),
    )
    for dtype, hidden, neurons, classes, criterion, indexed, sums in cases:
        make = Maker(device, dtype)
        policy, classifier = _weights(make, hidden, neurons, classes)
        norm = make.full(hidden), make.full(hidden), EPS
        for lengths in FEW:
            live, tokens, capacity = len(lengths), sum(lengths), 5 + SPARE
            counted, room = (tokens, 18 + SPARE) if indexed else (live, capacity)
            x, partials = _product(make, counted, room, hidden, sums)
            exit_norm_rows_(
                *_exit_rows(make, live, capacity, classes, criterion == "last"), x,
                make.head(counted, room, hidden), norm, make.ints([live, tokens]), 3, criterion, policy, classifier,
                _starts(make, lengths, capacity) if indexed else None, partials,
            )  # fmt: skip


def _run_exit_add_norms(device: str) -> None:
    """Programs that norm one, four and eight tokens beside those of the exit."""
    many = ([300, 1, 700], [20, 3], [100, 57], [])
    cases = (
        (HALF, 260, 33, 37, "policy", False, None, 22, FEW),
        (SINGLE, 33, 5, 2, "last", True, None, 300, ([300], *FEW)),
        (BRAIN, 72, 5, 20, "confidence", False, None, 1100, many),
        (HALF, 72, 5, 20, "policy", False, (40, 200), 1100, many),
        (HALF, 72, 5, 20, "policy", False, (40, 200), 300, ([100, 157, 40], [100, 57], [20, 3], [])),
        (HALF, 72, 5, 20, "last", False, (5, 200), 22, FEW),
    )
    for dtype, hidden, neurons, classes, criterion, given, sums, room, batches in cases:
        make = Maker(device, dtype)
        policy, classifier = _weights(make, hidden, neurons, classes)
        norm = make.full(hidden), make.full(hidden), EPS
        for lengths in batches:
            live, tokens, capacity = len(lengths), sum(lengths), 5 + SPARE
            x, partials = _product(make, tokens, room, hidden, sums)
            exit_add_norm_rows_(
                *_exit_rows(make, live, capacity, classes, False), make.empty(room, hidden), x,
                make.head(tokens, room, hidden), norm, make.ints([live, tokens]), 3, criterion, policy, classifier,
                None if given else _starts(make, lengths, capacity),
                make.head(live, capacity, hidden) if given else None, partials,
            )  # fmt: skip


def run_attention(device: str) -> None:
    """Heads that fill no block, lengths around a block; queries, keys and values as part of wider rows."""
    cases = (
        (HALF, 2, 32, 20, False),
        (HALF, 3, 12, 150, True),
        (BRAIN, 2, 64, 150, False),
        (SINGLE, 1, 20, 150, True),
    )
    for dtype, heads, d, longest, biased in cases:
        make = Maker(device, dtype)
        hidden = heads * d
        bias = make.full(heads, 256, 256, dtype=SINGLE) if biased else None
        for lengths in (*FEW, [min(n, longest) for n in (31, 32, 33, 64, 65, 150)]):
            tokens, capacity = sum(lengths), len(lengths) + SPARE
            starts, counts = _starts(make, lengths, capacity), make.ints([len(lengths), tokens])
            qkv = make.head(tokens, tokens + SPARE, 3 * hidden + 8)[:, : 3 * hidden]
            for first_only, rows in ((False, tokens + SPARE), (True, capacity)):
                varlen_attention_(
                    make.empty(rows, hidden), qkv, starts, counts, heads, 0.3, longest, bias, first_only
                )
            if not biased:
                keep = (torch.rand(capacity, device=device) < 0.5).to(torch.int8)
                written = (make.ints([0] * n) for n in (capacity + 1, tokens + SPARE, 2, capacity))
                removal = Removal(keep, make.ints(list(range(capacity))), *written)
                varlen_attention_(
                    make.empty(tokens + SPARE, hidden), qkv, starts, counts, heads, 0.3, longest, removal=removal
                )


def run_linear(device: str) -> None:
    """Widths that are multiples of a tile and not; several groups of blocks, the last one not full."""
    cases = (
        (HALF, 37, 70, "none", True, 20, LinearConfig(16, 32, 128, 4, 4)),
        (HALF, 96, 128, "gelu", True, 300, LinearConfig(32, 64, 128, 4, 4)),
        (HALF, 300, 72, "tanh", False, 300, LinearConfig(64, 128, 64, 4, 4)),
        (BRAIN, 136, 200, "none", True, 300, LinearConfig(64, 64, 64, 4, 4, 2)),
        (SINGLE, 33, 50, "gelu", True, 20, LinearConfig(16, 32, 32, 4, 2)),
    )
    for dtype, outputs, inputs, act, biased, capacity, config in cases:
        make = Maker(device, dtype)
        weight, bias = make.full(outputs, inputs), make.full(outputs, dtype=SINGLE) if biased else None
        which = ROWS if act == "tanh" else TOKENS
        for live in _lives(capacity):
            counts = make.ints([live, FAR] if which == ROWS else [FAR, live])
            out, x = make.empty(capacity, outputs), make.head(live, capacity, inputs)
            linear_rows_(out, x, weight, bias, counts, which, act, config)


def run_norms(device: str) -> None:
    _run_embeddings(device)
    _run_add_norms(device)
    _run_compact_norms(device)


def _run_embeddings(device: str) -> None:
    """With types, with a table of them alone, and without; one row a program, and four."""
    cases = ((HALF, 260, 20, True, True), (SINGLE, 33, 20, False, True), (BRAIN, 40, 4099, False, False))
    for dtype, hidden, capacity, types, table in cases:
        make = Maker(device, dtype)
        word, kinds, position = make.full(11, hidden), make.full(2, hidden), make.full(7, hidden)
        for live in _lives(capacity):
            ids, kind, place = (make.ints(_some(live, end), capacity) for end in (11, 2, 7))
            embed_layer_norm_rows_(
                make.empty(capacity, hidden), ids, kind if types else None, place, word, kinds if table else None,
                position, make.full(hidden), make.full(hidden), EPS, make.ints([FAR, live]),
            )  # fmt: skip


def _run_add_norms(device: str) -> None:
    """All tokens, in place too, and first tokens found by index; rows of x whole or as sums."""
    cases = (
        (HALF, 260, 22, False, None),
        (HALF, 72, 22, True, (9, 200)),
        (SINGLE, 33, 22, True, None),
        (BRAIN, 384, 530, False, (9, 200)),
    )
    for dtype, hidden, room, indexed, sums in cases:
        make = Maker(device, dtype)
        for lengths in FEW if room < 500 else ([1], [100, 57], [500, 27], []):
            live, tokens, capacity = len(lengths), sum(lengths), 5 + SPARE
            x, partials = _product(make, tokens, room, hidden, sums)
            rest = make.full(hidden), make.full(hidden), EPS, make.ints([live, tokens])
            residual = make.head(tokens, room, hidden)
            if indexed:
                starts = _starts(make, lengths, capacity)
                out = make.empty(capacity, hidden)
                add_layer_norm_rows_(out, x, residual, *rest, ROWS, starts, starts, partials)
            else:
                for out in (make.empty(room, hidden), residual):
                    add_layer_norm_rows_(out, x, residual, *rest, TOKENS, partials=partials)


def _run_compact_norms(device: str) -> None:
    """Tokens that leave among others, places known late and early; one row a program, and four."""
    cases = ((HALF, 260, 22, None, False), (BRAIN, 44, 4099, (30, 200), True))
    for dtype, hidden, capacity, sums, settled in cases:
        make = Maker(device, dtype)
        for live in (0, 1, 18, min(150, capacity), capacity):
            x, partials = _product(make, live, capacity, hidden, sums)
            dest = [-1 if i % 3 == 0 else i - 1 - i // 3 for i in range(live)]
            add_layer_norm_compact_(
                make.empty(capacity, hidden), x, make.head(live, capacity, hidden), make.full(hidden),
                make.full(hidden), EPS, make.ints([FAR, live]), make.ints(dest, capacity), partials, settled,
            )  # fmt: skip


# --- decoder ---------------------------------------------------------------------------------------------------------


def run_qkv(device: str) -> None:
    """One row and several, with nothing owed, few entries and many; a weight in one part and in several; norms of their
    own, for all entries and for some."""
    small, cut = QkvConfig(16, 16, 32, 4, 2), QkvConfig(16, 16, 64, 4, 2, 1, 64)
    cases = (
        (HALF, 1, 72, 4, 2, 12, HALF, None, 0),
        (HALF, 1, 128, 2, 2, 32, SINGLE, cut, 0),
        (BRAIN, 1, 200, 2, 1, 6, BRAIN, cut, 0),
        (SINGLE, 1, 33, 3, 3, 10, SINGLE, small, 0),
        (HALF, 20, 72, 4, 2, 12, HALF, None, 0),
        (BRAIN, 20, 64, 2, 2, 40, SINGLE, small, 0),
        (SINGLE, 5, 33, 3, 1, 10, SINGLE, small, 0),
        (HALF, 20, 200, 2, 1, 128, HALF, None, 60),
        (BRAIN, 20, 72, 4, 2, 16, BRAIN, None, 18),
        (SINGLE, 5, 33, 3, 1, 16, SINGLE, None, 4),
    )
    for dtype, capacity, hidden, heads, kv_heads, d, tables, config, room in cases:
        make = Maker(device, dtype)
        weight = make.full((heads + 2 * kv_heads) * d, hidden)
        norm = make.full(hidden, dtype=tables), EPS
        cos, sin = make.full(90, d, dtype=tables), make.full(90, d, dtype=tables)
        for live in _lives(capacity):
            for owed in (0, 3, 21):
                _run_qkv(make, capacity, live, owed, (heads, kv_heads, d), weight, norm, cos, sin, config, room)


def _run_qkv(make: Maker, capacity: int, live: int, owed: int, heads, weight, norm, cos, sin, config, room) -> None:
    num_heads, kv_heads, d = heads
    hidden, cache = weight.shape[1], 50
    rows, slots = _picked(live, capacity), _picked(live + owed, cache)
    qkv_rows_(
        make.empty(capacity, num_heads, d), make.empty(cache, kv_heads, d), make.empty(cache, kv_heads, d),
        make.at(rows if capacity > 1 else [0], capacity, hidden),  # the only row is read ahead of the count
        make.at(slots[live:], cache, hidden), weight, norm, cos, sin, make.ints(rows, capacity),
        make.ints_at(rows, slots[:live], capacity), make.ints_at(rows, _some(live, 90), capacity),
        make.ints(slots[live:], owed + SPARE), make.ints(_some(owed, 90), owed + SPARE), make.ints([live, owed]),
        config, make.empty(room, hidden) if room else None,
    )  # fmt: skip


def run_stream(device: str) -> None:
    """One row in one part and in several, tiles of rows; widths that are multiples of a tile and not; residuals apart
    and in place, and sums that stay in fp32; tiles that two programs share."""
    cases = (
        (HALF, 1, 37, 200, "none", False, True, StreamConfig(1, 4, 1024, 4)),
        (HALF, 1, 30, 600, "swiglu", True, False, StreamConfig(1, 4, 256, 4, registers=96)),
        (BRAIN, 1, 32, 512, "swiglu", False, True, StreamConfig(1, 4, 256, 4)),
        (SINGLE, 1, 33, 33, "none", True, False, None),
        (HALF, 20, 37, 72, "none", False, True, None),
        (HALF, 20, 130, 400, "none", False, True, StreamConfig(16, 64, 128, 4, 3, splits=2)),
        (HALF, 5, 40, 256, "swiglu", False, False, StreamConfig(16, 32, 128, 4, 4)),
        (BRAIN, 40, 70, 100, "swiglu", False, False, StreamConfig(32, 64, 64, 8, 3)),
        (SINGLE, 5, 33, 64, "none", False, True, StreamConfig(16, 64, 32, 4, 2, splits=2)),
    )
    for dtype, capacity, outputs, inputs, act, normed, added, config in cases:
        make = Maker(device, dtype)
        weight = make.full(outputs * (2 if act == "swiglu" else 1), inputs)
        norm = (make.full(inputs, dtype=SINGLE if act == "none" else dtype), EPS) if normed else None
        shared = stream_workspace(capacity, outputs, torch.device(device))
        for live in _lives(capacity):
            rows = _picked(live, capacity)
            x, order, counts = make.at(rows, capacity, inputs), make.ints(rows, capacity), make.ints([live, FAR])
            residual = make.at(rows, capacity, outputs) if added else None
            apart = make.empty(capacity, outputs, dtype=dtype if added else SINGLE)
            for out in (apart, residual):
                if out is not None:
                    stream_rows_(out, x, weight, order, counts, norm, residual, act, config, shared)


def run_decode_attention(device: str) -> None:
    """Heads with keys of their own and in groups that fill no block, contexts whole and in parts (some are empty)."""
    cases = (
        (HALF, 3, 3, 12, 1, 4),
        (HALF, 6, 2, 40, 3, 16),
        (BRAIN, 2, 2, 64, 3, 16),
        (SINGLE, 5, 1, 20, 1, 4),
    )
    for dtype, heads, kv_heads, d, splits, size in cases:
        make = Maker(device, dtype)
        for positions in ([], [0], [5, 130, 15, 0, 16, 63]):
            rows = _picked(len(positions), len(positions) + 2)
            _run_decode_attention(make, rows, positions, heads, kv_heads, d, splits, size)


def _run_decode_attention(make: Maker, rows, positions, heads, kv_heads, d, splits, size) -> None:
    """Only the positions of a context are filled, not the rest of its last block."""
    capacity, most = len(rows) + 2, 140 // size + 1
    order = torch.randperm(capacity * most).tolist()
    table, filled = [[FAR] * most for _ in range(capacity)], []
    for row, position in zip(rows, positions, strict=True):
        for p in range(0, position + 1, size):
            block = table[row][p // size] = order.pop()
            filled += range(block * size, block * size + min(size, position + 1 - p))
    decode_attention_(
        make.empty(capacity, heads, d),
        make.at(rows, capacity, heads, d),
        make.at(filled, capacity * most * size, kv_heads, d),
        make.at(filled, capacity * most * size, kv_heads, d),
        make.ints(rows, capacity),
        make.ints(sum(table, [])).view(capacity, most),
        make.ints_at(rows, positions, capacity),
        make.ints([len(rows), FAR]),
        0.3,
        size,
        make.empty(capacity, splits, heads, d + 2, dtype=SINGLE),
    )


def run_decoder_exits(device: str) -> None:
    """A step's policy, with states to keep and without, what an exit adds to the head, CALM's measures, and the greedy
    token."""
    cases = ((HALF, 72, 5, 6, True), (BRAIN, 128, 32, 40, False), (SINGLE, 33, 9, 6, True), (HALF, 40, 0, 6, True))
    for dtype, hidden, neurons, capacity, kept in cases:
        make = Maker(device, dtype)
        for live in _lives(capacity):
            _run_policy(make, hidden, neurons, capacity, live, kept)
            rows, z = _picked(live, capacity), make.empty(capacity, 1, dtype=SINGLE)
            x, lists = make.at(rows, capacity, hidden), (make.ints(rows, capacity), make.ints([live, FAR]))
            classifier_rows_(z, x, make.full(1, hidden), *lists)
            saturation_rows_(z, make.at(rows, capacity, hidden), x, *lists)
            if neurons:
                rows = _picked(live, capacity)
                delta_rows_(
                    make.empty(capacity, hidden), make.at(rows, capacity, hidden), make.full(3, neurons, hidden),
                    make.full(3, hidden, neurons), make.ints_at(rows, _some(live, 3), capacity),
                    make.ints(rows, capacity), make.ints([live, FAR]),
                )  # fmt: skip
    make, ints = Maker(device, SINGLE), torch.int32
    for words in (2, 37, 9000):
        for live in _lives(6):
            rows = _picked(live, 6)
            response_rows_(
                make.empty(6, 1), make.at(rows, 6, words), make.ints(rows, 6), make.ints([live, FAR])
            )  # fmt: skip
            greedy_rows_(
                make.empty(6, 3, dtype=ints), make.empty(6, dtype=ints), make.head(live, 6, words),
                make.ints(_some(live, 7), 6), make.head(live, 6), make.ints([live, FAR]),
            )  # fmt: skip


def _run_policy(make: Maker, hidden: int, neurons: int, capacity: int, live: int, kept: bool) -> None:
    rows, cache = _picked(live, capacity), 50
    splits = policy_splits(capacity, hidden, max(neurons, 1))
    policy = make.full(neurons, hidden), make.full(neurons), make.full(1, neurons)
    policy_rows_(
        make.empty(capacity, splits, dtype=SINGLE), make.empty(capacity, hidden),
        make.empty(cache, hidden) if kept else None, make.at(rows, capacity, hidden), (make.full(hidden), EPS),
        policy if neurons else None, make.ints(rows, capacity), make.ints_at(rows, _picked(live, cache), capacity),
        make.ints([live, FAR]),
    )  # fmt: skip


RUNS: dict[str, Callable[[str], None]] = {
    "triton exits": run_exits,
    "triton attention": run_attention,
    "triton products": run_linear,
    "triton norms": run_norms,
    "triton qkv": run_qkv,
    "triton stream": run_stream,
    "triton decode attention": run_decode_attention,
    "triton decoder exits": run_decoder_exits,
}
