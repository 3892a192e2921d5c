import subprocess
import sys
import textwrap
from pathlib import Path

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
