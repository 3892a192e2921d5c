"""The GPU benchmark of decoders, on the CPU with a tiny model: what it writes, and that its arithmetic is right."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from engine.bench import decoder_h100 as bench
from engine.bench import gpt_fast


def test_a_whole_run(tmp_path, monkeypatch):
    output = tmp_path / "out.json"
    arguments = ["--shape", "tiny", "--device", "cpu", "--batches", "1", "3", "--prompt", "5", "--new-tokens", "8"]
    monkeypatch.setattr(sys, "argv", ["decoder_h100", *arguments, "--rounds", "2", "--output", str(output)])
    monkeypatch.setattr(bench, "shipped_share", lambda: ({2: 0.5, 8: 0.5}, 8))
    bench.main()
    result = json.loads(output.read_text())
    rows = {(row["batch"], row["name"]): row for row in result["rows"]}
    alone = (bench.REMOVED, bench.NOBODY, bench.TRAINED, bench.HALF, bench.EAGER)
    assert set(rows) == {*((1, name) for name in alone), (3, bench.REMOVED), (3, bench.TRAINED)}
    for (batch, name), row in rows.items():
        few = max(4, 8 // 16) if name == bench.EAGER else 8
        assert len(row["decode_s"]) == 2
        step_ms = 1e3 * sum(row["decode_s"]) / 2 / (few - 1)
        assert row["ms_a_step"] == pytest.approx(step_ms)
        assert row["tokens_a_second"] == pytest.approx(1e3 * batch / step_ms)
    figures = {f["name"]: f for f in result["figures"]}
    assert len(figures) == 5
    ratio = rows[1, bench.REMOVED]["ms_a_step"] / rows[1, bench.HALF]["ms_a_step"]
    assert figures["batch 1, mean depth L/2, times faster than full depth"]["value"] == pytest.approx(ratio)
    assert figures["batch 3, trained exits: ceiling / time"]["value"] == rows[3, bench.TRAINED]["of_ceiling"]
    hf = bench.SHAPES["tiny"]
    memory = result["memory"]["tiny"]
    assert memory["kv_bytes_a_position"] == 2 * hf["num_hidden_layers"] * 2 * 16 * 4
    assert memory["exit_state_bytes_a_position"] == hf["hidden_size"] * 4


def run_tiny(monkeypatch, output, *more):
    """Rows of one batch of one row, and the figures."""
    arguments = ["--shape", "tiny", "--device", "cpu", "--batches", "1", "--prompt", "5", "--new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["decoder_h100", *arguments, "--rounds", "1", "--output", str(output), *more])
    monkeypatch.setattr(bench, "shipped_share", lambda: ({2: 0.5, 8: 0.5}, 8))
    bench.main()
    result = json.loads(output.read_text())
    return {row["name"]: row for row in result["rows"]}, [f["name"] for f in result["figures"]]


def test_gpt_fast_that_fails_leaves_the_others(tmp_path, monkeypatch):
    """Files of those names that are not gpt-fast's; what they set, and where they look, must not stay."""
    (tmp_path / "model.py").write_text("raise RuntimeError('of another torch\\nand more')\n")
    (tmp_path / "generate.py").write_text("")
    (tmp_path / "COMMIT").write_text("abc1234\n")
    path = list(sys.path)
    rows, figures = run_tiny(monkeypatch, tmp_path / "with.json", "--gpt-fast", str(tmp_path))
    failed = rows.pop(bench.GPT_FAST)
    assert failed["error"] == "RuntimeError: of another torch" and "ms_a_step" not in failed
    assert failed["note"].startswith("gpt-fast abc1234, decode_one_token not compiled")
    assert sys.path == path and not {"model", "tokenizer"} & set(sys.modules)
    without, same = run_tiny(monkeypatch, tmp_path / "without.json")
    assert list(without) == list(rows) and figures == same


def test_gpt_fast_keeps_its_settings_to_itself(tmp_path):
    """What its generate.py sets at import holds for its own calls only: other competitors compile in the same run."""
    (tmp_path / "model.py").write_text("size = 3\n")
    (tmp_path / "generate.py").write_text(
        "import sys, torch._inductor.config as config\n"
        "from model import size\n"
        "from tokenizer import get_tokenizer\n"
        "config.coordinate_descent_tuning = not config.coordinate_descent_tuning\n"
        "sys.path.append('elsewhere')\n"
    )
    config = torch._inductor.config
    before, path = config.coordinate_descent_tuning, list(sys.path)
    _, generate, settings = gpt_fast.load(tmp_path)
    assert generate.size == 3 and settings == [{"coordinate_descent_tuning": not before}, {}]
    assert config.coordinate_descent_tuning is before and sys.path == path
    assert not {"model", "tokenizer"} & set(sys.modules)


