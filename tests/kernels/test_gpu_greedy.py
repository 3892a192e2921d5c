"""The greedy tokens of a decode step, and what the host is told."""

import pytest
import torch

from engine.kernels import gpu_greedy
from engine.kernels.gpu_greedy import greedy_rows_, greedy_rows__ref
from tests.kernels import gpu_cases

INT = torch.int32


def run(way, logits, live):
    rows = len(logits)
    told, ids = torch.full((rows, 3), -7, dtype=INT, device=way.device), torch.full((rows,), -7, dtype=INT)
    ids, layers = ids.to(way.device), torch.arange(rows, dtype=INT, device=way.device) + 3
    probs = torch.rand(rows).to(way.device)
    counts = torch.tensor([live, 99], dtype=INT, device=way.device)
    way(greedy_rows_, greedy_rows__ref)(told, ids, logits.to(way.device), layers, probs, counts)
    assert torch.equal(told[:live, 1], layers[:live]) and torch.equal(told[:live, 2].view(torch.float32), probs[:live])
    assert torch.equal(told[:live, 0], ids[:live])
    assert bool((told[live:] == -7).all()) and bool((ids[live:] == -7).all())
    return ids[:live].cpu()


@pytest.mark.parametrize("rows, live", [(1, 1), (5, 3), (4, 0), (3, 3)])
@pytest.mark.parametrize("words", [1, 2, 101, 8192, 20000])
def test_the_greatest(way, rows, live, words):
    logits = torch.randn(rows, words)
    assert torch.equal(run(way, logits, live), logits[:live].argmax(1).to(INT))


@pytest.mark.parametrize("places", [(0, 1), (5, 8197), (8191, 8192, 19999), (19999,), (3, 16387)])
def test_the_first_of_equals(way, places):
    """Within a tile of the kernel, and in tiles that meet at the end."""
    logits = torch.randn(2, 20000).clamp(max=4)
    logits[1, list(places)] = 9.0
    assert int(run(way, logits, 2)[1]) == places[0]


def test_no_finite_logit_is_still_a_token(way):
    logits = torch.full((1, 300), float("-inf"))
    assert 0 <= int(run(way, logits, 1)[0]) < 300


TOLD, IDS, LOGITS, PROBS = torch.zeros(2, 3, dtype=INT), torch.zeros(2, dtype=INT), torch.zeros(2, 9), torch.zeros(2)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(logits=LOGITS.half()), r"logits must be fp32 of shape \(R, V\), V at least 1, got torch.float16"),
        (dict(logits=LOGITS[:, :0]), "V at least 1"),
        (dict(told=torch.zeros(2, 2, dtype=INT)), r"told must be int32 of shape \[2 or more, 3\]"),
        (dict(told=torch.zeros(1, 3, dtype=INT)), r"told must be int32 of shape \[2 or more, 3\]"),
        (dict(ids=torch.zeros(2)), "ids must be int32"),
        (dict(exit_probs=IDS), "exit_probs must be float32"),
        (dict(told=LOGITS.view(INT).flatten()[:6].view(2, 3)), "told must not overlap logits in memory"),
        (dict(ids=LOGITS.view(INT).flatten()[:2]), "ids must not overlap logits in memory"),
        (dict(exit_layers=IDS[:1]), r"exit_layers must have shape \[2 or more\]"),
    ],
)
def test_messages(change, words):
    good = dict(told=TOLD, ids=IDS.clone(), logits=LOGITS, exit_layers=IDS, exit_probs=PROBS, counts=IDS)
    with pytest.raises(ValueError, match=words):
        greedy_rows_(**{**good, **change})


@gpu_cases.compiles
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("words", [32000, 49152, 128256])
def test_compiles(monkeypatch, words, arch):
    def call():
        greedy_rows_(torch.empty(4, 3, dtype=INT), torch.empty(4, dtype=INT), torch.empty(4, words),
                     torch.empty(4, dtype=INT), torch.empty(4), torch.empty(2, dtype=INT))  # fmt: skip

    monkeypatch.setattr(gpu_cases, "MODULES", (gpu_greedy,))
    usage = gpu_cases.compile_launch(gpu_cases.record(monkeypatch, "greedy", call), arch)
    assert usage.stack_bytes == 0 and usage.shared_bytes <= gpu_cases.SHARED_BYTES[arch]
