"""``run_encoder`` against the slowest correct version: every row alone, layer by layer, in plain torch."""

from __future__ import annotations

import gc
import math
import threading

import pytest
import torch
from torch.nn.functional import layer_norm, linear

from engine.kernels import extension
from engine.kernels.attention import ALL_TOKENS
from engine.kernels.encoder import EncoderPlan, EncoderTensors, run_encoder
from engine.kernels.exits import exit_policy_ref
from engine.kernels.layer import finish_layer_ref
from engine.kernels.linear import pack_panels
from tests.kernels.cases import cu_seqlens_of, needs_extension

pytestmark = needs_extension
EPS = 1e-6
FIRST = 2  # position of a row's first token
ALWAYS, NEVER = -1.0, math.inf  # second_pass_tokens: first tokens first at every exit that is read, or nowhere


def unpacked(panels, outputs):
    return panels.transpose(1, 2).flatten(0, 1)[:outputs]


def tensors_of(layers=3, num_heads=2, d=8, wide=20, pooled=False, exit_layers=None, classes=3, bias=False, seed=0):
    """Weights under which rows disagree: policies spread over both signs."""
    g = torch.Generator().manual_seed(seed)
    h = num_heads * d
    exit_layers = list(exit_layers or range(1, layers + 1))

    def randn(*shape, scale=1.0):
        return torch.randn(*shape, generator=g) * scale

    def product(n, k):
        return pack_panels(randn(n, k, scale=k**-0.5)), randn(n, scale=0.1)

    def norm():
        return randn(h, scale=0.2) + 1, randn(h, scale=0.2)

    each = []
    for _ in range(layers):
        each += [*product(3 * h, h), *product(h, h), *norm(), *product(wide, h), *product(h, wide), *norm()]
    exits = []
    for layer in exit_layers:
        if pooled:
            exits += [randn(h, h, scale=h**-0.5), randn(h)]
        if layer != exit_layers[-1]:
            exits += [randn(5, h, scale=2 * h**-0.5), randn(5), randn(1, 5), randn(1, scale=0.1)]
        exits += product(classes, h)
    return EncoderTensors(
        word=randn(50, h),
        token_type=randn(2, h),
        position=randn(40, h),
        norm_weight=norm()[0],
        norm_bias=norm()[1],
        norm_eps=EPS,
        first_position=FIRST,
        num_heads=num_heads,
        scale=d**-0.5,
        position_bias=randn(num_heads, 2 * 36 - 1) if bias else None,
        layers=each,
        eps=[EPS] * (2 * layers),
        exit_layers=exit_layers,
        exits=exits,
        pooled=pooled,
        classes=classes,
    )


def batch_of(lengths, seed=1):
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    return torch.randint(0, 50, (total,), generator=g), torch.randint(0, 2, (total,), generator=g)


