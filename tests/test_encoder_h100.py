"""The encoder's device benchmark, as far as a CPU shows it: competitors, scripts, figures, and a tiny run."""

import json

import pytest
import torch
from torch.nn import functional as F

import engine
from engine.bench import encoder_competitors as peers
from engine.bench import encoder_h100 as bench
from engine.bench import encoder_session as session_module
from engine.bench.encoder_figures import MODEL, OURS, figures, merged, plot_times
from tests.test_executors import FP32
from tests.tiny import hugging_face_logits, padded, random_rows, tiny_model


def rows_one_by_one(q, k, v, cu_q, cu_k, longest_q, longest_k):
    """varlen_attn in plain torch; tokens behind the last row keep something that must never be read."""
    out = torch.full_like(q, torch.nan)
    queries, keys = (list(zip(c.tolist(), c.tolist()[1:], strict=False)) for c in (cu_q, cu_k))
    assert max(b - a for a, b in queries) <= longest_q and max(b - a for a, b in keys) <= longest_k
    for (a, b), (c, d) in zip(queries, keys, strict=True):
        one = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        out[a:b] = F.scaled_dot_product_attention(*one)[0].transpose(0, 1)
    return out


def mixed_batch(lengths=(9, 1, 17, 4)):
    batch = padded(random_rows(len(lengths), lengths=lengths))
    return peers.Batch(batch["input_ids"], batch["attention_mask"], tuple(lengths))


# -- competitors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooler", ["none", "shared"])
@torch.inference_mode()
def test_packed_and_eager_equal_hugging_face(pooler):
    model, batch = tiny_model("bert", pooler), mixed_batch()
    expected = hugging_face_logits(model, batch.inputs)
    buffers = peers.PackedBuffers(batch, torch.device("cpu"))
    buffers.fill(batch)
    assert (buffers.tokens, buffers.bucket, buffers.longest) == (31, 128, 32)
    packed = peers.PackedBert(model, rows_one_by_one)
    found = packed(buffers.input_ids, buffers.positions, buffers.cu_seqlens, buffers.longest)
    torch.testing.assert_close(found, expected, **FP32)
    torch.testing.assert_close(peers.build(peers.EAGER, model, batch).from_host(batch), expected, **FP32)


def test_batches_that_take_turns():
    """None has the lengths of another, nor as many tokens; all fit the buffers that one of them was given."""
    model, lengths = tiny_model(), [9, 1, 17, 4, 17, 12]
    batch = peers.varied_batch(model, lengths, 8, 6)
    every = batch.turns
    assert batch.lengths == tuple(lengths) and len(every) == 7
    assert len({sum(one.lengths) for one in every}) == 7 and {max(one.lengths) for one in every} == {17}
    assert sorted(sum(one.lengths) - 60 for one in every) == [-3, -2, -1, 0, 1, 2, 3]
    buffers = peers.PackedBuffers(batch, torch.device("cpu"))
    packed = peers.PackedBert(model, rows_one_by_one)
    with torch.inference_mode():
        for one in (*every, batch):
            assert one.input_ids.shape == (6, 24) and one.attention_mask.sum(1).tolist() == list(one.lengths)
            buffers.fill(one)
            found = packed(buffers.input_ids, buffers.positions, buffers.cu_seqlens, buffers.longest)
            torch.testing.assert_close(found, hugging_face_logits(model, one.inputs), **FP32)


def test_rows_that_are_full_need_no_mask():
    batch = mixed_batch((6, 6, 6))
    buffers = peers.PackedBuffers(batch, torch.device("cpu"))
    buffers.fill(batch)
    assert buffers.input_ids[:18].tolist() == batch.input_ids.flatten().tolist()
    assert buffers.positions[:18].tolist() == [*range(6)] * 3 and buffers.cu_seqlens.tolist() == [0, 6, 12, 18]


