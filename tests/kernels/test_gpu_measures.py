"""CALM's measures of live rows: what torch says they are, for these rows alone."""

import pytest
import torch

from engine.kernels import gpu_measures
from engine.kernels.gpu_measures import (
    classifier_rows_,
    classifier_rows__ref,
    response_rows_,
    response_rows__ref,
    saturation_rows_,
    saturation_rows__ref,
)
from tests.kernels import gpu_cases

INT, DTYPES = torch.int32, (torch.float32, torch.float16, torch.bfloat16)
ROWS = [(1, 1), (5, 3), (4, 0), (3, 3)]


def lists(way, rows, live):
    order = torch.randperm(rows).to(INT)
    return order.to(way.device), torch.tensor([live, 99], dtype=INT, device=way.device), order[:live].long()


def check(z, ids, want, **close):
    """The live rows' and nobody else's."""
    z = z.cpu()
    others = torch.ones(len(z), dtype=torch.bool)
    others[ids] = False
    assert bool((z[others] == -7).all())
    torch.testing.assert_close(z[ids, 0].sigmoid(), want.float(), **(close or dict(rtol=1e-5, atol=1e-6)))


@pytest.mark.parametrize("rows, live", ROWS)
@pytest.mark.parametrize("width", [1, 24, 576, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_saturation(way, rows, live, width, dtype):
    before = torch.randn(rows, width).to(dtype)
    hidden = (before.float() + 0.3 * torch.randn(rows, width)).to(dtype)
    order, counts, ids = lists(way, rows, live)
    z, kept = torch.full((rows, 1), -7.0, device=way.device), before.clone().to(way.device)
    way(saturation_rows_, saturation_rows__ref)(z, kept, hidden.to(way.device), order, counts)
    want = torch.nn.functional.cosine_similarity(hidden[ids].double(), before[ids].double(), dim=-1).clamp(0, 1)
    check(z, ids, want)
    expected = before.clone()
    expected[ids] = hidden[ids]
    assert torch.equal(kept.cpu(), expected)


def test_the_ends_of_saturation(way):
    """What has not moved at all is as sure as can be; what has turned round is not at all, nor is a row of zeros."""
    hidden = torch.randn(4, 64)
    hidden[2], hidden[3, 5] = 0.0, float("nan")
    before = torch.stack([hidden[0], -hidden[1], hidden[2], hidden[3]])
    order, counts, _ = lists(way, 4, 4)
    z = torch.zeros(4, 1, device=way.device)
    way(saturation_rows_, saturation_rows__ref)(z, before.to(way.device), hidden.to(way.device), order, counts)
    z = z.cpu()[:, 0]
    assert float(z[0]) > 14 and float(z[1]) == float(z[2]) == float("-inf") and bool(z[3].isnan())


@pytest.mark.parametrize("rows, live", ROWS)
@pytest.mark.parametrize("width", [1, 24, 576, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_classifier(way, rows, live, width, dtype):
    normed, weight = torch.randn(rows, width).to(dtype), torch.randn(1, width).to(dtype) * width**-0.5
    order, counts, ids = lists(way, rows, live)
    z = torch.full((rows, 1), -7.0, device=way.device)
    args = normed.to(way.device), weight.to(way.device), order, counts
    way(classifier_rows_, classifier_rows__ref)(z, *args)
    check(z, ids, (normed[ids].double() @ weight[0].double()).sigmoid())


@pytest.mark.parametrize("rows, live", ROWS)
@pytest.mark.parametrize("words", [2, 3, 101, 4096, 20000])
def test_response(way, rows, live, words):
    logits = 4 * torch.randn(rows, words)
    order, counts, ids = lists(way, rows, live)
    z = torch.full((rows, 1), -7.0, device=way.device)
    way(response_rows_, response_rows__ref)(z, logits.to(way.device), order, counts)
    top = logits[ids].double().softmax(-1).topk(2, dim=-1).values
    check(z, ids, top[:, 0] - top[:, 1])


@pytest.mark.parametrize("places", [(0, 1), (5, 4101), (4095, 4096), (3, 19999)])
def test_two_equal_answers_are_no_answer(way, places):
    """Within a tile of the kernel, and in one lane of two tiles."""
    logits = torch.randn(1, 20000)
    logits[0, list(places)] = 50.0
    order, counts, _ = lists(way, 1, 1)
    z = torch.zeros(1, 1, device=way.device)
    way(response_rows_, response_rows__ref)(z, logits.to(way.device), order, counts)
    assert float(z) == float("-inf")


def test_large_and_missing_logits(way):
    logits = torch.full((2, 5000), float("-inf"))
    logits[0, 4999], logits[1] = 3e4, torch.linspace(-1e5, 1e5, 5000)
    order, counts, _ = lists(way, 2, 2)
    z = torch.zeros(2, 1, device=way.device)
    way(response_rows_, response_rows__ref)(z, logits.to(way.device), order, counts)
    assert float(z[0]) == float(z[1]) == float("inf")


Z, HIDDEN, LOGITS = torch.zeros(2, 1), torch.zeros(2, 8), torch.zeros(2, 9)
LISTS = dict(order=torch.zeros(2, dtype=INT), counts=torch.zeros(2, dtype=INT))


@pytest.mark.parametrize(
    "function, given, words",
    [
        (saturation_rows_, dict(z=Z[:1], before=HIDDEN.clone(), hidden=HIDDEN), r"z must be fp32 of shape \[2 or more"),
        (saturation_rows_, dict(z=Z, before=HIDDEN, hidden=HIDDEN), "before must not overlap hidden"),
        (saturation_rows_, dict(z=Z, before=HIDDEN, hidden=Z), "z must not overlap hidden"),
        (saturation_rows_, dict(z=Z, before=HIDDEN[:1], hidden=HIDDEN.clone()), "before must have shape"),
        (saturation_rows_, dict(z=Z, before=HIDDEN.half(), hidden=HIDDEN), "before"),
        (classifier_rows_, dict(z=Z.half(), normed=HIDDEN, weight=HIDDEN[:1]), "z must be fp32"),
        (classifier_rows_, dict(z=Z, normed=HIDDEN, weight=HIDDEN[:1, :4]), r"weight must have shape \[1, 8\]"),
        (response_rows_, dict(z=Z, logits=LOGITS.half()), "logits must be fp32 with 2 or more columns"),
        (response_rows_, dict(z=Z, logits=LOGITS[:, :1].contiguous()), "logits must be fp32 with 2 or more columns"),
        (response_rows_, dict(z=Z, logits=LOGITS[:, :0]), "at least 1 column"),
    ],
)
def test_messages(function, given, words):
    with pytest.raises(ValueError, match=words):
        function(**given, **LISTS)


@gpu_cases.compiles
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("width, words", [(576, 49152), (4096, 32000), (5120, 128256)])
@pytest.mark.parametrize("name", ["saturation", "classifier", "response"])
def test_compiles(monkeypatch, name, width, words, arch):
    z, x = torch.empty(4, 1), torch.empty(4, width).half()
    lists = torch.empty(4, dtype=INT), torch.empty(2, dtype=INT)

    def call():
        if name == "saturation":
            saturation_rows_(z, x.clone(), x, *lists)
        elif name == "classifier":
            classifier_rows_(z, x, x[:1].clone(), *lists)
        else:
            response_rows_(z, torch.empty(4, words), *lists)

    monkeypatch.setattr(gpu_cases, "MODULES", (gpu_measures,))
    usage = gpu_cases.compile_launch(gpu_cases.record(monkeypatch, name, call), arch)
    assert usage.stack_bytes == 0 and usage.shared_bytes <= gpu_cases.SHARED_BYTES[arch]
