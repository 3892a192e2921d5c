import pytest
import torch
from torch.nn.functional import gelu, linear

from engine.kernels import extension
from engine.kernels.linear import PackedLinear, linear_ref, pack_panels, packed_linear, packed_linear_ref
from tests.kernels.cases import assert_no_worse, doubled, needs_extension

SIZES = [(0, 8, 16), (1, 384, 1152), (3, 1, 1), (7, 33, 5), (14, 384, 384), (13, 100, 49), (64, 1536, 40), (6, 8, 0)]


def linear_case(rows, inputs, outputs, bias=True):
    weight = torch.randn(outputs, inputs) * inputs**-0.5
    return torch.randn(rows, inputs), weight, torch.randn(outputs) if bias else None


def check(x, weight, bias, activated):
    outputs = len(weight)
    panels = pack_panels(weight)
    exact = linear_ref(*doubled(x, weight, bias), activated)
    plain = linear_ref(x, weight, bias, activated)
    for function in (packed_linear, packed_linear_ref):
        # The activations are good to 4e-7 of their input, of a few units here (test_activations_over_their_range).
        assert_no_worse(function(x, panels, bias, outputs, activated), plain, exact, floor=2e-6 if activated else 1e-6)


@pytest.mark.parametrize("activated", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows, inputs, outputs", SIZES)
def test_packed_linear(rows, inputs, outputs, with_bias, activated):
    check(*linear_case(rows, inputs, outputs, with_bias), activated)


@pytest.mark.parametrize("rows", [*range(1, 28), 300])
def test_every_height_of_tile(instruction_set, rows):
    check(*linear_case(rows, 50, 70), activated=rows % 2 == 0)


@pytest.mark.parametrize("inputs", [1, 7, 8, 9, 383, 384, 385, 1000])
def test_every_end_of_a_block(instruction_set, inputs):
    check(*linear_case(5, inputs, 48), activated=False)
    check(*linear_case(5, inputs, 47), activated=False)


def test_rows_of_a_wider_buffer():
    _, weight, bias = linear_case(1, 40, 24)
    wide = torch.randn(9, 100)
    exact = linear(*doubled(wide[:, 30:70], weight, bias))
    assert_no_worse(packed_linear(wide[:, 30:70], pack_panels(weight), bias, 24), exact.float(), exact)


def test_packing_keeps_every_element():
    weight = torch.arange(35 * 3.0).view(35, 3)
    panels = pack_panels(weight)
    assert panels.shape == (3, 3, 16) and panels[2, :, 3:].eq(0).all()
    assert all(panels[o // 16, k, o % 16] == weight[o, k] for o in range(35) for k in range(3))


@needs_extension
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_row_alone_and_in_a_batch(threads, instruction_set):
    """Bit for bit, whatever the height of the tile it falls into and the number of threads."""
    torch.set_num_threads(threads)
    x, weight, bias = linear_case(301, 777, 100)
    panels = pack_panels(weight)
    together = packed_linear(x, panels, bias, 100, gelu=True)
    for rows in (1, 2, 5, 14, 31):
        for n in range(0, 301 - rows, 37):
            assert torch.equal(packed_linear(x[n : n + rows], panels, bias, 100, gelu=True), together[n : n + rows])


@needs_extension
def test_not_a_number_stays_in_its_row():
    x, weight, bias = linear_case(9, 384, 100)
    x[4, 7] = torch.nan
    y = packed_linear(x, pack_panels(weight), bias, 100, gelu=True)
    assert y[4].isnan().all() and not y[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", ["widest", "baseline"])
def test_packed_linear_module(dtype, kernels):
    """Whatever implementation serves: ours, oneDNN or torch."""
    x, weight, bias = (t.to(dtype) for t in linear_case(14, 96, 40))
    if extension.available():
        extension.cpu_kernels("baseline" if kernels == "baseline" else None)
    try:
        module = PackedLinear(weight, bias)
    finally:
        extension.cpu_kernels()
    for activated in (False, True):
        exact = linear(*doubled(x, weight, bias))
        exact = gelu(exact) if activated else exact
        assert_no_worse(module(x, activated), linear_ref(x, weight, bias, activated), exact, floor=2e-6)


X, PANELS = torch.zeros(2, 4), torch.zeros(2, 4, 16)
MESSAGES = [
    ((X.double(), PANELS, None, 20, False), r"x must be float32, got float64"),
    ((X, PANELS.double(), None, 20, False), r"weight must be float32, got float64"),
    ((X, PANELS, None, 40, False), r"weight must have shape \[3, 4, 16\], got \[2, 4, 16\]"),
    ((X, PANELS, None, -1, False), r"outputs must not be negative, got -1"),
    ((X, PANELS, torch.zeros(19), 20, False), r"bias must have shape \[20\], got \[19\]"),
    ((X[0], PANELS, None, 20, False), r"x must have"),
]


@needs_extension
@pytest.mark.parametrize("arguments, message", MESSAGES)
def test_messages(arguments, message):
    with pytest.raises(ValueError, match=message):
        packed_linear(*arguments)
