"""Inputs and comparisons shared by the op tests."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels import extension
from engine.kernels.products import Partials

needs_extension = pytest.mark.skipif(not extension.available(), reason="the extension is not built")

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def cu_seqlens_of(lengths, device="cpu") -> Tensor:
    total = [0]
    for length in lengths:
        total.append(total[-1] + length)
    return torch.tensor(total, dtype=torch.int32, device=device)


def lead_rows(lengths, i: int) -> list[int]:
    """Rows of sequence i in the lead layout, by position; the definition, in plain Python."""
    start = len(lengths) + sum(lengths[:i]) - i
    return [i, *range(start, start + lengths[i] - 1)]


def assert_no_worse(ours: Tensor, twin: Tensor, exact: Tensor, factor: float = 2.0, floor: float = 1e-6) -> None:
    """Our error against fp64 is at most ``factor`` times the one that plain torch makes in the same dtype."""
    assert ours.dtype == twin.dtype and ours.shape == twin.shape
    scale = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
    error = (ours.double() - exact).abs().max().item() if exact.numel() else 0.0
    allowed = (twin.double() - exact).abs().max().item() if exact.numel() else 0.0
    floor = 1e-13 if ours.dtype == torch.float64 else floor
    assert error <= factor * allowed + floor * scale, f"error {error:.3g}, plain torch {allowed:.3g}"


def partials_of(x: Tensor, shares: int) -> Partials:
    """x as a product may leave it: ``shares`` (4, 2 or 0) partial sums a row, which come to x exactly in any order."""
    if shares == 0:
        return Partials(torch.full((4 * x.numel(),), float("nan"), device=x.device), 0, 0)
    parts = torch.tensor([2.0**-i for i in (*range(1, shares), shares - 1)], device=x.device)
    forever = 1 << 20
    return Partials((x.float()[:, None] * parts[:, None]).flatten(), forever if shares == 4 else 0, forever)


def doubled(*tensors):
    return [None if t is None else t.double() if t.is_floating_point() else t for t in tensors]