@torch.inference_mode()
def test_who_cannot_take_part_says_why():
    with pytest.raises(peers.LeftOutError, match="BERT only, got 'mpnet'"):
        peers.PackedBert(tiny_model("mpnet"), rows_one_by_one)
    for name in (peers.REDUCE_OVERHEAD, peers.MAX_AUTOTUNE, peers.PACKED):
        with pytest.raises(peers.LeftOutError, match="needs a CUDA device, the model is on cpu"):
            peers.build(name, tiny_model(), mixed_batch())
    with pytest.raises(ValueError, match="must be one of eager, .*, got 'naive'"):
        peers.build(peers.NAIVE, tiny_model(), mixed_batch())


@pytest.mark.parametrize("family", ["bert", "mpnet"])
@torch.inference_mode()
def test_naive_early_exit_equals_the_reference(family):
    model = tiny_model(family, "none", (1, 2, 4))
    peers.keep_bias_on_device(model)
    reference = engine.from_module(model, executor="reference")
    rows = random_rows(24, seed=5)
    batch = padded(rows, pad_id=model.encoder_backbone.config.pad_token_id)
    script = [(1, 2, 4)[i % 3] for i in range(24)]
    for ours, theirs in (
        ({"threshold": 0.5}, {"threshold": 0.5}),
        ({"criterion": "scripted", "exit_layers": script}, {"script": torch.tensor(script)}),
        ({"threshold": 1.0}, {"threshold": 1.0}),
        ({"criterion": "scripted", "exit_layers": 1}, {"script": torch.ones(24, dtype=torch.int64)}),
    ):
        want = reference.run(batch, batch_tokens=10**6, **ours)
        logits, layers = peers.naive_early_exit(model, batch["input_ids"], batch["attention_mask"], **theirs)
        assert layers.tolist() == want.exit_layers.tolist()
        torch.testing.assert_close(logits, want.logits, **FP32)
    assert len(set(reference.run(batch).exit_layers.tolist())) > 1
    with pytest.raises(ValueError, match="either threshold or script"):
        peers.naive_early_exit(model, batch["input_ids"], None)


@torch.inference_mode()
def test_position_bias_on_the_device_is_hugging_faces():
    model, batch = tiny_model("mpnet"), mixed_batch()
    expected = hugging_face_logits(model, batch.inputs)
    peers.keep_bias_on_device(model)
    assert torch.equal(hugging_face_logits(model, batch.inputs), expected)


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_spread_exits_have_half_of_the_depth():
    assert sorted(bench.spread_exits(8, 12)) == [1, 2, 4, 5, 7, 8, 10, 11]
    assert bench.half_depth(1, 12) == [[layer] for layer in range(1, 12)]
    for layers in (2, 4, 6, 12):
        for rows in (2, 3, 7, 8, 10, 11, 12, 25, 32, 128, 512):
            found = bench.spread_exits(rows, layers)
            assert 2 * sum(found) == layers * rows and 1 <= min(found) and max(found) < layers
            if rows >= layers:
                counts = [found.count(layer) for layer in range(1, layers)]
                assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("rows", [1, 2, 9, 40])
def test_policies_decide_as_a_script_would_spread(rows):
    session = session_module.Session(torch.device("cpu"), True, 1, (rows,), (), ())
    one = session_module.subject(session, "bert-base")
    batch = peers.random_batch(one.module, [16] * rows)
    for _ in range(2):  # behind the first time, policies are no longer what they were
        cases = session_module.decide_half_depth(one, batch)
        depths = [session_module.run_ours(one.engine, batch, case).exit_layers.tolist() for case in cases]
        if rows == 1:
            assert depths == [[1], [2], [3]]
        else:
            assert sorted(depths[0]) == sorted(session_module.spread_exits(rows, 4)) and len(depths) == 1


