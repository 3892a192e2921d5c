import json

import pytest
import torch

from engine.bench import decoder_kernels_h100 as bench
from engine.bench.record import RESULTS

COMMITTED = RESULTS / "decoder_kernels_h100.json"
TRIED = ["--device", "cpu", "--context", "20", "--repeats", "1", "--no-compile"]


def test_every_op_is_timed(tmp_path):
    """On the twins, which the run itself holds against plain torch."""
    output = tmp_path / "kernels.json"
    bench.main([*TRIED, "--rows", "1", "5", "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    owed = "norm + q, k, v + RoPE, {} owed"
    for count, own in ((1, {owed.format(n) for n in (1, 16, 128)}), (5, {owed.format(5)})):
        ops = {row["op"] for row in rows if row["rows"] == count and row["competitor"] == bench.KERNEL}
        assert own <= ops and len(ops - own) == 15
        assert {"head's low-rank part, rank 8", "head's low-rank part, rank 8, width 48"} <= ops
        assert {"norm + policy of 2 neurons", "norm + policy of 8 neurons"} <= ops
    for row in rows:
        if row["competitor"] == bench.QUARTER:
            assert row["gbps"] is None and row["of_peak"] is None
        else:
            assert row["gbps"] > 0 and row["of_peak"] > 0
    quarter = {(row["op"], row["rows"]) for row in rows if row["competitor"] == bench.QUARTER}
    assert quarter == {(op, 5) for op in ("norm + q, k, v + RoPE", "paged attention, 20 positions", "gate, up")}


def test_an_op_keeps_its_name():
    """At the sizes that are measured, every op of the committed file is still among them."""
    names = {(row["op"], row["rows"]) for row in json.loads(COMMITTED.read_text())["rows"]}
    makers = [bench._Maker(bench.LLAMA, rows, 384, torch.float16, "cpu") for rows in (1, 8, 32, 64)]
    ops = {(op.name, m.rows) for m in makers for group in bench._GROUPS for op in group(m)}
    assert names <= ops
    assert {("norm + policy of 32 neurons", 8), ("norm + q, k, v + RoPE, 64 owed", 64)} <= ops
    assert {("head's low-rank part, rank 128", 1), ("head's low-rank part, rank 128, width 576", 64)} <= ops


@pytest.mark.parametrize("rows, owed", [(1, 0), (1, 16), (5, 5)])
def test_keys_that_are_not_written_are_noticed(rows, owed):
    """Of live rows and of what is owed; the kernel's cache is not the one that torch has written."""
    op = bench._qkv_op(bench._Maker(bench.TINY, rows, 20, torch.float32, "cpu"), owed)
    tensors = op.make()
    assert tensors["counts"].tolist() == [rows, owed]
    expected = op.runs[bench.PLAIN](tensors)
    before = tensors["keys"].clone()
    found = op.runs[bench.KERNEL](tensors)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    moved = (tensors["keys"] != before).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert moved == sorted([2 * k for k in range(rows)] + [2 * k + 1 for k in range(owed)])


@pytest.mark.parametrize("rows", [1, 5])
def test_a_step_owes_at_every_call(rows):
    op = bench.step_op(bench._Maker(bench.TINY, rows, 20, torch.float32, "cpu"))
    tensors, stay = op.make(), (rows + 1) // 2
    for name in (bench.KERNEL, bench.PLAIN):
        op.restore(tensors)
        op.runs[name](tensors)
        assert tensors["counts_to"].tolist() == [stay, 2 * stay]
        assert tensors["to"][:stay].tolist() == list(range(0, rows, 2))
        assert tensors["owed_at"][: 2 * stay].tolist() == [17, 18] * stay
    op.runs[bench.KERNEL](tensors)
    assert tensors["counts_to"].tolist() == [stay, 0]


def test_merged_files(tmp_path):
    """A later file's rows stand for those of the same op, rows and competitor; what was asked otherwise is refused."""
    output = tmp_path / "all.json"
    bench.main(["--merge", str(COMMITTED), str(COMMITTED), "--output", str(output)])
    known, found = json.loads(COMMITTED.read_text()), json.loads(output.read_text())
    assert found["rows"] == [{"commit": known["commit"], **row} for row in known["rows"]]
    assert (found["figures"], found["context"]) == (known["figures"], known["context"])
    changed = known["rows"][0] | {"median_us": 1.0}
    more = changed | {"op": "another"}
    later = tmp_path / "later.json"
    later.write_text(json.dumps(known | {"commit": "later", "rows": [changed, more]}))
    bench.main(["--merge", str(COMMITTED), str(later), "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert rows[0] == {"commit": "later", **changed} and rows[-1] == {"commit": "later", **more}
    assert len(rows) == len(known["rows"]) + 1
    later.write_text(json.dumps(known | {"context": 1}))
    with pytest.raises(ValueError, match="context differs between the files"):
        bench.main(["--merge", str(COMMITTED), str(later), "--output", str(output)])


def test_arguments(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--device", "cpu", "--rows", "0"])
    assert "must be at least 1" in capsys.readouterr().err
