import json

import pytest

from engine.bench import decoder_kernels_h100 as bench


def test_every_op_is_timed(tmp_path):
    """On the twins, which the run itself holds against plain torch."""
    output = tmp_path / "kernels.json"
    options = ["--device", "cpu", "--rows", "1", "3", "--context", "20", "--repeats", "1", "--no-compile"]
    bench.main([*options, "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    for count in (1, 3):
        ops = {row["op"] for row in rows if row["rows"] == count and row["competitor"] == bench.KERNEL}
        assert len(ops) == 12 and all(row["gbps"] > 0 for row in rows)


def test_arguments(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--device", "cpu", "--rows", "0"])
    assert "must be at least 1" in capsys.readouterr().err
