import math

import pytest
import torch

from engine.kernels.exits import (
    add_layer_norm,
    add_layer_norm_ref,
    embed_layer_norm,
    embed_layer_norm_ref,
    exit_policy,
    exit_policy_ref,
)
from tests.kernels.cases import FLOATS, assert_no_worse, doubled, needs_extension


def policy_case(n, hidden, width, pooler, dtype=torch.float32, device="cpu", policy_dtype=None):
    def made(*shape, scale=1.0, dtype=dtype):
        return (torch.randn(shape) * scale).to(dtype).to(device)

    policy_dtype = policy_dtype or dtype
    return (
        made(n, hidden),
        made(hidden, hidden, scale=hidden**-0.5) if pooler else None,
        made(hidden) if pooler else None,
        made(width, hidden, scale=hidden**-0.5, dtype=policy_dtype),
        made(width, dtype=policy_dtype),
        made(1, width, dtype=policy_dtype),
        made(1, dtype=policy_dtype),
    )


def check_policy(case):
    (state, logit), (state_twin, logit_twin) = exit_policy(*case), exit_policy_ref(*case)
    assert_no_worse(state, state_twin, exit_policy_ref(*doubled(*case))[0])
    assert logit.dtype == logit_twin.dtype == (torch.float64 if case[0].dtype == torch.float64 else torch.float32)
    # From the state as returned, which is what the policy sees.
    exact = exit_policy_ref(*doubled(state, None, None, *case[3:]))[1]
    assert_no_worse(logit, exit_policy_ref(state, None, None, *case[3:])[1], exact, floor=2e-6)
    assert state.data_ptr() != case[0].data_ptr() or len(state) == 0


@pytest.mark.parametrize("pooler", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "n, hidden, width", [(0, 8, 4), (1, 384, 32), (3, 33, 5), (7, 100, 40), (70, 64, 32), (5, 1, 1)]
)
def test_policy(n, hidden, width, dtype, pooler, device):
    check_policy(policy_case(n, hidden, width, pooler, dtype, device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_policy_in_fp32_beside_half_data(dtype, device):
    check_policy(policy_case(9, 40, 32, True, dtype, device, policy_dtype=torch.float32))


@pytest.mark.parametrize("pooler", [False, True])
def test_policy_instruction_sets(instruction_set, pooler):
    for dtype in FLOATS:
        check_policy(policy_case(9, 50, 33, pooler, dtype))


def test_policy_twin_against_loops():
    case = policy_case(2, 4, 3, True, torch.float64)
    first, pooler_weight, pooler_bias, w1, b1, w2, b2 = (x.tolist() for x in case)
    states, logits = exit_policy_ref(*case)
    for n, x in enumerate(first):
        state = [
            math.tanh(sum(a * b for a, b in zip(x, w, strict=True)) + c)
            for w, c in zip(pooler_weight, pooler_bias, strict=True)
        ]
        total = b2[0]
        for w, c, v in zip(w1, b1, w2[0], strict=True):
            h = sum(a * b for a, b in zip(state, w, strict=True)) + c
            total += v * 0.5 * h * (1 + math.erf(h / math.sqrt(2)))
        assert logits[n].item() == pytest.approx(total, rel=1e-12)
        assert states[n].tolist() == pytest.approx(state, rel=1e-12)


@needs_extension
@pytest.mark.parametrize("pooler", [False, True])
def test_a_row_alone_and_in_a_batch(pooler, device):
    first, *weights = policy_case(67, 384, 32, pooler, device=device)
    states, logits = exit_policy(first, *weights)
    for n in (0, 1, 31, 63, 64, 66):
        state, logit = exit_policy(first[n : n + 1], *weights)
        assert torch.equal(state[0], states[n]) and torch.equal(logit[0], logits[n])


@needs_extension
def test_activations_over_their_range():
    """tanh and gelu through the op: a one-wide policy whose weights are 1."""
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([0.0, 1e-8, -1e-8, 88.0, -88.0, 1e4, -1e4])])[:, None]
    one, zero = torch.ones(1, 1), torch.zeros(1)
    state, logit = exit_policy(x, one, zero, one, zero, one, zero)
    exact = x.double().tanh()
    assert ((state - exact).abs() <= 3e-7 * exact.abs()).all()
    _, logit = exit_policy(x, None, None, one, zero, one, zero)
    exact = torch.nn.functional.gelu(x.double())[:, 0]
    assert ((logit - exact).abs() <= 4e-7 * x[:, 0].abs().clamp(min=1)).all()
    nan = torch.full((1, 1), float("nan"))
    assert all(out.isnan().all() for out in exit_policy(nan, one, zero, one, zero, one, zero))


# --- norms ---------------------------------------------------------------------------------------------------------


