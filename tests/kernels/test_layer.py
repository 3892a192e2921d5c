import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear

from engine.kernels.attention import ALL_TOKENS, FIRST_TOKENS, OTHER_TOKENS, lead_attention_ref
from engine.kernels.exits import exit_policy_ref
from engine.kernels.layer import LAYER_TENSORS, finish_layer, finish_layer_ref, run_layers, run_layers_ref
from engine.kernels.linear import pack_panels
from tests.kernels.cases import assert_no_worse, cu_seqlens_of, needs_extension


def layer_case(lengths, num_heads, d, wide):
    hidden = num_heads * d
    weights = [torch.randn(n, k) * k**-0.5 for n, k in ((hidden, hidden), (wide, hidden), (hidden, wide))]
    biases = [torch.randn(len(w)) for w in weights]
    norms = [torch.randn(hidden) for _ in range(4)]
    return torch.randn(sum(lengths), 3 * hidden), weights, biases, norms


def operands(weights, biases, norms, eps=1e-6):
    first, second, third = ((pack_panels(w), b) for w, b in zip(weights, biases, strict=True))
    return *first, *norms[:2], eps, *second, *third, *norms[2:], eps


def plain(qkv, cu_seqlens, rows, residual, num_heads, scale, part, bias, weights, biases, norms, eps=1e-6):
    """The definition, on weights that are not packed, in the dtype of qkv."""

    def cast(x):
        return x.to(qkv.dtype)

    query, key, value = qkv.chunk(3, 1)
    x = lead_attention_ref(query, key, value, cu_seqlens, rows, num_heads, scale, part, bias, len(residual))
    size = (residual.shape[1],)
    x = layer_norm(linear(x, cast(weights[0]), cast(biases[0])) + residual, size, cast(norms[0]), cast(norms[1]), eps)
    y = linear(gelu(linear(x, cast(weights[1]), cast(biases[1]))), cast(weights[2]), cast(biases[2]))
    return layer_norm(y + x, size, cast(norms[2]), cast(norms[3]), eps)


def check(lengths, num_heads, d, wide, part, with_rows=False, with_bias=False, spare=0):
    qkv, *weights = layer_case(lengths, num_heads, d, wide)
    cu_seqlens = cu_seqlens_of(lengths)
    rows = torch.tensor([len(lengths) - 1, 0], dtype=torch.int32) if with_rows else None
    served = [lengths[-1], lengths[0]] if with_rows else lengths
    count = {FIRST_TOKENS: len(served), OTHER_TOKENS: sum(served) - len(served), ALL_TOKENS: sum(served)}[part]
    residual = torch.randn(count + spare, num_heads * d)
    bias = torch.randn(num_heads, 2 * max(lengths) + 3) if with_bias else None
    before = (qkv, cu_seqlens, rows, residual, num_heads, d**-0.5, part, bias)
    exact = plain(qkv.double(), cu_seqlens, rows, residual.double(), *before[4:], *weights)
    expected = plain(*before, *weights)
    for function in (finish_layer, finish_layer_ref):
        assert_no_worse(function(*before, *operands(*weights)), expected, exact, floor=4e-6)


@pytest.mark.parametrize("part", [FIRST_TOKENS, OTHER_TOKENS, ALL_TOKENS])
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize(
    "lengths, num_heads, d, wide", [([14], 12, 32, 1536), ([3, 1, 6, 2], 3, 7, 50), ([40] * 6, 2, 16, 33)]
)
def test_finish_layer(lengths, num_heads, d, wide, part, with_rows):
    check(lengths, num_heads, d, wide, part, with_rows, with_bias=with_rows)


@pytest.mark.parametrize("part", [FIRST_TOKENS, OTHER_TOKENS, ALL_TOKENS])
def test_spare_rows(part):
    check([3, 1, 6], 2, 8, 20, part, spare=3)


def test_no_other_tokens():
    check([1, 1], 2, 8, 20, OTHER_TOKENS)


def test_instruction_sets(instruction_set):
    check([5, 9, 1], 2, 12, 100, ALL_TOKENS)