def test_mixes_have_real_lengths():
    found = json.loads(bench.LENGTHS.read_text())
    assert [len(found[mix]) for mix in bench.MIXES] == [512, 512, 277]
    for mix in bench.MIXES:
        lengths = bench.mix_lengths(found[mix], 4000)
        assert lengths == found[mix][: len(lengths)] and max(found[mix]) <= 512
        assert len(lengths) * max(lengths) >= 4000 > (len(lengths) - 1) * max(lengths[:-1])
    with pytest.raises(ValueError, match="2 rows of at most 5 tokens make no batch of 11"):
        bench.mix_lengths([5, 4], 11)


def test_floor_counts_products_and_attention():
    whole = session_module.pass_flops([128] * 2, 768, 3072, 12)
    assert whole == 12 * 256 * (2 * (4 * 768**2 + 2 * 768 * 3072) + 4 * 128 * 768)
    assert 11 / 12 < session_module.pass_flops([128] * 2, 768, 3072, 12, last_layer_whole=False) / whole < 1


# -- figures -----------------------------------------------------------------------------------------------------------


def made_rows(over=1.5, nobody=1.04, realised=0.93, launches=1, waits=0, seconds=4.0):
    full = {"model": MODEL, "setting": "full depth"}
    rows = []
    shapes = [{"part": "full", "batch": b, "mix": None} for b in (1, 8, 32, 128, 512)]
    shapes += [{"part": "mixes", "batch": 80, "mix": mix} for mix in bench.MIXES]
    for shape in shapes:
        rows.append({**full, **shape, "competitor": OURS})
        for k, name in enumerate((peers.PACKED, peers.MAX_AUTOTUNE, peers.REDUCE_OVERHEAD)):
            ratio = over + k + (shape["mix"] == "rte")
            rows.append({**full, **shape, "competitor": name, "over_ours": {"device": ratio, "host": ratio + 10}})
        rows.append({**full, **shape, "competitor": peers.EAGER, "left_out": "it has no attention"})
    for batch in (1, 8, 32, 128, 512):
        ratios = {"nobody_over_removed": nobody, "realised": realised}
        rows.append(
            {"part": "exits", "model": MODEL, "batch": batch, "competitor": OURS, "setting": "exits", "mean_depth": 6.0}
            | {name: {"device": value, "host": value} for name, value in ratios.items()}
        )
    rows.append({"part": "sync", "model": MODEL, "graph_launches": launches, "synchronisations": waits})
    for cache, factor in (("cold", 10), ("warm", 1)):
        rows.append({"part": "capture", "model": MODEL, "setting": f"{cache} cache", "seconds": seconds * factor})
    return rows


def by_name(rows):
    return {f["name"]: f for f in figures(rows)}


def test_figures_are_judged_by_their_bars():
    found = by_name(made_rows())
    assert len(found) == 16
    best = found["full depth vs best competitor, batch 8"]
    assert (best["value"], best["best"], best["host_to_host"], best["met"]) == (1.5, peers.PACKED, 11.5, True)
    assert best["left_out"] == {peers.EAGER: "it has no attention"}
    assert found["full depth vs best competitor, batch 128"]["batch_512"]["value"] == 1.5
    assert found["real mix vs best padded"]["value"] == 2.5 and found["real mix vs best padded"]["met"]
    assert found["real mix vs compiled packed"]["mixes"]["rte"]["value"] == 2.5
    assert found["load + capture, warm cache"]["cold_cache"] == 40.0
    assert [n for n, f in found.items() if not f["met"]] == ["full depth vs best competitor, batch 1"]
    worse = by_name(made_rows(over=0.9, nobody=1.2, realised=0.7, waits=1, seconds=6.0))
    assert not any(f["met"] for n, f in worse.items() if n != "real mix vs best padded")
    assert not by_name(made_rows(launches=2))["host synchronisations inside a pass"]["met"]
    bars = {name.rpartition(", ")[0] or name: [] for name in found}
    for name, f in found.items():
        bars[name.rpartition(", ")[0] or name].append(f["bar"])
    assert bars["full depth vs best competitor"] == [">= 1.7", ">= 1.3", ">= 1.3", ">= 1.25"]
    assert bars["nobody leaves / exits removed"] == ["<= 1.15", "<= 1.10", "<= 1.05", "<= 1.05"]
    assert bars["realised over arithmetic"] == [">= 0.80", ">= 0.85", ">= 0.92", ">= 0.92"]


