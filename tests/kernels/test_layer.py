import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear

from engine.kernels.attention import ALL_TOKENS, FIRST_TOKENS, OTHER_TOKENS, lead_attention_ref
from engine.kernels.layer import finish_layer, finish_layer_ref
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