def read_row(t: EncoderTensors, ids, types):
    """Of one row at every exit: (layer, z, class logits); z of the last one is inf."""
    n = len(ids)
    x = t.word[ids] + t.position[FIRST : FIRST + n] + (t.token_type[types] if types is not None else t.token_type[0])
    x = layer_norm(x, x.shape[1:], t.norm_weight, t.norm_bias, EPS)
    exits, found = list(t.exits), []
    for layer in range(1, len(t.eps) // 2 + 1):
        qkv_weight, qkv_bias, *rest = t.layers[12 * (layer - 1) : 12 * layer]
        qkv = linear(x, unpacked(qkv_weight, len(qkv_bias)), qkv_bias)
        rest = *rest[:4], EPS, *rest[4:], EPS
        cu_seqlens = cu_seqlens_of([n])
        x = finish_layer_ref(qkv, cu_seqlens, None, x, t.num_heads, t.scale, ALL_TOKENS, t.position_bias, *rest)
        if layer not in t.exit_layers:
            continue
        pooler = (exits.pop(0), exits.pop(0)) if t.pooled else (None, None)
        state, z = torch.tanh(linear(x[:1], *pooler)) if t.pooled else x[:1], math.inf
        if layer != t.exit_layers[-1]:
            policy = [exits.pop(0) for _ in range(4)]
            state, z = exit_policy_ref(x[:1], *pooler, *policy)
        weight, bias = exits.pop(0), exits.pop(0)
        found.append((layer, float(z), linear(state, unpacked(weight, t.classes), bias)[0]))
    return found


def expected(t, lengths, ids, types, threshold=None, script=None, least=None, most=None):
    ends = cu_seqlens_of(lengths).tolist()
    out = []
    for i in range(len(lengths)):
        part = slice(ends[i], ends[i + 1])
        last = len(t.eps) // 2 if most is None else int(most[i])
        for layer, z, logits in read_row(t, ids[part], None if types is None else types[part]):
            if layer >= last:
                z = math.inf
            leaves = z > threshold[i] if threshold is not None else script[i] <= layer
            if layer >= last or (leaves and (least is None or layer >= least[i])):
                out.append((logits, layer, 1 / (1 + math.exp(-z))))
                break
    return torch.stack([o[0] for o in out]), [o[1] for o in out], torch.tensor([o[2] for o in out])


def run(t, lengths, ids, types, order, threshold=None, script=None, least=None, most=None, rates=None, deepest=None):
    plan = EncoderPlan(t)
    layers = len(t.eps) // 2
    deepest = deepest or layers
    if rates is None:
        rates = torch.tensor([1.0 if k in t.exit_layers[:-1] else -1.0 for k in range(1, deepest + 1)])
    return run_encoder(plan, ids, types, tuple(lengths), threshold, script, least, most, rates, deepest, order)


def check(t, lengths, order=NEVER, types=True, **rules):
    ids, segment = batch_of(lengths)
    segment = segment if types else None
    logits, layers, probs = run(t, lengths, ids, segment, order, **rules)
    rules.pop("rates", None)
    wanted = expected(t, lengths, ids, segment, **rules)
    assert layers.tolist() == wanted[1]
    torch.testing.assert_close(logits, wanted[0], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(probs, wanted[2], rtol=1e-4, atol=1e-5)
    return layers


LENGTHS = [[1], [14], [3, 1, 6, 2, 9], [1] * 7, [30] + [2] * 9]


@pytest.mark.parametrize("order", [ALWAYS, NEVER], ids=["first tokens first", "whole layers"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("d", [8, 5], ids=["width 16", "width 10"])
def test_thresholds(lengths, order, d):
    """A width that panels do not divide has no product of its own for keys and values."""
    t = tensors_of(d=d, wide=23)
    check(t, lengths, order, threshold=torch.linspace(-1, 1, len(lengths)))


@pytest.mark.parametrize("order", [ALWAYS, NEVER], ids=["first tokens first", "whole layers"])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("exit_layers", [[1, 2, 3, 4], [2, 4], [4]], ids=str)
def test_scripts(order, pooled, exit_layers):
    t = tensors_of(4, pooled=pooled, exit_layers=exit_layers, bias=True)
    script = torch.tensor([exit_layers[i % len(exit_layers)] for i in range(9)], dtype=torch.int32)
    lengths = [1 + (5 * i) % 12 for i in range(9)]
    assert check(t, lengths, order, types=False, script=script).tolist() == script.tolist()


@pytest.mark.parametrize("order", [ALWAYS, NEVER], ids=["first tokens first", "whole layers"])
def test_limits_of_each_row(order):
    t = tensors_of(4)
    lengths = [1 + (3 * i) % 10 for i in range(16)]
    least = torch.tensor([1 + i % 4 for i in range(16)], dtype=torch.int32)
    most = torch.tensor([max(int(k), 1 + i // 4) for i, k in enumerate(least)], dtype=torch.int32)
    for threshold in (torch.zeros(16), torch.full((16,), -math.inf), torch.full((16,), math.inf)):
        check(t, lengths, order, threshold=threshold, least=least, most=most)


def test_equal_is_not_above_and_nan_never_is():
    t = tensors_of(2)
    ids, types = batch_of([4, 3])
    z = [read_row(t, ids[part], types[part])[0][1] for part in (slice(0, 4), slice(4, 7))]
    _, layers, probs = run(t, [4, 3], ids, types, NEVER, threshold=torch.full((2,), -math.inf))
    assert layers.tolist() == [1, 1]
    exact = torch.logit(probs.double()).float()  # z as the op has it, but for a rounding
    torch.testing.assert_close(exact, torch.tensor(z), rtol=1e-3, atol=1e-3)
    _, layers, probs = run(t, [4, 3], ids, types, NEVER, threshold=torch.full((2,), math.nan))
    assert layers.tolist() == [2, 2] and probs.tolist() == [1.0, 1.0]
    _, layers, _ = run(t, [4, 3], ids, types, NEVER, threshold=torch.full((2,), math.inf))
    assert layers.tolist() == [2, 2]


def test_exits_that_are_not_read_and_an_end_before_the_last_layer():
    t = tensors_of(4)
    ids, types = batch_of([5, 2, 7])
    never = torch.full((3,), -math.inf)
    rates = torch.tensor([-1.0, -1.0, 0.5, -1.0])
    assert run(t, [5, 2, 7], ids, types, NEVER, threshold=never, rates=rates)[1].tolist() == [3, 3, 3]
    logits, layers, probs = run(t, [5, 2, 7], ids, types, NEVER, rates=torch.full((2,), -1.0), deepest=2)
    assert layers.tolist() == [2, 2, 2] and probs.tolist() == [1.0] * 3
    wanted = expected(t, [5, 2, 7], ids, types, threshold=never + math.inf, most=[2, 2, 2])
    torch.testing.assert_close(logits, wanted[0], rtol=1e-4, atol=2e-5)


def test_the_other_rows_change_no_bit_and_the_order_of_work_nothing_but_rounding():
    t = tensors_of(3, 2, 16, 64)
    lengths = [1 + (7 * i) % 15 for i in range(24)]
    ids, types = batch_of(lengths)
    threshold = torch.linspace(-1, 1, 24)
    want = run(t, lengths, ids, types, NEVER, threshold=threshold)
    assert len(set(want[1].tolist())) > 1
    for order in (ALWAYS, 4.0):
        for a, b in zip(run(t, lengths, ids, types, order, threshold=threshold), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    ends = cu_seqlens_of(lengths).tolist()
    for i in range(24):
        part = slice(ends[i], ends[i + 1])
        alone = run(t, lengths[i : i + 1], ids[part], types[part], NEVER, threshold=threshold[i : i + 1])
        for a, b in zip(alone, want, strict=True):
            assert torch.equal(a[0], b[i])


def test_every_instruction_set(instruction_set):
    t = tensors_of(3, 3, 12, 70, pooled=True, bias=True)
    check(t, [5, 9, 1, 13], ALWAYS, threshold=torch.zeros(4))


def test_a_batch_that_is_larger_than_what_a_thread_keeps():
    """64 MiB: 30 rows of 1 000 tokens at 640 floats a token."""
    t = tensors_of(1, 2, 32, 192)._replace(position=torch.randn(1002, 64))
    lengths = [1000] * 30
    ids, types = batch_of(lengths)
    logits, layers, _ = run(t, lengths, ids, types, NEVER)
    assert layers.tolist() == [1] * 30
    want = read_row(t, ids[-1000:], types[-1000:])[0][2]
    torch.testing.assert_close(logits[-1], want, rtol=1e-4, atol=2e-5)


def test_threads_share_a_plan_and_change_nothing():
    t = tensors_of(3, 4, 32, 512)
    plan = EncoderPlan(t)
    lengths = [1 + (11 * i) % 30 for i in range(20)]
    ids, types = batch_of(lengths)
    rest = torch.linspace(-1, 1, 20), None, None, None, torch.tensor([0.3, 0.3, -1.0]), 3, 6.0
    torch.set_num_threads(1)
    want = run_encoder(plan, ids, types, lengths, *rest)
    torch.set_num_threads(2)
    problems = []

    def work():
        for _ in range(20):
            got = run_encoder(plan, ids, types, lengths, *rest)
            if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
                problems.append(got)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_a_plan_holds_its_weights_and_goes_with_its_owner():
    t = tensors_of(2)
    ids, types = batch_of([4, 3])
    rest = ids, types, (4, 3), torch.zeros(2), None, None, None, torch.tensor([0.5, -1.0]), 2, NEVER
    plan = EncoderPlan(t)
    want = run_encoder(plan, *rest)
    handle, classes = plan.handle, t.classes
    del t
    gc.collect()
    for _ in range(50):
        torch.full((40, 16), math.nan)
    assert torch.equal(run_encoder(plan, *rest)[0], want[0])
    del plan
    gc.collect()
    with pytest.raises(ValueError, match=f"plan must be one that encoder_plan made and nobody dropped, got {handle}"):
        torch.ops.consistentee.run_encoder(*rest[:3], handle, classes, *rest[3:])
    assert extension.library() is not None


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(word=torch.zeros(50, 16, dtype=torch.float64)), "word must be float32, got float64"),
        (dict(position=torch.zeros(40, 8)), r"position must have shape \[40, 16\], got \[40, 8\]"),
        (dict(norm_bias=torch.zeros(7)), r"norm_bias must have shape \[16\], got \[7\]"),
        (dict(num_heads=3), "num_heads must divide the width of query, got 3"),
        (dict(eps=[EPS] * 3), "layers must hold 12 tensors and eps 2 numbers for each layer, got 24 and 3"),
        (dict(layers=[]), "layers must hold 12 tensors and eps 2 numbers"),
        (dict(pooled=True), "exits must hold 8 tensors for each of exit_layers, the last one 4 less, got 8 for 2"),
        (dict(classes=4), r"classifier_bias must have shape \[4\], got \[3\]"),
        (dict(exit_layers=[2, 1]), "exit_layers must rise from at least 1 to 2, got 1 behind 2"),
        (dict(exit_layers=[1, 3]), "exit_layers must rise from at least 1 to 2, got 3 behind 1"),
        (dict(first_position=-1), "first_position must not be negative"),
        (dict(position_bias=torch.zeros(2, 4)), r"position_bias must be \[num_heads, 2 \* M - 1\]"),
    ],
)
def test_messages_of_a_plan(change, message):
    with pytest.raises(ValueError, match=message):
        EncoderPlan(tensors_of(2)._replace(**change))


@pytest.mark.parametrize(
    "at, value, message",
    [
        (1, torch.zeros(6, dtype=torch.int64), r"input_ids must have shape \[7\], got \[6\]"),
        (1, torch.zeros(7, dtype=torch.int32), "input_ids must be int64, got int32"),
        (1, torch.full((7,), 50), r"input_ids must lie in \[0, 50\), the rows of word, got 50 at index 0"),
        (2, torch.full((7,), -1), r"token_type_ids must lie in \[0, 2\), the rows of token_type, got -1"),
        (3, (7, 0), "lengths must be at least 1, got 0 at index 1"),
        (4, torch.zeros(3), r"threshold_logit must have shape \[2\], got \[3\]"),
        (5, torch.zeros(2), "script must be int32, got float32"),
        (6, torch.ones(1, dtype=torch.int32), r"min_depth must have shape \[2\], got \[1\]"),
        (8, torch.zeros(3), r"leave_rates must have shape \[2\], got \[3\]"),
        (9, 3, "deepest must be a layer with an exit, at most 2, got 3"),
        (9, 0, "deepest must be a layer with an exit, at most 2, got 0"),
    ],
)
def test_messages_of_a_run(at, value, message):
    ids, types = batch_of([4, 3])
    plan = EncoderPlan(tensors_of(2))
    arguments = [plan, ids, types, (4, 3), torch.zeros(2), None, None, None, torch.tensor([0.5, -1.0]), 2, NEVER]
    arguments[at] = value
    with pytest.raises((ValueError, IndexError), match=message):
        run_encoder(*arguments)


def test_rows_longer_than_the_position_table():
    ids, types = batch_of([39])
    with pytest.raises(IndexError, match=r"positions must lie in \[0, 40\), the rows of position, got 40"):
        run(tensors_of(2), [39], ids, types, NEVER, threshold=torch.zeros(1))
