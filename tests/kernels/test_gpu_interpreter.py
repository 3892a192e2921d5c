"""Run the tests marked ``interpreter`` in a process of their own: Triton decides at import how its kernels run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.kernels.gpu_common import INTERPRETED, triton

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(triton is None, reason="triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="this is the process for them")
@pytest.mark.slow
def test_kernels_in_the_interpreter():
    files = sorted(str(path) for path in Path(__file__).parent.glob("test_gpu_*.py") if path != Path(__file__))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "interpreter", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    # A process in which nothing was interpreted would have nothing to fail.
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 100