def test_a_figure_needs_all_its_rows():
    assert all(f["value"] is None and not f["met"] for f in figures([]))
    for absent in (peers.PACKED, peers.EAGER):
        rows = [row for row in made_rows() if row.get("competitor") != absent]
        found = by_name(rows)["full depth vs best competitor, batch 32"]
        assert found["value"] is None and found["missing"] == [absent] and not found["met"]
    crashed = [row | ({"error": "no room"} if row.get("competitor") == peers.EAGER else {}) for row in made_rows()]
    found = by_name(crashed)["full depth vs best competitor, batch 32"]
    assert found["value"] is None and found["failed"] == {peers.EAGER: "no room"} and not found["met"]
    slow_host = [dict(row) for row in made_rows()]
    for row in slow_host:
        if "over_ours" in row:
            row["over_ours"] = {"device": 2.0, "host": 1.0}
    met = {n for n, f in by_name(slow_host).items() if n.startswith("full depth") and f["met"]}
    assert met == {"full depth vs best competitor, batch 1"}, "the device alone counts for one row only"
    failed = [row | ({"error": "no"} if row.get("competitor") == OURS else {}) for row in made_rows()]
    assert by_name(failed)["realised over arithmetic, batch 1"]["value"] is None


# -- the command -------------------------------------------------------------------------------------------------------


def test_arguments(capsys):
    options = bench.parse(["--device", "cpu", "--tiny", "--only", "full", "sync", "--competitors", "eager"])
    assert options.batches == [1, 8] and options.only == ["full", "sync"] and options.competitors == ["eager"]
    for wrong, message in (
        (["--device", "cpu", "--batches", "0"], "batches and rounds must be at least 1"),
        (["--device", "cpu", "--only", "gpt"], "invalid choice: 'gpt'"),
        (["--device", "cpu", "--plot", "times.bmp"], "must end in .png"),
        (["--device", "cpu", "--kernels", "kernels.json"], "give --merge, too"),
    ):
        with pytest.raises(SystemExit):
            bench.parse(wrong)
        assert message in capsys.readouterr().err


