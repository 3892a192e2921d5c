import json

import pytest
import torch

from engine.bench import kernels_h100 as bench
from engine.bench.kernel_timing import COPY, KERNEL, PLAIN, check


def test_arguments(capsys):
    options = bench.parse(["--device", "cpu", "--models", "tiny", "--ops", "exit", "--no-sweep"])
    assert options.tokens == [128, 1024, 4096, 16384] and options.compile and not options.sweep
    for wrong, message in (
        (["--models", "gpt"], "invalid choice: 'gpt'"),
        (["--device", "cpu", "--tokens", "0"], "must be at least 1"),
        (["--device", "cpu", "--seqlen", "1024"], "seqlen must be at most 512"),
    ):
        with pytest.raises(SystemExit):
            bench.parse(wrong)
        assert message in capsys.readouterr().err


def test_every_op_agrees_with_plain_torch():
    """Full buffers, at shapes small enough for the twins: every competitor that computes all of it, and every tile."""
    names = []
    for tokens in (6, 24):
        for op in bench.ops_for(bench.SHAPES["tiny"], tokens, 6, torch.float32, "cpu", bench.OPS):
            tensors = op.make()
            check(op, tensors, torch.float32, [name for name in op.runs if name.startswith("cuBLAS")])
            expected = op.runs[PLAIN](tensors)
            torch.testing.assert_close(op.math(tensors), expected)
            for run in op.configs.values():
                torch.testing.assert_close(run(tensors), expected, rtol=1e-4, atol=1e-4)
            for name in op.runs:
                assert isinstance(op.runs[name](tensors), (torch.Tensor, tuple))
            assert op.bytes > 0 and KERNEL in op.runs
            names.append(op.name)
    assert len(set(names)) == 16 and len(names) == 32


def test_rows_are_written(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    bench.main(["--device", "cpu", "--models", "tiny", "--tokens", "12", "--seqlen", "4", "--dtypes", "fp32",
                "--repeats", "1", "--no-compile", "--output", str(path)])  # fmt: skip
    rows = json.loads(path.read_text())["rows"]
    assert {row["group"] for row in rows} == set(bench.OPS)
    kernels = [row for row in rows if row["competitor"] == KERNEL]
    assert any(row["config"] for row in kernels) and all(row["median_us"] > 0 for row in rows)
    assert all((row["gbps"] is None) == ("live" in row["competitor"]) for row in rows)
    assert all(row["tflops"] is not None for row in kernels if row["group"] == "linear")
    copied = {row["op"]: row for row in rows if row["competitor"] == COPY}
    assert set(copied) == set(bench._BARS) and all(row["gbps"] and row["tflops"] is None for row in copied.values())
    shown = capsys.readouterr().out
    assert "tiny, 12 tokens, float32" in shown and "linear up + gelu" in shown


def test_figures():
    def row(op, competitor, median_us, **other):
        where = {"model": "bert-base", "tokens": 4096, "dtype": "float16", "config": None} | other
        return {"op": op, "competitor": competitor, "median_us": median_us, **where}

    rows = [row("norm + exit", KERNEL, 10.0), row("norm + exit", COPY, 9.0),
            row("norm + exit", COPY, 1.0, tokens=128), row("norm + pooler + exit", KERNEL, 10.0),
            row("norm + pooler + exit", COPY, 5.0), row("linear qkv", KERNEL, 1.0)]  # fmt: skip
    found = bench.figures(rows)
    assert [(f["value"], f["bar"], f["met"]) for f in found] == [(0.9, ">= 0.80", True), (0.5, ">= 0.60", False)]
    assert bench.figures(rows[2:3]) == []
