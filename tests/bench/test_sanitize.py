"""The script for sanitizers must at least run: on the CPU it walks over the same shapes."""

import pytest
import torch

from engine.bench import sanitize
from tests.kernels.cases import needs_extension


@needs_extension
def test_runs_on_the_cpu(capsys):
    sanitize.main(["--device", "cpu"])
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == list(sanitize.RUNS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_says_what_is_missing():
    with pytest.raises(SystemExit, match="^nothing to sanitize: "):
        sanitize.main([])