def check_add(x, residual, weight, bias, eps=1e-12):
    case = (x, residual, weight, bias)
    exact = add_layer_norm_ref(*doubled(*case), eps)
    assert_no_worse(add_layer_norm(*case, eps), add_layer_norm_ref(*case, eps), exact, floor=2e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows, hidden", [(0, 8), (1, 384), (12, 100), (5, 1), (3, 7), (200, 384), (2, 1023)])
def test_add_layer_norm(rows, hidden, dtype, device):
    x, residual = torch.randn(2, rows, hidden).to(dtype).to(device)
    weight, bias = torch.randn(2, hidden).to(dtype).to(device)
    check_add(x, residual, weight, bias)


def test_add_layer_norm_far_from_zero(device):
    """A mean of 1e4 with a spread of 1: one pass over sum and sum of squares would lose it."""
    x = torch.randn(4, 256, device=device) + 1e4
    check_add(x, torch.zeros_like(x), torch.ones(256, device=device), torch.zeros(256, device=device), 1e-5)


def test_add_layer_norm_of_slices(device):
    wide = torch.randn(6, 40, device=device)
    check_add(wide[:, 3:13], wide[:, 20:30], torch.randn(10, device=device), torch.randn(10, device=device))


def embed_case(count, hidden, dtype=torch.float32, device="cpu", types=True, ids=torch.int64):
    tables = [torch.randn(size, hidden).to(dtype).to(device) for size in (50, 2, 20)]
    index = [torch.randint(0, size, (count,), device=device).to(ids) for size in (50, 2, 20)]
    weight, bias = torch.randn(2, hidden).to(dtype).to(device)
    return [index[0], index[1] if types else None, index[2], *tables, weight, bias]


def check_embed(case, eps=1e-12):
    ours, twin = embed_layer_norm(*case, eps), embed_layer_norm_ref(*case, eps)
    assert_no_worse(ours, twin, embed_layer_norm_ref(*doubled(*case), eps), floor=2e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("count, hidden", [(0, 8), (1, 384), (12, 100), (5, 1), (300, 128)])
def test_embed_layer_norm(count, hidden, dtype, device):
    check_embed(embed_case(count, hidden, dtype, device))


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
def test_embed_layer_norm_without_types(ids, device):
    case = embed_case(9, 33, device=device, types=False, ids=ids)
    check_embed(case)  # row 0 of the table throughout
    case[4] = None
    check_embed(case)  # no table at all


def test_norms_instruction_sets(instruction_set):
    for dtype in FLOATS:
        for hidden in (3, 31, 96, 130):
            check_embed(embed_case(5, hidden, dtype))
            x, residual = torch.randn(2, 5, hidden).to(dtype)
            check_add(x, residual, *torch.randn(2, hidden).to(dtype))


# --- messages ------------------------------------------------------------------------------------------------------

POLICY = policy_case(2, 4, 3, True)
EMBED = embed_case(3, 4)
X, W = torch.zeros(2, 4), torch.zeros(4)


def with_argument(case, at, value):
    return (*case[:at], value, *case[at + 1 :])


MESSAGES = [
    (exit_policy, with_argument(POLICY, 2, None), ValueError, "must be given together, got pooler_weight alone"),
    (exit_policy, with_argument(POLICY, 3, torch.zeros(3, 5)), ValueError, r"w1 must have shape \[3, 4\], got"),
    (exit_policy, with_argument(POLICY, 3, torch.zeros(3, 4).half()), ValueError, r"w1 must be float32 or have"),
    (exit_policy, with_argument(POLICY, 5, torch.zeros(3)), ValueError, r"w2 must have shape \[1, 3\], got \[3\]"),
    (exit_policy, with_argument(POLICY, 0, X.int()), ValueError, "first must be float32, float64, float16 or bfloat16"),
    (exit_policy, with_argument(POLICY, 0, torch.zeros(4, 2).t()), ValueError, "first must be contiguous, got strides"),
    (add_layer_norm, (X, X[:1], W, W, 0.0), ValueError, r"residual must have shape \[2, 4\], got \[1, 4\]"),
    (add_layer_norm, (X, X, W[:3], W, 0.0), ValueError, r"weight must have shape \[4\], got \[3\]"),
    (add_layer_norm, (X, X, W, W.double(), 0.0), ValueError, r"bias must have the dtype of x \(float32\), got float64"),
    (embed_layer_norm, (*with_argument(EMBED, 0, torch.tensor([0, 50, 1])), 0.0), IndexError,
     r"input_ids must lie in \[0, 50\), the rows of word, got 50 at index 1"),
    (embed_layer_norm, (*with_argument(EMBED, 1, torch.tensor([0, 1, -1])), 0.0), IndexError,
     r"token_type_ids must lie in \[0, 2\), the rows of token_type, got -1 at index 2"),
    (embed_layer_norm, (*with_argument(EMBED, 2, torch.tensor([20, 0, 0])), 0.0), IndexError,
     r"positions must lie in \[0, 20\), the rows of position, got 20 at index 0"),
    (embed_layer_norm, (*with_argument(EMBED, 4, None), 0.0), ValueError, "token_type must be given where"),
    (embed_layer_norm, (*with_argument(EMBED, 5, torch.zeros(20, 5)), 0.0), ValueError, "position must have rows of 4"),
]  # fmt: skip


@needs_extension
@pytest.mark.parametrize("function, arguments, error, message", MESSAGES)
def test_messages(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments)