def test_a_folder_without_gpt_fast_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "generate.py").write_text("")
    monkeypatch.setattr(bench, "random_decoder", None)
    with pytest.raises(ValueError, match=f"^{tmp_path} has no model.py: --gpt-fast must name a checkout of .*gpt-fast"):
        run_tiny(monkeypatch, tmp_path / "out.json", "--gpt-fast", str(tmp_path))


def test_gpt_fast_has_a_figure_where_it_was_measured(tmp_path):
    made = dict(prompt=5, new_tokens=8, machine={"gpu": "H"}, versions={}, date="d", commit="c1", memory={})
    times = {bench.REMOVED: 4.0, bench.NOBODY: 4.2, bench.HALF: 2.0}
    rows = [{"shape": "7b", "batch": 1, "name": name, "ms_a_step": ms} for name, ms in times.items()]
    own = {"shape": "7b", "batch": 1, "name": bench.GPT_FAST, "note": "gpt-fast abc"}
    files = [tmp_path / f"{k}.json" for k in range(3)]
    for file, found in zip(files, (rows, [own | {"ms_a_step": 6.0}], [own | {"error": "no room"}]), strict=True):
        file.write_text(json.dumps({**made, "rows": found}))
    name = "batch 1, full depth, times faster than gpt-fast"
    for merged, value in (files, 1.5), (files[::2], None), (files[:1], None):
        bench.merge(merged, tmp_path / "all.json")
        figures = {f["name"]: f for f in json.loads((tmp_path / "all.json").read_text())["figures"]}
        if value is None:
            assert name not in figures
        else:
            found = figures[name]
            assert (found["value"], found["ms_a_token"], found["note"]) == (value, 6.0, "gpt-fast abc")


def test_merged_files(tmp_path, monkeypatch):
    """A checkpoint's rows beside those of a shape; what was measured otherwise is refused."""
    made = dict(prompt=5, new_tokens=8, machine={"gpu": "H"}, versions={}, date="d", commit="c1", memory={"7b": 1})
    scripted = {bench.REMOVED: 4.0, bench.NOBODY: 4.2, bench.HALF: 2.0}
    rows = [{"shape": "7b", "batch": 1, "name": name, "ms_a_step": ms} for name, ms in scripted.items()]
    decided = {bench.REMOVED: 3.0, bench.DECIDED: 2.0}
    own = [{"shape": "mine", "batch": 8, "name": n, "ms_a_step": ms, "mean_depth": 7} for n, ms in decided.items()]
    one, two, other = (tmp_path / f"{k}.json" for k in range(3))
    one.write_text(json.dumps({**made, "rows": rows}))
    two.write_text(json.dumps({**made, "rows": own, "commit": "c2", "memory": {"mine": 2}}))
    other.write_text(json.dumps({**made, "rows": own, "prompt": 6}))
    bench.merge([one, two], tmp_path / "all.json")
    result = json.loads((tmp_path / "all.json").read_text())
    assert [row["commit"] for row in result["rows"]] == ["c1"] * 3 + ["c2"] * 2
    assert result["memory"] == {"7b": 1, "mine": 2}
    figures = {f["name"]: f for f in result["figures"]}
    assert figures["batch 1, mean depth L/2, times faster than full depth"]["value"] == 2.0
    mine = figures["mine, batch 8, its policies decide, times faster than full depth"]
    assert mine["value"] == 1.5 and mine["bar"] == "-" and mine["mean_depth"] == 7
    with pytest.raises(ValueError, match="prompt differs between the files: 5, 6"):
        bench.merge([one, other], tmp_path / "all.json")


def test_the_ceiling_counts_visited_layers_once_and_every_row_there():
    model = bench.random_decoder("tiny", torch.device("cpu"), torch.float32, 32)
    layer = sum(p.numel() for p in model.backbone.layers[0].parameters()) * 4
    head, position = 101 * 64 * 4, 2 * 2 * 16 * 4
    # Two rows, two steps behind the first token: depths (1, 3), then (2, 2).
    found = bench.ceiling_bytes(model, [[4, 1, 2], [4, 3, 2]], 10)
    assert found == pytest.approx(3 * layer + 4 * 11 * position + head + 2 * layer + 4 * 12 * position + head)


def test_trained_exits_are_scaled():
    script = bench.trained_exits({3: 0.25, 15: 0.75}, 30, 32, 4001, 0)
    assert script[0] == 32 and set(script[1:]) == {3, 16}
    assert script[1:].count(16) / 4000 == pytest.approx(0.75, abs=0.03)


def test_the_shipped_decoder_has_a_distribution():
    share, layers = bench.shipped_share()
    assert layers == 30 and sum(share.values()) == pytest.approx(1, abs=1e-6)
