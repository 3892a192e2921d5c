"""The exit: one launch decides about every live row, and writes what the leaving ones leave with.

    h = LayerNorm(x + residual)  of the row's first token      (exit_norm_rows_; exit_rows_ takes a given state)
    z = w2 . gelu(w1 h + b1) + b2
    leave = max_depth <= layer, or min_depth <= layer and the criterion says so
    leaving rows: class logits, exit layer and exit probability at their original index; all rows: keep = 0 or 1

The decision stays on the device (``keep`` feeds the compaction), in fp32 and in logits. One program a row: it reads w1
(P x H; 49 KB for 32 x 768 in 16 bit), and the classifier (C x H) only where the row leaves or the criterion reads it.
Where there are few rows and many classes, several programs decide about the same row, each for itself and with the same
result, and share its classes. Latency-bound at the 1 to some hundreds of rows it sees, so trips to memory are counted:
weights, which no kernel of a pass writes, the counts, the row's number, its place and its limits are loaded before the
kernel in front is waited for; behind it comes its first token.

``exit_add_norm_rows_`` is the residual Add & Norm of all tokens with the exit beside it, in one launch: the first
programs of the grid are those of the exit, which take longest, the others norm 1 to 8 rows each. Limited by bytes, 6 H
a token in 16 bit, until the exit's latency is longer.

A pooler (H x H) would take one program 13.5 us by itself: with one, ``add_layer_norm_rows_`` of the first tokens alone
and ``linear_rows_(act="tanh")`` make the states, and ``exit_rows_`` or ``exit_add_norm_rows_`` takes them: the norm of
all tokens, which nobody waits for, then runs beside the exit and not in front of the pooler.

``exit_rows`` has what goes in and comes out, and each op in plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.exit_rows import (
    CRITERIA,
    ExitDestinations,
    ExitLimits,
    exit_add_norm_rows__ref,
    exit_norm_rows__ref,
    exit_rows__ref,
)
from engine.kernels.gpu_common import (
    UNALIGNED,
    begin,
    cdiv,
    check_apart,
    check_counts,
    check_device,
    check_float,
    check_rows,
    check_vector,
    check_weight,
    early,
    gelu,
    jit,
    loaded_ahead,
    next_power_of_2,
    on_device,
    runs_kernel,
    shares_of,
    tl,
)
from engine.kernels.gpu_norms import residual_norm, sums_of
from engine.kernels.products import Partials

__all__ = [
    "exit_add_norm_rows_",
    "exit_norm_rows_",
    "exit_rows_",
]



# --- kernel ----------------------------------------------------------------------------------------------------------
#
# Rows of x, of the norm and of the matrices all come in tiles (ROWS, ..., BLOCK_K): BLOCK_K entries are what one warp
# loads at 16 bytes a lane, and each of ROWS rows belongs to one warp, so sums along it need no barrier. An exit program
# has ROWS copies of its state, one where each warp's neurons or classes are.


@jit
def _tiles(ptr, rows, present, stride, H: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr):
    """``ptr[rows]``, rows of H entries, as a tuple of tiles; zero where not present and past H."""
    tiles = ()
    starts = tl.expand_dims(ptr + rows.to(tl.int64) * stride, -1)
    for k in tl.static_range(TILES):
        columns = k * BLOCK_K + tl.arange(0, BLOCK_K)
        here = tl.expand_dims(present, -1) & (columns < H)
        tiles = tiles + (tl.load(starts + columns, mask=here, other=0.0),)
    return tiles


@jit
def _vector(ptr, wanted, H: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr):
    """H entries from ptr on as a tuple of tiles (BLOCK_K,); zeros where not wanted and past H."""
    tiles = ()
    for k in tl.static_range(TILES):
        columns = k * BLOCK_K + tl.arange(0, BLOCK_K)
        tiles = tiles + (tl.load(ptr + columns, mask=(columns < H) & wanted, other=0.0),)
    return tiles


@jit
def _first_token(
    x_ptr,
    sums_ptr,
    shares,
    residual_ptr,
    weight,
    bias,
    eps,
    H: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    MOST_SHARES: tl.constexpr,
):
    """LayerNorm(x + residual) of one row, rounded to its dtype as ``add_layer_norm_rows_`` stores it: all forms of the
    exit, and every executor, then decide on the same numbers. All warps work on it together, then each gets a copy:
    tiles (ROWS, BLOCK_K) of equal rows. With ``shares``, x stands in that many partial sums."""
    x = _vector(x_ptr, shares == 0, H, TILES, BLOCK_K)
    residual = _vector(residual_ptr, True, H, TILES, BLOCK_K)
    rows = ()
    for k in tl.static_range(TILES):
        rows = rows + (x[k].to(tl.float32),)
    for share in tl.static_range(MOST_SHARES):
        part = _vector(sums_ptr + share * H, share < shares, H, TILES, BLOCK_K)
        added = ()
        for k in tl.static_range(TILES):
            added = added + (rows[k] + part[k],)
        rows = added
    summed = ()
    for k in tl.static_range(TILES):
        summed = summed + (rows[k] + residual[k].to(tl.float32),)
    total = summed[0]
    for k in tl.static_range(1, TILES):
        total += summed[k]
    mean = tl.sum(total, axis=0) / H
    centred = ()
    squares = tl.zeros_like(total)
    for k in tl.static_range(TILES):
        part = tl.where(k * BLOCK_K + tl.arange(0, BLOCK_K) < H, summed[k] - mean, 0.0)
        squares += part * part
        centred = centred + (part,)
    scale = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / H + eps)
    copies = ()
    for k in tl.static_range(TILES):
        y = centred[k] * scale * weight[k].to(tl.float32) + bias[k].to(tl.float32)
        copies = copies + (tl.broadcast_to(y.to(residual[k].dtype)[None, :], [ROWS, BLOCK_K]),)
    return copies


@jit
def _products(matrix, state, TILES: tl.constexpr):
    """matrix . state in fp32: matrix in tiles (ROWS, n, BLOCK_K), state in tiles (ROWS, BLOCK_K) of equal rows."""
    total = matrix[0].to(tl.float32) * state[0].to(tl.float32)[:, None, :]
    for k in tl.static_range(1, TILES):
        total += matrix[k].to(tl.float32) * state[k].to(tl.float32)[:, None, :]
    return tl.sum(total, axis=2)


@jit
def _classify(logits_ptr, bias_ptr, matrix, state, chosen, C: tl.constexpr, TILES: tl.constexpr):
    """Write the logits of the classes ``chosen``, whose weights are ``matrix``; returns them."""
    values = tl.load(bias_ptr + chosen, mask=chosen < C, other=0.0).to(tl.float32)
    values += _products(matrix, state, TILES)
    tl.store(logits_ptr + chosen, values, mask=chosen < C)
    return values


@jit(
    do_not_specialize=["layer", "exit_programs", "four", "two"],
    do_not_specialize_on_alignment=(
        *UNALIGNED,
        "exit_layers_ptr",
        "exit_probs_ptr",
        "keep_ptr",
        "exit_logits_ptr",
        "row_ids_ptr",
        "min_depth_ptr",
        "max_depth_ptr",
        "threshold_ptr",
        "script_ptr",
        "index_ptr",
        "b2_ptr",
    ),
)
def _exit_kernel(
    logits_ptr,
    exit_layers_ptr,
    exit_probs_ptr,
    keep_ptr,
    exit_logits_ptr,
    row_ids_ptr,
    min_depth_ptr,
    max_depth_ptr,
    threshold_ptr,
    script_ptr,
    normed_ptr,
    x_ptr,
    residual_ptr,
    state_ptr,
    sums_ptr,
    four,
    two,
    norm_weight_ptr,
    norm_bias_ptr,
    eps,
    index_ptr,
    counts_ptr,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    b2_ptr,
    classifier_ptr,
    classifier_bias_ptr,
    normed_stride,
    x_stride,
    residual_stride,
    state_stride,
    layer,
    exit_programs,
    H: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    CRITERION: tl.constexpr,
    NORM: tl.constexpr,
    STORE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_MIN: tl.constexpr,
    HAS_MAX: tl.constexpr,
    HAS_EXIT_LOGITS: tl.constexpr,
    BY_ROW_ID: tl.constexpr,
    SUMS: tl.constexpr,
    STORE_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
):
    program = tl.program_id(0)
    copies = tl.arange(0, ROWS)
    # Weights do not depend on the kernel in front: they are on their way while it still runs.
    if STORE:
        if program >= exit_programs:
            tokens = loaded_ahead(counts_ptr + 1)
            shares = 0  # of a row of x
            if SUMS != "never":
                shares = shares_of(tokens, four, two)
            columns = tl.arange(0, BLOCK_H)
            weight = tl.load(norm_weight_ptr + columns, mask=columns < H, other=0.0)
            bias = tl.load(norm_bias_ptr + columns, mask=columns < H, other=0.0)
            begin(EARLY)
            first = (program - exit_programs) * STORE_ROWS
            if first < tokens:
                token = first + tl.arange(0, STORE_ROWS)
                present = token < tokens
                y = residual_norm(
                    x_ptr, token, x_stride, sums_ptr, shares, residual_ptr, token, residual_stride, present, columns,
                    weight, bias, eps, H, SUMS, STORE_ROWS <= 4,
                )  # fmt: skip
                places = normed_ptr + token.to(tl.int64)[:, None] * normed_stride + columns[None, :]
                here = present[:, None] & (columns < H)[None, :]
                tl.store(places, y.to(normed_ptr.dtype.element_ty), mask=here)
            return
    if NORM:
        norm_weight = _vector(norm_weight_ptr, True, H, TILES, BLOCK_K)
        norm_bias = _vector(norm_bias_ptr, True, H, TILES, BLOCK_K)
    i = program // SPLITS
    split = program % SPLITS  # of SPLITS that share the row's classes; the first one writes all else
    neurons = copies[:, None] * (BLOCK_P // ROWS) + tl.arange(0, BLOCK_P // ROWS)[None, :]
    classes = copies[:, None] * (BLOCK_C // ROWS) + tl.arange(0, BLOCK_C // ROWS)[None, :]
    if CRITERION == "last":
        own = split * BLOCK_C + classes
        first_classes = _tiles(classifier_ptr, own, own < C, H, H, TILES, BLOCK_K)
    elif CRITERION != "confidence":
        z = tl.load(b2_ptr).to(tl.float32)
        first_neurons = _tiles(w1_ptr, neurons, neurons < P, H, H, TILES, BLOCK_K)
        first_b1 = tl.load(b1_ptr + neurons, mask=neurons < P, other=0.0)
        first_w2 = tl.load(w2_ptr + neurons, mask=neurons < P, other=0.0)
    live = loaded_ahead(counts_ptr)
    row_id = loaded_ahead(row_ids_ptr + i).to(tl.int64)
    source = i
    if HAS_INDEX:
        source = loaded_ahead(index_ptr + i)
    row_shares = 0
    if NORM and SUMS != "never":
        row_shares = shares_of(loaded_ahead(counts_ptr + 1) if HAS_INDEX else live, four, two)
    limit = row_id if BY_ROW_ID else i.to(tl.int64)
    if CRITERION == "scripted":
        script = loaded_ahead(script_ptr + limit, i < live, 0)
    elif CRITERION != "last":
        threshold = loaded_ahead(threshold_ptr + limit, i < live, 0.0)
    if HAS_MIN:
        min_depth = loaded_ahead(min_depth_ptr + limit, i < live, 0)
    if HAS_MAX:
        max_depth = loaded_ahead(max_depth_ptr + limit, i < live, 0)
    begin(EARLY)
    if i >= live:
        return
    if NORM:
        row = source.to(tl.int64)
        sums = sums_ptr
        if SUMS != "never":
            sums += source * row_shares * H
        state = _first_token(
            x_ptr + row * x_stride, sums, row_shares, residual_ptr + row * residual_stride, norm_weight, norm_bias, eps,
            H, TILES, BLOCK_K, ROWS, 0 if SUMS == "never" else 4,
        )  # fmt: skip
    else:
        state = _tiles(state_ptr, source + copies * 0, copies >= 0, state_stride, H, TILES, BLOCK_K)

    logits_ptr += row_id * C
    leave = i >= 0
    prob = 1.0
    # No name of this half may come up again below: there it would be set anew inside a run-time branch.
    if CRITERION != "last":
        if CRITERION == "confidence":
            # Running maximum and sum of exp over tiles of classes. Logits of a row that stays are written too: the
            # exit that it leaves through writes them again.
            top = -float("inf")
            size = 0.0
            for first in range(0, C, BLOCK_C):
                chosen = first + classes
                read = _tiles(classifier_ptr, chosen, chosen < C, H, H, TILES, BLOCK_K)
                values = _classify(logits_ptr, classifier_bias_ptr, read, state, chosen, C, TILES)
                values = tl.where(chosen < C, values, -float("inf"))
                higher = tl.maximum(top, tl.max(tl.max(values, axis=1), axis=0))
                size = size * tl.exp(top - higher) + tl.sum(tl.sum(tl.exp(values - higher), axis=1), axis=0)
                top = higher
            z = -tl.log(size - 1.0)
        else:
            hidden = gelu(_products(first_neurons, state, TILES) + first_b1.to(tl.float32))
            votes = hidden * first_w2.to(tl.float32)
            for neuron in tl.static_range(BLOCK_P, P, BLOCK_P):
                more = neuron + neurons
                rest = _tiles(w1_ptr, more, more < P, H, H, TILES, BLOCK_K)
                b1 = tl.load(b1_ptr + more, mask=more < P, other=0.0).to(tl.float32)
                w2 = tl.load(w2_ptr + more, mask=more < P, other=0.0).to(tl.float32)
                votes += gelu(_products(rest, state, TILES) + b1) * w2
            z += tl.sum(tl.sum(votes, axis=1), axis=0)
        if HAS_EXIT_LOGITS:
            tl.store(exit_logits_ptr + i, z, mask=split == 0)
        # Comparisons with NaN are false: a row whose z is NaN never leaves of its own accord.
        leave = script <= layer if CRITERION == "scripted" else z > threshold
        if HAS_MIN:
            leave = leave & (min_depth <= layer)
        prob = 1.0 / (1.0 + tl.exp(-z))
        if HAS_MAX:
            forced = max_depth <= layer
            leave = leave | forced
            prob = tl.where(forced, 1.0, prob)

    tl.store(keep_ptr + i, tl.where(leave, 0, 1).to(tl.int8), mask=split == 0)
    if leave:
        tl.store(exit_layers_ptr + row_id, layer, mask=split == 0)
        tl.store(exit_probs_ptr + row_id, prob, mask=split == 0)
        if CRITERION != "confidence":
            begun = 0
            if CRITERION == "last":
                _classify(logits_ptr, classifier_bias_ptr, first_classes, state, own, C, TILES)
                begun = SPLITS * BLOCK_C
            for tile in range(begun + split * BLOCK_C, C, SPLITS * BLOCK_C):
                wanted = tile + classes
                matrix = _tiles(classifier_ptr, wanted, wanted < C, H, H, TILES, BLOCK_K)
                _classify(logits_ptr, classifier_bias_ptr, matrix, state, wanted, C, TILES)


# --- public functions ------------------------------------------------------------------------------------------------


# Programs of 8 warps that an H100 holds at once: two at 128 registers a thread (16 bit, H 768) on each of its 132
# multiprocessors. Programs that share a row decide twice, free only while none has to wait (reckoned, not measured).
_PROGRAMS = 264
# Beside blocks of the norm, those wait. Here an extra trip through the classifier, for a row that leaves, is hidden.
_PROGRAMS_BESIDE = 66
_NUM_WARPS = 8


def exit_block(
    cap_rows: int,
    hidden: int,
    neurons: int,
    classes: int,
    criterion: str,
    itemsize: int,
    tokens: int = 0,
) -> dict[str, int]:
    """Tiles of the kernel, and how many programs share a row's classes (all of them are needed to be confident).

    itemsize is that of the widest weight; tokens: for whose norm the grid has programs, too. 8 warps hold 32 neurons or
    classes of up to 96 KB, 96 registers a thread.
    """
    block_k = min(512 // itemsize, max(16, next_power_of_2(hidden)))
    rows = 8

    most = 32
    while most > rows and most * hidden * itemsize > 96 * 1024:
        most //= 2
    block_c = min(most, max(rows, next_power_of_2(classes)))
    programs = _PROGRAMS_BESIDE if tokens else _PROGRAMS
    splits = 1 if criterion == "confidence" else min(cdiv(classes, block_c), max(1, programs // cap_rows))
    # A row of four partial sums is 12 KB, and a multiprocessor brings some 84 a microsecond: few rows to a program
    # while all programs run at once.
    store_rows = next((n for n in (1, 4) if cap_rows * splits + cdiv(tokens, n) <= _PROGRAMS), 8)
    return {
        "STORE_ROWS": store_rows if tokens else 1,
        "BLOCK_H": next_power_of_2(hidden),
        "ROWS": rows,
        "TILES": cdiv(hidden, block_k),
        "BLOCK_K": block_k,
        "BLOCK_P": min(most, max(rows, next_power_of_2(neurons))),
        "BLOCK_C": block_c,
        "SPLITS": splits,
        "num_warps": _NUM_WARPS,
        # Two programs a multiprocessor; left alone, ptxas takes up to twice as many at H 384. Three, with weights of 8
        # neurons at a time, let the exit make four trips to memory for one: 15 us for 10 at 4 096 tokens.
        **({"maxnreg": 128} if itemsize == 2 else {}),
        "num_stages": 1,
    }


def _check(out: ExitDestinations, limits: ExitLimits, x: Tensor, counts, layer, criterion, policy, classifier) -> None:
    check_float("the state", x)
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"the state must have shape [rows, H], got {list(x.shape)}")
    hidden = x.shape[1]
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    if layer < 1:
        raise ValueError(f"layer must be at least 1, the layers that have run, got {layer}")
    check_counts("counts", counts, x, "the state")
    cap_rows, batch = limits.row_ids.shape[0], out.exit_layers.shape[0]
    check_vector("row_ids", limits.row_ids, x, "the state", torch.int32, 0)
    check_vector("keep", out.keep, x, "the state", torch.int8, cap_rows)
    check_vector("exit_layers", out.exit_layers, x, "the state", torch.int32, 0)
    check_vector("exit_probs", out.exit_probs, x, "the state", torch.float32, batch)
    if out.exit_logits is not None:
        check_vector("exit_logits", out.exit_logits, x, "the state", torch.float32, cap_rows)
    weight, bias = classifier
    classes = weight.shape[0]
    check_weight("the classifier's weight", weight, x, "the state", classes, hidden)
    check_weight("the classifier's bias", bias, x, "the state", classes)
    logits = out.logits
    if logits.dtype != torch.float32 or tuple(logits.shape) != (batch, classes) or not logits.is_contiguous():
        raise ValueError(
            f"logits must be contiguous float32 of shape [{batch}, {classes}], got {logits.dtype} {list(logits.shape)} "
            f"with strides {logits.stride()}"
        )
    check_device("logits", logits, x, "the state")
    if criterion == "last":
        return
    entries = batch if limits.by_row_id else cap_rows
    asked = {"threshold_logit": criterion != "scripted", "script": criterion == "scripted"}
    for name in ("min_depth", "max_depth", "threshold_logit", "script"):
        tensor = getattr(limits, name)
        if tensor is not None:
            dtype = torch.float32 if name == "threshold_logit" else torch.int32
            check_vector(name, tensor, x, "the state", dtype, entries)
        elif asked.get(name):
            raise ValueError(f"the {criterion} criterion needs {name} for every row, got None")
    if criterion == "confidence":
        return
    if policy is None:
        raise ValueError(f"the {criterion} criterion needs policy, (w1, b1, w2, b2), got None")
    w1, b1, w2, b2 = policy
    neurons = w1.shape[0]
    check_weight("w1", w1, x, "the state", neurons, hidden)
    check_weight("b1", b1, x, "the state", neurons)
    check_weight("w2", w2, x, "the state", 1, neurons)
    check_weight("b2", b2, x, "the state", 1)


def _check_norm(limits: ExitLimits, x: Tensor, residual: Tensor, norm, index: Tensor | None, partials) -> None:
    hidden, cap_rows = x.shape[1], limits.row_ids.shape[0]
    for name, rows in (("x", x), ("residual", residual)):
        check_rows(name, rows, x, "x", hidden, cap_rows if index is None else 0)
    check_weight("the norm's weight", norm[0], x, "x", hidden)
    check_weight("the norm's bias", norm[1], x, "x", hidden)
    if partials is not None:
        partials.check(x, "x")
    if index is not None:
        check_vector("index", index, x, "x", torch.int32, cap_rows)


def _launch(
    out,
    limits,
    x,
    residual,
    norm,
    index,
    counts,
    layer,
    criterion,
    policy,
    classifier,
    partials,
    normed=None,
    state=None,
) -> None:
    """x: what the exit reads, where no state is given beside the norm of all tokens."""
    cap_rows, hidden = limits.row_ids.shape[0], x.shape[1]
    read = x if state is None else state
    tokens = 0 if normed is None else normed.shape[0]
    if cap_rows + tokens == 0:
        return
    w1, b1, w2, b2 = (None,) * 4 if criterion in ("confidence", "last") else policy
    norm_weight, norm_bias, eps = (None, None, 0.0) if norm is None else norm
    neurons = 1 if w1 is None else w1.shape[0]
    itemsize = max(t.element_size() for t in (classifier[0], w1, norm_weight, x) if t is not None)
    block = exit_block(
        max(cap_rows, 1),
        hidden,
        neurons,
        classifier[0].shape[0],
        criterion,
        itemsize,
        tokens,
    )
    exit_programs = cap_rows * block["SPLITS"]
    with on_device(x):
        _exit_kernel[(exit_programs + cdiv(tokens, block["STORE_ROWS"]),)](
            out.logits,
            out.exit_layers,
            out.exit_probs,
            out.keep,
            out.exit_logits,
            limits.row_ids,
            limits.min_depth,
            limits.max_depth,
            limits.threshold_logit,
            limits.script,
            normed,
            x,
            residual,
            read,
            *((None, 0, 0) if partials is None else partials),
            norm_weight,
            norm_bias,
            eps,
            index,
            counts,
            w1,
            b1,
            w2,
            b2,
            *classifier,
            0 if normed is None else normed.stride(0),
            x.stride(0),
            0 if residual is None else residual.stride(0),
            read.stride(0),
            layer,
            exit_programs,
            H=hidden,
            P=neurons,
            C=classifier[0].shape[0],
            CRITERION=criterion,
            NORM=norm is not None and state is None,
            STORE=normed is not None,
            HAS_INDEX=index is not None,
            HAS_MIN=limits.min_depth is not None,
            HAS_MAX=limits.max_depth is not None,
            HAS_EXIT_LOGITS=out.exit_logits is not None,
            BY_ROW_ID=limits.by_row_id,
            SUMS=sums_of(partials, x.shape[0]),
            **block,
            **early(x),
        )


def exit_rows_(
    out: ExitDestinations,
    limits: ExitLimits,
    state: Tensor,
    counts: Tensor,
    layer: int,
    criterion: str,
    policy: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    classifier: tuple[Tensor, Tensor],
) -> None:
    """The exit check of the counts[0] live rows on given states (behind a pooler), one a row.

    out         written: see ExitDestinations; entries of rows that stay, and past the live count, are left alone (but
                "confidence" writes the logits of every live row)
    limits      see ExitLimits; cap_rows is the size of its row_ids
    state       (cap_rows or more, H), fp16, bf16 or fp32, last dimension contiguous
    counts      (2,) int32: live rows, live tokens
    layer       layers that have run, from 1 on
    criterion   "policy", "scripted" (the policy is computed all the same), "confidence" or "last"
    policy      (w1 (P, H), b1 (P,), w2 (1, P), b2 (1,)), each fp32 or the dtype of state, contiguous; unused with
                "confidence" and "last", where it may be None
    classifier  (weight (C, H), bias (C,)), the same
    The kernel in front may not be one that writes weights, counts or limits: they may be read before it has ended.
    Everything is computed in fp32 from the state as stored. A row's result does not depend on the other rows.
    Bytes, of R live rows and b a number: R H b of states in; P H b of w1 (none with "confidence" and "last") and C H b
    of the classifier (where a row leaves, or with "confidence"), once from memory and for further rows from L2; 4 C out
    for a row that leaves (with "confidence" for all).
    """
    _check(out, limits, state, counts, layer, criterion, policy, classifier)
    check_rows("state", state, state, "state", state.shape[1], limits.row_ids.shape[0])
    check_apart(out.logits, "state", state, "logits")
    if not runs_kernel(state):
        exit_rows__ref(out, limits, state, counts, layer, criterion, policy, classifier)
        return
    _launch(out, limits, state, None, None, None, counts, layer, criterion, policy, classifier, None)


def exit_norm_rows_(
    out: ExitDestinations,
    limits: ExitLimits,
    x: Tensor,
    residual: Tensor,
    norm: tuple[Tensor, Tensor, float],
    counts: Tensor,
    layer: int,
    criterion: str,
    policy: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    classifier: tuple[Tensor, Tensor],
    index: Tensor | None = None,
    partials: Partials | None = None,
) -> None:
    """``exit_rows_`` on LayerNorm(x + residual) of each live row's first token, where there is no pooler.

    x, residual  (rows, H), one dtype, last dimension contiguous; the normed state is rounded to that dtype
    norm         (weight (H,), bias (H,), eps), fp32 or the dtype of x
    index        (cap_rows or more,) int32 or None: row i reads x[index[i]] and residual[index[i]] (cu_seqlens: first
                 tokens of the rows layout); None: both are compact, row i reads row i
    partials     what the product that made x was given, or None: rows of x are taken from there where they are left as
                 sums. That product's live count is counts[1], and counts[0] without index
    The norm is not stored: ``add_layer_norm_compact_`` computes it again for the tokens that stay. Bytes: those of
    ``exit_rows_``, with 2 R H b of x and residual and 4 R of index for its R H b; a row of x in S partial sums is 4 S H
    instead of H b.
    """
    _check(out, limits, x, counts, layer, criterion, policy, classifier)
    _check_norm(limits, x, residual, norm, index, partials)
    if not runs_kernel(x):
        exit_norm_rows__ref(
            out, limits, x, residual, norm, counts, layer, criterion, policy, classifier, index, partials
        )
        return
    _launch(out, limits, x, residual, norm, index, counts, layer, criterion, policy, classifier, partials)


def exit_add_norm_rows_(
    out: ExitDestinations,
    limits: ExitLimits,
    normed: Tensor,
    x: Tensor,
    residual: Tensor,
    norm: tuple[Tensor, Tensor, float],
    counts: Tensor,
    layer: int,
    criterion: str,
    policy: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    classifier: tuple[Tensor, Tensor],
    index: Tensor | None,
    state: Tensor | None = None,
    partials: Partials | None = None,
) -> None:
    """``normed[t] = LayerNorm(x[t] + residual[t])`` for t < counts[1], and ``exit_norm_rows_`` beside it: one launch.
    With ``state``, ``exit_rows_`` beside it.

    normed       (cap_tokens, H), dtype of x, last dimension contiguous; rows from counts[1] on are left alone.
                 Overlaps neither x nor residual, of which the exit reads first tokens meanwhile
    x, residual  (cap_tokens or more, H), one dtype, last dimension contiguous
    norm         (weight (H,), bias (H,), eps), fp32 or the dtype of x
    counts       (2,) int32: live rows, live tokens
    index        (cap_rows or more,) int32, cu_seqlens: where the live rows' first tokens stand; None with ``state``
    state        (cap_rows or more, H), dtype of x, last dimension contiguous, apart from normed: what the exit reads of
                 each live row, from a pooler. None: the normed first tokens
    partials     as in ``exit_norm_rows_``
    The rest as in ``exit_norm_rows_``. Bytes, of T live tokens and b a number: 3 T H b, two rows in and one out (a row
    of x in S partial sums is 4 S H instead of H b), and those of ``exit_norm_rows_``, or of ``exit_rows_``, beside it.
    Without ``state`` the exit decides on the numbers that ``normed`` gets, bit for bit.
    """
    _check(out, limits, x, counts, layer, criterion, policy, classifier)
    if (index is None) == (state is None):
        given = "neither" if index is None else "both"
        raise ValueError(f"either index (where first tokens stand) or state must be given, got {given}")
    hidden = x.shape[1]
    if state is not None:
        check_rows("state", state, x, "x", hidden, limits.row_ids.shape[0])
        check_apart(normed, "state", state, "normed")
    _check_norm(limits, x, residual, norm, index, partials)
    check_rows("normed", normed, x, "x", hidden)
    for name, rows in (("x", x), ("residual", residual)):
        check_rows(name, rows, x, "x", hidden, normed.shape[0])
        check_apart(normed, name, rows, "normed")
    if not runs_kernel(x):
        exit_add_norm_rows__ref(
            out, limits, normed, x, residual, norm, counts, layer, criterion, policy, classifier, index, state, partials
        )
        return
    _launch(
        out, limits, x, residual, norm, index, counts, layer, criterion, policy, classifier, partials, normed, state
    )