@needs_extension
def test_threads_change_nothing():
    qkv, *weights = layer_case([30] * 8, 4, 16, 200)
    arguments = (qkv, cu_seqlens_of([30] * 8), None, torch.randn(240, 64), 4, 0.25, ALL_TOKENS, None)
    arguments += operands(*weights)
    alone = finish_layer(*arguments)
    torch.set_num_threads(4)
    assert torch.equal(finish_layer(*arguments), alone)


@needs_extension
@pytest.mark.parametrize(
    "at, value, message",
    [
        (0, torch.zeros(6, 25), "qkv must hold query, key and value side by side, got a width of 25"),
        (0, torch.zeros(6, 24).double(), "qkv must be float32, got float64"),
        (3, torch.zeros(5, 8), "residual must have at least 6 rows, one for each query, got 5"),
        (3, torch.zeros(6, 9), r"residual must have shape \[6, 8\], got \[6, 9\]"),
        (8, torch.zeros(8, 8), r"attention_weight must have shape \[1, 8, 16\], got \[8, 8\]"),
        (10, torch.zeros(7), r"attention_norm_weight must have shape \[8\], got \[7\]"),
        (14, torch.zeros(99), r"intermediate_weight must have shape \[7, 8, 16\], got \[2, 8, 16\]"),
        (16, torch.zeros(1, 20, 16).half(), "output_bias|output_weight must be float32, got float16"),
    ],
)
def test_messages(at, value, message):
    _, *weights = layer_case([3, 1, 2], 2, 4, 20)
    arguments = [torch.zeros(6, 24), cu_seqlens_of([3, 1, 2]), None, torch.zeros(6, 8), 2, 0.5, ALL_TOKENS, None]
    arguments += operands(*weights)
    # Positions behind num_heads: 13 is the intermediate weight, 14 its bias, 15 the output's weight.
    place = {14: 14, 16: 15}.get(at, at)
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        finish_layer(*arguments)


# -- layers until somebody leaves --------------------------------------------------------------------------------


def block_case(lengths, num_heads, d, wide, reads, pooled=False, spare=0, seed=0):
    """Arguments of run_layers but the threshold; ``reads``: which layers have an exit."""
    torch.manual_seed(seed)
    hidden = num_heads * d
    layers, eps, exits = [], [], []
    for read in reads:
        _, weights, biases, norms = layer_case([1], num_heads, d, wide)
        qkv = torch.randn(3 * hidden, hidden) * hidden**-0.5
        tensors = [x for x in operands(weights, biases, norms) if isinstance(x, torch.Tensor)]
        layers += [pack_panels(qkv), torch.randn(3 * hidden), *tensors]
        eps += [1e-6, 1e-6]
        if read:
            exits += [torch.randn(hidden, hidden) * hidden**-0.5, torch.randn(hidden)] if pooled else []
            exits += [torch.randn(5, hidden), torch.randn(5), torch.randn(1, 5), torch.randn(1)]
    assert len(layers) == LAYER_TENSORS * len(reads)
    counts = [(6 if pooled else 4) * read for read in reads]
    hidden_states = torch.randn(sum(lengths) + spare, hidden)
    return (hidden_states, cu_seqlens_of(lengths)), (num_heads, d**-0.5, None, layers, eps, counts, exits)


def run_block(function, case, threshold):
    return function(*case[0], threshold, *case[1])


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("spare", [0, 3])
def test_run_layers_is_layer_by_layer(pooled, spare):
    lengths = [3, 1, 6]
    case = block_case(lengths, 2, 8, 20, [0, 1, 1], pooled, spare)
    got = run_block(run_layers, case, torch.full((3,), torch.inf))
    x, cu_seqlens = case[0]
    layers, eps, _, exits = case[1][3:]
    for layer in range(3):
        qkv_weight, qkv_bias, *rest = layers[layer * LAYER_TENSORS : (layer + 1) * LAYER_TENSORS]
        qkv = linear(x, qkv_weight.transpose(1, 2).flatten(0, 1)[:48], qkv_bias)
        x = finish_layer_ref(qkv, cu_seqlens, None, x, 2, 8**-0.5, ALL_TOKENS, None, *rest[:4], 1e-6, *rest[4:], 1e-6)
    last = exits[len(exits) // 2 :]
    state, z = exit_policy_ref(x[:3], *(last[:-4] or (None, None)), *last[-4:])
    torch.testing.assert_close(got[0][:10], x[:10], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1], state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[2], z, rtol=1e-4, atol=1e-4)
    assert got[3] == 3