def test_a_tiny_run_and_a_merge(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    paths = {name: tmp_path / f"{name}.json" for name in ("full", "rest", "all")}
    few = ["--device", "cpu", "--tiny", "--rounds", "1", "--output"]
    bench.main([*few, str(paths["full"]), "--only", "full", "exits", "--batches", "1", "3"])
    rest = "--only", "mixes", "mpnet", "sync", "--batches", "2", "--mixes", "sst2", "rte"
    bench.main([*few, str(paths["rest"]), *rest])
    merge = ["--merge", str(paths["full"]), str(paths["rest"]), "--output", str(paths["all"])]
    kernels = {"name": "norm + exit", "value": 0.9, "unit": "ratio of times", "bar": ">= 0.80", "met": True}
    (tmp_path / "kernels.json").write_text(json.dumps({"figures": [kernels]}))
    bench.main([*merge, "--plot", str(tmp_path / "times.png"), "--kernels", str(tmp_path / "kernels.json")])
    result = json.loads(paths["all"].read_text())
    assert result["figures"][-1] == kernels
    assert {"machine", "versions", "commit", "date", "rows", "figures"} <= set(result) and len(result["runs"]) == 2
    assert {row["part"] for row in result["rows"]} == {"full", "exits", "mixes", "sync"}
    assert {row["mix"] for row in result["rows"] if row["part"] == "mixes"} == {"sst2", "rte"}
    measured = [row for row in result["rows"] if "host_s" in row]
    assert not [row for row in result["rows"] if "error" in row]
    assert {row["competitor"] for row in measured} == {OURS, peers.EAGER, peers.NAIVE}
    for row in measured:
        clocks = ["host_s"] if row["competitor"] == peers.NAIVE else ["device_s", "host_s"]
        assert all(row[clock][q] > 0 for clock in clocks for q in ("p10", "median"))
        assert ("device_s" in row) == ("device_s" in clocks), "who waits for the host has no time of the device alone"
    exits = [row for row in result["rows"] if row["part"] == "exits" and row["competitor"] == OURS]
    assert {(row["model"], row["batch"]) for row in exits} == {
        ("tiny-bert-base", 1), ("tiny-bert-base", 3), ("tiny-mpnet", 2)
    }  # fmt: skip
    assert all(row["mean_depth"] == 2.0 and row["layers"] == 4 for row in exits)
    assert all(row["decided_depth"] == 2.0 and row["decided_realised"]["host"] > 0 for row in exits)
    assert len([row for row in measured if row["setting"] == "half depth" and row["part"] == "mixes"]) == 4
    left_out = {row["competitor"]: row["left_out"] for row in result["rows"] if "left_out" in row}
    assert set(left_out) == {peers.REDUCE_OVERHEAD, peers.MAX_AUTOTUNE, peers.PACKED, OURS}
    assert (tmp_path / "times.png").stat().st_size > 1000
    assert "NO" in capsys.readouterr().out
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_times([], tmp_path / "nothing.png")


def test_rows_with_times_survive_a_merge(tmp_path):
    about = {"machine": {}, "versions": {}, "date": "2026-01-01"}
    row = {"part": "full", "model": MODEL, "mix": None, "batch": 1, "competitor": "eager", "setting": "full depth"}
    kinds = {"a": {"device_s": 1}, "b": {"error": "no room"}, "c": {"device_s": 2}, "d": {"left_out": "no device"}}
    for name, more in kinds.items():
        (tmp_path / name).write_text(json.dumps({**about, "commit": name * 7, "rows": [row | more]}))
    rows, found = merged([tmp_path / name for name in "abcd"])
    assert rows == [row | {"device_s": 2, "commit": "c" * 7}]
    assert [run["file"] for run in found["runs"]] == list("abcd")
    for card in ("H100", "H200"):
        two = {**about, "commit": "2", "rows": [row | {"part": card, "device_s": 1, "gpu": card}]}
        (tmp_path / card).write_text(json.dumps(two))
    with pytest.raises(ValueError, match="must be of one GPU, got H100 and H200"):
        merged([tmp_path / "H100", tmp_path / "H200"])
    # Merged once more, it still says what came from where.
    (tmp_path / "whole").write_text(json.dumps({**about, **found, "rows": rows}))
    (tmp_path / "late").write_text(json.dumps({**about, "commit": "1", "rows": [row | {"batch": 8, "device_s": 3}]}))
    again, more = merged([tmp_path / "whole", tmp_path / "late"])
    assert [r["commit"] for r in again] == ["c" * 7, "1"]
    assert [run["file"] for run in more["runs"]] == [*"abcd", "late"]
    (tmp_path / "e").write_text("{}")
    with pytest.raises(ValueError, match="must be a result file with rows"):
        merged([tmp_path / "e"])


def test_load_and_capture_warms_every_capacity():
    options = bench.parse(["--device", "cpu", "--tiny"])
    with torch.inference_mode():
        found = bench.load_and_capture(bench.make_session(options))
    assert found["rows_served"] == [1, 2, 3, 4, 6, 8] and found["seconds"] > 0


def test_who_computes_something_else_is_refused():
    exact = torch.tensor([[1.0, -2.0]])
    wrong = peers.Competitor(on_device=lambda: None, from_host=lambda batch: exact + 0.05)
    with pytest.raises(RuntimeError, match="differ from Hugging Face eager by 0.025 of the largest, allowed 0.02"):
        bench._checked(wrong, None, exact)
    assert bench.difference(exact * torch.nan, exact) == float("inf")
