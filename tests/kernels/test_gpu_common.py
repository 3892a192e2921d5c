import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.kernels import gpu_common
from engine.kernels.gpu_common import AMPERE, HOPPER, TileLimits

ROOT = Path(__file__).resolve().parents[2]


def test_without_triton_the_twins_serve():
    """``import engine`` leaves triton alone; where it is absent, the public functions are the twins."""
    program = """
        import sys
        import engine
        import engine.executors
        assert "triton" not in sys.modules
        sys.modules["triton"] = None
        import torch
        from engine.kernels import gpu_attention, gpu_common, gpu_exit, gpu_linear, gpu_norms
        assert gpu_common.triton is None and not gpu_common.INTERPRETED
        counts = torch.tensor([1, 2], dtype=torch.int32)
        x, w, out = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, 5)
        gpu_linear.linear_rows_(out, x, w, None, counts, gpu_linear.TOKENS)
        assert out.tolist() == [[4.0] * 5, [4.0] * 5, [0.0] * 5]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "major, shared_bytes, limits",
    [
        (9, 227 * 1024, HOPPER),
        (8, 163 * 1024, AMPERE),
        (8, 99 * 1024, TileLimits(False, 99 * 1024)),
        (9, 99 * 1024, TileLimits(True, 99 * 1024)),
        (10, 227 * 1024, AMPERE),
        (12, 99 * 1024, TileLimits(False, 99 * 1024)),
    ],
)
def test_what_tiles_are_chosen_by(monkeypatch, major, shared_bytes, limits):
    properties = SimpleNamespace(major=major, shared_memory_per_block_optin=shared_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert gpu_common._tile_limits.__wrapped__(0) == limits


@pytest.mark.gpu
def test_a_device_says_what_tiles_are_chosen_by(gpu):
    found = gpu_common.tile_limits(torch.zeros(1, device="cuda"))
    assert found.shared_bytes >= 48 * 1024
    if torch.cuda.get_device_capability() == (9, 0):
        assert found == HOPPER