def test_run_layers_stops_where_the_first_row_is_above_its_threshold():
    case = block_case([2, 4, 1, 3], 2, 8, 20, [1, 1, 0, 1])
    z = [run_block(run_layers, (case[0], (*case[1][:3], case[1][3][: k * LAYER_TENSORS], case[1][4][: 2 * k],
                                          case[1][5][:k], case[1][6][: sum(case[1][5][:k])])),
                   torch.full((4,), torch.inf))[2] for k in (1, 2)]  # fmt: skip
    high = torch.maximum(z[0], z[1]) + 1
    for row in range(4):
        for layer, logits in enumerate(z, start=1):
            threshold = high.clone()
            threshold[row] = logits[row] - 1e-3
            expected = 1 if z[0][row] > threshold[row] else layer
            for function in (run_layers, run_layers_ref):
                got = run_block(function, case, threshold)
                assert int(got[3]) == expected
                torch.testing.assert_close(got[2], z[expected - 1], rtol=1e-4, atol=1e-4)
    # Equal is not above; NaN never is.
    assert run_block(run_layers, case, torch.cat([z[0][:1], high[1:]]))[3] == 4
    assert run_block(run_layers, case, torch.full((4,), torch.nan))[3] == 4


def test_run_layers_without_an_exit_at_the_end():
    got = run_block(run_layers, block_case([2, 2], 2, 8, 20, [1, 0]), torch.full((2,), torch.inf))
    assert got[3] == 2 and got[2].isnan().all()


def test_run_layers_leaves_its_input_alone():
    case = block_case([2, 2], 2, 8, 20, [1, 1, 1])
    before = case[0][0].clone()
    run_block(run_layers, case, torch.full((2,), torch.inf))
    assert torch.equal(case[0][0], before)


def test_run_layers_on_every_instruction_set(instruction_set):
    case = block_case([5, 9, 1], 2, 12, 100, [1, 1])
    got = run_block(run_layers, case, torch.full((3,), torch.inf))
    want = run_block(run_layers_ref, case, torch.full((3,), torch.inf))
    for a, b in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@needs_extension
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.__setitem__(0, a[0].double()), "hidden_states must be float32, got float64"),
        (lambda a: a.__setitem__(0, a[0][:3]), r"cu_seqlens must .* end within the rows .*\(3\), got 0 and 4"),
        (lambda a: a.__setitem__(2, torch.zeros(3)), r"threshold_logit must have shape \[2\], got \[3\]"),
        (lambda a: a[6].pop(), "layers must hold 12 tensors, eps 2 numbers and exit_tensors 1 for each layer"),
        (lambda a: a[8].__setitem__(0, 5), r"exit_tensors must be 0 \(no exit\), 4 \(policy\) or 6 .*, got 5"),
        (lambda a: a[9].append(torch.zeros(1)), r"exits must hold the sum of exit_tensors \(8\) tensors, got 9"),
        (lambda a: a[9].__setitem__(0, torch.zeros(5, 7)), r"w1 must have shape \[5, 16\], got \[5, 7\]"),
        (lambda a: a[6].__setitem__(13, torch.zeros(7)), r"qkv_bias must have shape \[48\], got \[7\]"),
    ],
)
def test_messages_of_run_layers(change, message):
    case = block_case([2, 2], 2, 8, 20, [1, 1])
    arguments = [*case[0], torch.zeros(2), *case[1]]
    change(arguments)
    with pytest.raises(ValueError, match=message):
        run_layers(*arguments)
